"""Words and patches side by side in one Vision Transformer (ViLT, arXiv 2102.03334).

The blocks and the last LayerNorm are those of the image tower's Vision Transformer, so that its weights load under
their own names; what is here is what ViLT adds to them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from simla_ray.models.dropout import attention_probabilities
from simla_ray.models.stack import Attentions
from simla_ray.models.text import bert_init
from simla_ray.models.vision import VisionTower


class Merging(nn.Module):
    """A vector for each kind of token, and the pooler of the text's [CLS] (official ``vilt_module.py``)."""

    def __init__(self, width: int, *, pooled: bool):
        super().__init__()
        self.type_embeddings = nn.Embedding(2, width)  # of words, of patches
        self.type_embeddings.apply(bert_init)
        # torch's own start is BERT's at 768; at 64 BERT's would leave ITM a quarter of its gradient.
        self.pooler = nn.Linear(width, width) if pooled else None

    def forward(
        self, tower: VisionTower, words: Tensor, mask: Tensor, patches: Tensor, keep: Attentions | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embedded words (n, L, D) with their mask (n, L), patches (n, N, D) -> the states of both.

        ``keep``, where it wants them, gets each layer's attention of words to patches, (n, H, L, N).
        """
        L = words.shape[1]
        states, allowed = self._joined(words, mask, patches)
        if keep is None or not keep.want_cross:
            states = tower.transform(states, allowed)
        else:
            for block in tower.vit.blocks:
                states = _at(block, states, states, allowed, keep, L)
            states = tower.vit.norm(states)
        return states[:, :L], states[:, L:]

    def cls(self, tower: VisionTower, words: Tensor, mask: Tensor, patches: Tensor) -> Tensor:
        """As ``forward`` -> (n, D), the text's [CLS]; of the last layer nothing else is computed."""
        *below, last = tower.vit.blocks
        states, allowed = self._joined(words, mask, patches)
        for block in below:
            states = tower.run(block, states, allowed)
        # Products of strided rows are others, in their last bit, for weights that are trained and for frozen ones.
        return tower.vit.norm(_at(last, states[:, :1].contiguous(), states, allowed))[:, 0]

    def pool(self, cls: Tensor) -> Tensor:
        """(n, D) -> (n, D)"""
        assert self.pooler is not None
        return self.pooler(cls).tanh()

    def _joined(self, words: Tensor, mask: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """(n, L + N, D), and who may be read, (n, 1, 1, L + N) bool."""
        kinds = self.type_embeddings.weight
        states = torch.cat([words + kinds[0], patches + kinds[1]], 1)
        return states, F.pad(mask, (0, patches.shape[1]), value=True)[:, None, None, :]


def _at(
    block: Block, x: Tensor, states: Tensor, allowed: Tensor, keep: Attentions | None = None, words: int = 0
) -> Tensor:
    """What a block gives at positions x (n, M, D) of the sequences states (n, S, D) -> (n, M, D).

    With ``keep``, x being all positions, of which the first ``words`` are words: see ``Merging.forward``.
    """
    attention = block.attn
    width = attention.attn_dim
    weight, bias = attention.qkv.weight, attention.qkv.bias
    query = F.linear(block.norm1(x), weight[:width], bias[:width] if bias is not None else None)
    both = F.linear(block.norm1(states), weight[width:], bias[width:] if bias is not None else None)
    query, key, value = (
        part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in (query, *both.chunk(2, -1))
    )
    query, key = attention.q_norm(query), attention.k_norm(key)
    if keep is None:
        context = F.scaled_dot_product_attention(query, key, value, allowed)
    else:
        probabilities = attention_probabilities(query, key, allowed)
        to_patches = probabilities[:, :, :words, words:]  # a tensor of its own, on the way to the result
        keep.cross.append(to_patches)
        of_words = torch.cat([probabilities[:, :, :words, :words], to_patches], -1)
        context = torch.cat([of_words, probabilities[:, :, words:]], 2) @ value
    context = attention.proj(attention.norm(context.transpose(1, 2).flatten(2)))
    x = x + block.ls1(context)
    return x + block.ls2(block.mlp(block.norm2(x)))
