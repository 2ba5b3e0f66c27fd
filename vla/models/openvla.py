"""OpenVLA: two vision towers, a projector and a Llama that writes an action as 7 tokens, one after the other.

Parameters have the names of the published checkpoints. The language model is transformers' LlamaForCausalLM. Towers and
projector are written here (vision.py), because every released package that has them needs timm.

    B samples   L prompt ids   P patches   S = L + P positions   H hidden width   V vocabulary   D = 7 action tokens
    R = S + D - 1 places in the cache   Q positions that are read at once

Sequence: [BOS, P patches, padding, rest of the prompt, action tokens]. Prompts are padded on the left, and BOS is moved
to the front (the batched layout of RLinf and RL4VLA). Positions count only real tokens, so padding changes nothing.
Source: openvla/openvla, prismatic/extern/hf/modeling_prismatic.py.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from schemas import UserError
from vla.models.cuda_graphs import GraphedCall, GraphStore, can_capture
from vla.models.layers import use_fused_norms
from vla.models.vision import TowerSpec, VisionBackbone, dinov2_spec, siglip_spec

# (embed_dim, depth, num_heads) of the timm models in published config.json files
TIMM_DIMS = {"vit_large_patch14_reg4_dinov2.lvd142m": (1024, 24, 16), "vit_so400m_patch14_siglip_224": (1152, 27, 16)}


def tower_specs(config: dict) -> tuple[TowerSpec, TowerSpec]:
    """The specs of (DINOv2, SigLIP) from the content of config.json.

    Its `vision_dims`, two dicts, overrides the sizes that the timm names imply.

    Raises:
        UserError: it names other towers than OpenVLA's two.
    """
    names = config.get("timm_model_ids", [])
    if "vision_dims" in config:
        sizes = ("embed_dim", "depth", "num_heads", "patch_size")
        dims = [{key: entry[key] for key in sizes if key in entry} for entry in config["vision_dims"]]
    elif names != list(TIMM_DIMS):
        raise UserError(f"config.json names the vision towers {names}: only {list(TIMM_DIMS)} are supported")
    else:
        dims = [dict(zip(("embed_dim", "depth", "num_heads"), TIMM_DIMS[name])) for name in names]
    for entry, image_size in zip(dims, config["image_sizes"]):
        entry["image_size"] = image_size
    return dinov2_spec(**dims[0]), siglip_spec(**dims[1])


def sine_positions(num_patches: int, width: int) -> torch.Tensor:
    """Position embeddings, fp32 [1, P, E]: sines and cosines of row and column, from half a period to a few per image.

    They are as large as the features of a patch. Random embeddings of std 0.02 would be lost next to those, and the
    task depends on where things are.
    """
    side = math.isqrt(num_patches)
    place = (torch.arange(side) + 0.5) / side  # [side], in (0, 1)
    frequencies = torch.logspace(0.0, math.log10(side / 2), width // 4)  # [E / 4], half periods per image
    angles = math.pi * place[:, None] * frequencies  # [side, E / 4]
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, E / 2]
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(1, num_patches, -1)


class Projector(nn.Module):
    """Language embeddings [B, P, H] from vision features [B, P, E]: "fused-gelu-mlp", three layers, exact GELU."""

    def __init__(self, vision_dim: int, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(vision_dim, 4 * vision_dim)
        self.fc2 = nn.Linear(4 * vision_dim, hidden_size)
        self.fc3 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features)))))


class DecodeCache:
    """Keys and values of every layer, with R places for prompt and action tokens. Allocated once, written in place.

    transformers' attention only calls update(), if it gets positions and a 4D mask. Shapes and addresses never change,
    and the places to write are a tensor. So a CUDA graph can contain a decode step.
    """

    def __init__(self, llama: nn.Module, batch: int, room: int, like: torch.Tensor):
        attention = llama.layers[0].self_attn
        shape = (len(llama.layers), 2, batch, llama.config.num_key_value_heads, room, attention.head_dim)
        with torch.inference_mode(False):  # the cache may outlive the call that made it
            self.pairs = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.slots: torch.Tensor | None = None  # int64 [Q], the places that update() writes

    def clear_from(self, place: int) -> None:
        """Zero the places from `place` on. They are masked, but 0 x NaN would be NaN."""
        self.pairs[..., place:, :].zero_()

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *unused: dict, **settings: dict
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [B, heads, Q, H / heads] at `slots`. Returns all places, [B, heads, R, H / heads], without a copy."""
        for kept, new in zip(self.pairs[layer], (keys, values)):
            kept.index_copy_(2, self.slots, new)
        return self.pairs[layer, 0], self.pairs[layer, 1]


# choose(logits, start): ids int64 [B, K] of the tokens start .. start + K - 1, from their logits [B, K, V]
Choose = Callable[[torch.Tensor, int], torch.Tensor]


class OpenVLA(nn.Module):
    """The network: it maps ids and pixels to logits over the whole vocabulary. VLAPolicy interprets them.

    Args:
        config: the content of a checkpoint's config.json.
    """

    def __init__(self, config: dict):
        super().__init__()
        dinov2, siglip = tower_specs(config)
        # sizes that the file leaves out are LlamaConfig's defaults, as in the code that wrote the published files. The
        # file's attention kernel is ignored, because OFT's mask needs one that takes any mask
        ignored = ("model_type", "torch_dtype", "dtype", "attn_implementation", "_attn_implementation")
        text_config = {key: value for key, value in config["text_config"].items() if key not in ignored}
        self.vision_backbone = VisionBackbone(dinov2, siglip)
        self.language_model = LlamaForCausalLM(LlamaConfig(**text_config, attn_implementation="sdpa"))
        use_fused_norms(self.language_model)
        self.hidden_size = self.language_model.config.hidden_size
        self.projector = Projector(dinov2.embed_dim + siglip.embed_dim, self.hidden_size)
        self.cuda_graphs = True  # whether generate() records graphs if possible
        self.graphs: GraphStore | None = None

    def init_weights(self) -> None:
        """Initialise the tiny presets with unit gain in every layer. The language model initialises itself."""
        for module in (*self.vision_backbone.modules(), *self.projector.modules()):
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.bias)
        for tower in (self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer):
            for parameter in tower.parameters(recurse=False):
                nn.init.normal_(parameter, std=0.02)
            tower.pos_embed.data = sine_positions(tower.num_patches, tower.embed_dim)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute every block's activations in the backward pass, in the towers and in the language model."""
        self.language_model.activation_checkpointing_enable({"use_reentrant": False})
        for tower in (self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer):
            tower.gradient_checkpointing = True

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters in the published files that no forward reads."""
        towers = (self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer)
        return [parameter for tower in towers for parameter in tower.unused_parameters()]

    def prefix(
        self,
        images: torch.Tensor,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of everything in front of the action tokens.

        Args:
            images: uint8 [B, H, W, 3] at the towers' size.
            prompt_ids, prompt_mask: int64 and bool [B, L]: BOS first, then padding, then the rest of the prompt.
            features: [B, P, E], the vision_backbone's output for these images, or None to compute it.

        Returns:
            embeddings [B, S, H], mask bool [B, S].
        """
        if prompt_mask.is_cpu:  # leave out columns that are padding in every row. On a GPU this would have to wait
            longest = int(prompt_mask.sum(dim=1).max())
            keep = [0, *range(prompt_ids.shape[1] - longest + 1, prompt_ids.shape[1])]
            prompt_ids, prompt_mask = prompt_ids[:, keep], prompt_mask[:, keep]
        features = self.vision_backbone(images) if features is None else features  # [B, P, E]
        patches = self.projector(features)  # [B, P, H]
        words = self.language_model.model.embed_tokens(prompt_ids)  # [B, L, H]
        seen = prompt_mask.new_ones(patches.shape[:2])
        embeddings = torch.cat([words[:, :1], patches, words[:, 1:]], dim=1)
        mask = torch.cat([prompt_mask[:, :1], seen, prompt_mask[:, 1:]], dim=1)
        if torch.is_grad_enabled():
            # if everything below is frozen, ZeRO-3 would free a block's weights before its backward
            embeddings.requires_grad_()
        return embeddings, mask

    def forward(
        self,
        images: torch.Tensor,
        prompt_ids: torch.Tensor,
        prompt_mask: torch.Tensor,
        features: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass over the prompt and given action tokens (teacher forcing), or over the prompt without tokens.

        Args:
            images, prompt_ids, prompt_mask, features: as for prefix().
            tokens: int64 [B, D] action token ids, or None.

        Returns:
            logits [B, D, V] in the model's precision (D = 1 without tokens), where entry d predicts token d, and hidden
            [B, H] at the last prompt token.
        """
        embeddings, mask = self.prefix(images, prompt_ids, prompt_mask, features)
        num_logits = 1
        if tokens is not None:
            num_logits = tokens.shape[1]
            # the last token is only predicted, not read
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
        """Write num_tokens action tokens. One prefill gives the value and the first token, one step each further token.

        Args:
            images, prompt_ids, prompt_mask, features: as for prefix().
            choose: called once per token, with K = 1.

        Returns:
            hidden [B, H] at the last prompt token.

        Raises:
            RuntimeError: in training mode with gradient checkpointing, where transformers does not use a cache.
        """
        if self.training and self.language_model.is_activation_checkpointing:
            raise RuntimeError("act() with gradient checkpointing needs eval mode: call policy.eval() before it")
        embeddings, mask = self.prefix(images, prompt_ids, prompt_mask, features)
        num_prompt = embeddings.shape[1]
        mask = torch.cat([mask, mask.new_ones(len(mask), num_tokens - 1)], dim=1)  # [B, R], False for padding
        position_ids, slots = positions(mask), torch.arange(mask.shape[1], device=mask.device)
        cache, step = self.decoder(embeddings, room=mask.shape[1])
        cache.clear_from(num_prompt)
        hidden = self.read(cache, embeddings, slots[:num_prompt], position_ids, mask)[:, -1:]  # [B, 1, H]
        chosen = choose(self.language_model.lm_head(hidden), 0)  # [B, 1]
        for index in range(1, num_tokens):
            end = num_prompt + index
            (logits,) = step(chosen, slots[end - 1 : end], position_ids, mask)
            chosen = choose(logits, index)
        return hidden[:, 0]

    def decoder(self, like: torch.Tensor, room: int) -> tuple[DecodeCache, Callable]:
        """A cache and decode_step() on it. On a GPU the step is a graph, and is kept for the next call of this shape.

        Args:
            like: embeddings [B, S, H], which give batch, precision and device.
            room: R.
        """

        def eager() -> tuple[DecodeCache, Callable]:
            cache = DecodeCache(self.language_model.model, len(like), room, like)
            return cache, partial(self.decode_step, cache)

        def recorded() -> tuple[DecodeCache, Callable]:
            cache, step = eager()
            return cache, GraphedCall(step)

        if not (self.cuda_graphs and can_capture(like)):
            return eager()
        return self.kept_graphs().get(("decode", len(like), room, like.dtype), recorded)

    def kept_graphs(self) -> GraphStore:
        """The recorded graphs. The store is made at the first use, when all adapters are on the model."""
        if self.graphs is None:
            self.graphs = GraphStore(self)
        return self.graphs

    def read(
        self,
        cache: DecodeCache,
        embeddings: torch.Tensor,
        slots: torch.Tensor,
        position_ids: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Read Q positions into the cache. No shape depends on the length so far, and nothing waits for the device.

        Args:
            embeddings: [B, Q, H].
            slots: int64 [Q], their places.
            position_ids, mask: int64 and bool [B, R], of all places.

        Returns:
            hidden [B, Q, H].
        """
        places = torch.arange(mask.shape[1], device=mask.device)
        visible = mask[:, None] & (places <= slots[:, None])  # [B, Q, R]: neither padding nor ahead
        cache.slots = slots
        return self.language_model.model(
            inputs_embeds=embeddings,
            attention_mask=visible[:, None],
            position_ids=position_ids.index_select(1, slots),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def decode_step(
        self,
        cache: DecodeCache,
        tokens: torch.Tensor,
        slot: torch.Tensor,
        position_ids: torch.Tensor,
        mask: torch.Tensor,
    ) -> tuple[torch.Tensor]:
        """Logits [B, 1, V] of the next token, after reading tokens int64 [B, 1] at slot int64 [1]."""
        embeddings = self.language_model.model.embed_tokens(tokens)
        return (self.language_model.lm_head(self.read(cache, embeddings, slot, position_ids, mask)),)


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids int64 [B, S] that count only the real tokens of mask bool [B, S].

    >>> positions(torch.tensor([[True, False, True, True]])).tolist()
    [[0, 0, 1, 2]]
    """
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
