"""Terms of the loss that regularise a policy: entropy, distance from the starting policy, and smoothness.

B samples   C actions per decision   D = 7 tokens per action   256 bins per token
"""

import torch


def regularization(
    new, mb, total_weight: float, *, ent_coef: float, kl_coef: float, fan_coef: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """kl_coef * KL(policy, starting policy) + fan_coef * FAN - ent_coef * entropy, each a mean over tokens.

    The KL is GRPO's published estimate (arXiv 2402.03300, eq. 4): k3 of the sampled tokens. Its value estimates
    KL(policy, starting policy). Its gradient differs: if the samples come from the policy itself, it is on average the
    gradient of KL(starting policy, policy). Log ratios are limited to 20, and have no gradient beyond that, because exp
    overflows at 88. FAN is exact.

    Terms with coefficient 0 are skipped. Entropy is always logged.

    Args:
        new: policy.PolicyOutput, the current policy's log-probabilities of the tokens.
        mb: rollout_buffer.MicroBatch.
        total_weight: divides the weighted sums, as for the clipped surrogate.

    Returns:
        the sum of the terms, and metrics by tag.
    """

    def mean(x: torch.Tensor) -> torch.Tensor:  # [B, C, D]
        return (x.mean(dim=-1) * mb.weights).sum() / total_weight

    metrics = {"train/entropy_loss": mean(new.entropy)}
    loss = -ent_coef * metrics["train/entropy_loss"]
    if kl_coef:
        executed = mb.weights[..., None] > 0  # other log-probabilities are arbitrary, and infinity * 0 would be NaN
        log_ratio = torch.where(executed, mb.reference_logprobs - new.logprobs, 0.0).clamp(max=20.0)
        metrics["train/actor/reference_kl"] = mean(log_ratio.exp() - 1.0 - log_ratio)
        loss = loss + kl_coef * metrics["train/actor/reference_kl"]
    if fan_coef:
        metrics["train/actor/fan_kl"] = mean(new.fan_kl)
        loss = loss + fan_coef * metrics["train/actor/fan_kl"]
    return loss, metrics
