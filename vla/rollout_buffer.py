"""One iteration's experience: preallocated, every shape asserted when it is stored.

    T decisions per rollout   N envs on this rank   C actions per decision   D = 7   L prompt ids   B = T * N decisions

Pixels are kept once, as uint8 at the model's resolution; beside them what frozen vision towers made of them, so that
the update does not run the towers again. A broadcast can not slip in: RL4VLA's buffer stored one
log-probability in seven columns and so trained with 7 times the policy loss.
"""

import math
from typing import NamedTuple

import torch

from vla.action_tokens import ACTION_DIM
from vla.policy import PolicyInputs


class MicroBatch(NamedTuple):
    """What one forward of the update reads, on the model's device."""

    inputs: PolicyInputs  # [B, ...]
    tokens: torch.Tensor  # int64 [B, C, D]
    old_logprobs: torch.Tensor  # [B, C, D]
    old_values: torch.Tensor  # [B, C]
    advantages: torch.Tensor  # [B, C]
    returns: torch.Tensor  # [B, C]
    loss_mask: torch.Tensor  # bool [B, C]: actions that were executed


class RolloutBuffer:
    """Storage for T x N decisions on the CPU (pinned where there is a GPU).

    Args:
        feature_shape: (P, E) of PolicyInputs.features, or None where towers are trained and nothing is kept.
    """

    def __init__(
        self,
        num_chunks: int,
        num_envs: int,
        chunk_size: int,
        image_size: tuple[int, int],
        prompt_length: int,
        feature_shape: tuple[int, int] | None = None,
        feature_dtype: torch.dtype = torch.float32,
        pin: bool = False,
    ):
        self.num_chunks, self.num_envs = num_chunks, num_envs

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(num_chunks, num_envs, *shape, dtype=dtype, pin_memory=pin)

        self.fields = {
            "images": new(*image_size, 3, dtype=torch.uint8),
            "prompt_ids": new(prompt_length, dtype=torch.int64),
            "prompt_mask": new(prompt_length, dtype=torch.bool),
            "tokens": new(chunk_size, ACTION_DIM, dtype=torch.int64),
            "logprobs": new(chunk_size, ACTION_DIM),
            "values": new(chunk_size),
            "rewards": new(chunk_size),
            "valid": new(chunk_size, dtype=torch.bool),
            "dones": new(dtype=torch.bool),
            "final_values": new(),
        }
        if feature_shape is not None:
            self.fields["features"] = new(*feature_shape, dtype=feature_dtype)

    def __getattr__(self, name: str) -> torch.Tensor:  # [T, N, ...]
        try:
            return self.__dict__["fields"][name]
        except KeyError:
            raise AttributeError(name) from None

    def add(self, t: int, inputs: PolicyInputs, **decision: torch.Tensor) -> None:
        """Store decision t of every env: all fields but those of `inputs` by name. Shapes and dtypes must be exact."""
        decision = {name: field for name, field in inputs._asdict().items() if field is not None} | decision
        if decision.keys() != self.fields.keys():
            raise ValueError(f"the buffer stores {sorted(self.fields)}, got {sorted(decision)}")
        for name, value in decision.items():
            slot = self.fields[name][t]
            if value.shape != slot.shape or value.dtype != slot.dtype:
                raise ValueError(
                    f"{name}: the buffer holds {tuple(slot.shape)} {slot.dtype}, got {tuple(value.shape)} {value.dtype}"
                )
            slot.copy_(value)

    def micro_batch(
        self, index: torch.Tensor, advantages: torch.Tensor, returns: torch.Tensor, device: torch.device
    ) -> MicroBatch:
        """The decisions `index` (int64 [B], t * N + n) with their advantages and returns, [T, N, C] each."""

        def pick(field: torch.Tensor) -> torch.Tensor:
            return field.flatten(0, 1)[index].to(device, non_blocking=True)

        return MicroBatch(
            PolicyInputs(*(pick(self.fields[name]) if name in self.fields else None for name in PolicyInputs._fields)),
            pick(self.tokens),
            pick(self.logprobs),
            pick(self.values),
            pick(advantages),
            pick(returns),
            pick(self.valid),
        )


def minibatch_block(num_chunks: int, num_minibatches: int) -> int:
    """The smallest number of envs whose decisions together are dealt evenly to the minibatches."""
    return num_minibatches // math.gcd(num_chunks, num_minibatches)


def minibatch_indices(
    num_chunks: int,
    num_envs: int,
    first_env: int,
    local_num_envs: int,
    num_minibatches: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Deal a rollout's decisions to minibatches: the same minibatches whatever the number of ranks.

    A block of envs (the smallest whose T decisions per env divide evenly) is shuffled on its own, and every minibatch
    gets an equal
    share of every block. So each rank has the same number of decisions in each minibatch (ZeRO-3 needs equal counts),
    and a
    minibatch holds the same decisions on 1, 2 or 8 ranks.

    Args:
        num_envs: over all ranks; first_env, local_num_envs: this rank's slice.
        generator: the same state on every rank.

    Returns:
        int64 [num_minibatches, T * local_num_envs / num_minibatches], entries t * local_num_envs + n.
    """
    block = minibatch_block(num_chunks, num_minibatches)
    order = torch.rand(num_envs // block, block * num_chunks, generator=generator).argsort(dim=1)
    local = order[first_env // block : (first_env + local_num_envs) // block]  # [blocks here, block * T]
    t, env_in_block = local // block, local % block
    env = torch.arange(len(local))[:, None] * block + env_in_block
    flat = t * local_num_envs + env
    return flat.view(len(local), num_minibatches, -1).transpose(0, 1).flatten(1)
