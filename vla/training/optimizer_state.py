"""This rank's part of what is trained: fp32 weights and Adam's moments, by parameter name, whatever the ZeRO stage.

DeepSpeed keeps them in flat buffers that ranks share out: stage 0 gives every rank everything, stage 2 cuts the
concatenation of all parameters, stage 3 cuts every parameter. A shard says which elements of which flattened
parameter lie here. Written so, a checkpoint is read back on any number of ranks and under any stage, each rank taking
the elements it needs: bits are copied, nothing is gathered and nothing is computed. (DeepSpeed's own files load on the
same number of ranks alone; its universal checkpoint does not know stage 2, and under stage 3 it loses the learning rate
of the second group and shares one step counter between groups, 0.19.8.)

It reads names that DeepSpeed does not promise (fp32_partitioned_groups_flat, grad_position, _hp_mapping): the version
is pinned, and tests/training/test_engine.py compares what is found with the weights that forwards use.
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


class Shard(NamedTuple):
    """Elements start .. start + K - 1 of a flattened parameter."""

    name: str
    start: int
    tensors: dict[str, torch.Tensor]  # "weight" and MOMENTS: fp32 [K], views of what the optimizer steps on
    state: dict  # Adam's state that the moments are views of, with its step counter


def adam_state(optimizer: torch.optim.Optimizer, flat: torch.Tensor) -> dict:
    """AdamW's state of one buffer; before its first step, which would make it, the same zeros are made here."""
    state = optimizer.state[flat]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        for key in MOMENTS:
            state[key] = torch.zeros_like(flat, memory_format=torch.preserve_format)
    return state


def local_shards(engine: Engine) -> list[Shard]:
    """What this rank's optimizer steps on, in the model's order. Parts of no element are left out."""
    stage, wrapper = engine.zero_optimization_stage(), engine.optimizer
    optimizer = wrapper.optimizer if stage else wrapper
    shards = []
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if stage == 3:
            group, offset, length = wrapper.grad_position[wrapper.get_param_id(parameter)]
            start, flat = rank() * length, wrapper.fp32_partitioned_groups_flat[group]
            length = min(length, parameter.ds_numel - start)  # the last ranks' parts are padded
        elif stage:
            mapping = parameter._hp_mapping
            if mapping is None:  # all of it lies on other ranks
                continue
            start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            flat, offset = (
                wrapper.single_partition_of_fp32_groups[mapping.param_group_index],
                mapping.hp_fragment_address.start,
            )
        else:
            start, length, flat, offset = 0, parameter.numel(), parameter, 0
        if length <= 0:
            continue
        state = adam_state(optimizer, flat)
        whole = {"weight": flat.detach()} | {key: state[key] for key in MOMENTS}
        views = {key: tensor.view(-1).narrow(0, offset, length) for key, tensor in whole.items()}
        shards.append(Shard(name, start, views, state))
    return shards


def local_buffers(engine: Engine) -> list[torch.Tensor]:
    """ZeRO-3: the flat buffers behind local_shards(). fp32 weights of an fp32 model are its own weights: left out."""
    wrapper, buffers = engine.optimizer, []
    for model_flat, master_flat in zip(wrapper.fp16_partitioned_groups_flat, wrapper.fp32_partitioned_groups_flat):
        if master_flat is not model_flat:
            buffers.append(master_flat)
        buffers += [adam_state(wrapper.optimizer, master_flat)[key] for key in MOMENTS]
    return buffers


def write_weights(engine: Engine, weights: dict[str, torch.Tensor]) -> None:
    """Whole fp32 weights, by parameter name, into what this rank's optimizer steps on."""
    for shard in local_shards(engine):
        if shard.name in weights:
            here = slice(shard.start, shard.start + len(shard.tensors["weight"]))
            shard.tensors["weight"].copy_(weights[shard.name].flatten()[here])


def publish_weights(engine: Engine) -> None:
    """After the fp32 weights were written: round them into the weights that forwards use. All ranks together."""
    wrapper = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        for model_flat, master_flat in zip(wrapper.fp16_partitioned_groups_flat, wrapper.fp32_partitioned_groups_flat):
            model_flat.data.copy_(master_flat.data)  # shards of the parameters are views of it
        if wrapper.persistent_parameters:  # small ones that stay whole between forwards
            wrapper.persistent_parameters[0].partition(wrapper.persistent_parameters)
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
    elif engine.zero_optimization_stage():
        wrapper.update_lp_params()


class Snapshot:
    """A copy, in host memory, of what an update changes: one that is broken off is undone with it."""

    def __init__(self):
        self.copies: list[dict[str, torch.Tensor]] = []  # allocated once, used again
        self.steps: list[float] = []

    def take(self, engine: Engine) -> None:
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

    def restore(self, engine: Engine) -> None:
        """All ranks together."""
        for shard, copies, step in zip(local_shards(engine), self.copies, self.steps):
            shard.state["step"].fill_(step)
            for key, tensor in shard.tensors.items():
                tensor.copy_(copies[key])
        publish_weights(engine)


# ---------------------------------------------------------------------- files
def shard_file(folder: Path, owner: int) -> Path:
    return folder / f"rank_{owner:05d}.safetensors"


def save_shards(engine: Engine, folder: Path) -> None:
    """Write this rank's shards into an existing folder. Without ZeRO all ranks hold the same, and rank 0 writes."""
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
        UserError: a file that is damaged, or elements that no file holds; nothing has been overwritten then.
    """
    shards = local_shards(engine)
    with ExitStack() as stack:
        pieces = open_pieces(files, stack)
        for shard in shards:
            found = sum(max(0, upper - lower) for lower, upper, _ in overlaps(shard, pieces.get(shard.name, [])))
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
    """What the files of all ranks hold, by parameter name; they are open until the stack is closed."""
    pieces: dict[str, list[Piece]] = {}
    for path in sorted(files):
        require_file(path, REMEDY)
        with sentences(str(path)):
            file = stack.enter_context(safe_open(path, framework="pt"))
            index = check(ShardIndex, json.loads((file.metadata() or {})["index"]), str(path), REMEDY)
            for name, (start, step) in index.items():
                lengths = {tuple(file.get_slice(f"{name}/{key}").get_shape()) for key in ("weight", *MOMENTS)}
                ((length,),) = lengths
                pieces.setdefault(name, []).append(Piece(int(start), int(start) + length, step, file))
    return pieces


def overlaps(shard: Shard, pieces: list[Piece]) -> list[tuple[int, int, Piece]]:
    """(first, one past the last) element that a piece and the shard have in common."""
    end = shard.start + len(shard.tensors["weight"])
    found = [(max(piece.start, shard.start), min(piece.stop, end), piece) for piece in pieces]
    return [(lower, upper, piece) for lower, upper, piece in found if lower < upper]
