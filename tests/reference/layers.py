"""The passes written out, one product after the other, on the weights of our ``Model``.

Every pass computes all positions of all its layers and projects its own keys and values. Attention is scores, softmax,
dropout, product; with ``sdpa`` it is torch's fused attention wherever nobody reads the probabilities.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Mask:
    """Which keys may be read: ``ok`` (B, 1, 1, S) bool, None where all may; ``bias`` (B, 1, 1, S), 0 or -10000.

    Written-out attention adds ``bias`` in every pass, also over images, where it is all zeros.
    """

    ok: Tensor | None
    bias: Tensor


def mask_of(states: Tensor, ok: Tensor | None, dtype: torch.dtype) -> Mask:
    """states (B, S, D), ok (B, S) bool or None."""
    every = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device) if ok is None else ok
    bias = (1.0 - every[:, None, None, :].to(dtype)) * -10000.0
    return Mask(None if ok is None else ok[:, None, None, :], bias)


def linear(module: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)


def layer_norm(module: nn.Module, x: Tensor) -> Tensor:
    return F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)


def unit_rows(x: Tensor) -> Tensor:
    return F.normalize(full(x), dim=-1)


def full(x: Tensor) -> Tensor:
    """In float32 at least: what softmax and losses run in under autocast."""
    return x if x.dtype == torch.float64 else x.float()


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Products in the numbers' own format; a device that knows no autocast has nothing to switch off."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


# --- attention --------------------------------------------------------------------------------------------------------


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, dropout: float) -> tuple[Tensor, Tensor]:
    """query (B, H, M, d), key and value (B, H, S, d) -> context (B, H, M, d), probabilities (B, H, M, S)"""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores + mask.bias
    probabilities = scores.softmax(-1)
    return F.dropout(probabilities, dropout) @ value, probabilities


def attend_fused(query: Tensor, key: Tensor, value: Tensor, mask: Mask | None, dropout: float) -> Tensor:
    """As ``attend``, context only."""
    return F.scaled_dot_product_attention(query, key, value, mask.ok if mask is not None else None, dropout)


def bert_attention(
    module: nn.Module, x: Tensor, states: Tensor, mask: Mask, *, sdpa: bool
) -> tuple[Tensor, Tensor | None]:
    """x (B, M, D) over states (B, S, D'), with output projection, residual and LayerNorm -> x, probabilities"""

    def heads(name: str, source: Tensor) -> Tensor:
        return linear(module.self[name], source).unflatten(-1, (module.heads, -1)).transpose(1, 2)

    query, key, value = heads("query", x), heads("key", states), heads("value", states)
    dropout = module.dropout if module.training else 0.0
    if sdpa:
        context, probabilities = attend_fused(query, key, value, mask, dropout), None
    else:
        context, probabilities = attend(query, key, value, mask, dropout)
    return residual(module.output, context.transpose(1, 2).flatten(2), x), probabilities


def residual(module: nn.Module, inner: Tensor, x: Tensor) -> Tensor:
    """dense -> dropout -> + x -> LayerNorm"""
    inner = F.dropout(linear(module.dense, inner), module.dropout.p, module.training)
    return layer_norm(module.LayerNorm, inner + x)


# --- the text stack ---------------------------------------------------------------------------------------------------


def embed(text: nn.Module, ids: Tensor) -> Tensor:
    """ids (B, L) -> (B, L, D)"""
    table = text.embeddings.word_embeddings
    return embed_states(text, F.embedding(ids, table.weight, table.padding_idx))


def embed_states(text: nn.Module, x: Tensor) -> Tensor:
    """x (B, S, D) + positions 0.., LayerNorm, dropout; image tokens that act as queries go through it too."""
    e = text.embeddings
    position = torch.arange(x.shape[1], device=x.device)[None]
    x = layer_norm(e.LayerNorm, x + F.embedding(position, e.position_embeddings.weight))
    return F.dropout(x, e.dropout.p, e.training)


def first_fusion_layer(text: nn.Module) -> int:
    """Number of layers below the first one with a cross-attention; all of them where none has one."""
    layers = text.encoder.layer
    return next((i for i, layer in enumerate(layers) if hasattr(layer, "crossattention")), len(layers))


def language_pass(text: nn.Module, ids: Tensor, ok: Tensor, *, sdpa: bool) -> Tensor:
    """The language encoder, ids and ok (B, L) -> (B, L, D): all layers (SIMLA), or those below fusion (ALBEF)."""
    layers = text.encoder.layer[: first_fusion_layer(text) or None]
    return run_layers(layers, embed(text, ids), ok, None, None, sdpa=sdpa)[0]


def fusion_input(text: nn.Module, ids: Tensor, ok: Tensor, *, sdpa: bool) -> Tensor:
    """What fusion starts from: the embeddings (SIMLA), or the language encoder's states (ALBEF)."""
    return language_pass(text, ids, ok, sdpa=sdpa) if first_fusion_layer(text) else embed(text, ids)


def text_over_image(
    text: nn.Module, states: Tensor, ok: Tensor, image: Tensor, *, sdpa: bool, attention: bool = False
) -> tuple[Tensor, Tensor | None]:
    """states (B, L, D) of ``fusion_input``, image (B, N, D) -> (B, L, D), last self-attention (B, H, L, L)"""
    layers = text.encoder.layer[first_fusion_layer(text) :]
    return run_layers(layers, states, ok, image, None, sdpa=sdpa, attention=attention)


def image_over_text(text: nn.Module, image: Tensor, memory: Tensor, ok: Tensor, *, sdpa: bool) -> Tensor:
    """image (B, N, D) over the text's embeddings memory (B, L, D) -> (B, N, D)"""
    return run_layers(text.encoder.layer, embed_states(text, image), None, memory, ok, sdpa=sdpa)[0]


def run_layers(
    layers: nn.ModuleList,
    x: Tensor,
    ok: Tensor | None,
    memory: Tensor | None,
    memory_ok: Tensor | None,
    *,
    sdpa: bool,
    attention: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Layers one after the other; without a memory their cross-attention is left out.

    Returns:
        the states, and the last layer's self-attention probabilities, which ``attention`` asks for (None with ``sdpa``
        otherwise).
    """
    dtype = layers[0].attention.self["query"].weight.dtype
    mask = mask_of(x, ok, dtype)
    memory_mask = mask_of(memory, memory_ok, dtype) if memory is not None else None
    probabilities = None
    for i, layer in enumerate(layers):
        fused = sdpa and not (attention and i == len(layers) - 1)
        x, probabilities = bert_attention(layer.attention, x, x, mask, sdpa=fused)
        if memory is not None:
            x, _ = bert_attention(layer.crossattention, x, memory, memory_mask, sdpa=sdpa)
        x = residual(layer.output, F.gelu(linear(layer.intermediate["dense"], x)), x)
    return x, probabilities


def word_logits(text: nn.Module, hidden: Tensor) -> Tensor:
    """(B, L, D) -> (B, L, V); the decoder is the word table."""
    head = text.cls["predictions"]
    hidden = layer_norm(head.transform["LayerNorm"], F.gelu(linear(head.transform["dense"], hidden)))
    return F.linear(hidden, text.embeddings.word_embeddings.weight, head.bias)


# --- the image tower --------------------------------------------------------------------------------------------------


def image_pass(tower: nn.Module, image: Tensor, patch_mask: Tensor | None = None, *, sdpa: bool) -> Tensor:
    """image (B, 3, px, px), patch_mask (B, P) bool -> (B, N, D)"""
    if not image.is_floating_point():
        image = (image - tower.mean) / tower.std
    if patch_mask is not None and tower.clears_pixels:
        image = clear_pixels(image, patch_mask, tower.patch_px)
    x = tower.vit.patch_embed(image)
    if patch_mask is not None:
        masked = patch_mask[:, :, None].to(x.dtype)
        x = x * (1 - masked) + tower.mask_token * masked
    x = tower.vit.norm_pre(tower.vit._pos_embed(x))
    for block in tower.vit.blocks:
        x = x + block.ls1(vit_attention(block.attn, layer_norm(block.norm1, x), sdpa=sdpa))
        x = x + block.ls2(block.mlp(layer_norm(block.norm2, x)))
    return layer_norm(tower.vit.norm, x)


def clear_pixels(image: Tensor, patch_mask: Tensor, patch_px: int) -> Tensor:
    """Zeros in the pixels of masked patches."""
    side = image.shape[-1] // patch_px
    pixels = patch_mask.view(-1, 1, side, side).repeat_interleave(patch_px, 2).repeat_interleave(patch_px, 3)
    return torch.where(pixels, torch.zeros_like(image), image)


def vit_attention(module: nn.Module, x: Tensor, *, sdpa: bool) -> Tensor:
    """x (B, N, D) -> (B, N, D); the tower has no dropout."""
    qkv = linear(module.qkv, x).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)
    query, key = module.q_norm(query), module.k_norm(key)
    context = attend_fused(query, key, value, None, 0.0) if sdpa else attend(query, key, value, None, 0.0)[0]
    return linear(module.proj, module.norm(context.transpose(1, 2).flatten(2)))
