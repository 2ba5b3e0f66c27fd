"""OpenVLA: two vision towers, a projector and a Llama that writes an action as 7 tokens, one after the other.

Parameter names are the published checkpoints' names, so loading is one strict load_state_dict. The language model is
transformers' LlamaForCausalLM; towers and projector are ours (vision.py), since no released package has them without
timm.

    B samples   L prompt ids   P patches   S = L + P positions   H hidden width   V vocabulary   D = 7 action tokens

Sequence: [BOS, P patches, padding, rest of the prompt, action tokens]. Prompts are padded on the left with BOS moved
to the front (RLinf's and RL4VLA's batched layout); positions count real tokens only, so padding changes nothing.
Source: openvla/openvla, prismatic/extern/hf/modeling_prismatic.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from vla.vision import TowerSpec, VisionBackbone, dinov2_spec, siglip_spec

# (embed_dim, depth, num_heads) of the timm models that published config.json files name
TIMM_DIMS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": (1024, 24, 16),
    "vit_so400m_patch14_siglip_224": (1152, 27, 16),
}


def tower_specs(config: dict) -> tuple[TowerSpec, TowerSpec]:
    """config.json -> (DINOv2, SigLIP). `vision_dims`, two dicts, overrides the sizes that the timm names imply.

    Raises:
        ValueError: other towers than OpenVLA's two.
    """
    names = config.get("timm_model_ids", [])
    if "vision_dims" in config:
        dims = [dict(entry) for entry in config["vision_dims"]]
    elif names != list(TIMM_DIMS):
        raise ValueError(f"config.json names the vision towers {names}: only {list(TIMM_DIMS)} are supported")
    else:
        dims = [dict(zip(("embed_dim", "depth", "num_heads"), TIMM_DIMS[name])) for name in names]
    for entry, image_size in zip(dims, config["image_sizes"]):
        entry["image_size"] = image_size
    return dinov2_spec(**dims[0]), siglip_spec(**dims[1])


class Projector(nn.Module):
    """Vision features [B, P, E] -> language embeddings [B, P, H]: "fused-gelu-mlp", three layers, exact GELU."""

    def __init__(self, vision_dim: int, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(vision_dim, 4 * vision_dim)
        self.fc2 = nn.Linear(4 * vision_dim, hidden_size)
        self.fc3 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features)))))


class DecodeCache:
    """Keys and values of every layer, allocated once for prompt and action tokens and written in place.

    transformers' attention asks a cache for update() alone, as long as it is handed positions and a 4D mask.
    """

    def __init__(self, num_layers: int, room: int):
        self.keys, self.values = [None] * num_layers, [None] * num_layers
        self.lengths = [0] * num_layers
        self.room = room

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *unused: dict
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, heads, Q, H / heads]; returns all there is, [B, heads, so far, H / heads], without a copy."""
        if self.keys[layer] is None:
            shape = (*keys.shape[:2], self.room, keys.shape[3])
            self.keys[layer], self.values[layer] = keys.new_empty(shape), values.new_empty(shape)
        start = self.lengths[layer]
        self.lengths[layer] = end = start + keys.shape[2]
        self.keys[layer][:, :, start:end] = keys
        self.values[layer][:, :, start:end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


# choose(logits [B, K, V] of tokens start .. start + K - 1, start) -> their ids int64 [B, K]
Choose = Callable[[torch.Tensor, int], torch.Tensor]


class OpenVLA(nn.Module):
    """The network alone: ids and pixels in, logits over the whole vocabulary out. VLAPolicy knows what they mean.

    Args:
        config: the content of a checkpoint's config.json.
    """

    def __init__(self, config: dict):
        super().__init__()
        dinov2, siglip = tower_specs(config)
        # sizes that the file leaves out are LlamaConfig's defaults, as in the code that wrote the published files;
        # the kernel is ours to choose: OFT's mask needs one that takes any mask
        not_sizes = ("model_type", "torch_dtype", "dtype", "attn_implementation", "_attn_implementation")
        text_config = {k: v for k, v in config["text_config"].items() if k not in not_sizes}
        self.vision_backbone = VisionBackbone(dinov2, siglip)
        self.language_model = LlamaForCausalLM(LlamaConfig(**text_config, attn_implementation="sdpa"))
        self.hidden_size = self.language_model.config.hidden_size
        self.projector = Projector(dinov2.embed_dim + siglip.embed_dim, self.hidden_size)

    def init_weights(self) -> None:
        """A start for the tiny presets: unit gain through every layer. The language model has already made its own."""
        for module in (*self.vision_backbone.modules(), *self.projector.modules()):
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.bias)
        for tower in (self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer):
            for parameter in tower.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.02)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute every block's activations in the backward pass, in the towers and in the language model."""
        self.language_model.activation_checkpointing_enable({"use_reentrant": False})
        for tower in (self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer):
            tower.gradient_checkpointing = True

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters of the published files that no forward reads."""
        towers = (self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer)
        return [parameter for tower in towers for parameter in tower.unused_parameters()]

    def prefix(
        self,
        images: torch.Tensor,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Everything in front of the action tokens.

        Args:
            images: uint8 [B, H, W, 3] at the towers' size.
            prompt_ids, prompt_mask: int64 and bool [B, L]; BOS first, padding next, the prompt's end last.
            features: [B, P, E] that vision_backbone made of the images before, or None: then it does so now.

        Returns:
            embeddings [B, S, H], mask bool [B, S].
        """
        longest = int(prompt_mask.sum(dim=1).max())  # columns that are padding in every row are left out
        keep = [0, *range(prompt_ids.shape[1] - longest + 1, prompt_ids.shape[1])]
        prompt_ids, prompt_mask = prompt_ids[:, keep], prompt_mask[:, keep]
        features = self.vision_backbone(images) if features is None else features  # [B, P, E]
        patches = self.projector(features)  # [B, P, H]
        words = self.language_model.model.embed_tokens(prompt_ids)  # [B, L, H]
        seen = prompt_mask.new_ones(patches.shape[:2])
        embeddings = torch.cat([words[:, :1], patches, words[:, 1:]], dim=1)
        mask = torch.cat([prompt_mask[:, :1], seen, prompt_mask[:, 1:]], dim=1)
        return embeddings, mask

    def forward(
        self,
        images: torch.Tensor,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        features: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass over prompt and given action tokens (teacher forcing); without tokens, over the prompt alone.

        Args:
            images, prompt_ids, prompt_mask, features: as for prefix().
            tokens: int64 [B, D] action token ids.

        Returns:
            logits [B, D, V] in the model's precision, entry d predicts token d (D = 1 without tokens); hidden [B, H]
            at the last prompt token.
        """
        embeddings, mask = self.prefix(images, prompt_ids, prompt_mask, features)
        num_logits = 1
        if tokens is not None:
            num_logits = tokens.shape[1]
            # the last token is predicted, never read
            embeddings = torch.cat([embeddings, self.language_model.model.embed_tokens(tokens[:, :-1])], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(mask), num_logits - 1)], dim=1)
        output = self.language_model.model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions(mask), use_cache=False
        )
        hidden = output.last_hidden_state[:, -num_logits:]  # [B, D, H]
        return self.language_model.lm_head(hidden), hidden[:, 0]

    def generate(
        self,
        images: torch.Tensor,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        features: torch.Tensor | None = None,
        *,
        num_tokens: int,
        choose: Choose,
    ) -> torch.Tensor:
        """Write num_tokens action tokens. One prefill serves the value and the first token; each further token is one
        step.

        Args:
            images, prompt_ids, prompt_mask, features: as for prefix().
            choose: called once per token, with K = 1.

        Returns:
            hidden [B, H] at the last prompt token.

        Raises:
            RuntimeError: training mode with gradient checkpointing, where transformers leaves out the cache.
        """
        llama = self.language_model.model
        if self.training and self.language_model.is_activation_checkpointing:
            raise RuntimeError("act() with gradient checkpointing needs eval mode: call policy.eval() before it")
        embeddings, mask = self.prefix(images, prompt_ids, prompt_mask, features)
        num_prompt = embeddings.shape[1]
        mask = torch.cat([mask, mask.new_ones(len(mask), num_tokens - 1)], dim=1)  # [B, S + D - 1], keys that are real
        position_ids, causal = positions(mask), mask.new_ones(mask.shape[1], mask.shape[1]).tril()
        visible = mask[:, None, None] & causal  # [B, 1, query, key]
        cache = DecodeCache(len(llama.layers), room=mask.shape[1])
        first_hidden, start = None, 0
        for index in range(num_tokens):
            end = num_prompt + index
            output = llama(
                inputs_embeds=embeddings,
                attention_mask=visible[:, :, start:end, :end],
                position_ids=position_ids[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
            hidden = output.last_hidden_state[:, -1:]  # [B, 1, H]
            first_hidden = hidden[:, 0] if first_hidden is None else first_hidden
            chosen = choose(self.language_model.lm_head(hidden), index)  # [B, 1]
            embeddings, start = llama.embed_tokens(chosen), end
        return first_hidden


def positions(mask: torch.Tensor) -> torch.Tensor:
    """mask bool [B, S] -> position ids int64 [B, S] that count real tokens only."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
