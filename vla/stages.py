"""The two halves of an iteration, as context managers.

Inside `rollout_stage` every rank has whole weights and is free: ranks may make different numbers of forwards. Outside
it ranks are in LOCK-STEP: under ZeRO-3 every rank makes the same forwards, backwards and gathers in the same order,
so nothing there may depend on one rank's data unless it was all-reduced first.

ZeRO-3's hooks gather every layer for every generated token: 4 to 10 times slower, and a hang as soon as ranks make
different numbers of forwards. So the rollout uses a second, plain copy of the policy; once per rollout its trainable
weights are copied from the engine's, parameter by parameter, and no hook is touched. Below stage 3 the engine's own
module is whole and is used as it is.
"""

import contextlib
import copy
from collections.abc import Iterator

import deepspeed
import torch
from torch import nn


def make_rollout_copy(policy: nn.Module, zero_stage: int) -> nn.Module | None:
    """Call before deepspeed.initialize: the plain copy that acts in the rollout, or None where none is needed.

    It shares the policy's weights until deepspeed.initialize takes them apart: each rank then keeps its shard, and what
    load_policy() read stays with the copy. So a rank never holds more than one whole model and its shard.
    """
    if zero_stage < 3:
        return None
    shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in policy.parameters()}
    return copy.deepcopy(policy, memo=shared).eval()


@contextlib.contextmanager
def rollout_stage(engine: deepspeed.DeepSpeedEngine, rollout_copy: nn.Module | None) -> Iterator[nn.Module]:
    """Yields a policy with whole, current weights, in eval mode, without autograd."""
    if rollout_copy is None:
        policy = engine.module
    else:
        copy_trainable(engine.module, rollout_copy)
        policy = rollout_copy
    policy.eval()
    with torch.no_grad():
        yield policy
    policy.free_graphs()  # the update needs their memory; the next rollout records anew


@contextlib.contextmanager
def update_stage(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Training mode; must end on an optimizer step, so that no half-accumulated gradient reaches the next iteration."""
    engine.train()
    yield
    if not engine.is_gradient_accumulation_boundary():
        raise RuntimeError("the update ended between two optimizer steps: micro batches per minibatch were miscounted")


def copy_trainable(source: nn.Module, target: nn.Module) -> None:
    """Copy the trainable parameters, gathering the sharded ones one at a time. A collective: all ranks together."""
    with torch.no_grad():
        for whole, sharded in zip(target.parameters(), source.parameters()):
            if sharded.requires_grad:
                with deepspeed.zero.GatheredParameters([sharded]):
                    whole.copy_(sharded)


def whole_state_dict(
    engine: deepspeed.DeepSpeedEngine, keep: bool, without_base: bool = False
) -> dict[str, torch.Tensor]:
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
