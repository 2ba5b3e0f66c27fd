"""The losses and advantages of the two scripts on bare tensors, with flat flags."""

from types import SimpleNamespace


def split_flags(flags: dict) -> dict[str, dict]:
    """Flat flags of a loss -> what it passes on to its parts."""
    surrogate = {name: flags.pop(name) for name in ("logprob_level", "clip_ratio_low", "clip_ratio_high", "dual_clip")}
    regularizers = {name: flags.pop(name, 0.0) for name in ("ent_coef", "kl_coef", "fan_coef")}
    return {"surrogate": surrogate, "regularizers": regularizers}


def gae_of(rewards, values, valid, dones, final_values, next_values, gamma, gae_lambda):
    from train_ppo import compute_gae

    buffer = SimpleNamespace(rewards=rewards, values=values, valid=valid, dones=dones, final_values=final_values)
    return compute_gae(buffer, next_values, gamma, gae_lambda)


def ppo_loss_of(new_logprobs, entropy, new_values, mb, total_weight, **flags):
    from train_ppo import ppo_loss
    from vla.models.policy import PolicyOutput

    flags |= split_flags(flags)
    flags["value_loss"] = {name: flags.pop(name) for name in ("value_clip", "huber_delta")}
    mb = mb._replace(total_weight=total_weight)
    return ppo_loss(PolicyOutput(new_logprobs, entropy, new_values), mb, **flags)


def grpo_loss_of(new_logprobs, entropy, mb, total_weight, **flags):
    from train_grpo import grpo_loss
    from vla.models.policy import PolicyOutput

    mb = mb._replace(total_weight=total_weight)
    return grpo_loss(PolicyOutput(new_logprobs, entropy, None), mb, **split_flags(flags))
