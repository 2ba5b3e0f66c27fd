"""Two layers with fewer passes over memory than transformers' and peft's, the same functions otherwise.

Measured where they are used: a LoRA update of openvla-7b on an H100 (bf16, 16 decisions, recomputing activations) took
844 ms with the libraries' own, 794 ms with the first and 748 ms with both (dev/LOG.md).
"""

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class FusedRMSNorm(LlamaRMSNorm):
    """x / rms(x) * weight in one kernel; in bfloat16 the product is rounded once instead of twice."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, hidden_states.shape[-1:], self.weight, self.variance_epsilon)


class LoraLinear(Linear):
    """W x + B (s A x): peft scales B A x, which is as wide as the layer's output; A x is as wide as the rank.

    For what `vla/models/loading.py` injects: one adapter without dropout, in the precision of its layer, never merged.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        narrow = self.lora_A["default"](x)
        if self.scaling["default"] != 1.0:
            narrow = narrow * self.scaling["default"]
        return self.base_layer(x) + self.lora_B["default"](narrow)


def use_fused_layers(model: nn.Module) -> None:
    """Turn every RMSNorm and adapted linear layer of a model into ours; parameters and their names stay."""
    for module in model.modules():
        if type(module) is LlamaRMSNorm:
            module.__class__ = FusedRMSNorm
        elif type(module) is Linear:
            module.__class__ = LoraLinear
