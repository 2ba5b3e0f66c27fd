"""The critic: an MLP on the language model's hidden state at the last prompt token.

That position predicts the first action token. RL4VLA found it the best of four places to read the value from. Sizes
and key names (value_head.mlp.{0,2,4}) are RLinf's. All weights start from N(0, 0.02), and biases at zero. RLinf
declares a Kaiming initialisation, but that code never runs (it rejects "gelu"). So its published numbers were made with
N(0, 0.02).

If the hidden state does not have RLinf's 4,096 dimensions, the first layer's weights are scaled so that its outputs are
as large. With 96 dimensions they would be a sixth. (For the tiny policy this raised the explained variance after six
iterations from 0.03 to 0.25, together with three times the critic's learning rate.)

The critic computes in fp32 even if the model is bf16, because returns differ by less than bf16 resolves (2 decimal
digits). Its weights are fp32, too, except inside a DeepSpeed bf16 engine. That engine casts every parameter (0.19.8
makes exceptions only for buffers), and trains the optimizer's fp32 weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PUBLISHED_HIDDEN_SIZE = 4096


class Float32Linear(nn.Linear):
    """A linear layer that computes in fp32, whatever the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class ValueHead(nn.Module):
    """hidden [B, H] -> values fp32 [B, num_outputs]. num_outputs is 1 for OpenVLA and chunk_size for OpenVLA-OFT."""

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

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(hidden)


def value_errors(
    values: Tensor, old_values: Tensor, returns: Tensor, *, value_clip: float | None, huber_delta: float
) -> tuple[Tensor, Tensor]:
    """Clipped Huber loss: the larger of two losses, of the value and of the value within old_value +- value_clip.

    Returns:
        losses, and bool, True for values that are further than value_clip from the rollout's. All shapes are [...].
    """
    change = values - old_values
    errors = F.huber_loss(values, returns, reduction="none", delta=huber_delta)
    if value_clip is None:
        return errors, torch.zeros_like(change, dtype=torch.bool)
    limited = old_values + change.clamp(-value_clip, value_clip)
    limited_errors = F.huber_loss(limited, returns, reduction="none", delta=huber_delta)
    return torch.maximum(errors, limited_errors), change.abs() > value_clip
