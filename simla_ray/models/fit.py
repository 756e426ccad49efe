"""Given weights into a model: what must be there, what may be absent, and one error for all that does not fit.

Whole heads may be on one side only, for runs differ in their objectives; that is noted. A part of a head, a tower's
tensor or a shape that differs is an error. Two tables of positions are made to fit: those of the image's patches by
interpolation, those of the text by cutting.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simla_ray.errors import UserError

#: Parts that a run has or has not, by its objectives and its temperature.
HEADS = (
    "student.text.cls.",
    "student.vision.mask_token",
    "student.vision_proj.",
    "student.text_proj.",
    "student.mim_head.",
    "student.concept_head.",
    "student.merging.pooler.",
    "student.vision.mask_embedding",
    "student.vision.tag_head.",
    "student.vision.features.",
    "student.region_regression.",
    "student.region_classifier.",
    "region_codes.",
    "itm_head.",
    "decoder.",
    "answer_head.",
    "label_head.",
    "scale.temperature",
    "scale.log_scale",
    "scale.bias",
)
CROSS = ".crossattention."
IMAGE_POSITIONS = "student.vision.vit.pos_embed"
TEXT_POSITIONS = "student.text.embeddings.position_embeddings.weight"
#: Tensors with a row per word piece.
PER_WORD = (
    "student.text.embeddings.word_embeddings.weight",
    "student.text.cls.predictions.bias",
    "student.concept_head.weight",
    "student.concept_head.bias",
)
#: What in a name points to which key.
HINTS = {
    CROSS: "text.fusion",
    "merging.": "text.fusion",
    "patch_embed.stem": "vision.stem",
    "patch_embed.": "vision.patch_px",
    ".blocks.": "vision.depth",
    ".layer.": "text.depth",
    "position_embeddings": "text.max_positions",
    "mim_head": "codes.n",
    "region_c": "codes.n",
    "img_linear": "regions",
    "_proj.": "joint_width",
}


def load_start(model: nn.Module, given: Mapping[str, Tensor], origin: str) -> list[str]:
    """Load weights into the student, its heads and the temperature; returns notes, as ``adapted`` does."""
    fitting, notes = adapted(start_state(model), given, origin)
    with torch.no_grad():
        model.load_state_dict(fitting, strict=False)
    return notes


def start_state(model: nn.Module) -> dict[str, Tensor]:
    """What of a model a start brings: all but teacher and queue."""
    return {n: t for n, t in model.state_dict().items() if not n.startswith(("teacher.", "queue."))}


def adapted(
    ours: Mapping[str, Tensor], given: Mapping[str, Tensor], origin: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The given tensors that ours have a place for, made to fit.

    Args:
        ours: only their shapes are read; they may be on the meta device.
        given: teacher and queue among them are passed over.
        origin: file or folder, for the messages.

    Returns:
        The tensors, and a line for each thing that was changed, left out or starts anew.

    Raises:
        UserError: one line that lists what is missing, what is too much and what has another shape.
    """
    given = {name: tensor for name, tensor in given.items() if not name.startswith(("teacher.", "queue."))}
    absent, left_out = _lone_heads(ours, given), _lone_heads(given, ours)
    notes = [f"{head} starts anew: {origin} has none" for head in absent]
    notes += [f"{head} of {origin} is left out: this run has none" for head in left_out]
    fitting = {name: t for name, t in given.items() if _head_of(name) not in left_out}
    notes += _fit_positions(fitting, ours, origin)
    missing = [name for name in ours if name not in fitting and _head_of(name) not in absent]
    extra = [name for name in fitting if name not in ours]
    wrong = other_shapes(ours, fitting)
    if missing or extra or wrong:
        raise UserError(f"{origin}: does not fit this run; {misfit(missing, extra, wrong)}{_vocabulary(ours, fitting)}")
    return fitting, notes


def misfit(missing: Collection[str], extra: Collection[str], wrong: Mapping[str, str]) -> str:
    """``missing 3 (a, b, c); unknown 1 (d); of another shape 1 (e (2, 3) for (2, 4)); see text.depth``"""
    parts = []
    if missing:
        parts.append(f"missing {listed(missing)}")
    if extra:
        parts.append(f"unknown {listed(extra)}")
    if wrong:
        parts.append(f"of another shape {listed([f'{name} {shapes}' for name, shapes in wrong.items()])}")
    names = [*missing, *extra, *wrong]
    keys = {key: None for hint, key in HINTS.items() if any(hint in name for name in names)}
    return "; ".join(parts) + (f"; see {', '.join(keys)}" if keys else "")


def listed(names: Collection[str], n: int = 5) -> str:
    """How many there are, and the first of them."""
    return f"{len(names)} ({', '.join(sorted(names)[:n])}{', ...' if len(names) > n else ''})"


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """(1, 1 + n^2, D) -> (1, 1 + grid^2, D): bicubic, the class token's row untouched.

    As the official ``vit.interpolate_pos_embed``: corners not aligned, no smoothing on the way down.
    """
    side = math.isqrt(positions.shape[1] - 1)
    if side**2 != positions.shape[1] - 1:
        raise UserError(f"positions of {positions.shape[1] - 1} patches are no square grid")
    patches = positions[:, 1:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1].float(), patches.permute(0, 2, 3, 1).flatten(1, 2)], 1).to(positions.dtype)


def _head_of(name: str) -> str | None:
    head = next((head.removeprefix("student.").rstrip(".") for head in HEADS if name.startswith(head)), None)
    return "cross-attention" if head is None and CROSS in name else head


def _lone_heads(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> list[str]:
    """Heads of which the others have no tensor at all."""
    there = {_head_of(name) for name in others}
    return [head for head in dict.fromkeys(map(_head_of, some)) if head is not None and head not in there]


def _fit_positions(fitting: dict[str, Tensor], ours: Mapping[str, Tensor], origin: str) -> list[str]:
    """Bring both tables of positions to our shapes where they can be; returns notes."""
    notes = []
    image, text = (fitting.get(n) for n in (IMAGE_POSITIONS, TEXT_POSITIONS))
    wanted = ours.get(IMAGE_POSITIONS)
    if image is not None and wanted is not None and image.ndim == 3 and image.shape[1] != wanted.shape[1]:
        grid = math.isqrt(wanted.shape[1] - 1)
        fitting[IMAGE_POSITIONS] = resize_positions(image, grid)
        was = math.isqrt(image.shape[1] - 1)
        notes.append(f"image positions of {origin} are resized from {was}x{was} to {grid}x{grid} patches")
    wanted = ours.get(TEXT_POSITIONS)
    if text is not None and wanted is not None and len(text) > len(wanted):
        fitting[TEXT_POSITIONS] = text[: len(wanted)]
        notes.append(f"of {len(text)} text positions of {origin} the first {len(wanted)} are kept (text.max_positions)")
    return notes


def other_shapes(ours: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> "theirs for ours"."""
    both = [name for name in ours if name in given and given[name].shape != ours[name].shape]
    return {name: f"{tuple(given[name].shape)} for {tuple(ours[name].shape)}" for name in both}


def _vocabulary(ours: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """A word on vocabularies of two sizes."""
    for name in PER_WORD:
        if name in ours and name in given and len(given[name]) != len(ours[name]):
            return (
                f"; text.vocab: the vocabulary has {len(ours[name])} word pieces, the weights know {len(given[name])}"
            )
    return ""
