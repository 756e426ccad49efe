"""Records with their pictures -> rows as they are written, in row groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from simla_ray.data.adapt.gathered import Gathered, Record, within
from simla_ray.data.adapt.pictures import FolderPictures, Found, SetPictures
from simla_ray.data.convert.plan import MB
from simla_ray.data.convert.rows import TYPES, encoded_bytes, pictures_of, values_of
from simla_ray.data.decode import DropRow, EncodedImage
from simla_ray.data.schema import normalise

GROUP_BYTES = 8 * MB
#: Of rows that are dropped for one reason, those that an error names.
NAMED = 3
COUNTED = ("captions", "phrases", "boxes", "qas", "statements")


class Rows:
    """Rows of the shards, made one after another; what cannot be used is added to what was dropped.

    Attributes:
        done: records looked at.
        of_other_splits: records whose picture is of another split than that asked for, as its data set says.
        entries: how many captions, questions, ... are written.
        clipped: boxes that reached out of their picture by more than a pixel.
    """

    def __init__(self, gathered: Gathered, pictures: FolderPictures | SetPictures, max_pixels: int):
        self.gathered, self.pictures, self.max_pixels = gathered, pictures, max_pixels
        self.done = self.clipped = self.of_other_splits = 0
        self.entries: Counter[str] = Counter()
        self.lost: dict[str, list[str]] = {}
        records = gathered.records.values()
        used = {name for record in records for name in record.columns} | set(pictures.columns)
        used |= {"split"} if gathered.split is not None else set()
        used |= {"uid", "images" if any(len(record.images) > 1 for record in records) else "image"}
        self.schema = pa.schema([(name, kind) for name, kind in TYPES.items() if name in used])

    def groups(self) -> Iterator[list[dict[str, Any]]]:
        """Row groups."""
        group: list[dict[str, Any]] = []
        size = 0
        for found in self.pictures.of(self.gathered.records.values()):
            self.done += 1
            record = found[0]
            if self.gathered.split is not None and self._split(found) != self.gathered.split:
                self.of_other_splits += 1
                continue
            try:
                row = self._row(found)
            except DropRow as drop:
                self.lost.setdefault(drop.reason, []).append(record.images[0][0])
                self.gathered.dropped.append({"uid": record.uid, "reason": drop.reason, "image": record.images[0][0]})
                continue
            self.entries.update({name: len(row[name]) for name in COUNTED if row.get(name)})
            group.append(row)
            size += encoded_bytes(row)
            if size >= GROUP_BYTES:
                yield group
                group, size = [], 0
        if group:
            yield group

    def why_none(self) -> str:
        """Where not one row could be written: the reasons, and the first of the pictures."""
        if self.of_other_splits == self.done:
            return f"--split: {self.gathered.split}, but the data set of --images has none of that split"
        reasons = "; ".join(
            f"{len(names):,} {reason} (first: {', '.join(names[:NAMED])})" for reason, names in self.lost.items()
        )
        return f"--images: not one of {self.done:,} pictures can be used: {reasons}"

    def _split(self, found: Found) -> str | None:
        """As the annotations say, else the data set of the pictures, else that asked for."""
        record, _, carried = found
        return record.columns.get("split") or carried.get("split") or self.gathered.split

    def _row(self, found: Found) -> dict[str, Any]:
        record, images, carried = found
        encoded = [_encoded(image) for image in images]
        columns = {**carried, **self._scaled(record, encoded[0]), "split": self._split(found)}
        columns |= {"images": encoded} if len(encoded) > 1 else {"image": encoded[0]}
        row = normalise({**columns, "uid": record.uid}, record.uid)
        written = values_of(row) | pictures_of(row, self.max_pixels, None)
        return {name: written.get(name) for name in self.schema.names}

    def _scaled(self, record: Record, image: bytes) -> dict[str, Any]:
        """The columns with boxes in shares of the picture.

        The annotations may say of which size the picture was that they count pixels of: then it may have been resized.
        """
        columns = dict(record.columns)
        if not columns.keys() & {"phrases", "boxes"}:
            return columns
        size = record.size or EncodedImage(image, self.max_pixels).size
        if columns.get("boxes") is not None:
            boxes = [self._box(record, box, size, "boxes") for box in columns["boxes"]]
            if "box_labels" in columns:
                labels = zip(columns["box_labels"], boxes, strict=True)
                columns["box_labels"] = [label for label, box in labels if box is not None]
            columns["boxes"] = [box for box in boxes if box is not None]
        if columns.get("phrases") is not None:
            phrases = []
            for phrase in columns["phrases"]:
                found = [self._box(record, box, size, phrase["text"]) for box in phrase["boxes"]]
                kept = [box for box in found if box is not None]
                phrases += [{"text": phrase["text"], "boxes": kept}] if kept else []
            columns["phrases"] = phrases
        return columns

    def _box(self, record: Record, box: Any, size: tuple[float, float], of: str) -> list[float] | None:
        share, clipped = within(box, size)
        self.clipped += clipped
        if share is None:
            reason = "box_unreadable" if box is None else "box_without_area"
            self.gathered.dropped.append({"uid": record.uid, "reason": reason, "box": of})
        return share


def _encoded(image: bytes | Path | str) -> bytes:
    """Raises ``DropRow`` with the reason why there is no picture."""
    if isinstance(image, str):
        raise DropRow(image)
    if isinstance(image, Path):
        try:
            return image.read_bytes()
        except OSError:
            raise DropRow("image_missing") from None
    return image
