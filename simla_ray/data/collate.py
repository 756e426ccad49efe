"""Samples of a micro-batch -> ``Batch``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from simla_ray.config.schema import Run
from simla_ray.data.sample import Sample
from simla_ray.types import Batch


def collate(samples: Sample, run: Run, uids: Sequence[str] = (), epochs: Sequence[int] = ()) -> Batch:
    """A batch of stacked samples (``sample.stacked``), of whose arrays it keeps views.

    Text is cut to the longest caption, rounded up to ``text.pad_multiple``. Masked positions become index lists of one
    width with weights, so that the step never has to look for them.
    """
    column, B = samples, len(samples["n_tokens"])
    longest = int(column["n_tokens"].max())
    multiple = run.text.pad_multiple
    L = min(-(-longest // multiple) * multiple, run.text.length)
    ids = _tensor(column["token_ids"][:, :L])
    n_tokens = _tensor(column["n_tokens"])
    none = np.zeros((B, L), dtype=bool)
    chosen = column["mlm_chosen"][:, :L] if "mlm_chosen" in column else none
    mlm_index, mlm_weight = _index_lists(chosen)
    C, patch_mask, code_image = 0, np.zeros((0, run.grid**2), dtype=bool), None
    if run.objectives.mim is not None and "patch_mask" in column:
        C = math.ceil(B * run.objectives.mim.batch_fraction)
        patch_mask = column["patch_mask"][:C]
        if "code_row" in column:
            code_image = torch.from_numpy(_code_images(column, C))
    mim_index, mim_weight = _index_lists(patch_mask)
    return Batch(
        **regions_of(column),
        **tags_of(column),
        image=_tensor(column["image"]),
        token_ids=ids,
        token_mask=torch.arange(L)[None, :] < n_tokens[:, None],
        masked_ids=_tensor(column["masked_ids"][:, :L]) if "masked_ids" in column else ids,
        mlm_index=mlm_index,
        mlm_weight=mlm_weight,
        mlm_label=ids.gather(1, mlm_index),
        patch_mask=_tensor(patch_mask),
        mim_index=mim_index,
        mim_weight=mim_weight,
        word_start=_tensor(column["word_start"][:, :L]),
        keyword_ok=_tensor(column["keyword_ok"][:, :L] if "keyword_ok" in column else none),
        keyword_prior=_tensor(
            column["keyword_prior"][:, :L] if "keyword_prior" in column else np.zeros((B, L), dtype=np.float32)
        ),
        image_id=_tensor(column["image_id"]),
        is_concept=_tensor(column["is_concept"][:, :L]) if "is_concept" in column else None,
        code_image=code_image,
        second_image=_tensor(column["second_image"]) if "second_image" in column else None,
        answer_ids=_tensor(_cut(column["answer_ids"])) if "answer_ids" in column else None,
        label=_tensor(column["label"]) if "label" in column else None,
        uid=list(uids),
        epoch=list(epochs),
    )


def regions_of(column: Sample) -> dict[str, Tensor]:
    """Boxes, mask and a column's features of regions, cut to the image that has most of them; which are hidden."""
    if "region_boxes" not in column:
        return {}
    n = column["n_regions"]
    R = int(n.max())
    there = {"region_boxes": _tensor(column["region_boxes"][:, :R])}
    there["region_mask"] = torch.from_numpy(np.arange(R)[None, :] < n[:, None])
    if "regions" in column:
        there["regions"] = _tensor(column["regions"][:, :R])
    if "region_class" in column:
        there["region_class"] = _tensor(column["region_class"][:, :R])
    if "region_hidden" in column:
        there["region_hidden"] = _tensor(column["region_hidden"][:, :R])
        there["mrm_index"], there["mrm_weight"] = _index_lists(column["region_hidden"][:, :R])
    return there


def tags_of(column: Sample) -> dict[str, Tensor]:
    """Tags cut to the image that has most of them, and those that are masked."""
    if "tag_ids" not in column:
        return {}
    G = int(column["n_tags"].max())
    ids = column["tag_ids"][:, :G]
    chosen = column["mcr_chosen"][:, :G] if "mcr_chosen" in column else np.zeros(ids.shape, dtype=bool)
    index, weight = _index_lists(chosen)
    masked = column["masked_tag_ids"][:, :G] if "masked_tag_ids" in column else ids
    return {"tag_ids": _tensor(ids), "masked_tag_ids": _tensor(masked), "mcr_index": index, "mcr_weight": weight}


def _cut(answer_ids: np.ndarray) -> np.ndarray:
    """(B, A) without the columns in which every answer has ended."""
    return answer_ids[:, : int((answer_ids != 0).sum(1).max())]


def _tensor(values: np.ndarray) -> Tensor:
    """Shares the memory of an array, also of one that may not be written to: nobody writes into a batch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(values)


def _code_images(column: Sample, n: int) -> np.ndarray:
    """(n, 3, px, px) pictures of the codes: the tower's own, or another where there is one."""
    rows = column["code_row"][:n]
    if not len(column["code_image"]):
        return column["image"][:n].copy()
    shape = column["code_image"].shape[1:]
    images = column["image"][:n].copy() if column["image"].shape[1:] == shape else np.empty((n, *shape), np.uint8)
    images[rows >= 0] = column["code_image"][rows[rows >= 0]]
    return images


def _index_lists(chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    """chosen (B, S) bool -> index (B, M) int64 and weight (B, M) float32, M the largest count (at least 1)."""
    counts = chosen.sum(1)
    M = max(1, int(counts.max(initial=0)))
    index = np.argsort(~chosen, axis=1, kind="stable")[:, :M]
    weight = np.arange(M)[None, :] < counts[:, None]
    return torch.from_numpy(np.where(weight, index, 0)), torch.from_numpy(weight.astype(np.float32))
