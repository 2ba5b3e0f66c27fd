"""The critic: an MLP on the language model's hidden state at the last prompt token.

That position predicts the first action token; RL4VLA found it the best of four places to read the value from. Sizes
and key names
(value_head.mlp.{0,2,4}) as in RLinf. All weights start N(0, 0.02), biases at zero: RLinf declares a Kaiming start that
never
runs (its code rejects "gelu"), so this is what its published numbers were made with.
"""

import torch
from torch import nn


class ValueHead(nn.Module):
    """hidden [B, H] -> values [B, num_outputs]; num_outputs is 1 for OpenVLA, chunk_size for OpenVLA-OFT."""

    def __init__(self, hidden_size: int, num_outputs: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 512),
            nn.GELU(),
            nn.Linear(512, 128),
            nn.GELU(),
            nn.Linear(128, num_outputs, bias=False),
        )
        for layer in (self.mlp[0], self.mlp[2], self.mlp[4]):
            nn.init.normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mlp(hidden)
