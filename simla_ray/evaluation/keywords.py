"""Does PSL's concept head name what an image shows and its caption does not say?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from simla_ray.config.schema import KeywordSelect, Psl, Side
from simla_ray.data.collate import collate
from simla_ray.data.sample import stacked
from simla_ray.data.text import Vocabulary, clean, load_stop_words
from simla_ray.evaluation.eval_set import IMAGES, EvalSet, Item
from simla_ray.evaluation.examples import number, pick
from simla_ray.evaluation.intervals import image_sums, mean_interval, mean_intervals
from simla_ray.evaluation.scorer import Images
from simla_ray.evaluation.work import chunks_of
from simla_ray.models.precision import autocast
from simla_ray.models.stack import Attentions, Memory
from simla_ray.objectives.keywords import select_keywords
from simla_ray.types import EvalResult


def average_precision(hits: np.ndarray) -> float:
    """Mean of the precisions at each right word; hits (n,) bool in ranked order, at least one True."""
    places = np.flatnonzero(hits) + 1
    return float((np.arange(1, len(places) + 1) / places).mean())


@dataclass(frozen=True)
class Candidates:
    """The words that are ranked, in alphabetical order, and their pieces."""

    words: list[str]
    frequency: np.ndarray  # (n,) share of the training captions
    piece_ids: torch.Tensor  # all words' pieces, one after another
    offsets: torch.Tensor  # (n,) where each word's begin

    @classmethod
    def of(cls, vocabulary: Vocabulary, stop_words: frozenset[str]) -> Candidates:
        """Every word of the training captions that is no stop word and that the word pieces can spell."""
        pieces = {word: vocabulary.word_ids(word) for word in sorted(vocabulary.frequency) if word not in stop_words}
        pieces = {word: ids for word, ids in pieces.items() if ids and vocabulary.unk_id not in ids}
        lengths = [len(ids) for ids in pieces.values()]
        return cls(
            list(pieces),
            np.array([vocabulary.frequency[word] for word in pieces]),
            torch.tensor([i for ids in pieces.values() for i in ids]),
            torch.tensor(np.cumsum([0, *lengths])[:-1]),
        )

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """logits (B, V) of pieces -> (B, n): the mean over a word's pieces."""
        table = logits.float().T.contiguous()
        return F.embedding_bag(self.piece_ids.to(table.device), table, self.offsets.to(table.device), mode="mean").T


@dataclass(frozen=True)
class Case:
    """An image whose first caption leaves words unsaid (``truth``); ``visible`` are all it shows, where known."""

    item: int
    said: frozenset[str]
    truth: frozenset[str]
    visible: frozenset[str] | None


def truth_of(item: Item, stop_words: frozenset[str]) -> tuple[frozenset[str], frozenset[str] | None]:
    """(words the image shows and the first caption does not say; all it shows, None where only captions tell).

    From ``keywords``; without them, from the content words that the other captions use.
    """
    said = frozenset(item.captions[0].split())
    if item.keywords is not None:
        visible = frozenset(word for keyword in item.keywords for word in clean(keyword, 100).split())
        return visible - said - stop_words, visible
    others = frozenset(word for caption in item.captions[1:] for word in caption.split())
    return others - said - stop_words, None


@dataclass(frozen=True)
class Unsaid:
    """The words that first captions leave unsaid, as far as a run can rank them."""

    data: EvalSet
    psl: Psl
    stop_words: frozenset[str]
    candidates: Candidates
    number: dict[str, int]  # of each candidate
    cases: list[Case]

    def ap(self) -> float:
        """``ap`` of ``measure`` alone, with the weights of the moment. Collective."""
        chunks = chunks_of(len(self.cases), IMAGES)
        parts = self.data.work.map(lambda c: self._precisions([self.cases[i] for i in c]), chunks)
        return float(np.array([one for part in parts for one in part]).mean())

    def _precisions(self, cases: list[Case]) -> list[float]:
        scores = self.scores(self.data.images([case.item for case in cases]))[1]
        return [average_precision(self.ranked(case, row)[1]) for case, row in zip(cases, scores, strict=True)]

    def scores(self, images: Images) -> tuple[torch.Tensor, np.ndarray]:
        """The teacher's tokens of B images (B, N, D), and its concept head's scores of the candidates (B, n)."""
        scorer = self.data.scorer
        tokens, vectors = scorer.encode_images(images, towers=scorer.teacher)
        with torch.no_grad(), autocast(scorer.run, scorer.device):
            logits = scorer.teacher.concept_head(vectors)
        return tokens, np.nan_to_num(self.candidates.scores(logits).cpu().numpy())

    def ranked(self, case: Case, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The candidates that the caption does not say, best first, by number, and which of them are true."""
        unsaid, right = np.ones(len(scores), bool), np.zeros(len(scores), bool)
        unsaid[[self.number[word] for word in case.said if word in self.number]] = False
        right[[self.number[word] for word in case.truth]] = True
        order = np.flatnonzero(unsaid)[np.argsort(-scores[unsaid], kind="stable")]
        return order, right[order]


def unsaid(data: EvalSet) -> Unsaid | str:
    """What is left unsaid, or the reason why there is nothing to rank."""
    psl = data.run.objectives.psl
    if psl is None or "psl" not in data.active:
        return "no objective psl"
    # Stop words are never truth, also in a run that takes them as keywords: numbers of two runs stay comparable.
    stop_words = load_stop_words(psl.stop_words or "en")
    candidates = Candidates.of(data.scorer.vocabulary, stop_words)
    number_of = {word: k for k, word in enumerate(candidates.words)}
    known = set(number_of)
    cases = []
    for i, item in enumerate(data.items):
        truth, visible = truth_of(item, stop_words)
        if truth & known:
            cases.append(Case(i, frozenset(item.captions[0].split()), truth & known, visible))
    if not cases:
        return "no column keywords and no second caption, or they say nothing new"
    return Unsaid(data, psl, stop_words, candidates, number_of, cases)


def measure(data: EvalSet) -> EvalResult | str:
    """Ranking of all words that the shown caption does not say, by the concept head; teacher's where there is one.

    Metrics, means over images with something left unsaid: ``ap``; ``baseline_ap``, the same words by frequency in the
    training captions; ``precision`` and ``recall`` of the ``psl.max_keywords`` highest; ``n`` images.
    ``selected_precision``, where rows have ``keywords``: share of the keywords that attention selects from the caption
    which the image shows. Words that no training caption used cannot be ranked and are no truth. Equal scores are
    ranked alphabetically. Without PSL or truth, the reason.
    """
    found = unsaid(data)
    if isinstance(found, str):
        return found
    cases = found.cases
    parts = data.work.map(lambda c: _judge(found, [cases[i] for i in c]), chunks_of(len(cases), IMAGES))
    judged = [one for part in parts for one in part]
    values = {name: np.array([one[name] for one in judged]) for name in ("ap", "baseline_ap", "precision", "recall")}
    metrics: dict[str, Any] = {name: float(column.mean()) for name, column in values.items()}
    metrics["n"] = len(cases)
    intervals = mean_intervals(values)
    per_image = image_sums(values, len(data), np.array([case.item for case in cases]))
    selected = [
        (case.item, word in case.visible)
        for case, one in zip(cases, judged, strict=True)
        if case.visible is not None
        for word in one["selected"]
    ]
    if selected:
        owner, seen = (np.array(column) for column in zip(*selected, strict=True))
        metrics["selected_precision"] = float(seen.mean())
        intervals["selected_precision"] = mean_interval(seen, owner)
        per_image |= image_sums({"selected_precision": seen}, len(data), owner)
    return EvalResult("keywords", metrics, _examples(found, judged), intervals, per_image)


def _judge(unsaid: Unsaid, cases: list[Case]) -> list[dict[str, Any]]:
    """ap, baseline_ap, precision, recall, recommended words and selected words of each case."""
    data, psl, candidates = unsaid.data, unsaid.psl, unsaid.candidates
    items = [data.items[case.item] for case in cases]
    images = data.images([case.item for case in cases])
    tokens, scores = unsaid.scores(images)
    if psl.image_source is Side.student:
        tokens, _ = data.scorer.encode_images(images)
    selected = selected_words(data, psl, items, tokens)
    judged = []
    for case, row, chosen in zip(cases, scores, selected, strict=True):
        order, right = unsaid.ranked(case, row)
        top = right[: psl.max_keywords]
        judged.append(
            {
                "ap": average_precision(right),
                "baseline_ap": average_precision(unsaid.ranked(case, candidates.frequency)[1]),
                "precision": float(top.mean()),
                "recall": float(top.sum() / right.sum()),
                "recommended": [candidates.words[i] for i in order[: psl.max_keywords]],
                "selected": chosen,
            }
        )
    return judged


@torch.no_grad()
def selected_words(data: EvalSet, psl: Psl, items: list[Item], image_tokens: torch.Tensor) -> list[list[str]]:
    """The words that training would take as keywords from each first caption; a chosen piece stands for its word."""
    scorer = data.scorer
    batch = collate(stacked([item.sample for item in items]), scorer.run).to(scorer.device)
    attention = None
    if psl.select is KeywordSelect.attention:
        towers = scorer.teacher if psl.attention is Side.teacher else scorer.model.student
        keep = Attentions(cls_rows=slice(None))
        with autocast(scorer.run, scorer.device):
            towers.text.encode(batch.token_ids, batch.token_mask, Memory(image_tokens), keep)
        attention = keep.cls
    chosen = select_keywords(attention, batch.keyword_ok, batch.word_start, batch.keyword_prior, psl).cpu().numpy()
    chosen[:, 0] = False  # [CLS] is never a keyword
    found = []
    for item, row in zip(items, chosen, strict=True):
        words = scorer.vocabulary.encode(item.captions[0], scorer.run.text.max_tokens).words
        # Padding can be chosen with the official variant.
        named = [words[p] if p < len(words) else "[PAD]" for p in np.flatnonzero(row)]
        found.append(list(dict.fromkeys(named)))
    return found


def _examples(unsaid: Unsaid, judged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Half of them with an average precision above the mean."""
    data, cases, stop_words = unsaid.data, unsaid.cases, unsaid.stop_words
    ap = np.array([one["ap"] for one in judged])
    examples = []
    for k in pick(ap >= ap.mean()):
        item, one = data.items[cases[k].item], judged[k]
        example = {
            "uid": item.uid,
            "caption": item.captions[0],
            "said": [word for word in dict.fromkeys(item.captions[0].split()) if word not in stop_words],
            "selected": one["selected"],
            "recommended": one["recommended"],
            "true": sorted(cases[k].truth),
            "ap": number(one["ap"]),
        }
        examples.append(example | data.picture(cases[k].item))
    return examples
