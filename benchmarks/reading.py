"""How many lines you read to understand one PPO iteration: every function on its path.

    python benchmarks/reading.py            # lines of code, and with docstrings, of each
    python benchmarks/reading.py --total    # only their sum

The networks are left out, and so is what runs once per run: constructors, flags, checkpoints, logging.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# file -> functions and methods in the order in which an iteration meets them
PATH = {
    "train_ppo.py": "main has_future outcome_of_decision compute_gae used_advantages surrogate_units clipped_surrogate "
    "ppo_loss policy_rate",
    "envs/vector.py": "Outcome Turn VectorEnv.pipeline VectorEnv.step_async VectorEnv.step_wait VectorEnv._start_step "
    "VectorEnv._finish_step VectorEnv._observation VectorEnv._ended VectorEnv._checked",
    "envs/local.py": "LocalGroup.start LocalGroup.finish",
    "envs/group.py": "EnvGroup.step EnvGroup._run_chunk EnvSlot.begin EnvSlot.execute EnvSlot.state EnvSlot.metrics",
    "vla/models/policy.py": "PolicyInputs PolicyOutput VLAPolicy.preprocess VLAPolicy.prepare VLAPolicy.with_features "
    "VLAPolicy.act VLAPolicy.value VLAPolicy.decode VLAPolicy.forward VLAPolicy._act VLAPolicy._evaluate "
    "VLAPolicy._value VLAPolicy._action_logprobs VLAPolicy._values uniform_noise rollout_noise sample_bins",
    "vla/models/value_head.py": "value_errors",
    "vla/training/critics.py": "HiddenCritic StateCritic.value StateCritic.decision_values "
    "StateCritic.chunk_values StateCritic.store StateCritic.__call__ StateCritic._normalized StateCritic.fit "
    "StateCritic._gathered StateCritic._update_statistics",
    "vla/training/stages.py": "StageSwitcher.to_rollout StageSwitcher.to_update rollout_stage update_stage "
    "copy_trainable",
    "vla/training/rollout_buffer.py": "MicroBatch RolloutBuffer.reference_of "
    "RolloutBuffer.add_decision RolloutBuffer.add_outcome RolloutBuffer._store RolloutBuffer.micro_batch "
    "RolloutBuffer.micro_batches RolloutBuffer.statistics RolloutBuffer.explained_variance minibatch_block "
    "minibatch_indices minibatches split_padded shuffle_generator",
    "vla/training/engine.py": "backward NonFiniteGuard.check_ratio NonFiniteGuard.check_gradients "
    "NonFiniteGuard.pop_metrics",
    "vla/training/regularization.py": "regularization",
    "vla/training/preemption.py": "StopRequest.requested StopRequest.until_requested StopRequest.agreed "
    "Preemption.snapshot Preemption.exit_if_requested",
    "vla/distributed.py": "normalize masked_mean_var all_reduce_sum",
    "vla/logger.py": "Averages",
}


def definitions(path: Path) -> dict[str, tuple[int, int]]:
    """{name: lines} of all functions, classes and methods of a file; of `main` only the loop over iterations."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{m.name}": lines_of(m) for m in node.body if isinstance(m, ast.FunctionDef)}
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.setdefault(node.name, lines_of(node))
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            loops = [
                inner for inner in node.body if isinstance(inner, ast.For) and "iteration" in ast.unparse(inner.target)
            ]
            found["main"] = lines_of(loops[0])
    return found


def lines_of(node: ast.stmt) -> tuple[int, int]:
    """Lines of code, and with its docstrings: (code, all)."""
    everything = node.end_lineno - node.lineno + 1
    code = everything
    for inner in ast.walk(node):
        if isinstance(inner, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(inner):
            code -= inner.body[0].end_lineno - inner.body[0].lineno + 1
    return code, everything


def main() -> None:
    total_code, total, count = 0, 0, 0
    for file, names in PATH.items():
        known = definitions(ROOT / file)
        missing = [name for name in names.split() if name not in known]
        if missing:
            sys.exit(f"{file} has no {', '.join(missing)}: put the new names into PATH of benchmarks/reading.py")
        for name in names.split():
            code, everything = known[name]
            total_code, total, count = total_code + code, total + everything, count + 1
            if "--total" not in sys.argv:
                print(f"{code:5} {everything:5} {file} {name}")
    print(f"{total_code} lines of code ({total} with docstrings) in {len(PATH)} files, {count} functions and classes")


if __name__ == "__main__":
    main()
