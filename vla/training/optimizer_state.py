"""This rank's share of what is trained, by parameter name and under any ZeRO stage: fp32 weights and Adam's moments.

DeepSpeed keeps them in flat buffers. Stage 0 gives every rank everything. Stage 2 cuts the concatenation of all
parameters into one piece per rank, and stage 3 cuts every parameter. A Shard says which elements of which flattened
parameter this rank holds. So a checkpoint can be read on any number of ranks and under any stage: each rank takes the
elements that it needs. Bits are copied, and nothing is gathered or computed.

DeepSpeed's own files (0.19.8) do not allow this. The ordinary ones load only on the same number of ranks. The universal
checkpoint does not know stage 2. Under stage 3 it loses the second group's learning rate and shares one step counter
between the groups.

This module reads names that DeepSpeed does not promise to keep (fp32_partitioned_groups_flat, grad_position,
_hp_mapping). Therefore the version is pinned, and tests/training/test_engine.py compares the shards with the weights
that forwards use.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from schemas import UserError, check, require_file
from schemas.runs import ShardIndex
from vla.distributed import Engine, rank
from vla.files.tensors import save_tensors
from vla.files.trees import REMEDY, sentences

MOMENTS = ("exp_avg", "exp_avg_sq")
# trained parameters up to which an update can be undone: 5.6 GiB of fp32 weights and moments, over all ranks. Adapters
# of a 7B model have 1e8 to 4e8, whole fine-tuning has 7e9
MAX_UNDONE = 500_000_000


class Shard(NamedTuple):
    """Elements start .. start + K - 1 of a flattened parameter."""

    name: str
    start: int
    tensors: dict[str, torch.Tensor]  # "weight" and MOMENTS: fp32 [K], views of what the optimizer steps on
    state: dict  # Adam's state that the moments are views of, with its step counter


class Slice(NamedTuple):
    """Where a buffer of the optimizer holds elements start .. start + length - 1 of a flattened parameter."""

    buffer: torch.Tensor
    offset: int  # of the first element in the flattened buffer
    start: int  # of the first element in the flattened parameter
    length: int


def adam_state(optimizer: torch.optim.Optimizer, flat: torch.Tensor) -> dict:
    """AdamW's state of one buffer. Before the first step there is none yet: then the same zeros are made here."""
    state = optimizer.state[flat]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        for key in MOMENTS:
            state[key] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    return state


def _slice_stage0(parameter: torch.nn.Parameter) -> Slice:
    """Without ZeRO the optimizer steps on the parameter itself, and every rank holds all of it."""
    return Slice(parameter, offset=0, start=0, length=parameter.numel())


def _slice_stage2(zero_optimizer, parameter: torch.nn.Parameter) -> Slice | None:
    """ZeRO-2: a group's parameters are concatenated, and every rank steps on one piece of the result.

    Mirrors get_hp_fragment_mapping() of deepspeed/utils/tensor_fragment.py (0.19.8). "hp" is fp32, "lp" the model's
    dtype.

    Returns:
        None if no element of the parameter is in this rank's piece.
    """
    fragment = parameter._hp_mapping
    if fragment is None:
        return None
    buffer = zero_optimizer.single_partition_of_fp32_groups[fragment.param_group_index]
    in_parameter, in_buffer = fragment.lp_fragment_address, fragment.hp_fragment_address
    return Slice(buffer, offset=in_buffer.start, start=in_parameter.start, length=in_parameter.numel)


def _slice_stage3(zero_optimizer, parameter: torch.nn.Parameter) -> Slice:
    """ZeRO-3: every parameter is padded and cut into one part of equal length per rank.

    Mirrors set_grad_positions() of deepspeed/runtime/zero/stage3.py (0.19.8). The padding belongs to the last ranks. So
    their lengths here are smaller, and can be 0 or negative.
    """
    group, offset, padded_length = zero_optimizer.grad_position[zero_optimizer.get_param_id(parameter)]
    start = rank() * padded_length
    length = min(padded_length, parameter.ds_numel - start)
    return Slice(zero_optimizer.fp32_partitioned_groups_flat[group], offset, start, length)


def _local_slice(engine: Engine, parameter: torch.nn.Parameter) -> Slice | None:
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return _slice_stage0(parameter)
    if stage == 3:
        return _slice_stage3(engine.optimizer, parameter)
    return _slice_stage2(engine.optimizer, parameter)


def local_shards(engine: Engine) -> list[Shard]:
    """The shards that this rank's optimizer steps on, in the model's order. Empty ones are left out."""
    has_zero = engine.zero_optimization_stage() > 0
    optimizer = engine.optimizer.optimizer if has_zero else engine.optimizer
    shards = []
    for name, parameter in engine.module.named_parameters():
        found = _local_slice(engine, parameter) if parameter.requires_grad else None
        if found is None or found.length <= 0:
            continue
        state = adam_state(optimizer, found.buffer)
        buffers = {"weight": found.buffer.detach()} | {key: state[key] for key in MOMENTS}
        views = {key: buffer.view(-1).narrow(0, found.offset, found.length) for key, buffer in buffers.items()}
        shards.append(Shard(name, found.start, views, state))
    return shards


def local_buffers(engine: Engine) -> list[torch.Tensor]:
    """ZeRO-3: the flat buffers behind local_shards(). An fp32 model's weights are its own fp32 weights: left out."""
    zero_optimizer = engine.optimizer
    buffers = []
    for model_flat, master_flat in zip(
        zero_optimizer.fp16_partitioned_groups_flat, zero_optimizer.fp32_partitioned_groups_flat
    ):
        if master_flat is not model_flat:
            buffers.append(master_flat)
        state = adam_state(zero_optimizer.optimizer, master_flat)
        buffers += [state[key] for key in MOMENTS]
    return buffers


def write_weights(engine: Engine, weights: dict[str, torch.Tensor]) -> None:
    """Copy whole fp32 weights, by parameter name, into the shards that this rank's optimizer steps on."""
    for shard in local_shards(engine):
        if shard.name in weights:
            elements = slice(shard.start, shard.start + len(shard.tensors["weight"]))
            shard.tensors["weight"].copy_(weights[shard.name].flatten()[elements])


def publish_weights(engine: Engine) -> None:
    """Round the fp32 weights, which were just written, into the weights that forwards use. All ranks together."""
    zero_optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        for model_flat, master_flat in zip(
            zero_optimizer.fp16_partitioned_groups_flat, zero_optimizer.fp32_partitioned_groups_flat
        ):
            model_flat.data.copy_(master_flat.data)  # shards of the parameters are views of it
        if zero_optimizer.persistent_parameters:  # small ones that stay whole between forwards
            zero_optimizer.persistent_parameters[0].partition(zero_optimizer.persistent_parameters)
            zero_optimizer.persistent_parameters[0].all_gather(zero_optimizer.persistent_parameters)
    elif engine.zero_optimization_stage():
        zero_optimizer.update_lp_params()


def can_be_copied(num_trained: int) -> bool:
    """Whether a Snapshot copies a model with so many trained parameters."""
    return num_trained <= MAX_UNDONE


class Snapshot:
    """A copy, in host memory, of what an update changes. An update that is interrupted is undone with it.

    A large model is not copied, because that would be a second optimizer in host memory, written in every iteration.
    """

    def __init__(self):
        self.copies: list[dict[str, torch.Tensor]] = []  # allocated once, then reused
        self.steps: list[float] = []

    def take(self, engine: Engine) -> None:
        self.taken_at = engine.global_steps
        trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        if not can_be_copied(sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trained)):
            return
        shards = local_shards(engine)
        if not self.copies:
            self.copies = [
                {key: torch.empty_like(tensor, device="cpu") for key, tensor in shard.tensors.items()}
                for shard in shards
            ]
        self.steps = [float(shard.state["step"]) for shard in shards]
        for shard, copies in zip(shards, self.copies):
            for key, tensor in shard.tensors.items():
                copies[key].copy_(tensor)

    def can_restore(self, engine: Engine) -> bool:
        """Whether restore() leads back: there is a copy, or no optimizer step was made since. The same on all ranks."""
        return bool(self.copies) or engine.global_steps == self.taken_at

    def restore(self, engine: Engine) -> None:
        """Write the copy back, if there is one. All ranks together."""
        if not self.copies:
            return  # nothing has changed: see can_restore()
        for shard, copies, step in zip(local_shards(engine), self.copies, self.steps):
            shard.state["step"].fill_(step)
            for key, tensor in shard.tensors.items():
                tensor.copy_(copies[key])
        publish_weights(engine)


# ---------------------------------------------------------------------- files
def shard_file(folder: Path, owner: int) -> Path:
    return folder / f"rank_{owner:05d}.safetensors"


def save_shards(engine: Engine, folder: Path) -> None:
    """Write this rank's shards into an existing folder. Without ZeRO all ranks hold the same, so only rank 0 writes."""
    if engine.zero_optimization_stage() == 0 and rank() > 0:
        return
    shards = local_shards(engine)
    tensors = {
        f"{shard.name}/{key}": tensor.to("cpu", copy=True) for shard in shards for key, tensor in shard.tensors.items()
    }
    index = {shard.name: [shard.start, float(shard.state["step"])] for shard in shards}
    save_tensors(tensors, shard_file(folder, rank()), metadata={"index": json.dumps(index)})


class Piece(NamedTuple):
    """Elements start .. stop - 1 of a parameter, in an open file."""

    start: int
    stop: int
    step: float
    file: safe_open


def load_shards(engine: Engine, files: list[Path]) -> None:
    """Fill this rank's shards from files that any number of ranks wrote under any stage. All ranks together.

    Raises:
        UserError: a file is damaged, or no file holds some of the elements. Nothing has been overwritten then.
    """
    shards = local_shards(engine)
    with ExitStack() as stack:
        pieces = open_pieces(files, stack)
        for shard in shards:
            found = sum(upper - lower for lower, upper, _ in overlaps(shard, pieces.get(shard.name, [])))
            if found != len(shard.tensors["weight"]):
                raise UserError(f"the optimizer's files lack a part of {shard.name}: {REMEDY}")
        for shard in shards:
            for lower, upper, piece in overlaps(shard, pieces[shard.name]):
                shard.state["step"].fill_(piece.step)
                for key, tensor in shard.tensors.items():
                    saved = piece.file.get_slice(f"{shard.name}/{key}")[lower - piece.start : upper - piece.start]
                    tensor[lower - shard.start : upper - shard.start].copy_(saved)
    publish_weights(engine)


def open_pieces(files: list[Path], stack: ExitStack) -> dict[str, list[Piece]]:
    """The pieces in all ranks' files, by parameter name. The files stay open until the stack is closed."""
    pieces: dict[str, list[Piece]] = {}
    for path in sorted(files):
        require_file(path, REMEDY)
        with sentences(str(path)):
            file = stack.enter_context(safe_open(path, framework="pt"))
            index = check(ShardIndex, json.loads((file.metadata() or {})["index"]), str(path), REMEDY)
            for name, (start, step) in index.items():
                shapes = {tuple(file.get_slice(f"{name}/{key}").get_shape()) for key in ("weight", *MOMENTS)}
                ((length,),) = shapes  # one shape for all three, of one dimension
                pieces.setdefault(name, []).append(Piece(int(start), int(start) + length, step, file))
    return pieces


def overlaps(shard: Shard, pieces: list[Piece]) -> list[tuple[int, int, Piece]]:
    """(first, one past the last) element that a piece and the shard have in common, for every piece that has any."""
    end = shard.start + len(shard.tensors["weight"])
    found = [(max(piece.start, shard.start), min(piece.stop, end), piece) for piece in pieces]
    return [(lower, upper, piece) for lower, upper, piece in found if lower < upper]
