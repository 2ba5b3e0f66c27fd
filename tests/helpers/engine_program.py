"""What tests/training/test_engine.py runs on its own ranks: engine, stages and checkpoints without a simulator.

    RANK=.. WORLD_SIZE=.. python tests/helpers/engine_program.py '[["scenario", {argument: value}], ...]'

Each scenario's result is printed by rank 0 as one line of JSON.
"""

import gc
import json
import resource
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from micro import micro_preset  # noqa: E402

from vla.distributed import UserError, all_reduce_max, all_reduce_sum, rank, setup_distributed, world_size  # noqa: E402
from vla.models.loading import load_policy  # noqa: E402
from vla.models.policy import PolicyInputs  # noqa: E402
from vla.training.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from vla.training.engine import DTYPES, backward, build_engine, read_deepspeed_config, zero_stage  # noqa: E402
from vla.training.memory_plan import LiveBytes  # noqa: E402
from vla.training.optimizer_state import Snapshot, local_buffers, local_shards  # noqa: E402
from vla.training.preemption import Preemption  # noqa: E402
from vla.training.stages import GIB, StageSwitcher, make_rollout_copy, rollout_stage, update_stage  # noqa: E402

LINEAR = torch.nn.functional.linear  # as torch has it
BATCH = 4  # samples over all ranks and micro batches


def made(
    config: str = "zero3",
    dtype: str = "float32",
    lora_rank: int = 0,
    lora_scope: str = "all",
    offload: str = "none",
    threshold: int = 0,
):
    """An engine on the tiny model, its hand-over and its device. threshold: elements that stay whole under ZeRO-3."""
    settings = read_deepspeed_config(str(ROOT / f"ds_configs/{config}.json"), dtype, offload)
    if zero_stage(settings) == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    policy = load_policy(micro_preset(), lora_rank=lora_rank, lora_scope=lora_scope, dtype=DTYPES[dtype], device=DEVICE)
    rollout_copy = make_rollout_copy(policy, zero_stage(settings), offload)
    engine = build_engine(
        policy,
        settings,
        micro_batch_size=1,
        learning_rate=1e-3,
        value_learning_rate=3e-3,
        weight_decay=0.01,
        max_grad_norm=1.0,
    )
    return engine, StageSwitcher(engine, rollout_copy, offload)


def samples(iteration: int) -> tuple[PolicyInputs, torch.Tensor]:
    """This rank's part of a batch that depends on the iteration alone."""
    generator = torch.Generator().manual_seed(iteration)
    images = torch.randint(0, 256, (BATCH, 96, 96, 3), dtype=torch.uint8, generator=generator)
    ids = torch.randint(3, 300, (BATCH, 12), generator=generator)
    tokens = torch.randint(512, 768, (BATCH, 1, 7), generator=generator)
    mine = slice(rank() * BATCH // world_size(), (rank() + 1) * BATCH // world_size())
    inputs = PolicyInputs(images[mine], ids[mine], torch.ones(BATCH, 12, dtype=torch.bool)[mine])
    return inputs.to(DEVICE), tokens[mine].to(DEVICE)


def trained(engine, stages, first: int, last: int, forwards: int = 1) -> list[list[float]]:
    """Iterations first .. last - 1: a rollout of `forwards` greedy actions, then one step over all micro batches.

    Returns [loss, gradient norm, sum of the rollout's values] of each, over all ranks.
    """
    lines = []
    for iteration in range(first, last):
        inputs, tokens = samples(iteration)
        with rollout_stage(stages) as actor:
            for _ in range(forwards):
                _, logprobs, values = actor.act(inputs, 0.0)
        total, norm = torch.zeros(()), None
        with update_stage(stages):
            for row in range(len(tokens)):
                one = PolicyInputs(*(None if field is None else field[row : row + 1] for field in inputs))
                new = engine("evaluate", one, tokens[row : row + 1])
                loss = (new.values - 1.0).pow(2).mean() - new.logprobs.mean() - 0.01 * new.entropy.mean()
                norm = backward(engine, loss / len(tokens), last=row + 1 == len(tokens))
                total += loss.detach().float().cpu() / BATCH
        acted = all_reduce_sum(logprobs.double().sum() + values.double().sum())
        lines.append([float(all_reduce_sum(total)), norm, float(acted)])
    return lines


def save(folder: str, at: int, until: int, **settings) -> dict:
    """Train, save after iteration `at`, train on."""
    engine, stages = made(**settings)
    lines = trained(engine, stages, 0, at)
    save_checkpoint(engine, Path(folder), at, 100 * at, [{"env": e} for e in range(4 // world_size())], keep=0)
    return {"losses": lines + trained(engine, stages, at, until)}


def resume(checkpoint: str, until: int, **settings) -> dict:
    engine, stages = made(**settings)
    share = 4 // world_size()
    iteration, global_step, env_states = load_checkpoint(
        engine, Path(checkpoint), slice(rank() * share, (rank() + 1) * share), share * world_size()
    )
    return {
        "iteration": iteration,
        "global_step": global_step,
        "envs": env_states,
        "losses": trained(engine, stages, iteration, until),
    }


def undo(**settings) -> dict:
    """Two iterations, their second one made again after a Snapshot was restored, also from before the first step."""
    engine, stages = made(**settings)
    start, middle = Snapshot(), Snapshot()
    start.take(engine)
    first = trained(engine, stages, 0, 1)
    middle.take(engine)
    second = trained(engine, stages, 1, 2)
    middle.restore(engine)
    again = trained(engine, stages, 1, 2)
    start.restore(engine)
    return {"once": first + second, "again": trained(engine, stages, 0, 1) + again}


def coverage(**settings) -> dict:
    """How many elements of each trained parameter the ranks' shards hold, against how many it has."""
    engine, _ = made(**settings)
    share = {shard.name: float(len(shard.tensors["weight"])) for shard in local_shards(engine)}
    wrong = []
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            numel = parameter.ds_numel if zero_stage_of(engine) == 3 else parameter.numel()
            held = float(all_reduce_sum(torch.tensor(share.get(name, 0.0))))
            if held != numel * (world_size() if zero_stage_of(engine) == 0 else 1):
                wrong.append(name)
    return {"wrong": wrong}


def one_arithmetic(**settings) -> dict:
    """Before the first step: what differs from a policy that no engine holds, acting and evaluated."""
    flags = {name: settings[name] for name in ("lora_rank", "lora_scope") if name in settings}
    plain = load_policy(micro_preset(), dtype=DTYPES[settings.get("dtype", "float32")], device=DEVICE, **flags).eval()
    engine, stages = made(**settings)
    inputs, tokens = samples(0)
    with torch.no_grad():
        acted, evaluated = plain.act(plain.prepare(inputs), 0.0), plain("evaluate", inputs, tokens)
    with rollout_stage(stages) as actor:
        ours = actor.act(actor.prepare(inputs), 0.0)
    with update_stage(stages):
        new = engine("evaluate", inputs, tokens)
        backward(engine, new.values.sum() + new.logprobs.sum(), last=True)
    pairs = {"tokens": (acted[0], ours[0]), "logprobs": (acted[1], ours[1])}
    pairs["new logprobs"] = (evaluated.logprobs, new.logprobs)
    if settings.get("dtype", "float32") == "float32":  # else the engine has rounded the critic's weights
        pairs |= {"values": (acted[2], ours[2]), "new values": (evaluated.values, new.values)}
    differing = [name for name, (one, other) in pairs.items() if not torch.equal(one, other)]
    return {"differing": differing, "torchs_own": torch.nn.functional.linear is LINEAR}


def exact_critic(**settings) -> dict:
    """The largest difference of the critic's fp32 weights, on this rank, from those that were read."""
    plain = load_policy(micro_preset(), dtype=DTYPES[settings["dtype"]], device=DEVICE, lora_rank=settings["lora_rank"])
    engine, _ = made(**settings)
    wanted = {name: p.detach().flatten() for name, p in plain.named_parameters() if name.startswith("value_head.")}
    held = [shard for shard in local_shards(engine) if shard.name in wanted]
    differences = [
        (shard.tensors["weight"] - wanted[shard.name][shard.start :][: len(shard.tensors["weight"])]).abs().max()
        for shard in held
    ]
    elements = all_reduce_sum(torch.tensor(float(sum(len(shard.tensors["weight"]) for shard in held))))
    largest = all_reduce_max(torch.stack([torch.zeros(()), *differences]).max())
    return {"all": float(elements) == sum(len(whole) for whole in wanted.values()), "largest": float(largest)}


def zero_stage_of(engine) -> int:
    return engine.zero_optimization_stage()


def losses(uneven: bool = False, **settings) -> dict:
    """uneven: rank 1 makes three forwards in a rollout where rank 0 makes one."""
    engine, stages = made(**settings)
    lines = trained(engine, stages, 0, 2, forwards=3 if uneven and rank() else 1)
    movable = 0
    if zero_stage_of(engine) == 3:  # what offload "stage" takes off a GPU in the rollout, gradients not counted
        movable = sum(buffer.nbytes for buffer in local_buffers(engine))
        movable += sum(p.ds_tensor.nbytes for p in engine.module.parameters() if not p.requires_grad)
    return {"losses": lines, "memory": stages.pop_metrics(), "movable_gib": movable / GIB}


def broken_rollout(**settings) -> dict:
    """An exception inside a rollout stage, then two iterations."""
    engine, stages = made(**settings)
    try:
        with rollout_stage(stages):
            raise KeyError("in the rollout")
    except KeyError:
        pass
    return {"losses": trained(engine, stages, 0, 2)}


def full_disk(folder: str) -> dict:
    """A whole checkpoint, then one that rank 1 cannot write: its files may not grow beyond a few bytes."""
    engine, _ = made()
    save_checkpoint(engine, Path(folder), 1, 100, [{}], keep=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        save_checkpoint(engine, Path(folder), 2, 200, [{}], keep=1)
        said = "nothing"
    except UserError as error:
        said = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return {"said": said, "left": sorted(path.name for path in (Path(folder) / "checkpoints").iterdir())}


def not_finite(folder: str, **settings) -> dict:
    """A whole checkpoint, then one where the last rank holds a NaN among its weights, or infinity in a moment."""
    engine, _ = made(**settings)
    place = Path(folder)
    if not (place / "checkpoints" / "iteration_000001").exists():
        save_checkpoint(engine, place, 1, 100, [{}], keep=0)
    found = []
    for key, value in (("exp_avg_sq", float("inf")), ("weight", float("nan"))):
        if rank() == world_size() - 1:
            local_shards(engine)[-1].tensors[key][-1] = value
        try:
            save_checkpoint(engine, place, 2, 200, [{}], keep=1)
            said = "nothing"
        except UserError as error:
            said = str(error)
        found.append((said, sorted(path.name for path in (place / "checkpoints").iterdir())))
    return {"said": found[1][0], "left": found[1][1], "after_a_moment": found[0][1]}


def stale_stop(folder: str) -> dict:
    """A killed run left its file `stop`; rank 0, which removes it, is late."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "stop").touch()
    if rank() == 0:
        time.sleep(1.0)
    preemption = Preemption(None, Path(folder), keep=1)
    return {"asked": float(all_reduce_sum(torch.tensor(float(preemption.requested))))}


def tensors_alive() -> list[torch.Tensor]:
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor) and not thing.is_meta]


def bytes_alive(without=()) -> int:
    """Of all tensors in this process, those of `without` left out; storages that are shared count once."""
    left_out = {tensor.untyped_storage()._cdata for tensor in without}
    storages = [tensor.untyped_storage() for tensor in tensors_alive()]
    return sum({s._cdata: s.nbytes() for s in storages if s._cdata not in left_out}.values())


def memory(micro_batch_size: int = 2, **settings) -> dict:
    """Bytes at the start of either stage and at most within it, in the second of two iterations."""
    gc.collect()
    gc.freeze()  # what is there by now is neither counted nor looked at again
    before = bytes_alive()
    engine, stages = made(**settings)
    trained(engine, stages, 0, 1)
    inputs, tokens = samples(0)
    measured = {}
    with rollout_stage(stages) as actor:
        gone = list(stages.host.values())
        if stages.offload:  # on a GPU it would be in host memory now; "to the CPU" moves nothing on a CPU
            gone.append(engine.optimizer.grad_partitions_flat_buffer)
        measured["rollout_resident"] = bytes_alive(gone) - before
        with LiveBytes(tensors_alive()) as count:
            actor.act(actor.prepare(inputs), 0.0)
        measured["rollout_peak"] = measured["rollout_resident"] + count.peak
    mb = PolicyInputs(*(None if field is None else field[:micro_batch_size] for field in inputs))
    mb = stages.engine.module.prepare(mb) if zero_stage_of(engine) < 3 else mb
    with update_stage(stages):
        measured["update_resident"] = bytes_alive(stages.host.values()) - before
        peaks = []  # when ZeRO-3 lets go of gathered layers is a matter of timing: the largest of several is the peak
        for _ in range(6):
            with LiveBytes(tensors_alive()) as count:
                new = engine("evaluate", mb, tokens[:micro_batch_size])
                backward(engine, new.values.sum() + new.logprobs.sum() + new.entropy.sum(), last=True)
            peaks.append(count.peak)
            del new
        measured["update_peak"] = measured["update_resident"] + max(peaks)
    return measured


if __name__ == "__main__":
    DEVICE = setup_distributed(0)
    for name, arguments in json.loads(sys.argv[1]):
        result = globals()[name](**arguments)
        if rank() == 0:
            print("RESULT " + json.dumps(result), flush=True)
