"""ZeRO-3 rollouts with weights gathered once per rollout, as in the scripts, against gathered in every forward pass.

    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 benchmarks/gather.py
    deepspeed --num_gpus 8 benchmarks/gather.py --model_path /models/openvla-7b --lora_rank 32 --dtype bfloat16

Rank 0 prints one line of JSON with actions per second over all ranks: medians of rounds in which both take turns. The
first way includes the gathering. At the end, every rank makes a different number of forward passes within one rollout,
in which the hooks of the second way would hang.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vla.distributed import all_reduce_max, all_reduce_sum, barrier, print0, rank, setup_distributed, world_size
from vla.models.loading import load_policy
from vla.training.engine import DTYPES, build_engine, read_deepspeed_config
from vla.training.stages import StageSwitcher, make_rollout_copy, rollout_stage


def seconds_of(work: Callable[[], None]) -> float:
    """Of the slowest rank."""
    barrier()
    start = time.perf_counter()
    work()
    return float(all_reduce_max(torch.tensor(time.perf_counter() - start)))


def main(flags: argparse.Namespace) -> None:
    device = setup_distributed(0)
    config = read_deepspeed_config("ds_configs/zero3.json", flags.dtype)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # at tiny sizes all would stay gathered
    policy = load_policy(
        flags.model_path,
        flags.model_type,
        chunk_size=flags.chunk_size,
        lora_rank=flags.lora_rank,
        dtype=DTYPES[flags.dtype],
        device=device,
    )
    rollout_copy = make_rollout_copy(policy, 3)
    engine = build_engine(
        policy,
        config,
        micro_batch_size=1,
        learning_rate=1e-4,
        value_learning_rate=1e-4,
        weight_decay=0.0,
        max_grad_norm=1.0,
    )
    stages = StageSwitcher(engine, rollout_copy)
    inputs = policy.preprocess(
        {
            "image": torch.randint(0, 256, (flags.num_envs, 224, 224, 3), dtype=torch.uint8),
            "task_description": ["put carrot on plate"] * flags.num_envs,
        }
    )

    def once(decisions: int = flags.num_decisions) -> None:
        with rollout_stage(stages) as actor:
            for _ in range(decisions):
                actor.act(inputs, 1.0)[0].cpu()

    def every_forward() -> None:
        engine.eval()
        with torch.no_grad():
            for _ in range(flags.num_decisions):
                engine.module.act(inputs, 1.0)[0].cpu()

    seconds: dict[str, list[float]] = {"once": [], "every forward": []}
    for warm in [False] + [True] * flags.rounds:
        for name, work in (("once", once), ("every forward", every_forward)):
            if warm:
                seconds[name].append(seconds_of(work))
            else:
                work()
    once(decisions=1 + 2 * rank())  # returns on every rank, or the launcher's limit ends this
    forwards = int(all_reduce_sum(torch.tensor(1.0 + 2 * rank())))
    actions = flags.num_decisions * flags.num_envs * policy.chunk_size * world_size()
    rates = {name: actions / statistics.median(times) for name, times in seconds.items()}
    print0(
        json.dumps(
            {
                "model": flags.model_path,
                "ranks": world_size(),
                "decisions_per_rollout": flags.num_decisions,
                "gathered_once_actions_per_second": round(rates["once"], 1),
                "gathered_per_forward_actions_per_second": round(rates["every forward"], 1),
                "ratio": round(rates["once"] / rates["every forward"], 2),
                "uneven_forwards": forwards,
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_path", default="openvla-tiny", help="Model folder or tiny preset. (default: %(default)s)"
    )
    parser.add_argument(
        "--model_type",
        default="openvla",
        choices=("openvla", "openvla_oft"),
        help="Model family. (default: %(default)s)",
    )
    parser.add_argument("--chunk_size", type=int, default=1, help="Actions per decision. (default: %(default)s)")
    parser.add_argument(
        "--lora_rank", type=int, default=0, help="Rank of the LoRA adapter, or 0 for none. (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=tuple(DTYPES), help="Number format of the weights. (default: %(default)s)"
    )
    parser.add_argument("--num_envs", type=int, default=8, help="Envs per rank. (default: %(default)s)")
    parser.add_argument("--num_decisions", type=int, default=16, help="Decisions per rollout. (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="Measurements of each kind. (default: %(default)s)")
    parser.add_argument(
        "--local_rank", type=int, default=-1, help="Number of this rank on its machine. The launcher sets it."
    )
    main(deepspeed.add_config_arguments(parser).parse_args())
