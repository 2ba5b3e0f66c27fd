"""What crosses between the ranks of a placement in an iteration: bytes by the model, and as a run counted them.

    python benchmarks/wire_bytes.py --config yaml/maniskill_ppo_openvla.yaml --config yaml/placement_hybrid.yaml
    python benchmarks/wire_bytes.py --num_gpus 4 --config my.yaml --placement env=0 rollout=1 actor=2-3
    python benchmarks/wire_bytes.py --run runs/my_run

The model counts tensors by their shapes, and 970 bytes of JSON around those of an outcome, which were measured. It
leaves out other headers, states that are saved, and evaluations. With --run, the table has the mean over the run's
iterations and the largest difference in one of them. The exit code is 1 if a mean differs from the model by more than
1 %.
"""

import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from schemas import UserError
from vla.cli import parse_args
from vla.placement.rules import Placement, parse_placement
from vla.placement.weights import TAGS
from vla.reports.run_record import read_run
from vla.training.critics import WIDTH
from vla.training.memory_plan import GIB, policy_of, recipe_of
from vla.training.rollout_buffer import RolloutBuffer

TOLERANCE = 0.01
STATE_SIZE = 45  # numbers that --critic state reads in the PutOnPlateInScene25 family (envs/rules.py)
ACTION_BYTES = 7 * 4
HEADER = 970  # bytes of JSON around the tensors of an outcome: names, shapes, and a few instructions


def model_bytes(flags: dict, placement: Placement, episodes: float = 0.0) -> dict[str, float]:
    """Bytes of one iteration by boundary.

    Args:
        flags: of train_ppo.py or train_grpo.py.
        episodes: number of episodes that end in an iteration, whose last images travel, too.
    """
    recipe = recipe_of(flags)
    policy = policy_of(recipe)
    is_grpo, sees_state = "group_size" in flags, flags.get("critic") == "state"
    T, N, C = flags["num_steps"] // flags["chunk_size"], flags["num_envs"], flags["chunk_size"]
    state = 4 * STATE_SIZE if sees_state else 0

    found = dict.fromkeys(TAGS, 0.0)
    if placement.env != placement.rollout:
        height, width = policy.image_size
        image = height * width * 3 + state
        outcome = C * (4 + 1 + state) + 4  # rewards and valid, states, and four events
        found["observations"] = T * N * (image + outcome) + episodes * (image + 8 + 5 * 4)
        found["observations"] += HEADER * T * flags["pipeline_stages"] * len(placement.rollout)
        if is_grpo or not flags["auto_reset"]:  # the first images of an iteration
            found["observations"] += N * image
        if {*placement.env} <= {*placement.actor}:  # they count the actions that they get
            found["observations"] += T * N * C * ACTION_BYTES
    with torch.device("meta"):
        buffer = RolloutBuffer.of(policy, T, 1, keeps_reference=flags["kl_coef"] > 0).for_envs(1)
    of_env = sum(field.nbytes for field in buffer.fields.values()) + T * C * state
    of_env += 8 + 1 if is_grpo else 4  # its steps and whether its group was live, or the value after its last step
    parts = placement.overlaps(N)
    moved = sum(part.acted.stop - part.acted.start for part in parts if part.rollout != part.actor)
    found["experience"] = moved * of_env
    if placement.sends_weights:
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        weights = sum(parameter.numel() for parameter in trained) * getattr(torch, recipe.dtype).itemsize
        if sees_state:
            weights += 4 * ((STATE_SIZE + 1) * WIDTH + (WIDTH + 1) * WIDTH + WIDTH + 1) + 2 * 8 * STATE_SIZE
        found["weights"] = weights * len(placement.only_act)
    return found


def rows_of_run(folder: Path) -> list[tuple[str, float, float, float, float]]:
    """Boundary, mean bytes counted, mean bytes by the model, largest relative difference, and seconds.

    Raises:
        UserError: the folder holds no run with a placement.
    """
    record = read_run(folder)
    lines = [line for line in record.lines if "time/wire_weights_gib" in line]
    if not lines:
        raise UserError(f"{folder} has no iteration of a placement: give the folder of a run with --placement")
    placement = parse_placement(record.flags["placement"], record.description["num_ranks"])
    expected = [model_bytes(record.flags, placement, line["env/num_episodes"]) for line in lines]
    rows = []
    for name, (seconds, gib) in TAGS.items():
        counted = [line[gib] * GIB for line in lines]
        model = [of_line[name] for of_line in expected]
        worst = max((abs(c - m) / m for c, m in zip(counted, model) if m), default=0.0)
        means = (sum(values) / len(lines) for values in (counted, model, [worst] * len(lines)))
        rows.append((name, *means, sum(line[seconds] for line in lines) / len(lines)))
    return rows


def print_run(folder: Path) -> int:
    """Print a run's table. Returns the exit code."""
    print(f"{'an iteration':14} {'counted MB':>12} {'model MB':>12} {'largest difference':>19} {'seconds':>8}")
    code = 0
    for name, counted, model, worst, seconds in rows_of_run(folder):
        print(f"{name:14} {counted / 1e6:12.3f} {model / 1e6:12.3f} {100 * worst:17.2f} % {seconds:8.3f}")
        if model and abs(counted - model) > TOLERANCE * model:
            code = 1
    return code


def print_model(configs: list[str], num_gpus: int, more_flags: list[str]) -> int:
    """Print what the model says of a recipe. Returns the exit code."""
    script = "train_grpo" if "grpo" in Path(configs[0]).name else "train_ppo"
    args = parse_args(importlib.import_module(script).Args, ["--config", *configs, *more_flags], "", offline=True)
    flags = vars(args)
    placement = parse_placement(flags["placement"], num_gpus)
    episodes = flags["num_envs"] * flags["num_steps"] / flags["max_episode_steps"]  # at least
    print(f"placement {placement}, an iteration")
    for name, size in model_bytes(flags, placement, episodes).items():
        print(f"{name:14} {size / 1e6:12,.1f} MB")
    return 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, metavar="DIR", help="folder of a run with a placement")
    parser.add_argument("--config", action="append", metavar="FILE", help="yaml file of flags, may be repeated")
    parser.add_argument("--num_gpus", type=int, default=8, metavar="INT", help="number of ranks (default: 8)")
    flags, more_flags = parser.parse_known_args(argv)
    if (flags.run is None) == (flags.config is None):
        parser.error("give either --run or --config")
    try:
        return print_run(flags.run) if flags.run else print_model(flags.config, flags.num_gpus, more_flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
