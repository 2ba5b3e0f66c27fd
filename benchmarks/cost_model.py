"""Predict hours and GPU-hours of a run from measured parts, and compare predictions with measured runs.

    python benchmarks/cost_model.py                            # the newest results: predicted against measured
    python benchmarks/cost_model.py --results CARD.json HOST.json --config yaml/maniskill_ppo_openvla.yaml --num_gpus 8
    python benchmarks/cost_model.py --config yaml/maniskill_ppo_openvlaoft.yaml --num_gpus 8 --num_env_workers 8

Results are files of benchmarks/bench.py and benchmarks/gpu_check.py. The first file wins if several hold a value. The
exit code is 1 if the prediction for a measured iteration is wrong by more than 25 %. The model:

    rollout    decisions x (act + simulate + rest), or the longer of the overlapping ones with two pipeline stages
    simulate   physics, task, image and resets of an env, over worker processes and cores
    update     micro batches x (fixed + decisions x slope), and optimizer steps
    ranks      gathers and reductions, from bytes and --bandwidth (overlap_comm is off)

Unmeasured models take their counted arithmetic over peak times --utilisation, and their weights over memory bandwidth.
The output lists each input as measured or assumed. It leaves out evaluation, checkpoints and the start.
"""

import argparse
import importlib
import json
import math
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pydantic import Field

from benchmarks import flops
from benchmarks.cards import CARDS
from schemas import UserError, check_flags
from schemas.flags import Count, Positive
from vla.cli import derive_sizes, parse_args, pick
from vla.training.engine import read_deepspeed_config, zero_stage

RESULTS = Path(__file__).resolve().parent / "results"
TOLERANCE = 0.25
H200 = CARDS["H200 141 GB"]  # of the published runs
MODEL_7B = "openvla-7b"  # what benchmarks/gpu_check.py calls random weights of the published size
# env steps/s on 8 H200: a third party's run of RLinf (the AWS example of RLinf on EKS), 128 envs x 160 steps per
# iteration of about 145 s and 230 s, read from its plots (shared/reference/field.md, 3.1)
PUBLISHED = {"openvla": 141, "openvla_oft": 89}
PUBLISHED_TASK = ("train_ppo", "PutOnPlateInScene25Main-v3", 500)  # script, env, physics steps per second
PUBLISHED_SOURCE = (
    "a third party's run of RLinf on 8 H200 (AWS example of RLinf on EKS): 20,480 env steps in 145 / 230 s"
)


@dataclass(frozen=True)
class Assumed:
    """What a machine is taken for where nothing was measured on it."""

    peak: float  # multiplications and additions per second of one GPU
    memory: float  # bytes per second of one GPU's memory
    bandwidth: float  # bytes per second between ranks, per GPU
    utilisation: float  # share of either that is reached


class Inputs:
    """Entries of results files, and what was made of them: `used` has a sentence per input."""

    def __init__(self, files: list[dict]):
        self.entries = [entry | {"file": file["name"]} for file in files for entry in file["measured"]]
        self.used: dict[str, str] = {}

    def find(self, part: str, prefer: dict | None = None, **wanted) -> dict | None:
        """The entry that is as wanted. Of several, it is the first that agrees best in what is preferred."""
        fitting = [
            entry
            for entry in self.entries
            if entry["part"] == part and all(entry.get(name) == value for name, value in wanted.items())
        ]
        liked = prefer or {}
        return min(fitting, key=lambda entry: [entry.get(name) != value for name, value in liked.items()], default=None)

    def note(self, what: str, how: str) -> None:
        self.used.setdefault(what, how)

    def measured(self, what: str, entry: dict) -> dict:
        self.note(what, f"measured: {entry['file']}, {entry['ranks']} ranks")
        return entry


def read_results(paths: list[Path]) -> list[dict]:
    """Contents of results files, each with its name. Without paths, the newest of `make bench`."""
    if not paths:  # by name, which begins with the date: a checkout gives all files one time
        written = sorted(RESULTS.glob("*.json"))
        paths = [path for path in written if json.loads(path.read_text()).get("kind") == "bench"][-1:]
    if not paths:
        raise UserError(f"no results of `make bench` are in {RESULTS}: run it, or name a file of it with --results")
    found = []
    for path in paths:
        try:
            content = json.loads(path.read_text())
            found.append({"name": path.name, "measured": content["measured"], "machine": content["machine"]})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a results file of benchmarks/bench.py ({error}): name another") from error
    return found


# ---------------------------------------------------------------------- one env, one decision
@dataclass(frozen=True)
class EnvCosts:
    """Seconds on one core."""

    step: float  # physics and task, per action
    picture: float
    reset: float
    resets_per_step: float

    def decision(self, chunk_size: int) -> float:
        """A chunk of actions in one env: one image, and its share of new episodes, each with its first image."""
        return chunk_size * (self.step + self.resets_per_step * (self.reset + self.picture)) + self.picture


def env_costs(inputs: Inputs, flags: dict, busy: int, render: str) -> EnvCosts:
    """As measured for this env at this rate and size, or scaled from another by physics rate and pixels.

    Args:
        busy: processes that simulate at the same time on the whole machine, which share caches and cores' clocks.
    """
    size, rate = list(flags["image_size"]), flags["sim_freq"]
    # another policy touches other things, and contacts are half of what a step costs
    prefer = {"env_id": flags["env_id"], "model_path": name_of(flags), "chunk_size": flags["chunk_size"], "ranks": busy}
    found = inputs.find("env", prefer, image_size=size, sim_freq=rate, render="cpu")
    faster, smaller = 1.0, 1.0
    if found:
        inputs.measured("env", found)
        if (found["env_id"], found["asset_pack"]) != (flags["env_id"], flags["asset_pack"]):
            how = (
                f"that {flags['asset_pack']} assets cost what {found['env_id']} with {found['asset_pack']} assets does"
            )
            inputs.note("env, other scene", f"assumed: {how}")
    else:
        found = inputs.find("env", prefer, render="cpu")
        if found is None:
            raise UserError("no results file has an env's stages: add one of `make bench`")
        faster = rate / found["sim_freq"]
        smaller = math.prod(size) / math.prod(found["image_size"])
        inputs.note("env", f"assumed: {found['file']}'s at {found['sim_freq']} Hz, scaled by rate and pixels")
    picture = found["picture_s"] * smaller
    if render != "cpu":
        on_card = inputs.find("env", image_size=size, render=render)
        if on_card is None:
            raise UserError(f"--render {render}: no results file has images of {size[0]} x {size[1]} rendered so")
        picture = inputs.measured("pictures", on_card)["picture_s"]
    resets = 1.0 / flags["max_episode_steps"]
    if found["max_episode_steps"] == flags["max_episode_steps"] and found["resets_per_step"]:
        resets = found["resets_per_step"]
    step = found["physics_s"] * faster + found["task_s"]
    return EnvCosts(step, picture, found["reset_s"] * faster, resets)


def transport_seconds(inputs: Inputs, flags: dict, envs: int) -> float:
    """Actions there and images back, for so many envs of one rank."""
    found = inputs.find("transport", num_env_workers=min(1, flags["num_env_workers"]))
    if found is None:
        inputs.note("transport", "assumed: free")
        return 0.0
    inputs.measured("transport", found)
    pixels = math.prod(flags["image_size"]) / math.prod(found["image_size"])
    return found["seconds"] * pixels * envs / found["num_envs"]


def at_once(flags: dict, ranks: int, cores: float) -> int:
    """Processes that simulate at the same time."""
    return ranks * max(1, min(flags["num_env_workers"], int(cores)))


def simulate_seconds(costs: EnvCosts, flags: dict, envs: int, workers: int, cores: float, transport: float) -> float:
    """A decision of `envs` envs of one rank: in its own process, or shared out among workers."""
    one = costs.decision(flags["chunk_size"])
    if workers == 0:
        return envs * one + transport
    return max(math.ceil(envs / workers) * one, envs * one / max(1.0, min(workers, cores))) + transport


# ---------------------------------------------------------------------- the model
def at_peak(assumed: Assumed) -> str:
    return f"{assumed.utilisation:.0%} of {assumed.peak / 1e12:.0f} TFLOP/s and of {assumed.memory / 1e12:.2f} TB/s"


def name_of(flags: dict) -> str:
    """The model's name in results files: its path, or for one that is not here what stands for the published size."""
    return flags["model_path"] if flops.is_known(flags["model_path"]) else MODEL_7B


def model_entry(inputs: Inputs, part: str, flags: dict, ranks: int) -> dict | None:
    same = {"model_path": name_of(flags), "model_type": flags["model_type"], "chunk_size": flags["chunk_size"]}
    preferred = {"gradient_checkpointing": flags["gradient_checkpointing"], "ranks": ranks}
    return inputs.find(part, preferred, **same)


def act_seconds(inputs: Inputs, flags: dict, envs: float, ranks: int, assumed: Assumed) -> float:
    """One decision for so many envs."""
    found = model_entry(inputs, "act", flags, ranks)
    if found:
        (few, less), (many, more) = (inputs.measured("act", found)["points"] * 2)[:2]
        if many > few:
            slope = max(0.0, (more - less) / (many - few))
        else:  # one point: what does not depend on the number of envs is that weights are read for each further token
            further = flops.passes(flags["chunk_size"]) - 1
            read = further * flops.num_bytes(flops.meta_policy_of(flags)) / assumed.memory if further else 0.0
            slope = max(0.0, more - read) / many
        return max(0.0, more - slope * many) + slope * envs
    policy = flops.meta_policy_of(flags)
    inputs.note("act", f"assumed: counted arithmetic, weights read per token, at {at_peak(assumed)}")
    arithmetic = envs * flops.act_flops(policy) / assumed.peak
    reading = flops.num_bytes(policy) / assumed.memory
    return (max(arithmetic, reading) + (flops.passes(flags["chunk_size"]) - 1) * reading) / assumed.utilisation


def rest_seconds(inputs: Inputs, flags: dict, envs: float, ranks: int) -> float:
    """Per decision: images to the model's size, tokens to actions, the buffer, values of cut episodes."""
    found = model_entry(inputs, "rollout", flags, ranks)
    if found:
        inputs.measured("rest", found)
        return (found["rest_s"] + found["value_s"]) * envs / found["num_envs"]
    found = inputs.find("resize", image_size=list(flags["image_size"]))
    if found is None or flags["image_resize"] == "tensor":
        inputs.note("rest", "assumed: free, because the model's device resizes images")
        return 0.0
    inputs.note("rest", f"{inputs.measured('resizing images', found)['file']}: resizing alone, assumed: else free")
    return found["seconds"] * envs


def micro_batch_seconds(inputs: Inputs, flags: dict, decisions: float, ranks: int, assumed: Assumed) -> float:
    """Forward and backward of so many decisions through DeepSpeed, without what ranks say to each other if that was not
    measured."""
    again = flags["gradient_checkpointing"]
    bare = model_entry(inputs, "update", flags, ranks)
    if bare is None:
        policy = flops.meta_policy_of(flags)
        inputs.note("update", f"assumed: counted arithmetic at {at_peak(assumed)}; DeepSpeed: free")
        return decisions * flops.update_flops(policy, again) / assumed.peak / assumed.utilisation
    per_decision = inputs.measured("update", bare)["seconds"] / bare["micro_batch_size"]
    rank = flags["lora_rank"] or (32 if flags["lora_path"] else 0)
    measured = (bare["gradient_checkpointing"], bool(bare.get("lora_rank", rank)))
    if measured != (again, bool(rank)):
        other = flops.meta_policy_of(flags | {"lora_rank": bare.get("lora_rank", rank), "lora_path": None})
        factor = flops.update_flops(flops.meta_policy_of(flags), again) / flops.update_flops(other, measured[0])
        what = f"learning, {'an adapter' if rank else 'all weights'}{', recomputed' * again}"
        inputs.note(what, f"assumed: {factor:.2f} times what was measured, as the counted arithmetic")
        return decisions * per_decision * factor
    engine = model_entry(inputs, "engine", flags, ranks)
    if engine is None:
        return decisions * per_decision
    inputs.measured("DeepSpeed", engine)
    return max(0.0, engine["seconds"] - engine["micro_batch_size"] * per_decision) + decisions * per_decision


def communication(inputs: Inputs, flags: dict, stage: int, ranks: int, assumed: Assumed) -> dict[str, float]:
    """Seconds per micro batch, per optimizer step and per iteration. 0 where it is within what was measured."""
    engine = model_entry(inputs, "engine", flags, ranks)
    if ranks == 1 or (engine and engine["ranks"] == ranks and engine["zero_stage"] == stage):
        return {"micro batch": 0.0, "step": 0.0, "iteration": 0.0}
    policy = flops.meta_policy_of(flags)
    inputs.note("communication", f"assumed: bytes at {assumed.bandwidth / 1e9:g} GB/s per GPU, behind nothing")
    pieces = (ranks - 1) / ranks / assumed.bandwidth  # a gather or a scatter moves this share of all bytes per GPU
    whole, trained = pieces * flops.num_bytes(policy), pieces * flops.num_bytes(policy, trained=True)
    if stage == 3:  # weights for the forward and for the backward pass, and gradients scattered
        again = whole if flags["offload"] == "stage" else trained
        return {"micro batch": 2 * whole + trained, "step": 0.0, "iteration": again}
    if stage == 2:  # gradients scattered, updated weights gathered
        return {"micro batch": trained, "step": trained, "iteration": 0.0}
    return {"micro batch": 0.0, "step": 2 * trained, "iteration": 0.0}


# ---------------------------------------------------------------------- an iteration
def predict(inputs: Inputs, flags: dict, ranks: int, cores: float, assumed: Assumed, render: str = "cpu") -> dict:
    """Seconds of an iteration on the slowest of equal ranks: rollout, update, and both.

    With one pipeline stage, also those of the parts: acting, simulation, images, learning, ranks (what they exchange).

    Args:
        flags: of the script. cores: of one rank.
    """
    sizes = derive_sizes(
        **pick(argparse.Namespace(**{"group_size": 1} | flags), derive_sizes, rank=0, world_size=ranks)
    )
    envs, decisions = sizes.local_num_envs, sizes.num_chunks
    stage = zero_stage(read_deepspeed_config(flags["deepspeed_config"], flags["dtype"], flags["offload"]))
    talk = communication(inputs, flags, stage, ranks, assumed)
    engine = model_entry(inputs, "engine", flags, ranks) or {"step_seconds": 0.0, "between_seconds": 0.0}
    costs = env_costs(inputs, flags, at_once(flags, ranks, cores), render)
    one_act = act_seconds(inputs, flags, envs, ranks, assumed)
    between = engine["between_seconds"] + talk["iteration"]
    share = envs * decisions / flags["num_minibatches"] / sizes.micro_batches  # decisions of one micro batch
    steps = flags["update_epochs"] * flags["num_minibatches"]
    learning = steps * sizes.micro_batches * micro_batch_seconds(inputs, flags, share, ranks, assumed)
    learning += steps * engine["step_seconds"]
    exchange = steps * (sizes.micro_batches * talk["micro batch"] + talk["step"])
    parts = {}
    if flags["pipeline_stages"] == 1:
        workers, transport = flags["num_env_workers"], transport_seconds(inputs, flags, envs)
        parts = {
            "acting": (decisions + 1) * one_act,  # the last one for the value of the frame after the last decision
            "simulation": decisions * simulate_seconds(costs, flags, envs, workers, cores, transport),
            "images": decisions * rest_seconds(inputs, flags, envs, ranks),
            "learning": learning,
            "ranks": between + exchange,
        }
        rollout = parts["acting"] + parts["simulation"] + parts["images"] + between
    else:
        rollout = decisions * overlapped_seconds(inputs, flags, costs, envs, cores, ranks, assumed) + one_act + between
    update = learning + exchange
    return {"rollout": rollout, "update": update, "iteration": rollout + update} | parts


def overlapped_seconds(
    inputs: Inputs, flags: dict, costs: EnvCosts, envs: int, cores: float, ranks: int, assumed: Assumed
) -> float:
    """A decision with two pipeline stages: one half of the envs acts while the other half is simulated."""
    transport = transport_seconds(inputs, flags, envs)
    half, busy = envs / 2, at_once(flags, ranks, cores)  # it acts while others simulate, which slows both
    acting = act_seconds(inputs, flags, half, busy, assumed) + rest_seconds(inputs, flags, half, busy)
    simulating = simulate_seconds(costs, flags, math.ceil(half), flags["num_env_workers"] // 2, cores, transport / 2)
    work = 2 * acting + envs * costs.decision(flags["chunk_size"])
    return max(2 * acting, acting + simulating, work / cores)  # no core does two things at once


# ---------------------------------------------------------------------- what is printed
def check(files: list[dict], assumed: Assumed) -> tuple[list[str], bool]:
    """Predicted against measured seconds of every iteration in the files, and whether all are within the tolerance."""
    lines = ["| iteration | measured | predicted | off by |", "|---|---:|---:|---:|"]
    fits = True
    for file in files:
        for one in (entry for entry in file["measured"] if entry["part"] == "iteration"):
            flags, ranks = one["flags"], one["ranks"]
            predicted = predict(Inputs([file, *files]), flags, ranks, file["machine"]["cores"] / ranks, assumed)[
                "iteration"
            ]
            error = predicted / one["iteration_s"] - 1
            fits &= abs(error) <= TOLERANCE
            setting = f"{ranks} ranks, {flags['num_env_workers']} workers, chunk {flags['chunk_size']}, "
            setting += f"pipeline {flags['pipeline_stages']}, {flags['num_envs']} x {flags['num_steps']}"
            lines.append(f"| {setting} | {one['iteration_s']:.2f} s | {predicted:.2f} s | {error:+.0%} |")
    return (lines if len(lines) > 2 else ["no iteration was measured in these files: nothing to check"]), fits


def assumed_of(files: list[dict], options: argparse.Namespace) -> Assumed:
    """--peak and --memory, or what gpu_check.py measured of its card, or an H200's."""
    card = Inputs(files).find("limits", device="cuda") or {}
    peak = options.peak * 1e12 if options.peak else card.get("matrix_flops_per_s", H200.peak * 1e12)
    memory = options.memory * 1e12 if options.memory else card.get("memory_bytes_per_s", H200.bandwidth * 1e12)
    return Assumed(peak, memory, options.bandwidth * 1e9, options.utilisation)


def plan(files: list[dict], options: argparse.Namespace, assumed: Assumed) -> list[str]:
    """One line per number of GPUs, and where the inputs come from."""
    script = "train_grpo" if "grpo" in Path(options.config).name else "train_ppo"  # whose defaults hold
    words = ["--config", options.config, *options.more]
    flags = vars(parse_args(importlib.import_module(script).Args, words, "", offline=True))
    preset_ranks = re.search(r"^# ranks: *([1-9]\d*) *$", Path(options.config).read_text(), re.M)
    envs_per_gpu = max(1, flags["num_envs"] // int(preset_ranks[1] if preset_ranks else 1))
    inputs, task = Inputs(files), (script, flags["env_id"], flags["sim_freq"])
    lines = ["| GPUs | envs | workers per GPU | rollout | update | env steps/s | hours | GPU-hours | published |"]
    lines.append("|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for ranks in options.num_gpus:
        here = flags | {"num_envs": options.num_envs or envs_per_gpu * ranks}
        here["num_env_workers"] = min(flags["num_env_workers"], here["num_envs"] // ranks)
        seconds = predict(inputs, here, ranks, options.cores, assumed, options.render)
        rate = here["num_envs"] * here["num_steps"] / seconds["iteration"]
        hours = options.env_steps / rate / 3600
        known = PUBLISHED[flags["model_type"]] if ranks == 8 and task == PUBLISHED_TASK else ""
        lines.append(
            f"| {ranks} | {here['num_envs']} | {here['num_env_workers']} | {seconds['rollout']:.1f} s | "
            f"{seconds['update']:.1f} s | {rate:.1f} | {hours:.2f} | {hours * ranks:.1f} | {known} |"
        )
    lines += ["", f"hours to {options.env_steps:,} env steps, without evaluation; published: {PUBLISHED_SOURCE}", ""]
    if name_of(flags) == MODEL_7B:
        inputs.note("model", f"assumed: {flags['model_path']} is not here, sizes are openvla-7b's")
    return lines + [f"- {what}: {how}" for what, how in inputs.used.items()]


@dataclass
class Ranges:
    """What the numbers among the flags may be."""

    num_gpus: list[Count]
    num_envs: Count | None
    cores: Positive
    env_steps: Count
    peak: Positive | None
    memory: Positive | None
    bandwidth: Positive
    utilisation: Annotated[Positive, Field(le=1)]


def main(options: argparse.Namespace) -> int:
    try:
        check_flags(Ranges(**{field.name: getattr(options, field.name) for field in fields(Ranges)}))
        files = read_results(options.results)
        assumed = assumed_of(files, options)
        lines, fits = check(files, assumed)
        if options.config:
            lines += ["", *plan(files, options, assumed)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    if not fits:
        print(f"an iteration is predicted with an error of more than {TOLERANCE:.0%}", file=sys.stderr)
    return 0 if fits else 1


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--results",
        nargs="+",
        type=Path,
        default=[],
        help="Files of results. Without it, the newest in benchmarks/results is read.",
    )
    parser.add_argument("--config", help="Preset. Flags of its script may follow.")
    parser.add_argument(
        "--num_gpus", type=int, nargs="+", default=[1, 8, 16, 64, 256], help="Numbers of GPUs. (default: %(default)s)"
    )
    parser.add_argument(
        "--num_envs", type=int, help="Envs over all GPUs. Without it, as many per GPU as in the preset."
    )
    parser.add_argument("--cores", type=float, default=16, help="CPU cores per GPU. (default: %(default)s)")
    parser.add_argument("--env_steps", type=int, default=1_000_000, help="Env steps of the run. (default: %(default)s)")
    parser.add_argument(
        "--render",
        default="cpu",
        help="Renderer: cpu, or sapien_cuda for images as gpu_check.py measured them. (default: %(default)s)",
    )
    parser.add_argument(
        "--peak", type=float, help="Peak speed of a GPU in TFLOP/s. Without it, the measured one, or else 989."
    )
    parser.add_argument(
        "--memory",
        type=float,
        help="Memory bandwidth of a GPU in TB/s. Without it, the measured one, or else 4.8 (H200).",
    )
    parser.add_argument(
        "--bandwidth",
        type=float,
        default=50,
        help="Bandwidth between GPUs in GB/s per GPU, 50 for one 400 Gb/s port. (default: %(default)s)",
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        default=0.4,
        help="Share of the peak speed that the model reaches. (default: %(default)s)",
    )
    options, more = parser.parse_known_args(argv)
    if more and not options.config:
        parser.error(f"unknown without --config: {' '.join(more)}")
    options.more = more
    return options


if __name__ == "__main__":
    raise SystemExit(main(parse()))
