"""A baseline that never sees the picture: multinomial logistic regression on the words and word pairs of a text.

What it reaches on a task (questions, statements, hypotheses) says how much of the task can be guessed from language.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, WORDS = "text_only.safetensors", "text_only.json"
#: The most frequent words and pairs are features; the most frequent labels are classes, as many as in the first
#: baselines of VQA (Antol et al., 2015).
FEATURES, LABELS = 8192, 1000
#: Strengths of the L2 penalty, in units of one row's loss, in the order they are tried.
L2 = (30.0, 3.0, 0.3)
BATCH, LEARNING_RATE = 1024, 0.05
#: Passes over the rows with each penalty, or so many steps if that is more.
EPOCHS, STEPS = 2, 80
#: Distinct texts from which on they are held out as a whole.
DISTINCT = 50
EDGE = "^"
_WORD = re.compile(r"[\w']+")


@dataclass(frozen=True)
class TextOnly:
    """A fitted baseline: weight (features, labels), bias (labels,). ``l2``: the penalty that was picked, None where no
    word helped and the most frequent label is all there is."""

    features: dict[str, int]
    labels: list[str]
    weight: Tensor
    bias: Tensor
    l2: float | None

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The likeliest label of each text; unknown words are passed over."""
        found = []
        for start in range(0, len(texts), BATCH):
            rows = [_row(text, self.features) for text in texts[start : start + BATCH]]
            found += _logits(rows, self.weight, self.bias).argmax(1).tolist()
        return [self.labels[i] for i in found]

    def save(self, folder: Path) -> None:
        save_file({"weight": self.weight, "bias": self.bias}, folder / WEIGHTS)
        (folder / WORDS).write_text(json.dumps({"features": self.features, "labels": self.labels, "l2": self.l2}))

    @classmethod
    def load(cls, folder: Path) -> TextOnly:
        """What ``save`` has put there."""
        return cls(**json.loads((folder / WORDS).read_text()), **load_file(folder / WEIGHTS))


def fit_text_only(texts: Sequence[str], labels: Sequence[str], seed: int) -> TextOnly:
    """Fit on training rows; the penalty is the one with the best log-likelihood on a tenth of them.

    Rows with a label that is not among the ``LABELS`` most frequent are left out. Fewer than ten rows give the most
    frequent label. Equal inputs and seeds give equal results.

    Raises:
        ValueError: there are no rows.
    """
    if not texts:
        raise ValueError("no texts")
    counts = Counter(labels)
    classes = sorted(counts, key=lambda label: (-counts[label], label))[:LABELS]
    number = {label: i for i, label in enumerate(classes)}
    kept = [(text, number[label]) for text, label in zip(texts, labels, strict=True) if label in number]
    features = _frequent(text for text, _ in kept)
    rows, target = [_row(text, features) for text, _ in kept], torch.tensor([label for _, label in kept])
    held = _tenth([text for text, _ in kept], seed)
    shape, best = (len(features), len(classes)), 0
    if held.any():
        held, others = np.flatnonzero(held), np.flatnonzero(~held)
        losses = [_loss(rows, target, held, *weights) for weights in _fits(rows, target, others, shape, seed)]
        best = int(np.argmin(losses))
    *_, (weight, bias) = _fits(rows, target, np.arange(len(rows)), shape, seed, stages=best)
    return TextOnly(features, classes, weight, bias, L2[best - 1] if best else None)


def _tenth(texts: Sequence[str], seed: int) -> np.ndarray:
    """(n,) bool: the rows of a tenth of the distinct texts, or where there are few of those a tenth of the rows.

    A statement that comes with several pictures would be known by heart from its other rows.
    """
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    group = np.array([number[text] for text in texts]) if len(number) >= DISTINCT else np.arange(len(texts))
    n = int(group.max()) + 1
    chosen = np.random.default_rng(seed).permutation(n)[: n // 10]
    return np.isin(group, chosen)


def _fits(
    rows: Sequence[np.ndarray],
    target: Tensor,
    use: np.ndarray,
    shape: tuple[int, int],
    seed: int,
    stages: int = len(L2),
) -> Iterator[tuple[Tensor, Tensor]]:
    """weight and bias before any step, when every text gets the labels' shares, and after each stage of a penalty,
    which goes on from the stage before."""
    rng, n = np.random.default_rng([seed, len(use)]), len(use)
    share = (torch.bincount(target[torch.from_numpy(use)], minlength=shape[1]) + 0.1) / n
    weight, bias = torch.zeros(shape, requires_grad=True), share.log().requires_grad_()
    yield weight.detach().clone(), bias.detach().clone()
    per_epoch = -(-n // BATCH)
    epochs = max(EPOCHS, -(-STEPS // per_epoch))
    for l2 in L2[:stages]:
        groups = [{"params": [weight], "weight_decay": l2 / n}, {"params": [bias]}]
        optimizer = torch.optim.Adam(groups, LEARNING_RATE, betas=(0.9, 0.99), fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, epochs * per_epoch)
        for _ in range(epochs):
            for part in np.array_split(rng.permutation(use), per_epoch):
                logits = _logits([rows[i] for i in part], weight, bias)
                loss = F.cross_entropy(logits, target[torch.from_numpy(part)])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        yield weight.detach().clone(), bias.detach().clone()


@torch.no_grad()
def _loss(rows: Sequence[np.ndarray], target: Tensor, use: np.ndarray, weight: Tensor, bias: Tensor) -> float:
    """Mean negative log-likelihood."""
    total = 0.0
    for start in range(0, len(use), BATCH):
        part = use[start : start + BATCH]
        logits = _logits([rows[i] for i in part], weight, bias)
        total += float(F.cross_entropy(logits, target[torch.from_numpy(part)], reduction="sum"))
    return total / len(use)


def _logits(rows: Sequence[np.ndarray], weight: Tensor, bias: Tensor) -> Tensor:
    """Features of n rows -> (n, labels)"""
    starts = np.cumsum([0, *(len(row) for row in rows[:-1])])
    return F.embedding_bag(torch.from_numpy(np.concatenate(rows)), weight, torch.from_numpy(starts), mode="sum") + bias


def _words(text: str) -> Iterator[str]:
    """Words and pairs of neighbours, with the text's edges as neighbours."""
    words = _WORD.findall(text.lower())
    yield from words
    for pair in zip([EDGE, *words], [*words, EDGE], strict=True):
        yield " ".join(pair)


def _frequent(texts: Iterator[str]) -> dict[str, int]:
    counts = Counter(word for text in texts for word in _words(text))
    return {word: i for i, word in enumerate(sorted(counts, key=lambda word: (-counts[word], word))[:FEATURES])}


def _row(text: str, features: dict[str, int]) -> np.ndarray:
    """Features of a text, as often as they occur in it."""
    return np.array([features[word] for word in _words(text) if word in features], np.int64)
