"""The two halves of an iteration, as context managers.

Inside `rollout_stage` every rank has whole weights and is independent: ranks may make different numbers of forwards.
Outside it ranks are in LOCK-STEP. Under ZeRO-3 every rank makes the same forwards, backwards and gathers in the same
order. So no control flow there may depend on one rank's data, unless the data was all-reduced before.

ZeRO-3's hooks would gather every layer for every generated token. That is 4 to 10 times slower, and it hangs as soon as
ranks make different numbers of forwards. So the rollout uses a second, plain copy of the policy. Once per rollout, the
trainable weights are copied from the engine's policy, one parameter at a time, without touching a hook. Below stage 3
the engine's own module has whole weights and is used directly.

With offload "stage" a GPU holds, besides activations, only the memory that its stage needs:

                                   rollout                  update
    whole copy                     on the GPU, gathered     freed
    shards of frozen weights       host memory              on the GPU
    shards of trained weights      on the GPU               on the GPU
    fp32 weights, Adam's moments   host memory              on the GPU
    gradients and their buckets    host memory, freed       on the GPU

The copy needs no host memory, because it is gathered again in every rollout, frozen weights included. Each shard leaves
the GPU as soon as it has been read. This module moves fp32 weights, moments and frozen shards itself: DeepSpeed's
offload_states (0.19.8) moves the first two only for its own compiled FusedAdam, and it does not know the third. It does
move gradients and buckets. Nothing is computed on the way, so the losses equal those of offload "none", bit for bit.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from torch import nn

from vla.distributed import Engine, all_reduce_max
from vla.training.optimizer_state import local_buffers

GRADIENTS = (OffloadStateTypeEnum.lp_grads, OffloadStateTypeEnum.contiguous_grad_buffer)
GIB = 2**30


def make_rollout_copy(policy: nn.Module, zero_stage: int, offload: str = "none") -> nn.Module | None:
    """The plain copy that acts in the rollout, or None if none is needed. Call it before deepspeed.initialize().

    The copy shares the policy's weights until deepspeed.initialize() shards them. Then the engine keeps this rank's
    shard, and the copy keeps the weights that load_policy() read. So a rank never holds more than one whole model and
    its shard. With offload "stage" the copy's parameters are empty, and every rollout fills them.
    """
    if zero_stage < 3:
        return None
    weights = {id(p): p.new_empty(0) if offload == "stage" else p.data for p in policy.parameters()}
    shared = {key: nn.Parameter(weight, requires_grad=False) for key, weight in weights.items()}
    return copy.deepcopy(policy, memo=shared).eval()


class StageSwitcher:
    """Moves memory between the stages and measures it.

    Args:
        rollout_copy: from make_rollout_copy(), with the same offload.
        offload: "none" or "stage". read_deepspeed_config() allows the latter only under ZeRO-3.
    """

    def __init__(self, engine: Engine, rollout_copy: nn.Module | None, offload: str = "none"):
        self.engine, self.rollout_copy, self.offload = engine, rollout_copy, offload == "stage"
        self.device = torch.device(get_accelerator().current_device_name())
        self.host: dict[torch.Tensor, torch.Tensor] = {}  # each tensor's copy in host memory, allocated once
        self.gib: dict[str, float] = {}  # memory/*, the largest since pop_metrics()

    # ------------------------------------------------------------------ moving
    def to_rollout(self) -> nn.Module:
        """The policy with whole, current weights. All ranks together."""
        if self.rollout_copy is None:
            return self.engine.module
        if self.offload:
            self._fill_copy()
        else:
            copy_trainable(self.engine.module, self.rollout_copy)
        return self.rollout_copy

    def to_update(self) -> None:
        """Make room for an update."""
        if self.offload:
            self._free_copy()

    def _fill_copy(self) -> None:
        """Move the optimizer's state and gradients to host memory. Gather every weight into the whole copy."""
        for tensor in local_buffers(self.engine):
            self._to_host(tensor)
        self.engine.offload_states(include=GRADIENTS, pin_memory=self.device.type == "cuda")
        with torch.no_grad():
            for whole, sharded in zip(self.rollout_copy.parameters(), self.engine.module.parameters()):
                with deepspeed.zero.GatheredParameters([sharded]):
                    whole.data = torch.empty(sharded.shape, dtype=whole.dtype, device=self.device)
                    whole.copy_(sharded)
                if not sharded.requires_grad:
                    self._to_host(sharded.ds_tensor, frozen=True)
        get_accelerator().empty_cache()

    def _free_copy(self) -> None:
        """Free the whole copy, and move shards and the optimizer's state back to the GPU."""
        for whole, sharded in zip(self.rollout_copy.parameters(), self.engine.module.parameters()):
            whole.data = whole.new_empty(0)
            if not sharded.requires_grad:
                self._to_device(sharded.ds_tensor)
        for tensor in local_buffers(self.engine):
            self._to_device(tensor)
        self.engine.reload_states()
        get_accelerator().empty_cache()

    def _to_host(self, tensor: torch.Tensor, frozen: bool = False) -> None:
        """Move a tensor to host memory. A frozen one never changes, so it is copied only the first time."""
        is_known = tensor in self.host
        if not is_known:
            self.host[tensor] = torch.empty_like(tensor, device="cpu", pin_memory=self.device.type == "cuda")
        if not (is_known and frozen):
            self.host[tensor].copy_(tensor)
        tensor.data = self.host[tensor]

    def _to_device(self, tensor: torch.Tensor) -> None:
        tensor.data = self.host[tensor].to(self.device, copy=True)

    # ------------------------------------------------------------------ measuring
    @contextlib.contextmanager
    def measured(self, stage: str) -> Iterator[None]:
        """Measure memory: what a stage finds when it begins, and the peak until it ends."""
        get_accelerator().reset_peak_memory_stats()
        forget_host_peak()
        resident, host_resident = device_memory()[0], host_memory()[0]
        yield
        sizes = {
            f"memory/{stage}_resident_gib": resident,
            f"memory/{stage}_peak_gib": device_memory()[1],
            f"memory/host_{stage}_resident_gib": host_resident,
            f"memory/host_{stage}_peak_gib": host_memory()[1],
        }
        for tag, size in sizes.items():
            self.gib[tag] = max(self.gib.get(tag, 0.0), size / GIB)

    def pop_metrics(self) -> dict[str, float]:
        """The memory/* metrics of the rank that needs most. Measuring then starts again. All ranks together."""
        largest = all_reduce_max(torch.tensor(list(self.gib.values())))
        metrics, self.gib = dict(zip(self.gib, largest.tolist())), {}
        return metrics


def host_memory() -> tuple[int, int]:
    """Bytes of this process in host memory, without its env workers: now, and the peak since forget_host_peak()."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return tuple(int(kib[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))


def forget_host_peak() -> None:
    with contextlib.suppress(OSError):  # some containers forbid it, and the peak is then that of the whole run
        Path("/proc/self/clear_refs").write_text("5")


def device_memory() -> tuple[int, int]:
    """Bytes of torch's tensors on this rank's GPU: now, and the peak. Without a GPU, bytes of host memory."""
    if get_accelerator().device_name() == "cpu":
        return host_memory()
    return get_accelerator().memory_allocated(), get_accelerator().max_memory_allocated()


@contextlib.contextmanager
def rollout_stage(stages: StageSwitcher) -> Iterator[nn.Module]:
    """Yield a policy with whole, current weights, in eval mode and without autograd."""
    policy = stages.to_rollout().eval()
    try:
        with torch.no_grad(), stages.measured("rollout"):
            yield policy
    finally:
        policy.free_graphs()  # the update needs their memory, and the next rollout records them again
        stages.to_update()


@contextlib.contextmanager
def update_stage(stages: StageSwitcher) -> Iterator[None]:
    """Training mode for an update. It must end on an optimizer step, or half a gradient reaches the next iteration."""
    stages.engine.train()
    with stages.measured("update"):
        yield
    if not stages.engine.is_gradient_accumulation_boundary():
        raise RuntimeError("the update ended between two optimizer steps: micro batches per minibatch were miscounted")


def copy_trainable(source: nn.Module, target: nn.Module) -> None:
    """Copy the trainable parameters. Sharded ones are gathered one at a time. All ranks together."""
    with torch.no_grad():
        for whole, sharded in zip(target.parameters(), source.parameters()):
            if sharded.requires_grad:
                with deepspeed.zero.GatheredParameters([sharded]):
                    whole.copy_(sharded)


def trained_parameters(engine: Engine) -> Iterator[nn.Parameter]:
    """The trained parameters in their order, each of them whole until the next one. All ranks together."""
    with torch.no_grad():
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter]):
                    yield parameter


def whole_state_dict(engine: Engine, keep: bool, without_base: bool = False) -> dict[str, torch.Tensor]:
    """Every whole parameter, by name, on the CPU. All ranks together.

    Args:
        keep: False gives an empty dict, for ranks that only take part in the gathering.
        without_base: leave out the frozen weights under an adapter, because the base model's folder has them.
    """
    state = {}
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            if without_base and "lora_" not in name and not name.startswith("value_head."):
                continue
            with deepspeed.zero.GatheredParameters([parameter]):
                if keep:
                    state[name] = parameter.detach().cpu().clone()
    return state
