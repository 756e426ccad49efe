"""The decoder that writes answers, and how trained weights start it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from simla_ray.config.schema import Text
from simla_ray.models.stack import Memory, Stack
from simla_ray.models.text import Embeddings, MlmHead, bert_init

PREFIX = "decoder."
LAYER = "student.text.encoder.layer."
POSITIONS = "embeddings.position_embeddings.weight"


class AnswerDecoder(nn.Module):
    """A causal text stack over the states of a question (official ``models/simla/vqa.py``, ``text_decoder``)."""

    def __init__(self, config: Text, vocab_size: int, depth: int):
        super().__init__()
        self.embeddings = Embeddings(config, vocab_size)
        self.encoder = Stack(depth, config.width, config.heads, config.ffn, config.dropout, config.width)
        self.cls = nn.ModuleDict({"predictions": MlmHead(config.width, vocab_size)})
        self.apply(bert_init)

    def forward(self, ids: Tensor, memory: Memory) -> Tensor:
        """ids (n, A), [CLS] first -> (n, A, V), the next piece at each place.

        A place sees itself and what comes before it; padding follows the answer, so no place of the answer sees it.
        """
        A = ids.shape[1]
        earlier = torch.ones(1, A, A, dtype=torch.bool, device=ids.device).tril()
        hidden = self.encoder(self.embeddings(ids), earlier, memory)
        return self.cls["predictions"](hidden, self.embeddings.word_embeddings.weight)


def classifier(width: int, classes: int) -> nn.Module:
    """(n, width) -> (n, classes) (official ``cls_head``)."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))


def decoder_start(ours: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a decoder starts from: the text stack's embeddings, its upper layers and its MLM head, under our names.

    Empty where the given tensors bring a decoder of their own. Left out is what has another shape, such as a
    cross-attention over images of another width than the text's; of positions the first ones are taken.

    Args:
        ours: the model's tensors, of which only shapes are read.
        given: trained tensors.
    """
    wanted = [name for name in ours if name.startswith(PREFIX)]
    if not wanted or any(name.startswith(PREFIX) for name in given):
        return {}
    there = {int(name.removeprefix(LAYER).split(".")[0]) for name in given if name.startswith(LAYER)}
    mine = {int(name.split(".")[3]) for name in wanted if name.startswith(PREFIX + "encoder.layer.")}
    skip = len(there) - len(mine)
    found = {}
    for name in wanted:
        part = name.removeprefix(PREFIX)
        if part.startswith("encoder.layer."):
            number, rest = part.removeprefix("encoder.layer.").split(".", 1)
            part = f"encoder.layer.{int(number) + skip}.{rest}"
        source = given.get(f"student.text.{part}")
        if source is not None and part == POSITIONS:
            source = source[: len(ours[name])]
        if source is not None and source.shape == ours[name].shape:
            found[name] = source
    return found
