"""The image tower: a timm Vision Transformer that returns all tokens and can have patches masked."""

from __future__ import annotations

import timm
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simla_ray.config.schema import Stem, Vision, VisionSource
from simla_ray.errors import UserError

#: CLIP's normalisation, as the official code uses it for every model.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class VisionTower(nn.Module):
    """ViT -> tokens (B, N, D), pre-norm, final LayerNorm, no dropout (official ``models/vit.py``).

    With ``source: patches`` the tokens are embedded patches with their positions, and the blocks are there for whoever
    puts other tokens beside them (``models.merging``).

    Masked patches are replaced by a learned token after the patch embedding, before class token and positions. With a
    convolutional stem, whose receptive fields overlap, their pixels are cleared first, so that nothing leaks into
    neighbours.
    """

    def __init__(self, config: Vision, *, maskable: bool):
        super().__init__()
        shape = {"embed_dim": config.width, "depth": config.depth, "num_heads": config.heads}
        shape = {name: value for name, value in shape.items() if value is not None}
        if config.stem is Stem.conv:
            shape["embed_layer"] = ConvStem
        try:
            self.vit = timm.create_model(
                config.timm,
                pretrained=config.pretrained and config.weights is None,
                num_classes=0,
                img_size=config.image_px,
                patch_size=config.patch_px,
                mlp_ratio=config.mlp_ratio,
                **shape,
            )
        except Exception as error:  # timm and the hub's client raise many types for keys and names that do not fit
            raise UserError(f"vision.timm: {config.timm} cannot be built with these keys ({error})") from None
        if not hasattr(self.vit, "_pos_embed") or self.vit.num_prefix_tokens != 1:
            raise UserError(f"vision.timm: {config.timm} is not a Vision Transformer with one class token")
        self.embeds_only = config.source is VisionSource.patches
        if self.embeds_only and any(type(b) is not Block or b.attn.gate is not None for b in self.vit.blocks):
            raise UserError(f"vision.timm: {config.timm} has other blocks than the Vision Transformer's plain ones")
        self.patch_px = config.patch_px
        self.clears_pixels = config.stem is Stem.conv
        self.width: int = self.vit.embed_dim
        self.saves_memory = False  # recompute a block's inside in the backward pass
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.width)) if maskable else None
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """image (B, 3, px, px) uint8, or normalised float; patch_mask (B, P) bool -> (B, N, D)."""
        if not image.is_floating_point():
            image = (image - self.mean) / self.std
        if patch_mask is not None and self.clears_pixels:
            side = image.shape[-1] // self.patch_px
            pixels = patch_mask.view(-1, 1, side, side).repeat_interleave(self.patch_px, 2)
            image = image.masked_fill(pixels.repeat_interleave(self.patch_px, 3), 0)
        tokens = self.vit.patch_embed(image)
        if patch_mask is not None:
            tokens = torch.where(patch_mask[:, :, None], self.mask_token.to(tokens.dtype), tokens)
        tokens = self.vit._pos_embed(tokens)
        tokens = self.vit.norm_pre(tokens)
        return tokens if self.embeds_only else self.transform(tokens)

    def transform(self, tokens: Tensor, allowed: Tensor | None = None) -> Tensor:
        """All blocks and the last LayerNorm, (n, S, D) -> (n, S, D); ``allowed``: see ``run``."""
        for block in self.vit.blocks:
            tokens = self.run(block, tokens, allowed)
        return self.vit.norm(tokens)

    def run(self, block: nn.Module, tokens: Tensor, allowed: Tensor | None) -> Tensor:
        """One block, (n, S, D) -> (n, S, D); ``allowed`` (n, 1, 1, S) bool, the tokens that may be read, None for
        all."""
        if self.saves_memory and self.training and torch.is_grad_enabled():
            return checkpoint(block, tokens, allowed, use_reentrant=False)
        return block(tokens, allowed)


class ConvStem(nn.Module):
    """Two strided 3x3 convolutions, then the linear patch embedding of what is left of a patch [ours].

    Early convolutions make small towers learn much faster from scratch. Signature of timm's ``embed_layer``.
    """

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True, **timm_options: object
    ):
        super().__init__()
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        half = max(16, embed_dim // 2)
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, half, 3, 2, 1), nn.GELU(), nn.Conv2d(half, embed_dim, 3, 2, 1), nn.GELU()
        )
        self.proj = nn.Conv2d(embed_dim, embed_dim, patch_size // 4, patch_size // 4, bias=bias)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, px, px) -> (B, P, D)"""
        return self.proj(self.stem(image)).flatten(2).transpose(1, 2)
