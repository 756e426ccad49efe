"""Samples of a micro-batch -> ``Batch``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from simla_ray.config.schema import Run
from simla_ray.data.sample import Sample
from simla_ray.types import Batch


def collate(samples: Sequence[Sample], run: Run, uids: Sequence[str] = (), epochs: Sequence[int] = ()) -> Batch:
    """Stack samples; text is cut to the longest caption, rounded up to ``text.pad_multiple``.

    Masked positions become index lists of one width with weights, so that the step never has to look for them.
    """
    B = len(samples)
    longest = max(int(s["n_tokens"]) for s in samples)
    multiple = run.text.pad_multiple
    L = min(-(-longest // multiple) * multiple, run.text.max_tokens)
    column = {name: np.stack([s[name] for s in samples]) for name in samples[0] if name != "code_image"}
    ids = torch.from_numpy(column["token_ids"][:, :L])
    n_tokens = torch.from_numpy(column["n_tokens"])
    none = np.zeros((B, L), dtype=bool)
    chosen = column["mlm_chosen"][:, :L] if "mlm_chosen" in column else none
    mlm_index, mlm_weight = _index_lists(chosen)
    C, patch_mask, code_image = 0, np.zeros((0, run.grid**2), dtype=bool), None
    if run.objectives.mim is not None and "patch_mask" in column:
        C = math.ceil(B * run.objectives.mim.batch_fraction)
        patch_mask = column["patch_mask"][:C]
        if "code_image" in samples[0]:
            code_image = torch.from_numpy(np.stack([s["code_image"] for s in samples[:C]]))
    mim_index, mim_weight = _index_lists(patch_mask)
    return Batch(
        image=torch.from_numpy(column["image"]),
        token_ids=ids,
        token_mask=torch.arange(L)[None, :] < n_tokens[:, None],
        masked_ids=torch.from_numpy(column["masked_ids"][:, :L]) if "masked_ids" in column else ids,
        mlm_index=mlm_index,
        mlm_weight=mlm_weight,
        mlm_label=ids.gather(1, mlm_index),
        patch_mask=torch.from_numpy(patch_mask),
        mim_index=mim_index,
        mim_weight=mim_weight,
        word_start=torch.from_numpy(column["word_start"][:, :L]),
        keyword_ok=torch.from_numpy(column["keyword_ok"][:, :L] if "keyword_ok" in column else none),
        keyword_prior=torch.from_numpy(
            column["keyword_prior"][:, :L] if "keyword_prior" in column else np.zeros((B, L), dtype=np.float32)
        ),
        image_id=torch.from_numpy(column["image_id"]),
        code_image=code_image,
        uid=list(uids),
        epoch=list(epochs),
    )


def _index_lists(chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    """chosen (B, S) bool -> index (B, M) int64 and weight (B, M) float32, M the largest count (at least 1)."""
    counts = chosen.sum(1)
    M = max(1, int(counts.max(initial=0)))
    index = np.argsort(~chosen, axis=1, kind="stable")[:, :M]
    weight = np.arange(M)[None, :] < counts[:, None]
    return torch.from_numpy(np.where(weight, index, 0)), torch.from_numpy(weight.astype(np.float32))
