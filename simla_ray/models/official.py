"""Official SIMLA and ALBEF files under our names, and back.

One table serves both directions. Two things differ in layout: the queues are (E, Q) there and (Q, E) here; and ALBEF
adds a token type vector, always that of type 0, to words and positions before the LayerNorm, which here is part of the
positions (exact, the sum is the same). What can be derived from other tensors is left out here and made again on the
way out: the tied MLM decoder, position ids, the queue's pointer. What has no place here, such as the heads of
fine-tuned tasks, is set aside by name.

Fine-tuned files hold a ``BertModel`` where pretraining holds a ``BertForMaskedLM``: no ``bert.`` in the names, no MLM
head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from simla_ray.errors import UserError
from simla_ray.models.fit import listed

#: Our name of the official ``temp``.
TEMPERATURE = "scale.temperature"
#: Our prefixes of the towers with gradients and of their EMA copies, ``_m`` on the official top-level name.
OWNERS = {"": "student.", "_m": "teacher.master."}
#: Top-level modules of fine-tuned tasks that have no place here.
TASK_HEADS = ("text_decoder", "cls_head", "ta_head")
_WORDS = "embeddings.word_embeddings.weight"
_POSITIONS = "embeddings.position_embeddings.weight"
_TYPES = "embeddings.token_type_embeddings.weight"
_DECODER = "text_encoder{m}.cls.predictions.decoder."


@dataclass(frozen=True)
class Layout:
    """How a file is laid out: ``pretraining``, with ``bert.`` in its names; ``token_types``, as ALBEF's are."""

    pretraining: bool
    token_types: bool

    @classmethod
    def of(cls, names: Mapping[str, object]) -> Layout:
        return cls(
            pretraining=not any(name.startswith("text_encoder.encoder.") for name in names),
            token_types=any(name.endswith(_TYPES) for name in names),
        )

    @property
    def text(self) -> str:
        """The text model's prefix, ``{m}`` for the copy's ``_m``."""
        return "text_encoder{m}.bert." if self.pretraining else "text_encoder{m}."

    def towers(self) -> Iterator[tuple[str, str]]:
        """(official prefix, ours below its owner); the first that fits counts, in both directions."""
        yield "visual_encoder{m}.mask_token", "vision.mask_token"
        yield "visual_encoder{m}.", "vision.vit."
        if self.pretraining:
            yield "text_encoder{m}.cls.", "text.cls."
        yield self.text, "text."
        for head in ("vision_proj", "text_proj", "mim_head", "concept_head"):
            yield head + "{m}.", head + "."


SIMLA = Layout(pretraining=True, token_types=False)
ALBEF = Layout(pretraining=True, token_types=True)


@dataclass(frozen=True)
class Official:
    """An official state under our names.

    ``aside`` holds, under their official names, the tensors that have no place here, and those that a change of layout
    rounds; ``to_official`` takes them back.
    """

    tensors: dict[str, Tensor]
    layout: Layout
    aside: dict[str, Tensor] = field(default_factory=dict)

    @property
    def ignored(self) -> list[str]:
        """Modules of fine-tuned tasks that are in the file and have no place here."""
        tops = {name.partition(".")[0].removesuffix("_m") for name in self.aside}
        return [top for top in TASK_HEADS if top in tops]


def from_official_name(name: str, layout: Layout = SIMLA) -> tuple[str, bool] | None:
    """Our name of an official tensor, and whether it must be transposed; None where it is derived or set aside.

    Raises:
        KeyError: no such tensor in an official file.
    """
    if _is_derived(name) or name == "queue_ptr" or name.endswith(_TYPES) or _is_task_head(name):
        return None
    if name in ("image_queue", "text_queue"):
        return f"queue.{name.removesuffix('_queue')}", True
    if name == "idx_queue":  # (1, Q), fine-tuned retrieval
        return "queue.ids", False
    if name == "temp":
        return TEMPERATURE, False
    if name.startswith("itm_head."):
        return name, False
    for m, owner in OWNERS.items():
        for official, ours in layout.towers():
            prefix = official.format(m=m)
            if name.startswith(prefix):
                return f"{owner}{ours}{name.removeprefix(prefix)}", False
    raise KeyError(name)


def from_official(state: Mapping[str, Tensor]) -> Official:
    """An official state dict under our names.

    Raises:
        UserError: names that no official file has, or a decoder that is not tied to the words; lists them.
    """
    layout = Layout.of(state)
    found = Official({}, layout)
    unknown = []
    for name, tensor in state.items():
        try:
            place = from_official_name(name, layout)
        except KeyError:
            unknown.append(name)
            continue
        if place is None:
            if not _is_derived(name):
                found.aside[name] = tensor
        else:
            ours, transposed = place
            tensor = tensor.flatten() if ours == "queue.ids" else tensor
            found.tensors[ours] = tensor.T.contiguous() if transposed else tensor
    unknown += _untied(state, layout)
    if unknown:
        raise UserError(f"not of an official SIMLA or ALBEF file: {listed(unknown)}")
    for m, owner in OWNERS.items():
        _fold(state, found, m, owner)
    return found


def to_official(tensors: Mapping[str, Tensor], layout: Layout, aside: Mapping[str, Tensor] | None = None) -> dict:
    """Our tensors under official names, with all that is derived from them.

    With what ``from_official`` set aside, a file comes back bit by bit. Without, ALBEF's token types are zeros, and
    its positions hold the sum; the pointer of the queue is 0.

    Raises:
        UserError: tensors that the official layout has no place for; lists them.
    """
    aside = dict(aside or {})
    out, unknown = {}, []
    for name, tensor in tensors.items():
        official = to_official_name(name, layout)
        if official is None:
            unknown.append(name)
        elif name == "queue.ids":
            if not layout.pretraining:
                out[official] = tensor[None]
        else:
            out[official] = tensor.T.contiguous() if name.startswith("queue.") else tensor
    if unknown:
        raise UserError(f"no place in the official layout for {listed(unknown)}")
    for m in OWNERS:
        _derive(out, layout, m)
        _unfold(out, aside, layout, m)
    if "image_queue" in out:
        out["queue_ptr"] = aside.get("queue_ptr", torch.zeros(1, dtype=torch.int64))
    return out | {name: tensor for name, tensor in aside.items() if _is_task_head(name)}


def to_official_name(name: str, layout: Layout) -> str | None:
    """The official name of one of our tensors; None where it has none."""
    heads = {"queue.image": "image_queue", "queue.text": "text_queue", "queue.ids": "idx_queue", TEMPERATURE: "temp"}
    if name in heads:
        return heads[name]
    if name.startswith("itm_head."):
        return name
    for m, owner in OWNERS.items():
        if not name.startswith(owner) or name.startswith(f"{owner}vision.vit.patch_embed.stem."):
            continue
        for official, ours in layout.towers():
            if name.startswith(owner + ours):
                return official.format(m=m) + name.removeprefix(owner + ours)
    return None


def _is_derived(name: str) -> bool:
    return name.endswith(".position_ids") or (name.startswith("text_encoder") and ".cls.predictions.decoder." in name)


def _is_task_head(name: str) -> bool:
    return name.partition(".")[0].removesuffix("_m") in TASK_HEADS


def _untied(state: Mapping[str, Tensor], layout: Layout) -> list[str]:
    """Decoders that are no copies of what they are tied to: leaving them out would lose something."""
    wrong = []
    for m in OWNERS:
        decoder, text = _DECODER.format(m=m), layout.text.format(m=m)
        bias = decoder.removesuffix("decoder.") + "bias"
        for name, source in ((f"{decoder}weight", text + _WORDS), (f"{decoder}bias", bias)):
            if name in state and source in state and not torch.equal(state[name], state[source]):
                wrong.append(name)
    return wrong


def _fold(state: Mapping[str, Tensor], found: Official, m: str, owner: str) -> None:
    """Add token type 0 to the positions; the pair is set aside, for the sum cannot be taken apart again."""
    positions, types = (found.layout.text.format(m=m) + name for name in (_POSITIONS, _TYPES))
    if types in state and positions in state:
        found.tensors[f"{owner}text.{_POSITIONS}"] = _sum(state[positions], state[types])
        found.aside[positions] = state[positions]


def _unfold(out: dict[str, Tensor], aside: Mapping[str, Tensor], layout: Layout, m: str) -> None:
    """The pair that was set aside where it still is what was folded; else the sum, and types of zeros."""
    positions, types = (layout.text.format(m=m) + name for name in (_POSITIONS, _TYPES))
    if not layout.token_types or positions not in out:
        return
    if positions in aside and types in aside and torch.equal(_sum(aside[positions], aside[types]), out[positions]):
        out[positions], out[types] = aside[positions], aside[types]
    else:
        out[types] = out[positions].new_zeros(2, out[positions].shape[1])


def _sum(positions: Tensor, types: Tensor) -> Tensor:
    """In float32 at least: half precision would round."""
    wide = torch.promote_types(positions.dtype, torch.float32)
    return positions.to(wide) + types[0].to(wide)


def _derive(out: dict[str, Tensor], layout: Layout, m: str) -> None:
    text, decoder = layout.text.format(m=m), _DECODER.format(m=m)
    if text + _POSITIONS in out:
        out[f"{text}embeddings.position_ids"] = torch.arange(len(out[text + _POSITIONS]))[None]
    bias = decoder.removesuffix("decoder.") + "bias"
    if bias in out:
        out[f"{decoder}weight"], out[f"{decoder}bias"] = out[text + _WORDS].clone(), out[bias].clone()
