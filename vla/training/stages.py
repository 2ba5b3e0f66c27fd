"""The two halves of an iteration, as context managers.

Inside `rollout_stage` every rank has whole weights and is free: ranks may make different numbers of forwards. Outside
it ranks are in LOCK-STEP: under ZeRO-3 every rank makes the same forwards, backwards and gathers in the same order,
so nothing there may depend on one rank's data unless it was all-reduced first.

ZeRO-3's hooks gather every layer for every generated token: 4 to 10 times slower, and a hang as soon as ranks make
different numbers of forwards. So the rollout uses a second, plain copy of the policy; once per rollout its trainable
weights are copied from the engine's, parameter by parameter, and no hook is touched. Below stage 3 the engine's own
module is whole and is used as it is.

With offload "stage" a GPU holds, besides activations, only what its stage needs:

                                   rollout                  update
    whole copy                     on the GPU, gathered     gone
    shards of frozen weights       host memory              on the GPU
    shards of trained weights      on the GPU               on the GPU
    fp32 weights, Adam's moments   host memory              on the GPU
    gradients and their buckets    host memory, gone        on the GPU

The copy needs no host memory: it is gathered anew, frozen weights included, each shard leaving the GPU as soon as it
has been read. Masters, moments and frozen shards are moved here, because DeepSpeed's offload_states (0.19.8) moves the
first two for its own compiled FusedAdam alone and does not know the last; gradients and buckets it moves well. Nothing
is computed on the way, so the losses are those of offload "none", bit for bit.
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
    """Call before deepspeed.initialize: the plain copy that acts in the rollout, or None where none is needed.

    It shares the policy's weights until deepspeed.initialize takes them apart: each rank then keeps its shard, and what
    load_policy() read stays with the copy. So a rank never holds more than one whole model and its shard. With offload
    "stage" its parameters are empty: every rollout fills them.
    """
    if zero_stage < 3:
        return None
    weights = {id(p): p.new_empty(0) if offload == "stage" else p.data for p in policy.parameters()}
    shared = {key: nn.Parameter(weight, requires_grad=False) for key, weight in weights.items()}
    return copy.deepcopy(policy, memo=shared).eval()


class StageSwitcher:
    """Moves memory between the stages and measures it.

    Args:
        rollout_copy: of make_rollout_copy(), with the same offload.
        offload: "none" or "stage"; the latter under ZeRO-3 alone (read_deepspeed_config refuses the rest).
    """

    def __init__(self, engine: Engine, rollout_copy: nn.Module | None, offload: str = "none"):
        self.engine, self.rollout_copy, self.offload = engine, rollout_copy, offload == "stage"
        self.device = torch.device(get_accelerator().current_device_name())
        self.host: dict[torch.Tensor, torch.Tensor] = {}  # a tensor's place in host memory, allocated once
        self.gib: dict[str, float] = {}  # memory/*, the largest since pop_metrics()

    # ------------------------------------------------------------------ moving
    def to_rollout(self) -> nn.Module:
        """The policy with whole, current weights. All ranks together."""
        if self.rollout_copy is None:
            return self.engine.module
        if not self.offload:
            copy_trainable(self.engine.module, self.rollout_copy)
            return self.rollout_copy
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
        return self.rollout_copy

    def to_update(self) -> None:
        """Weights sharded, the optimizer's state beside them."""
        if not self.offload:
            return
        for whole, sharded in zip(self.rollout_copy.parameters(), self.engine.module.parameters()):
            whole.data = whole.new_empty(0)
            if not sharded.requires_grad:
                self._to_device(sharded.ds_tensor)
        for tensor in local_buffers(self.engine):
            self._to_device(tensor)
        self.engine.reload_states()
        get_accelerator().empty_cache()

    def _to_host(self, tensor: torch.Tensor, frozen: bool = False) -> None:
        """frozen: it never changes, so it is copied out once and from then on only let go."""
        known = tensor in self.host
        if not known:
            self.host[tensor] = torch.empty_like(tensor, device="cpu", pin_memory=self.device.type == "cuda")
        if not (known and frozen):
            self.host[tensor].copy_(tensor)
        tensor.data = self.host[tensor]

    def _to_device(self, tensor: torch.Tensor) -> None:
        tensor.data = self.host[tensor].to(self.device, copy=True)

    # ------------------------------------------------------------------ measuring
    @contextlib.contextmanager
    def measured(self, stage: str) -> Iterator[None]:
        """What lies in memory as the stage begins, and the most there is until it ends."""
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
        """memory/* of the rank that needs most, and start again. All ranks together."""
        largest = all_reduce_max(torch.tensor(list(self.gib.values())))
        metrics, self.gib = dict(zip(self.gib, largest.tolist())), {}
        return metrics


def host_memory() -> tuple[int, int]:
    """Bytes of this process in host memory, its env workers not included: now, and the most since
    forget_host_peak()."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return tuple(int(kib[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))


def forget_host_peak() -> None:
    with contextlib.suppress(OSError):  # some containers forbid it: the peak is then that of the whole run
        Path("/proc/self/clear_refs").write_text("5")


def device_memory() -> tuple[int, int]:
    """Bytes of torch's tensors on this rank's GPU: now and at most; without a GPU, the host's."""
    if get_accelerator().device_name() == "cpu":
        return host_memory()
    return get_accelerator().memory_allocated(), get_accelerator().max_memory_allocated()


@contextlib.contextmanager
def rollout_stage(stages: StageSwitcher) -> Iterator[nn.Module]:
    """Yields a policy with whole, current weights, in eval mode, without autograd."""
    policy = stages.to_rollout().eval()
    try:
        with torch.no_grad(), stages.measured("rollout"):
            yield policy
    finally:
        policy.free_graphs()  # the update needs their memory; the next rollout records anew
        stages.to_update()


@contextlib.contextmanager
def update_stage(stages: StageSwitcher) -> Iterator[None]:
    """Training mode; must end on an optimizer step, so that no half-accumulated gradient reaches the next iteration."""
    stages.engine.train()
    with stages.measured("update"):
        yield
    if not stages.engine.is_gradient_accumulation_boundary():
        raise RuntimeError("the update ended between two optimizer steps: micro batches per minibatch were miscounted")


def copy_trainable(source: nn.Module, target: nn.Module) -> None:
    """Copy the trainable parameters, gathering the sharded ones one at a time. A collective: all ranks together."""
    with torch.no_grad():
        for whole, sharded in zip(target.parameters(), source.parameters()):
            if sharded.requires_grad:
                with deepspeed.zero.GatheredParameters([sharded]):
                    whole.copy_(sharded)


def whole_state_dict(engine: Engine, keep: bool, without_base: bool = False) -> dict[str, torch.Tensor]:
    """Every parameter, whole, on the CPU. A collective; ranks with keep=False take part and get an empty dict.

    Args:
        without_base: leave out the frozen weights under an adapter, which lie in the base model's folder.
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
