"""The critic: an MLP on the language model's hidden state at the last prompt token.

That position predicts the first action token; RL4VLA found it the best of four places to read the value from. Sizes
and key names (value_head.mlp.{0,2,4}) as in RLinf. All weights start N(0, 0.02), biases at zero: RLinf declares a
Kaiming start that never runs (its code rejects "gelu"), so this is what its published numbers were made with. Where
the hidden state has not their 4,096 dimensions, the first layer's weights are scaled so that what it gives is as large:
with 96 it would be a sixth. (Tiny policy: explained variance 0.25 after six iterations, with three times the critic's
rate as well; 0.03 before.)

It computes in fp32 beside a bf16 model too: returns differ by less than bf16 resolves (2 decimal digits). Its weights
are fp32 as well, except inside a DeepSpeed bf16 engine, which casts every parameter (0.19.8 has no exception for
parameters, only for buffers); there the optimizer's fp32 master weights are what is trained.
"""

import torch
import torch.nn.functional as F
from torch import nn

PUBLISHED_HIDDEN_SIZE = 4096


class Float32Linear(nn.Linear):
    """A linear layer whose arithmetic is fp32 whatever its weights are stored in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class ValueHead(nn.Module):
    """hidden [B, H] -> values fp32 [B, num_outputs]; num_outputs is 1 for OpenVLA, chunk_size for OpenVLA-OFT."""

    def __init__(self, hidden_size: int, num_outputs: int):
        super().__init__()
        self.mlp = nn.Sequential(
            Float32Linear(hidden_size, 512),
            nn.GELU(),
            Float32Linear(512, 128),
            nn.GELU(),
            Float32Linear(128, num_outputs, bias=False),
        )
        for layer in (self.mlp[0], self.mlp[2], self.mlp[4]):
            nn.init.normal_(layer.weight, std=0.02)
        with torch.no_grad():
            self.mlp[0].weight *= (PUBLISHED_HIDDEN_SIZE / hidden_size) ** 0.5
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.zeros_(layer.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mlp(hidden)


def value_errors(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, value_clip: float | None, huber_delta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped Huber loss: the larger of a value's own and that of a value at most value_clip from the rollout's.

    Args:
        values, old_values, returns: [...], now, in the rollout, and what is regressed on. value_clip: None is no limit.
        huber_delta: errors above it count linearly.

    Returns:
        losses [...]; bool [...], values that are further than value_clip from the rollout's.
    """
    change = values - old_values
    errors = F.huber_loss(values, returns, reduction="none", delta=huber_delta)
    if value_clip is None:
        return errors, torch.zeros_like(change, dtype=torch.bool)
    limited = old_values + change.clamp(-value_clip, value_clip)
    limited_errors = F.huber_loss(limited, returns, reduction="none", delta=huber_delta)
    return torch.maximum(errors, limited_errors), change.abs() > value_clip
