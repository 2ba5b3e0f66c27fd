"""The losses of the two scripts on bare tensors, with flat flags."""


def split_flags(flags: dict) -> dict[str, dict]:
    """Flat flags of a loss -> what it passes on to its two parts."""
    surrogate = {name: flags.pop(name) for name in ("logprob_level", "clip_ratio_low", "clip_ratio_high", "dual_clip")}
    regularizers = {name: flags.pop(name, 0.0) for name in ("ent_coef", "kl_coef", "fan_coef")}
    return {"surrogate": surrogate, "regularizers": regularizers}


def ppo_loss_of(new_logprobs, entropy, new_values, mb, total_weight, **flags):
    from train_ppo import ppo_loss
    from vla.models.policy import PolicyOutput

    return ppo_loss(PolicyOutput(new_logprobs, entropy, new_values), mb, total_weight, **split_flags(flags), **flags)


def grpo_loss_of(new_logprobs, entropy, mb, total_weight, **flags):
    from train_grpo import grpo_loss
    from vla.models.policy import PolicyOutput

    return grpo_loss(PolicyOutput(new_logprobs, entropy, None), mb, total_weight, **split_flags(flags))
