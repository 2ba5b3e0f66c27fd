"""OpenVLA: two vision towers, a projector and a Llama that writes an action as 7 tokens, one after the other.

Parameter names are the published checkpoints' names, so loading is one strict load_state_dict. The language model is
transformers' LlamaForCausalLM; towers and projector are ours (vision.py), since no released package has them without
timm.

    B samples   L prompt ids   P patches   S = L + P positions   H hidden width   V vocabulary   D = 7 action tokens
    R = S + D - 1 places in the cache   Q positions taken in at once

Sequence: [BOS, P patches, padding, rest of the prompt, action tokens]. Prompts are padded on the left with BOS moved
to the front (RLinf's and RL4VLA's batched layout); positions count real tokens only, so padding changes nothing.
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
from vla.models.layers import use_fused_layers
from vla.models.vision import TowerSpec, VisionBackbone, dinov2_spec, siglip_spec

# (embed_dim, depth, num_heads) of the timm models that published config.json files name
TIMM_DIMS = {"vit_large_patch14_reg4_dinov2.lvd142m": (1024, 24, 16), "vit_so400m_patch14_siglip_224": (1152, 27, 16)}


def tower_specs(config: dict) -> tuple[TowerSpec, TowerSpec]:
    """config.json -> (DINOv2, SigLIP). `vision_dims`, two dicts, overrides the sizes that the timm names imply.

    Raises:
        UserError: other towers than OpenVLA's two.
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
    """Where a patch lies, fp32 [1, P, E]: sines and cosines of row and column, half a period to a few per picture.

    As large as what a patch shows: positions of std 0.02 are lost beside it, and where things are is what matters here.
    """
    side = math.isqrt(num_patches)
    at = (torch.arange(side) + 0.5) / side  # [side], in (0, 1)
    frequencies = torch.logspace(0.0, math.log10(side / 2), width // 4)  # half periods over the picture
    angles = math.pi * at[:, None] * frequencies  # [side, E / 4]
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, E / 2]
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(1, num_patches, -1)


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
    """Keys and values of every layer, R places for prompt and action tokens, allocated once and written in place.

    transformers' attention asks a cache for update() alone, as long as it is handed positions and a 4D mask. Shapes and
    addresses never change, and where to write is a tensor, so a CUDA graph can hold a step.
    """

    def __init__(self, llama: nn.Module, batch: int, room: int, like: torch.Tensor):
        attention = llama.layers[0].self_attn
        shape = (len(llama.layers), 2, batch, llama.config.num_key_value_heads, room, attention.head_dim)
        with torch.inference_mode(False):  # may outlive the call that made it
            self.pairs = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.slots: torch.Tensor | None = None  # int64 [Q], the places that update() writes

    def clear_from(self, place: int) -> None:
        """Zero the places that are still to come: they are masked, but 0 x NaN would be NaN."""
        self.pairs[..., place:, :].zero_()

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *unused: dict
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [B, heads, Q, H / heads] at `slots`; returns all places, [B, heads, R, H / heads], without a copy."""
        for kept, new in zip(self.pairs[layer], (keys, values)):
            kept.index_copy_(2, self.slots, new)
        return self.pairs[layer, 0], self.pairs[layer, 1]


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
        use_fused_layers(self.language_model)
        self.hidden_size = self.language_model.config.hidden_size
        self.projector = Projector(dinov2.embed_dim + siglip.embed_dim, self.hidden_size)
        self.cuda_graphs = True  # record what generate() repeats, where that is possible
        self.graphs: GraphStore | None = None

    def init_weights(self) -> None:
        """A start for the tiny presets: unit gain through every layer. The language model has already made its own."""
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
        if prompt_mask.is_cpu:  # columns that are padding in every row are left out; a GPU would have to be waited for
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
            # all below may be frozen; but ZeRO-3 frees a block's weights before its backward where no input has one
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
        if self.training and self.language_model.is_activation_checkpointing:
            raise RuntimeError("act() with gradient checkpointing needs eval mode: call policy.eval() before it")
        embeddings, mask = self.prefix(images, prompt_ids, prompt_mask, features)
        num_prompt = embeddings.shape[1]
        mask = torch.cat([mask, mask.new_ones(len(mask), num_tokens - 1)], dim=1)  # [B, R], places that are real
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
        """A cache and decode_step() on it: on a GPU as a graph, kept for the next call of this shape.

        Args:
            like: embeddings [B, S, H], for batch, precision and device. room: R.
        """

        def make(wrap: Callable = lambda function: function) -> tuple[DecodeCache, Callable]:
            cache = DecodeCache(self.language_model.model, len(like), room, like)
            return cache, wrap(partial(self.decode_step, cache))

        if not (self.cuda_graphs and can_capture(like)):
            return make()
        return self.kept_graphs().get(("decode", len(like), room, like.dtype), lambda: make(GraphedCall))

    def kept_graphs(self) -> GraphStore:
        """What was recorded; made at the first use, when every adapter is in its place."""
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
        """Take Q positions in. No shape depends on how far the sequence has got, and nothing waits for the device.

        Args:
            embeddings: [B, Q, H]. slots: int64 [Q], their places.
            position_ids, mask: int64 and bool [B, R], of all places.

        Returns:
            hidden [B, Q, H].
        """
        places = torch.arange(mask.shape[1], device=mask.device)
        visible = mask[:, None] & (places <= slots[:, None])  # [B, Q, R]: real and not ahead
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
        """One token further: tokens int64 [B, 1] at slot int64 [1] -> logits [B, 1, V] of the next one."""
        embeddings = self.language_model.model.embed_tokens(tokens)
        return (self.language_model.lm_head(self.read(cache, embeddings, slot, position_ids, mask)),)


def positions(mask: torch.Tensor) -> torch.Tensor:
    """mask bool [B, S] -> position ids int64 [B, S] that count real tokens only."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
