"""Measure each part of an iteration alone. benchmarks/bench.py starts this script.

    python benchmarks/components.py --config yaml/quickstart_ppo_openvlaoft.yaml              # one rank, every part
    python benchmarks/components.py --what env --sim_freq 500 --image_size 640 480            # the expert drives

Flags of train_ppo.py may follow. Rank 0 prints one line with `PARTS` and a JSON list. Times are seconds of the slowest
rank. With RANK, WORLD_SIZE and MASTER_PORT in the environment, several ranks measure at the same time. They then share
caches and memory as in a run.

    limits      one large matrix product, and a copy that is larger than any cache
    transport   a step of resting envs: actions out, images back, in this process and in a worker
    rollout     decisions as in the script (act, step, rest), and the parts of a control step
    act         one batch, and half a batch
    update      forward, backward and AdamW of the policy alone, for one micro batch
    engine      the same with DeepSpeed and the preset's ZeRO, and the switches between stages
"""

import argparse
import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import flops
from benchmarks.model_speed import matrix_peak, seconds
from envs import make_envs
from envs.expert import Expert
from schemas.pixels import resize
from vla.cli import derive_sizes, parse_args, pick
from vla.distributed import UserError, all_reduce_max, barrier, rank, run_main, setup_distributed, world_size
from vla.models.loading import load_policy
from vla.models.policy import VLAPolicy, uniform_noise
from vla.models.value_head import value_errors
from vla.training.engine import DTYPES, backward, build_engine, read_deepspeed_config, zero_stage
from vla.training.optimizer_state import Snapshot
from vla.training.regularization import regularization
from vla.training.rollout_buffer import MicroBatch, RolloutBuffer
from vla.training.stages import StageSwitcher, make_rollout_copy, rollout_stage, update_stage

PARTS = ("limits", "transport", "rollout", "act", "update", "engine", "env")
COPIED_BYTES = 256 * 2**20  # far beyond any cache
ONE_BATCH = dict(num_env_workers=0, pipeline_stages=1, first_env=0, privileged=False)  # in one process
STILL = {"learning_rate": 0.0, "value_learning_rate": 0.0, "weight_decay": 0.0}  # steps that leave weights alone


class Stopwatch:
    """Seconds and calls by name, wall clock."""

    def __init__(self, device: torch.device | None = None):
        self.cuda = device is not None and device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.open: list[str] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.open.append(name)
        start = time.perf_counter()
        yield
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.calls[name] = self.calls.get(name, 0) + 1
        self.open.pop()

    def clear(self) -> None:
        self.seconds, self.calls = {}, {}

    def per(self, name: str, count: float) -> float:
        return self.seconds.get(name, 0.0) / max(count, 1)

    def around(self, function: Callable, name: str, not_within: str = "") -> Callable:
        """function, timed, except where it is called within what is timed as `not_within`."""

        def timed(*arguments):
            if not_within in self.open:
                return function(*arguments)
            with self(name):
                return function(*arguments)

        return timed


def median_seconds(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each call on the slowest rank. They take turns, after one warm-up of each."""
    barrier()
    return {name: slowest(value) for name, value in seconds(calls, repeats, device.type).items()}


def slowest(value: float) -> float:
    return float(all_reduce_max(torch.tensor(value)))


@contextlib.contextmanager
def instrumented(watch: Stopwatch) -> Iterator[None]:
    """Times what an env of the family spends a step on, of the envs in this process."""
    from envs.put_on_plate import PutOnPlateInScene as Env

    with contextlib.ExitStack() as stack:
        for method, name in (("advance", "advance"), ("render_image", "picture"), ("start_episode", "reset")):
            stack.enter_context(mock.patch.object(Env, method, watch.around(getattr(Env, method), name)))
        stack.enter_context(mock.patch.object(Env, "_substeps", watch.around(Env._substeps, "physics", "reset")))
        yield


# ---------------------------------------------------------------------- the parts
def measure_limits(device: torch.device, dtype: torch.dtype) -> dict:
    """What the machine can do: multiplications and additions, bytes read and written, per second and rank."""
    barrier()
    peak = matrix_peak(device.type, dtype)
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = median_seconds({"copy": lambda: target.copy_(source)}, 5, device)["copy"]
    return {
        "part": "limits",
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "matrix_flops_per_s": -slowest(-peak),
        "memory_bytes_per_s": 2 * COPIED_BYTES / copying,
    }


def measure_transport(args, num_envs: int, workers: int, repeats: int) -> dict:
    """One step of envs whose episode has ended: all that is left is to carry actions there and images back."""
    resting = ONE_BATCH | dict(auto_reset=False, max_episode_steps=1, num_env_workers=workers)
    actions = np.zeros((num_envs, args.chunk_size, 7), np.float32)
    with make_envs(args.env_id, num_envs, **pick(args, make_envs, **resting)) as envs:
        envs.reset()
        envs.step(actions)
        medians = median_seconds({"step": lambda: envs.step(actions)}, repeats, torch.device("cpu"))
    return {
        "part": "transport",
        "num_env_workers": workers,
        "num_envs": num_envs,
        "image_size": list(args.image_size),
        "seconds": medians["step"],
    }


def env_entry(args, watch: Stopwatch) -> dict:
    """What `instrumented` saw, per control step, per image and per reset."""
    steps, resets = watch.calls["advance"], watch.calls.get("reset", 0)
    physics = watch.per("physics", steps)
    return {
        "part": "env",
        "env_id": args.env_id,
        "image_size": list(args.image_size),
        "sim_freq": args.sim_freq,
        "asset_pack": args.asset_pack,
        "max_episode_steps": args.max_episode_steps,
        "render": "cpu",
        "physics_s": slowest(physics),
        "task_s": slowest(watch.per("advance", steps) - physics),
        "picture_s": slowest(watch.per("picture", watch.calls["picture"])),
        "reset_s": slowest(watch.per("reset", resets)),
        "resets_per_step": resets / steps,
        "steps": steps,
    }


def measure_expert_env(args, num_envs: int, num_steps: int) -> list[dict]:
    """Env stages without a policy: the scripted expert acts, so that contacts are part of the work. And what resizing
    such a picture to openvla-7b's 224 pixels takes."""
    watch, experts = Stopwatch(), [Expert() for _ in range(num_envs)]
    with make_envs(args.env_id, num_envs, **pick(args, make_envs, **ONE_BATCH)) as envs:
        envs.reset()
        with instrumented(watch):
            for _ in range(max(1, num_steps // num_envs)):
                actions = np.stack([expert(state) for expert, state in zip(experts, envs.describe())])
                obs = envs.step(actions[:, None])[0]
    medians = median_seconds({"resize": lambda: resize(obs["image"], (224, 224))}, 5, torch.device("cpu"))
    resized = {"part": "resize", "image_size": list(args.image_size), "seconds": medians["resize"] / num_envs}
    return [env_entry(args, watch), resized]


def measure_rollout(args, policy: VLAPolicy, buffer: RolloutBuffer, first_env: int, device) -> list[dict]:
    """The script's decisions, one env batch of this rank, in one process. Fills the buffer. The first is left out."""
    (T, N), generator = buffer.rewards.shape[:2], torch.Generator().manual_seed(args.seed)
    watch, everything, executed = Stopwatch(device), slice(0, N), 0
    here = ONE_BATCH | dict(first_env=first_env)
    with make_envs(args.env_id, N, **pick(args, make_envs, **here)) as envs, instrumented(watch), torch.no_grad():
        obs = envs.reset()
        for t in range(T):
            if t == 1:
                watch.clear()
                barrier()
            with watch("rest"):
                noise = uniform_noise(args.num_envs, policy.chunk_size, generator)[first_env:][:N]
                inputs = policy.prepare(obs)
            with watch("act"):
                tokens, logprobs, values = policy.act(inputs, args.temperature, noise)
            with watch("rest"):
                buffer.add_decision(t, everything, inputs, tokens=tokens, logprobs=logprobs)
                actions = policy.decode(tokens)
            with watch("step"):
                obs, rewards, terminations, truncations, infos = envs.step(actions)
            final_values = torch.zeros(N)
            if truncations.any():
                with watch("value"):
                    final_values[infos["ended"]] = policy.value(infos["final_observation"])[:, 0].float().cpu()
            with watch("rest"):
                buffer.add_outcome(
                    t,
                    everything,
                    rewards=rewards,
                    valid=infos["valid"],
                    values=values.cpu(),
                    final_values=final_values * truncations,
                    dones=terminations | truncations | infos["dropped"],
                )
            executed += int(infos["valid"].sum()) * (t > 0)
    rollout = {"part": "rollout", "num_envs": N, "decisions": T - 1, "steps_per_decision": executed / (T - 1) / N}
    rollout |= {f"{name}_s": slowest(watch.per(name, T - 1)) for name in ("act", "step", "rest", "value")}
    return [flags_of_model(args) | rollout, flags_of_model(args) | env_entry(args, watch)]


def flags_of_model(args) -> dict:
    return {name: vars(args)[name] for name in flops.MODEL_FLAGS}


def measure_act(args, policy: VLAPolicy, buffer: RolloutBuffer, repeats: int, device: torch.device) -> dict:
    """Seconds of act() on all envs of a rank and on half of them."""
    N = buffer.rewards.shape[1]
    inputs = micro_batch_of(buffer, N).inputs

    def acting(batch: int) -> Callable:
        some = type(inputs)(*(None if field is None else field[:batch] for field in inputs))
        noise = torch.full((batch, policy.chunk_size, 7), 0.5, dtype=torch.float64)
        return lambda: policy.act(some, args.temperature, noise)

    calls = {str(batch): acting(batch) for batch in sorted({N, max(1, N // 2)})}
    with torch.no_grad():
        medians = median_seconds(calls, repeats, device)
    counted = flops.meta_policy_of(vars(args))
    return flags_of_model(args) | {
        "part": "act",
        "points": [[int(batch), value] for batch, value in medians.items()],
        "flops": flops.act_flops(counted),
        "passes": flops.passes(counted.chunk_size),
        "weight_bytes": flops.num_bytes(counted),
    }


def micro_batch_of(buffer: RolloutBuffer, size: int) -> MicroBatch:
    """The buffer's first `size` decisions, with advantages made up."""
    advantages = torch.randn(buffer.rewards.shape, generator=torch.Generator().manual_seed(0))
    weights = buffer.valid.float()
    mb = buffer.micro_batch(torch.arange(size), advantages, buffer.values + 0.1, weights, 1.0, True)
    return mb._replace(total_weight=float(mb.weights.sum()))


def loss_function(args, mb: MicroBatch) -> Callable:
    """The script's loss of one micro batch, as a function of what the policy makes of it."""
    script = importlib.import_module("train_ppo")
    flags = dict(surrogate=pick(args, script.clipped_surrogate), regularizers=pick(args, regularization))
    flags |= dict(value_loss=pick(args, value_errors), vf_coef=args.vf_coef)
    return lambda new: script.ppo_loss(new, mb, **flags)[0]


def measure_update(args, policy: VLAPolicy, mb: MicroBatch, repeats: int, device: torch.device) -> dict:
    """Forward and backward of one micro batch, and one step of AdamW, without DeepSpeed: nothing that could be left
    out."""
    policy.train()
    loss = loss_function(args, mb)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)

    def micro_batch() -> None:
        loss(policy("evaluate", mb.inputs, mb.tokens, args.temperature)).backward()

    medians = median_seconds({"micro batch": micro_batch, "step": optimizer.step}, repeats, device)
    optimizer.zero_grad(set_to_none=True)
    counted = flops.meta_policy_of(vars(args))
    return flags_of_model(args) | {
        "part": "update",
        "micro_batch_size": len(mb.tokens),
        "seconds": medians["micro batch"],
        "step_seconds": medians["step"],
        "flops": flops.update_flops(counted, args.gradient_checkpointing),
        "gradient_checkpointing": args.gradient_checkpointing,
    }


def measure_engine(args, policy: VLAPolicy, mb: MicroBatch, repeats: int, device: torch.device) -> dict:
    """One micro batch and one step through DeepSpeed, as the script makes them, and what an iteration adds.

    That is whole weights for the rollout, and a copy for preemption.
    """
    config = read_deepspeed_config(args.deepspeed_config, args.dtype, args.offload)
    rollout_copy = make_rollout_copy(policy, zero_stage(config), args.offload)
    engine = build_engine(policy, config, **pick(args, build_engine, **STILL))
    stages, start, loss = StageSwitcher(engine, rollout_copy, args.offload), Snapshot(), loss_function(args, mb)

    def micro_batch(last: bool) -> None:
        backward(engine, loss(engine("evaluate", mb.inputs, mb.tokens, args.temperature)), last=last)

    def between() -> None:
        start.take(engine)
        with rollout_stage(stages):
            pass

    with update_stage(stages):
        calls = {"one": lambda: micro_batch(False), "last": lambda: micro_batch(True)}
        medians = median_seconds(calls, repeats, device)
    medians |= median_seconds({"between": between}, repeats, device)
    return flags_of_model(args) | {
        "part": "engine",
        "zero_stage": zero_stage(config),
        "offload": args.offload,
        "micro_batch_size": len(mb.tokens),
        "seconds": medians["one"],
        "step_seconds": max(0.0, medians["last"] - medians["one"]),
        "between_seconds": medians["between"],
        "gradient_checkpointing": args.gradient_checkpointing,
        "memory": stages.pop_metrics(),
    }


# ---------------------------------------------------------------------- the program
def measure(args, what: list[str], repeats: int) -> list[dict]:
    """All wanted parts, in the order in which they need each other."""
    device = setup_distributed(args.seed)
    sizes = derive_sizes(**pick(args, derive_sizes, group_size=1, rank=rank(), world_size=world_size()))
    N, found = sizes.local_num_envs, []
    if "limits" in what:
        found.append(measure_limits(device, DTYPES[args.dtype]))
    if "env" in what:
        return found + measure_expert_env(args, N, args.num_steps * N)
    if "transport" in what:
        found += [measure_transport(args, N, workers, 50) for workers in (0, 1)]
    if not {"rollout", "act", "update", "engine"} & set(what):
        return found
    here = dict(dtype=DTYPES[args.dtype], device=device, norm_stats=None, value_head=None, cuda_graphs=True)
    here |= dict(world=None)
    policy = load_policy(args.model_path, args.model_type, **pick(args, load_policy, **here))
    buffer = RolloutBuffer.of(policy, sizes.num_chunks, N)
    found += measure_rollout(args, policy.eval(), buffer, sizes.first_env, device)  # what the others work on
    mb = micro_batch_of(buffer, min(args.micro_batch_size, sizes.num_chunks * N))
    if "act" in what:
        found.append(measure_act(args, policy, buffer, repeats, device))
    policy.free_graphs()
    if "update" in what:
        found.append(measure_update(args, policy, mb, repeats, device))
    if "engine" in what:
        found.append(measure_engine(args, policy, mb, repeats, device))
    return found


def main(flags: argparse.Namespace) -> None:
    script_flags = ["--config", flags.config, *flags.more]
    args = parse_args(importlib.import_module("train_ppo").Args, script_flags, "")
    if not args.env_id.startswith("PutOnPlateInScene25"):
        raise UserError(f"--env_id {args.env_id} is not of the PutOnPlateInScene25 family, whose stages are timed here")
    found = measure(args, flags.what, flags.repeats)
    if rank() == 0:
        print("PARTS " + json.dumps([{"ranks": world_size(), **one} for one in found]), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--config", default="yaml/quickstart_ppo_openvlaoft.yaml", help="Preset of train_ppo.py. (default: %(default)s)"
    )
    parser.add_argument(
        "--what", nargs="+", choices=PARTS, default=list(PARTS[:-1]), help="Parts to measure. (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=5, help="Repeats per measurement. (default: %(default)s)")
    flags, more = parser.parse_known_args()
    flags.more = more
    return flags


if __name__ == "__main__":
    run_main(main, parse)
