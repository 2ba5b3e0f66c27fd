"""One GPU's share of a published recipe: train_ppo.py itself, with random weights of the whole size.

    python benchmarks/gpu_iteration.py --recipe ppo_openvlaoft --zero_stage 2
    python benchmarks/gpu_iteration.py --recipe ppo_openvla --zero_stage 3 --tiny   # on CPUs, in a minute

Weights are drawn on the GPU, and assets are made by code, so nothing is downloaded. The recipe's flags hold but for
sizes. It has the envs of one of the recipe's 8 GPUs, and fewer steps for OpenVLA, whose time grows with them. The
script runs two iterations without evaluation and checkpoints. The second one counts. Memory is compared with
doctor.py's plan.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_ppo
from benchmarks import flops
from benchmarks.model_speed import fill_randomly
from vla.cli import parse_args
from vla.files.run_lines import read_lines
from vla.logger import Logger
from vla.models import loading
from vla.models.tiny import BRIDGE_ORIG, TINY_PRESETS
from vla.training.memory_plan import OPENVLA_7B, make_plan, recipe_of
from vla.training.stages import GIB

ROOT = Path(__file__).resolve().parent.parent
GPUS = 8  # of the recipe
RANDOM = "openvla-7b-random"
STEPS = {"ppo_openvla": 40, "ppo_openvlaoft": 160}  # of each env
TINY = {"image_size": (64, 64), "sim_freq": 100, "num_steps": 16, "max_episode_steps": 16, "num_envs": 2}


def flags_of(recipe: str, stage: int, tiny: bool, run_dir: str) -> list[str]:
    """The recipe's flags as a command line, with the sizes of one GPU."""
    file = ROOT / "yaml" / f"maniskill_{recipe}.yaml"
    asked = vars(parse_args(train_ppo.Args, ["--config", str(file)], "", offline=True))
    steps = STEPS[recipe]
    sizes = {
        "num_envs": asked["num_envs"] // GPUS,
        "num_steps": steps,
        "num_minibatches": max(1, asked["num_minibatches"] * steps // asked["num_steps"]),
        "num_eval_envs": max(1, asked["num_eval_envs"] // GPUS),
        "num_env_workers": min(asked["num_env_workers"], len(os.sched_getaffinity(0))),
        "num_iterations": 2,
        "eval_freq": 0,
        "save_freq": 0,
        "video_episodes": 0,
    }
    if tiny:
        sizes |= TINY | {"num_minibatches": 1}
    model = ("openvla-oft-tiny" if asked["chunk_size"] > 1 else "openvla-tiny") if tiny else RANDOM
    replaced = {"model_path": model, "lora_path": None, "lora_rank": 32, "asset_pack": "builtin", "asset_dir": None}
    replaced |= {"deepspeed_config": f"ds_configs/zero{stage}.json", "run_dir": run_dir} | sizes
    words = ["--config", str(file)]
    for name, value in replaced.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def random_model(
    model_type: str,
    config: dict,
    chunk_size: int,
    stop_token: bool,
    folder: Path | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[nn.Module, str]:
    """A replacement of loading.make_model(), which would draw the weights in float32 on the CPU."""
    model = loading.build_model(model_type, config, chunk_size, stop_token, on_meta=True)
    return fill_randomly(model, dtype, str(device)), "random"


def trained(words: list[str]) -> list[dict]:
    """Lines of metrics.jsonl of train_ppo.py with these flags, in this process."""
    config = {**OPENVLA_7B, "norm_stats": {"bridge_orig": BRIDGE_ORIG}}
    args = parse_args(train_ppo.Args, words, "", offline=True)
    with (
        mock.patch.dict(TINY_PRESETS, {RANDOM: config}),
        mock.patch.object(loading, "make_model", random_model),
        mock.patch.object(Logger, "owes_evaluation", lambda *_: False),
        mock.patch.object(train_ppo, "due", lambda *_: False),  # neither evaluations nor checkpoints
    ):
        train_ppo.main(args)
    return read_lines(Path(args.run_dir) / "metrics.jsonl")


def measure(recipe: str, stage: int, tiny: bool) -> dict:
    """The second iteration, its arithmetic, and the plan of its memory."""
    with tempfile.TemporaryDirectory() as folder:
        words = flags_of(recipe, stage, tiny, f"{folder}/run")
        before, line = trained(words)
    flags = vars(parse_args(train_ppo.Args, words, "", offline=True))
    known = flags if tiny else flags | {"model_path": "openvla-7b"}  # sizes, without the random weights
    policy, steps = flops.meta_policy_of(known), line["global_step"] - before["global_step"]
    decisions = math.ceil(steps / flags["chunk_size"])
    seconds = {name: line[f"time/{name}"] for name in ("rollout", "update")}
    plan = make_plan(recipe_of(known), 1)
    unmeasured = sum(size for name, size in plan.rollout.items() if name.endswith("(assumed)"))
    memory = {}
    for name in seconds:
        memory[f"{name}_peak_gib"] = line[f"memory/{name}_peak_gib"]
        memory[f"{name}_planned_gib"] = (plan.peak(name) - unmeasured) / GIB
    return {
        "part": "iteration on a card",  # cost_model.py has no parts to check it with
        "ranks": 1,
        "recipe": recipe,
        "zero_stage": stage,
        "model_type": flags["model_type"],
        "num_envs": flags["num_envs"],
        "num_steps": flags["num_steps"],
        "num_env_workers": flags["num_env_workers"],
        "env_steps": steps,
        **{f"{name}_s": value for name, value in seconds.items()},
        "rollout_flops": decisions * flops.act_flops(policy),
        "update_flops": decisions * flops.update_flops(policy, flags["gradient_checkpointing"]),
        **memory,
        "ratio_first_microbatch_error": line["train/actor/ratio_first_microbatch_error"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=STEPS, default="ppo_openvlaoft", help="Default: %(default)s.")
    parser.add_argument("--zero_stage", type=int, choices=(2, 3), default=2, help="Default: %(default)s.")
    parser.add_argument("--tiny", action="store_true", help="Tiny weights and sizes, for CPUs.")
    flags = parser.parse_args()
    if not flags.tiny and not torch.cuda.is_available():
        raise SystemExit("torch sees no NVIDIA card here: use --tiny, or a machine that has one")
    print("RESULT " + json.dumps(measure(flags.recipe, flags.zero_stage, flags.tiny)), flush=True)


if __name__ == "__main__":
    main()
