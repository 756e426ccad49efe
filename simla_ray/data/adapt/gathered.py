"""What annotations say, gathered by image, and what of them cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simla_ray.data.schema import utf8
from simla_ray.data.text import clean

#: What SNLI writes where its annotators did not agree.
NO_LABEL = ("", "-")
#: left, upper, right, lower; pixels
Box = tuple[float, float, float, float]


@dataclass
class Record:
    """A row before its picture is there.

    ``images``: of the picture, or of both, the names under which it is looked for. Boxes in ``columns`` are in pixels
    of a picture of ``size`` (width, height); None: of the file's own.
    """

    uid: str
    images: tuple[tuple[str, ...], ...]
    columns: dict[str, Any] = field(default_factory=dict)
    size: tuple[float, float] | None = None


@dataclass
class Gathered:
    """Records by uid and split, in the order of the annotations, and entries that are left out, with the reason.

    | reason of an entry | |
    |---|---|
    | entry_unreadable | a field is missing or is something else |
    | question_empty, statement_empty, caption_empty | no word in it |
    | answer_empty | a blank among the answers; the question keeps the others |
    | answers_empty, answers_missing | no answer with a word, no annotation of the question |
    | label_missing | none, or ``-``: the annotators did not agree |
    | label_unknown | none of the format's labels |
    | target_missing | the object of an expression is not among the annotated ones |
    | box_without_area | nothing of the box is in the picture |
    | box_unreadable | it is not four numbers; behind a candidate's there may be more |
    | phrase_without_box | of Flickr30k Entities, no box for the phrase: a scene, or nothing that can be seen |
    | markup_unreadable, xml_unreadable | a file of Flickr30k Entities that is not what it should be |
    """

    split: str | None = None  # asked for
    records: dict[tuple[str, str | None], Record] = field(default_factory=dict)
    dropped: list[dict[str, str]] = field(default_factory=list)
    splits: set[str] = field(default_factory=set)  # that the annotations name
    of_image: dict[str, list[Record]] = field(default_factory=dict)  # by the uid without a split

    def drop(self, entry: Any, reason: str, file: Path) -> None:
        self.dropped.append({"uid": utf8(entry), "reason": reason, "file": file.name})

    def wants(self, split: Any) -> bool:
        """Whether an entry of this split is asked for."""
        if isinstance(split, str):
            self.splits.add(split)
        return self.split is None or split == self.split

    def record(self, uid: Any, images: Sequence[Sequence[str]], split: Any = None, **columns: Any) -> Record:
        """The record of an image in a split, made where there is none.

        What is said of an image in two splits are two rows, so that nothing of one gets into the other: their uids are
        ``uid#split`` then, and their ``image_id`` is the same.
        """
        uid = utf8(uid)
        split = utf8(split) if isinstance(split, str) and split else None
        key = uid, split or self.split
        if key not in self.records:
            record = Record(uid, tuple(tuple(map(utf8, names)) for names in images), columns)
            if split is not None:
                record.columns["split"] = split
            self.records[key] = record
            alike = self.of_image.setdefault(uid, [])
            alike.append(record)
            for one in alike if len(alike) > 1 else ():
                one.uid = f"{uid}#{one.columns['split']}" if "split" in one.columns else uid
                one.columns.setdefault("image_id", uid)
        return self.records[key]

    def state(
        self, entry: Any, file: Path, labels: Sequence[str], text: Any, label: Any, uid: Any,
        images: Sequence[Sequence[str]], split: Any = None,
    ) -> None:  # fmt: skip
        """Add a statement to its image, or drop it."""
        label = str(label).strip().lower() if isinstance(label, str | bool) else ""
        if label in NO_LABEL:
            self.drop(entry, "label_missing", file)
        elif label not in labels:
            self.drop(entry, "label_unknown", file)
        elif not (text := worded(text)):
            self.drop(entry, "statement_empty", file)
        else:
            said = self.record(uid, images, split).columns.setdefault("statements", [])
            said.append({"text": text, "label": label})


def worded(value: Any) -> str:
    """Text with a word in it; else empty."""
    return utf8(value).strip() if isinstance(value, str) and clean(value, 1) else ""


def corners(box: Any) -> Box | None:
    """[x, y, width, height] as left, upper, right, lower; None where it is no box."""
    if not isinstance(box, list | tuple) or len(box) != 4:
        return None
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in box):
        return None
    try:
        x, y, width, height = map(float, box)
    except OverflowError:  # JSON's whole numbers have no end
        return None
    return x, y, x + width, y + height


def within(box: Box | None, size: tuple[float, float]) -> tuple[list[float] | None, bool]:
    """A box in shares of the picture, and whether it had to be clipped; None where it has no area in it."""
    if box is None or not all(abs(v) < float("inf") for v in box):
        return None, False
    whole = [box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]]
    clipped = [min(1.0, max(0.0, v)) for v in whole]
    if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        return None, False
    # An annotation tool that rounds up by a pixel put nothing outside.
    beyond = max(abs(v - c) * size[i % 2] for i, (v, c) in enumerate(zip(whole, clipped, strict=True)))
    return [round(v, 6) for v in clipped], beyond > 1
