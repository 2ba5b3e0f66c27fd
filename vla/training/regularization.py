"""Terms of the loss that regularise a policy: entropy, distance from the starting policy, and smoothness.

B samples   C actions per decision   D = 7 tokens per action   256 bins per token
"""

import torch
from torch import Tensor

from vla.models.policy import PolicyOutput
from vla.training.rollout_buffer import MicroBatch


def regularization(
    new: PolicyOutput, mb: MicroBatch, *, ent_coef: float, kl_coef: float, fan_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """kl_coef * KL(policy, starting policy) + fan_coef * FAN - ent_coef * entropy, each a mean over tokens.

    The KL is GRPO's published estimate k3 (arXiv 2402.03300, eq. 4) of the sampled tokens. Log ratios are limited to
    20, because exp overflows at 88.
    """
    metrics = {"train/entropy_loss": mb.mean(new.entropy.mean(dim=-1))}
    loss = -ent_coef * metrics["train/entropy_loss"]
    if kl_coef:
        executed = mb.weights[..., None] > 0  # other log-probabilities are arbitrary, and infinity * 0 would be NaN
        log_ratio = torch.where(executed, mb.reference_logprobs - new.logprobs, 0.0).clamp(max=20.0)  # [B, C, D]
        metrics["train/actor/reference_kl"] = mb.mean((log_ratio.exp() - 1.0 - log_ratio).mean(dim=-1))
        loss = loss + kl_coef * metrics["train/actor/reference_kl"]
    if fan_coef:
        metrics["train/actor/fan_kl"] = mb.mean(new.fan_kl.mean(dim=-1))
        loss = loss + fan_coef * metrics["train/actor/fan_kl"]
    return loss, metrics
