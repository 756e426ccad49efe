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


def normalise(row: Mapping[str, Any], uid: str) -> dict[str, Any]:
    """A row under our names: captions a list, phrases with text, uid and image_id always there."""
    row = dict(row)
    row["uid"] = uid if row.get("uid") is None else utf8(row["uid"])
    row["image_id"] = row["uid"] if row.get("image_id") is None else utf8(row["image_id"])
    if isinstance(row.get("image"), Mapping):  # Hugging Face's image feature; its path is somebody else's
        row["image"] = row["image"].get("bytes")
    captions = row.get("captions")
    row["captions"] = list(captions) if isinstance(captions, list) else [] if captions is None else [captions]
    if any(isinstance(c, str) and c != utf8(c) for c in row["captions"]):
        row |= {"image": "caption_not_utf8", "captions": []}
    if row.get("phrases"):
        try:
            row["phrases"] = [{"text": p.get("text") or p.get("phrase"), "boxes": p["boxes"]} for p in row["phrases"]]
        except (AttributeError, KeyError, TypeError):  # of a stranger's JSON
            row |= {"image": "phrases_unreadable", "phrases": None}
    return row


def utf8(value: Any) -> str:
    """As text that can be written: halves of surrogate pairs, which CSV and JSON let in, become question marks."""
    return str(value).encode("utf-8", "replace").decode("utf-8")
