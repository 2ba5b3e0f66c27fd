"""How many lines you read to understand one PPO iteration: every function on its path.

    python benchmarks/reading.py            # lines of code, and with docstrings, of each
    python benchmarks/reading.py --total    # only their sum
    python benchmarks/reading.py --check    # run an iteration of the preset, and compare PATH with what it called

The preset is yaml/quickstart_ppo_openvlaoft.yaml. LEFT_OUT names what is not counted: the networks with the formats
that they read and write, the simulated task, and what writes checkpoints and logs. Nor is what runs once per run.
"""

import ast
import runpy
import sys
import tempfile
from pathlib import Path
from types import FrameType
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# file -> functions and methods in the order in which an iteration meets them
PATH = {
    "train_ppo.py": "main has_future outcome_of_decision compute_gae used_advantages surrogate_units clipped_surrogate "
    "ppo_loss policy_rate",
    "envs/vector.py": "Outcome Turn VectorEnv.pipeline VectorEnv._check_usable VectorEnv.step_async "
    "VectorEnv.step_wait VectorEnv._guarded VectorEnv._start_step VectorEnv._finish_step VectorEnv._observation "
    "VectorEnv._ended VectorEnv._checked",
    "envs/local.py": "LocalGroup.start LocalGroup.finish alone",
    "envs/group.py": "EnvGroup.step EnvGroup.seen EnvGroup._states EnvGroup._execute EnvGroup._finish "
    "EnvGroup._show EnvGroup._begin empty_result",
    "vla/models/policy.py": "PolicyInputs PolicyOutput VLAPolicy.preprocess VLAPolicy.prepare VLAPolicy.device "
    "VLAPolicy.act VLAPolicy.decode VLAPolicy.forward VLAPolicy._act VLAPolicy._evaluate VLAPolicy._action_logprobs "
    "VLAPolicy._values VLAPolicy.free_graphs uniform_noise rollout_noise sample_bins",
    "vla/models/value_head.py": "value_errors",
    "vla/training/critics.py": "StateCritic.value StateCritic.decision_values StateCritic.chunk_values "
    "StateCritic.__call__ StateCritic._normalized StateCritic.fit StateCritic._gathered "
    "StateCritic._update_statistics",
    "vla/training/stages.py": "StageSwitcher.to_rollout StageSwitcher.to_update rollout_stage update_stage "
    "copy_trainable",
    "vla/training/rollout_buffer.py": "MicroBatch RolloutBuffer.__getattr__ RolloutBuffer.reference_of "
    "RolloutBuffer.add_decision RolloutBuffer.add_outcome RolloutBuffer._store RolloutBuffer.micro_batch "
    "RolloutBuffer.micro_batches RolloutBuffer.statistics RolloutBuffer.explained_variance minibatch_block "
    "minibatch_indices minibatches split_padded shuffle_generator",
    "vla/training/engine.py": "decay_at backward NonFiniteGuard.check_ratio NonFiniteGuard.check_gradients "
    "NonFiniteGuard.pop_metrics",
    "vla/training/regularization.py": "regularization",
    "vla/training/preemption.py": "StopRequest.requested StopRequest.until_requested StopRequest.agreed "
    "Preemption.snapshot Preemption.exit_if_requested",
    "vla/distributed.py": "normalize masked_mean_var masked_min_max all_reduce_sum all_reduce_max all_gather_lists "
    "to_group_device world_size rank",
    "vla/logger.py": "Averages",
}
# classes without methods, of which nothing is called, and the loop itself, which has been called before
DATA = {"Outcome", "Turn", "PolicyOutput", "main"}
# what an iteration calls and this does not count: a file, a folder, or functions of a file
LEFT_OUT = {
    "the networks, and prompts, pixels and action tokens as they read and write them": (
        "vla/models/openvla.py",
        "vla/models/openvla_oft.py",
        "vla/models/vision.py",
        "vla/models/layers.py",
        "vla/models/cuda_graphs.py",
        "vla/models/action_tokens.py",
        "vla/models/policy.py VLAPolicy.prompt_ids VLAPolicy.collate VLAPolicy.resized moved",
        "schemas/pixels.py",
        "vla/training/engine.py GatheredLinear.forward TorchLinear.forward",
    ),
    "the simulated task: scene, physics, reward, and which episode comes next": (
        "envs/gym_env.py",
        "envs/put_on_plate.py",
        "envs/variants.py",
        "envs/episodes.py",
        "envs/rules.py",
        "envs/images.py",
        "envs/shadows.py",
        "envs/spec.py",
        "envs/world.py",
        "envs/group.py EnvGroup._next_episode_id",
        "envs/kinematics.py",
        "envs/rotations.py",
        "envs/assets",
    ),
    "checkpoints": (
        "vla/training/optimizer_state.py",
        "envs/vector.py VectorEnv.state_dict VectorEnv._call",
        "envs/group.py EnvGroup.state_dict",
    ),
    "logs: metrics.jsonl, the terminal, the run's page, seconds and memory": (
        "vla/logger.py",
        "vla/backends.py",
        "vla/reports",
        "vla/distributed.py SteadyStream",
        "vla/training/stages.py StageSwitcher.measured StageSwitcher.pop_metrics device_memory host_memory "
        "forget_host_peak",
    ),
    "flags, and the version of the world that they mean": ("vla/cli.py", "schemas/flags.py"),
}
# a small iteration of the preset, in which episodes end; the second one only ends the first
FLAGS = """--config yaml/quickstart_ppo_openvlaoft.yaml --num_iterations 2 --save_freq 0 --num_envs 4 --num_steps 16
--max_episode_steps 8 --num_eval_episodes 2 --num_eval_envs 2 --critic_warmup_iterations 0""".split()


def path() -> list[tuple[str, str]]:
    """(file, function or class) of everything in PATH, in its order."""
    return [(file, name) for file, names in PATH.items() for name in names.split()]


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


def functions_called(flags: list[str]) -> set[tuple[str, str]]:
    """(file, function) of all of ours that an iteration calls, from its snapshot to that of the next one."""
    from vla.training.preemption import Preemption

    called = set()
    take_snapshot = Preemption.snapshot

    def see(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(f"{ROOT}/") and code.co_filename != __file__:
            called.add((code.co_filename.removeprefix(f"{ROOT}/"), code.co_qualname.partition(".<locals>")[0]))

    def snapshot(*arguments) -> None:
        sys.setprofile(None if called else see)
        take_snapshot(*arguments)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Preemption, "snapshot", snapshot):
        sys.argv = ["train_ppo.py", *FLAGS, "--run_dir", f"{folder}/run", *flags]
        runpy.run_path(str(ROOT / "train_ppo.py"), run_name="__main__")
    return called


def listed_in(called: tuple[str, str], entries: list[str]) -> bool:
    """Whether a function stands in one of the entries: itself, its class, its file or its folder."""
    file, name = called
    for entry in entries:
        place, *names = entry.split()
        known = not names or name in names or name.partition(".")[0] in names
        if known and (file == place or file.startswith(place + "/")):
            return True
    return False


def check(flags: list[str]) -> None:
    """Run an iteration with these flags. Exit with an error if PATH lacks a function or has one that is not called."""
    called = functions_called(flags)
    counted = [f"{file} {names}" for file, names in PATH.items()]
    left_out = [entry for entries in LEFT_OUT.values() for entry in entries]
    missing = sorted(one for one in called if not listed_in(one, counted + left_out))
    met = called | {(file, name.partition(".")[0]) for file, name in called}  # a class is met in its methods
    unused = [one for one in path() if one not in met and one[1] not in DATA]
    print(f"{len(called)} functions were called. PATH lacks: {missing or 'none'}. Not called: {unused or 'none'}")
    if missing or unused:
        sys.exit(1)


def main() -> None:
    if "--check" in sys.argv:
        return check([argument for argument in sys.argv[1:] if argument != "--check"])
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
