"""What one decision costs by arithmetic: counted on the meta device, where shapes are computed and no numbers.

torch's counter sees every matrix product of the real forward and backward, also of attention and recomputation. So
nothing here has to know how a model is built. An addition and a multiplication are two.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vla.models.action_tokens import ACTION_DIM
from vla.models.policy import VLAPolicy, uniform_noise
from vla.training.memory_plan import LiveBytes, meta_inputs, policy_of, recipe_of, set_checkpointing

MODEL_FLAGS = ("model_path", "model_type", "chunk_size", "lora_rank", "lora_scope", "dtype", "max_prompt_length")


def meta_policy_of(flags: dict, critic: bool = True) -> VLAPolicy:
    """The policy that these flags of a script ask for, without memory. Cached by memory_plan."""
    return policy_of(replace(recipe_of(flags), critic=critic))


def is_known(model_path: str) -> bool:
    """False: memory_plan takes the model for one of the published size."""
    from vla.models.tiny import TINY_PRESETS

    return model_path in TINY_PRESETS or (Path(model_path) / "config.json").is_file()


@cache
def act_flops(policy: VLAPolicy) -> float:
    """Of acting once in one env: towers, prompt, all tokens of a chunk, value."""
    inputs, _ = meta_inputs(policy, 1)
    noise = uniform_noise(1, policy.chunk_size, None).to("meta")
    counter = FlopCounterMode(display=False)
    with LiveBytes(item=policy.max_prompt_length), counter:
        inputs = policy.eval().prepare(inputs._replace(features=None))
        policy.act(inputs, 1.0, noise)
    return float(counter.get_total_flops())


@cache
def update_flops(policy: VLAPolicy, gradient_checkpointing: bool) -> float:
    """Of one decision's forward and backward in the update, with what gradient checkpointing computes twice."""
    set_checkpointing(policy, gradient_checkpointing)
    inputs, tokens = meta_inputs(policy, 1)
    counter = FlopCounterMode(display=False)
    with LiveBytes(item=policy.max_prompt_length), counter:
        new = policy.train()("evaluate", inputs, tokens)
        (new.logprobs.sum() + new.entropy.sum() + new.values.sum()).backward()
    policy.zero_grad(set_to_none=True)
    return float(counter.get_total_flops())


def passes(chunk_size: int) -> int:
    """How often acting reads all weights of the language model: once for the prompt, once per further token."""
    return ACTION_DIM if chunk_size == 1 else 1


def num_bytes(module: nn.Module, trained: bool = False) -> float:
    """Of its weights, or of those that are trained."""
    return float(sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad or not trained))
