"""What keeps a policy's distribution in shape while it learns: entropy, nearness to where it started, smoothness.

Shapes: B samples, C actions per decision, D = 7 tokens per action, 256 bins per token.
"""

import torch


def regularization(
    new, mb, total_weight: float, *, ent_coef: float, kl_coef: float, fan_coef: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """kl_coef * KL(policy, starting policy) + fan_coef * FAN - ent_coef * entropy, means over tokens.

    The KL is estimated as GRPO publishes it (arXiv 2402.03300, eq. 4): k3 of the tokens that were sampled. Its value
    estimates KL(policy, starting policy). Its gradient is not that KL's: while the samples are the policy's own, it is
    on average the gradient of KL(starting policy, policy). Log ratios count up to 20 and have no gradient beyond, since
    exp overflows at 88. FAN is exact. What is off is neither computed nor logged; entropy always is.

    Args:
        new: policy.PolicyOutput, what the policy as it is now makes of the tokens. mb: rollout_buffer.MicroBatch.
        total_weight: what weighted sums are divided by, as for the clipped surrogate.
    """

    def mean(x: torch.Tensor) -> torch.Tensor:  # [B, C, D]
        return (x.mean(dim=-1) * mb.weights).sum() / total_weight

    metrics = {"train/entropy_loss": mean(new.entropy)}
    loss = -ent_coef * metrics["train/entropy_loss"]
    if kl_coef:
        executed = mb.weights[..., None] > 0  # what was not may be anything: infinity times a weight of 0 is NaN
        log_ratio = torch.where(executed, mb.reference_logprobs - new.logprobs, 0.0).clamp(max=20.0)
        metrics["train/actor/reference_kl"] = mean(log_ratio.exp() - 1.0 - log_ratio)
        loss = loss + kl_coef * metrics["train/actor/reference_kl"]
    if fan_coef:
        metrics["train/actor/fan_kl"] = mean(new.fan_kl)
        loss = loss + fan_coef * metrics["train/actor/fan_kl"]
    return loss, metrics
