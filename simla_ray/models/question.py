"""The pass of a fine-tuned task: a question or a statement over its image, and what reads its states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simla_ray.config.schema import Objectives
from simla_ray.models.forward import Record
from simla_ray.models.model import Model
from simla_ray.models.needs import Needs
from simla_ray.models.stack import Memory
from simla_ray.models.text import read_cls
from simla_ray.types import Batch

#: Numbers of the vocabulary's logits that ranking holds at a time.
LOGITS = 2**26


def forward_question(model: Model, batch: Batch, objectives: Objectives, needs: Needs) -> Record:
    """All passes of one micro-batch of a fine-tuned task.

    A statement about two pictures is read over each of them with the same weights, and both [CLS] are judged together
    (UNITER's pair form). The official ``models/simla/nlvr.py`` lets layers take turns between the pictures instead,
    which needs twice the upper layers and a pretraining stage of its own.
    """
    record, regions = Record(), ()
    if batch.region_boxes is not None and batch.second_image is None:  # those of two pictures are a grid's cells
        regions = batch.regions, batch.region_boxes, batch.region_mask
    if needs.labels:
        assert objectives.labels is not None and model.label_head is not None
        pictures = [batch.image] if batch.second_image is None else [batch.image, batch.second_image]
        tokens = model.student.vision(torch.cat(pictures), *regions)
        cls = question_cls(model, tokens, batch.token_ids, batch.token_mask)
        record.label_logits = model.label_head(cls.unflatten(0, (len(pictures), -1)).transpose(0, 1).flatten(1))
    if needs.answers:
        tokens = model.student.vision(batch.image, *regions)
        if model.answer_head is not None:
            record.label_logits = model.answer_head(question_cls(model, tokens, batch.token_ids, batch.token_mask))
        else:
            assert model.decoder is not None and batch.answer_ids is not None
            states = model.student.fuse(tokens, None, batch.token_ids, batch.token_mask)
            record.answer_logits = model.decoder(batch.answer_ids[:, :-1], Memory(states, batch.token_mask))
    return record


def question_cls(model: Model, tokens: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """tokens (n * B, N, D) of n pictures per text, ids and mask (B, L) -> (n * B, D): the fused [CLS], pooled."""
    student, text, times = model.student, model.student.text, len(tokens) // len(ids)
    states = text.embeddings(ids)
    if student.merging is not None:
        states, mask = states.repeat(times, 1, 1), mask.repeat(times, 1)
        return student.pool(student.merging.cls(student.layers, states, mask, tokens))
    if text.split:
        states = text.encoder(states, mask, layers=text.language_layers)
    mask = mask.repeat(times, 1)
    (cls,) = text.fuse(states.repeat(times, 1, 1), mask, Memory(tokens), [read_cls(mask)])
    return cls[:, 0]


@torch.no_grad()
def answer_likelihoods(
    decoder: nn.Module, states: Tensor, mask: Tensor, answer_ids: Tensor, pad_id: int, top_k: int
) -> Tensor:
    """Log-likelihood of every answer of a list, (n, K) float32; -inf for those that are not among the ``top_k`` whose
    first word piece is the likeliest.

    Official ``rank_answer`` (``models/simla/vqa.py``), which counts the first piece twice; we count it once.

    Args:
        states: (n, L, D) of the questions; mask: (n, L).
        answer_ids: (K, A): [CLS], pieces, [SEP], padding.
    """
    n, K = len(states), len(answer_ids)
    bos, first = answer_ids[:1, :1].expand(n, 1), answer_ids[:, 1]
    start = decoder(bos, Memory(states, mask))[:, 0].float().log_softmax(-1)
    chosen = start[:, first].topk(min(top_k, K), dim=1).indices  # (n, k)
    parts = []
    # k groups of n rows, which read the states of questions 0..n-1; as many groups at a time as memory is wanted for.
    for group in chosen.T.split(max(1, LOGITS // (n * answer_ids.shape[1] * start.shape[1]))):
        rows = answer_ids[group.flatten()]
        logits = decoder(rows[:, :-1], Memory(states, mask)).float().log_softmax(-1)
        target = rows[:, 1:]
        each = logits.gather(2, target[:, :, None])[:, :, 0].masked_fill(target == pad_id, 0).sum(1)
        parts.append(each.view(len(group), n))
    likelihood = torch.cat(parts)
    found = torch.full((n, K), float("-inf"), device=states.device)
    return found.scatter_(1, chosen, likelihood.T)
