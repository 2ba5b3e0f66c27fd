"""The two vision towers of OpenVLA, with the parameter names of the published checkpoints (timm's, fused qkv included).

    B images   P patches (row by row)   E width of a tower

`featurizer` is DINOv2 with 4 registers, and `fused_featurizer` is SigLIP. Both are plain pre-norm ViTs with exact (erf)
GELU, and TowerSpec holds their differences. OpenVLA takes the output of the last block but one, without the final norm
and without prefix tokens. So the last block, the final norm and SigLIP's attention pool are never used. They are kept
because published files contain them. Source: openvla/openvla (prismatic), timm 0.9.10.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class TowerSpec:
    """Sizes of one tower. The kind of tower decides mlp_dim, num_prefix_tokens, layer_scale and attn_pool."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    num_prefix_tokens: int  # cls + registers, in front of the patches
    layer_scale: bool
    attn_pool: bool
    image_size: int = 224
    patch_size: int = 14

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def dinov2_spec(embed_dim: int, depth: int, num_heads: int, **sizes: int) -> TowerSpec:
    """DINOv2 reg4: cls and 4 register tokens, LayerScale, an MLP of ratio 4."""
    return TowerSpec(embed_dim, depth, num_heads, 4 * embed_dim, 5, layer_scale=True, attn_pool=False, **sizes)


def siglip_spec(embed_dim: int, depth: int, num_heads: int, **sizes: int) -> TowerSpec:
    """SigLIP so400m: only patches, an MLP of ratio 3.7362 (4304 for width 1152), and an unused attention pool."""
    mlp_dim = int(embed_dim * 3.7362)
    return TowerSpec(embed_dim, depth, num_heads, mlp_dim, 0, layer_scale=False, attn_pool=True, **sizes)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, P, E] -> [B, P, E]
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # [B, P, 3, heads, E / heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, P, E / heads] each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    """Scales every channel. The parameter is scale_factor in OpenVLA's files, because transformers renamed "gamma"."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale_factor


class Block(nn.Module):
    def __init__(self, spec: TowerSpec):
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.embed_dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(spec.embed_dim, spec.num_heads)
        self.ls1 = LayerScale(spec.embed_dim) if spec.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(spec.embed_dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(spec.embed_dim, spec.mlp_dim)
        self.ls2 = LayerScale(spec.embed_dim) if spec.layer_scale else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, P, E] -> [B, P, E]
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:  # [B, 3, H, W] -> [B, P, E]
        return self.proj(pixels).flatten(2).transpose(1, 2)


class AttentionPool(nn.Module):
    """SigLIP's pooling head. The published files contain it, but OpenVLA never calls it."""

    def __init__(self, spec: TowerSpec):
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, spec.embed_dim))
        self.q = nn.Linear(spec.embed_dim, spec.embed_dim)
        self.kv = nn.Linear(spec.embed_dim, 2 * spec.embed_dim)
        self.proj = nn.Linear(spec.embed_dim, spec.embed_dim)
        self.norm = nn.LayerNorm(spec.embed_dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(spec.embed_dim, spec.mlp_dim)


class VisionTower(nn.Module):
    """One ViT. forward() returns the patch features of the last block but one."""

    def __init__(self, spec: TowerSpec):
        super().__init__()
        self.num_prefix_tokens = spec.num_prefix_tokens
        self.num_patches = spec.num_patches
        self.embed_dim = spec.embed_dim
        self.gradient_checkpointing = False  # recompute each block in the backward pass
        if spec.num_prefix_tokens:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.embed_dim))
            self.reg_token = nn.Parameter(torch.zeros(1, spec.num_prefix_tokens - 1, spec.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, spec.num_patches, spec.embed_dim))
        self.patch_embed = PatchEmbed(spec.patch_size, spec.embed_dim)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(spec.embed_dim, eps=LAYER_NORM_EPS)
        if spec.attn_pool:
            self.attn_pool = AttentionPool(spec)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:  # [B, 3, H, W] -> [B, P, E]
        x = self.patch_embed(pixels) + self.pos_embed  # positions are for patches only (timm: no_embed_class)
        if self.num_prefix_tokens:
            prefix = torch.cat([self.cls_token, self.reg_token], dim=1)
            x = torch.cat([prefix.expand(len(x), -1, -1), x], dim=1)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks[:-1]:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x[:, self.num_prefix_tokens :]

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters that forward() never reads. They get no gradient."""
        modules = [self.blocks[-1], self.norm] + ([self.attn_pool] if "attn_pool" in self._modules else [])
        return [parameter for module in modules for parameter in module.parameters()]


class VisionBackbone(nn.Module):
    """DINOv2 and SigLIP features of the same image, concatenated along the feature axis, DINOv2 first."""

    # default (mean, std) of each tower's input, for pixels in [0, 1]. preprocessor_config.json overrides it
    NORMALIZATION = (((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))

    def __init__(self, dinov2: TowerSpec, siglip: TowerSpec):
        super().__init__()
        self.featurizer = VisionTower(dinov2)
        self.fused_featurizer = VisionTower(siglip)
        self.set_normalization(self.NORMALIZATION)

    def set_normalization(self, towers: tuple) -> None:
        """Set ((mean, std) of DINOv2's input, (mean, std) of SigLIP's), three channels each, for pixels in [0, 1].

        They are buffers, so that a forward copies nothing to the device.
        """
        for name, values in zip(("pixel_mean", "pixel_std"), zip(*towers)):
            self.register_buffer(name, torch.tensor(values)[:, :, None, None], persistent=False)  # [2, 3, 1, 1]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features [B, P, E_dinov2 + E_siglip] of images uint8 [B, H, W, 3] at the towers' own size."""
        dtype = self.featurizer.patch_embed.proj.bias.dtype
        pixels = images.permute(0, 3, 1, 2).float() / 255.0
        features = []
        for tower, mean, std in zip((self.featurizer, self.fused_featurizer), self.pixel_mean, self.pixel_std):
            features.append(tower(((pixels - mean) / std).to(dtype)))
        return torch.cat(features, dim=-1)
