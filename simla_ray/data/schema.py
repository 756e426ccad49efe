"""The row: what a data set must and may have, and the other names that are understood.

| column | type | |
|---|---|---|
| uid | str | who the row is; absent: file name and row number |
| image | bytes | encoded (JPEG, PNG, ...) |
| captions | list of str, or one str | one is drawn per epoch |
| image_id | str | equal for rows that show one image; absent: the uid |
| keywords | list of str | what the image shows; never trained on, only measured |
| phrases | list of {text, boxes} | grounding truth |
| boxes, box_labels | list of [x1, y1, x2, y2] in 0..1, list of str | all objects of the image |
| split, source, license | str | |

A column that is absent is absent, not empty. ``scene`` and ``claims`` are the built-in world's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from simla_ray.errors import UserError

#: Our name -> other names understood.
ALIASES = {
    "uid": ("id", "key"),
    "image": ("jpg", "image_path", "filepath", "file_name", "image_name", "path"),
    "captions": ("caption", "text", "title", "comment"),
}
OPTIONAL = ("image_id", "keywords", "phrases", "boxes", "box_labels", "split", "source", "license", "scene", "claims")
#: Columns whose values are lists.
LISTS = ("captions", "keywords", "phrases", "boxes", "box_labels")
#: What training reads; evaluation reads every column there is.
TRAINING = ("uid", "image", "captions", "image_id")


def resolve_columns(present: Iterable[str], where: str) -> dict[str, str]:
    """Our name -> name in the file, for every column of the row that is there.

    Raises:
        UserError: no image or no captions column; names what is there.
    """
    present = list(present)
    found = _names(present)
    for name in ("image", "captions"):
        if name not in found:
            allowed = " or ".join((name, *ALIASES[name]))
            raise UserError(f"{where}: no column {allowed}; found {', '.join(sorted(present))}")
    return found


def by_our_names(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of the row that an entry has, under our names."""
    return {ours: entry[theirs] for ours, theirs in _names(entry).items()}


def _names(present: Iterable[str]) -> dict[str, str]:
    present, found = set(present), {}
    for name in ("uid", "image", "captions", *OPTIONAL):
        for candidate in (name, *ALIASES.get(name, ())):
            if candidate in present:
                found[name] = candidate
                break
    return found


class StandIn(str):
    """The uid of a row that brings none: it tells the rows of one set apart, and says nothing of another set's."""


def normalise(row: Mapping[str, Any], uid: str) -> dict[str, Any]:
    """A row under our names: captions a list of text, phrases with text, uid and image_id always there.

    A column that is not what it should be costs the row: its image becomes the reason, and the column is empty.
    """
    row = dict(row)
    row["uid"] = _name(row.get("uid")) or StandIn(utf8(uid))
    row["image_id"] = _name(row.get("image_id")) or row["uid"]
    if isinstance(row.get("image"), Mapping):  # Hugging Face's image feature; its path is somebody else's
        row["image"] = row["image"].get("bytes")
    captions = row.get("captions")
    captions = captions if isinstance(captions, list) else [] if captions is None else [captions]
    try:
        row["captions"] = [_caption(caption) for caption in captions]
    except _NotACaption as wrong:
        row |= {"image": str(wrong), "captions": []}
    for name, is_one in _ENTRIES.items():
        if row.get(name) is not None and not (isinstance(row[name], list) and all(map(is_one, row[name]))):
            row |= {"image": f"{name}_unreadable", name: []}
    if row.get("phrases"):
        row["phrases"] = [{"text": _phrase(p), "boxes": p.get("boxes")} for p in row["phrases"]]
    return row


def _name(value: Any) -> str:
    """As text; empty where there is none, for a structure names nothing."""
    if value is None or isinstance(value, Mapping | list):
        return ""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else utf8(value)


class _NotACaption(Exception):
    """Says the reason."""


def _caption(value: Any) -> str:
    """As text; empty where there is none. Numbers are text that a list forgot to quote."""
    if value is None or value != value:  # NaN is what pandas makes of a missing one
        return ""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if not isinstance(value, str | int | float):
        raise _NotACaption("caption_not_text")
    if utf8(value) != str(value):
        raise _NotACaption("caption_not_utf8")
    return str(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value == utf8(value)


def _is_box(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(isinstance(x, int | float) for x in value)


def _is_phrase(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    text, boxes = _phrase(value), value.get("boxes")
    has_boxes = boxes is None or (isinstance(boxes, list) and all(map(_is_box, boxes)))
    return has_boxes and (text is None or _is_text(text))


def _phrase(phrase: Mapping[str, Any]) -> Any:
    return phrase.get("text") or phrase.get("phrase")


#: Columns that are lists -> what one entry is.
_ENTRIES = {"keywords": _is_text, "phrases": _is_phrase, "boxes": _is_box, "box_labels": _is_text}


def utf8(value: Any) -> str:
    """As text that can be written: halves of surrogate pairs, which CSV and JSON let in, become question marks."""
    return str(value).encode("utf-8", "replace").decode("utf-8")
