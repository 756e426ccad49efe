"""A toy run, model and micro-batch for tests: 9 patches of 8 px, 7 text tokens, width 16."""

from __future__ import annotations

import itertools
from collections import Counter

import torch

from simla_ray.config.load import load_run
from simla_ray.config.schema import Run
from simla_ray.data.concept_tokens import column_phrases, concepts_for, phrases_in
from simla_ray.data.text import Vocabulary, clean
from simla_ray.models.forward import Needs, Negatives, forward_cross
from simla_ray.models.model import Model
from simla_ray.objectives.terms import loss_terms
from simla_ray.types import Batch, LossTerm

NAMES = ("itc", "itm", "mlm", "mim", "psl")
SUBSETS = [frozenset(s) for n in range(1, 6) for s in itertools.combinations(NAMES, n)]
VOCAB, CODES, CLS, PX, PATCH = 40, 12, 2, 24, 8
B, L, P = 4, 7, 9
N = P + 1

SHAPE = {
    "size": "tiny",
    "schedule.kind": "joint",
    "schedule.phases": [],
    "eval.best": "last",
    "vision.image_px": PX,
    "vision.patch_px": PATCH,
    "vision.width": 16,
    "vision.stem": "patch",
    "text.width": 16,
    "text.ffn": 32,
    "text.max_positions": 32,
    "text.dropout": 0.0,
    "joint_width": 8,
    "objectives.itm.eps": 0.5,
    "objectives.itm.eps_end": 0.02,
    "objectives.psl.bias_log_prior": False,
    "queue": 0,
    "codes.n": CODES,
    "batch.micro": B,
    "batch.global": 2 * B,
    "ray.workers": 1,
    **{f"objectives.{name}.soft_alpha": 0.4 for name in ("itc", "mlm", "mim", "psl")},
    **{f"objectives.{name}.alpha_ramp": 1 / 30 for name in ("itc", "mlm", "mim", "psl")},
    **{f"objectives.{name}.weight": 1.0 for name in NAMES},
    "objectives.mim.batch_fraction": 1.0,
    "teacher.m": 0.99,
    "optim.warmup_steps": 0,
}


def make_run(on=NAMES, **overrides) -> Run:
    """A run with these objectives; overrides are dotted keys, ``__`` for the dot."""
    off = {f"objectives.{name}": None for name in NAMES if name not in on}
    return load_run(overrides={**SHAPE, **{k.replace("__", "."): v for k, v in overrides.items()}, **off})


def make_model(run: Run, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model(run, VOCAB).train()


def make_batch(seed: int = 0, rows: int = B, *, floats: bool = False) -> Batch:
    """Captions of 4 to 7 tokens, two masked words and three or four masked patches each; pads are id 0."""
    g = torch.Generator().manual_seed(seed)

    def ints(low, high, *shape):
        return torch.randint(low, high, shape, generator=g)

    length = torch.arange(rows) % 4 + 4
    position = torch.arange(L).expand(rows, L)
    mask = position < length[:, None]
    ids = ints(5, VOCAB, rows, L)
    ids[:, 0] = CLS
    ids = ids.masked_fill(~mask, 0)
    mlm_index = torch.tensor([[1, 3]]).expand(rows, 2).contiguous()
    masked = ids.clone().scatter_(1, mlm_index, 4)
    mim_index = torch.stack([torch.randperm(P, generator=g)[:4] for _ in range(rows)])
    mim_weight = torch.ones(rows, 4)
    mim_weight[::2, 3] = 0
    patch_mask = torch.zeros(rows, P).scatter_(1, mim_index, mim_weight).bool()
    image = ints(0, 256, rows, 3, PX, PX).to(torch.uint8)
    return Batch(
        image=torch.randn(rows, 3, PX, PX, generator=g) if floats else image,
        token_ids=ids,
        token_mask=mask,
        masked_ids=masked,
        mlm_index=mlm_index,
        mlm_weight=torch.ones(rows, 2),
        mlm_label=ids.gather(1, mlm_index),
        patch_mask=patch_mask,
        mim_index=mim_index,
        mim_weight=mim_weight,
        word_start=position.clone(),
        keyword_ok=mask & (position > 0),
        keyword_prior=torch.rand(rows, L, generator=g),
        image_id=torch.arange(rows) + 100 * seed,
        codes=ints(0, CODES, rows, P),
    )


def run_forward(model: Model, run: Run, batch: Batch, active=None, alpha=0.4, given=None):
    """-> record and terms of one micro-batch."""
    objectives = run.objectives
    active = set(objectives.active()) if active is None else set(active)
    needs = Needs.of(objectives, active, has_teacher=model.teacher is not None)
    record = forward_cross(model, batch, objectives, needs, itm_eps=1e-4, given=given)
    terms: dict[str, LossTerm] = loss_terms(
        record,
        batch,
        objectives,
        active,
        dict.fromkeys(active, alpha),
        scale=model.scale,
        queue=model.queue,
        codes=batch.codes,
        cls_id=CLS,
    )
    return record, terms


__all__ = ["CLS", "CODES", "NAMES", "SUBSETS", "VOCAB", "B", "L", "N", "Negatives", "P"]


def with_concepts(vocabulary, rows, run):
    """The vocabulary with the phrase concepts of some rows' captions."""
    most = run.text.max_words
    captions = [(clean(c, most), column_phrases(row)) for row in rows for c in row["captions"]]
    counts = Counter(
        p.concept for caption, given in captions for p in phrases_in(caption.split(), given, run.concepts, most)
    )
    concepts = concepts_for(run, vocabulary, counts, len(captions))
    return Vocabulary(vocabulary.tokenizer, vocabulary.frequency, vocabulary.answers, concepts)
