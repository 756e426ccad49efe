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
| tags | list of str | words of objects in the image, the likeliest first; of no caption |
| region_feats | list of lists of numbers | a feature of each of boxes, as a detector gives it |
| qas | list of {question, answers, type} | answers repeated as annotated; type may be absent |
| statements | list of {text, label} | "true" or "false", or another task's words |
| images | list of two encoded pictures | what a statement speaks of, in place of image |
| split, source, license | str | |

A column that is absent is absent, not empty. A ``sentence`` with a ``label`` is read as ``statements``; where there are
no captions, questions and statements stand for them. ``scene`` and ``claims`` are the built-in world's own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from simla_ray.data.text import clean
from simla_ray.errors import UserError

#: Our name -> other names understood.
ALIASES = {
    "uid": ("id", "key"),
    "image": ("jpg", "image_path", "filepath", "file_name", "image_name", "path"),
    "captions": ("caption", "text", "title", "comment"),
    "sentence": ("hypothesis", "statement", "sentence2"),
    "label": ("gold_label",),
}
OPTIONAL = (
    "image_id", "keywords", "phrases", "boxes", "box_labels", "qas", "statements", "images", "split", "source",
    "license", "scene", "claims", "region_feats", "tags",
)  # fmt: skip
#: One statement a row, as tables have it; ``normalise`` makes ``statements`` of the two.
STATEMENT = ("sentence", "label")
#: Columns whose values are lists.
LISTS = (
    "captions", "keywords", "phrases", "boxes", "box_labels", "region_feats", "tags", "qas", "statements", "images",
)  # fmt: skip
#: What training reads; evaluation reads every column there is.
TRAINING = ("uid", "image", "captions", "image_id")
#: What a task may read in addition.
OF_TASKS = ("qas", "statements", "images", "phrases", "boxes")
#: What images made of regions may read in addition.
OF_REGIONS = ("boxes", "box_labels", "region_feats")
#: Columns that few runs read and other people's files may have under the same name: what does not fit them is as if it
#: were not there, and whoever reads them says that it is missing.
ENRICHING = ("region_feats", "tags")
#: What texts with phrase concepts, and images with tags, may read in addition.
OF_CONCEPTS = ("phrases", "tags", "box_labels")
#: Column -> the columns it comes from where there is none of that name.
MADE_OF = {"captions": ("qas", "statements"), "statements": STATEMENT, "image": ("images",)}


def training_columns(extra: Iterable[str] = ()) -> tuple[str, ...]:
    """What training reads, for ``read_rows``: ``TRAINING``, and some of ``OF_TASKS``, ``OF_REGIONS`` and
    ``OF_CONCEPTS``.

    Raises:
        ValueError: another column is asked for.
    """
    extra, allowed = tuple(dict.fromkeys(extra)), tuple(dict.fromkeys(OF_TASKS + OF_REGIONS + OF_CONCEPTS))
    if unknown := set(extra).difference(allowed):
        raise ValueError(f"no columns of a task: {', '.join(sorted(unknown))}; allowed: {', '.join(allowed)}")
    return TRAINING + extra


def columns_behind(columns: Iterable[str], there: Collection[str]) -> set[str]:
    """The columns that must be read for these, when those of ``there`` are there, all by our names."""
    needed = set(columns)
    for name, sources in MADE_OF.items():
        if name in needed and name not in there:
            needed.update(sources)
    return needed


def resolve_columns(present: Iterable[str], where: str) -> dict[str, str]:
    """Our name -> name in the file, for every column of the row that is there.

    Raises:
        UserError: no image or no captions column, nor what stands for them; names what is there.
    """
    present = list(present)
    found = _names(present)
    for name, instead in (("image", "images"), ("captions", "qas, statements, or sentence with label")):
        if not columns_behind([name], found).intersection(found):
            allowed = " or ".join((name, *ALIASES[name]))
            raise UserError(f"{where}: no column {allowed} (nor {instead}); found {', '.join(sorted(present))}")
    return found


def by_our_names(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of the row that an entry has, under our names."""
    return {ours: entry[theirs] for ours, theirs in _names(entry).items()}


def _names(present: Iterable[str]) -> dict[str, str]:
    present, found = set(present), {}
    for name in ("uid", "image", "captions", *OPTIONAL, *STATEMENT):
        for candidate in (name, *ALIASES.get(name, ())):
            if candidate in present:
                found[name] = candidate
                break
    if "statements" in found or not all(name in found for name in STATEMENT):
        for name in STATEMENT:  # a label alone says nothing
            found.pop(name, None)
    return found


class StandIn(str):
    """The uid of a row that brings none: it tells the rows of one set apart, and says nothing of another set's."""


def normalise(row: Mapping[str, Any], uid: str) -> dict[str, Any]:
    """A row under our names: captions a list of text, phrases with text, uid and image_id always there.

    ``sentence`` and ``label`` become ``statements``. Where the row has no captions, they are its questions and
    statements; where it has no image, that is the first of ``images``.

    A column that is not what it should be costs the row: its image becomes the reason, and the column is empty. Of
    questions and statements those that cannot be used are left out; where they are all that a row says, and none is
    left, that is the reason.
    """
    row = dict(row)
    row["uid"] = _name(row.get("uid")) or StandIn(utf8(uid))
    row["image_id"] = _name(row.get("image_id")) or row["uid"]
    if isinstance(row.get("image"), Mapping):  # Hugging Face's image feature; its path is somebody else's
        row["image"] = row["image"].get("bytes")
    _read_pair(row)
    _read_entries(row)
    if "captions" not in row:
        texts = [qa["question"] for qa in row.get("qas") or ()] + [s["text"] for s in row.get("statements") or ()]
        row["captions"] = list(dict.fromkeys(texts))
        empty = next((name for name in ("qas", "statements") if row.get(name) == []), None)
        if not texts and empty is not None and not isinstance(row.get("image"), str):
            row["image"] = f"{empty}_empty"
    captions = row["captions"]
    captions = captions if isinstance(captions, list) else [] if captions is None else [captions]
    try:
        row["captions"] = [_caption(caption) for caption in captions]
    except _NotACaption as wrong:
        row |= {"image": str(wrong), "captions": []}
    for name, is_one in _ENTRIES.items():
        if row.get(name) is None or (isinstance(row[name], list) and all(map(is_one, row[name]))):
            continue
        if name in ENRICHING:
            row[name] = None
        else:
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


def _is_feature(value: Any) -> bool:
    # A row has tens of thousands of these numbers, of one kind.
    return (
        isinstance(value, list) and bool(value) and all(issubclass(kind, int | float) for kind in set(map(type, value)))
    )


def _is_phrase(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    text, boxes = _phrase(value), value.get("boxes")
    has_boxes = boxes is None or (isinstance(boxes, list) and all(map(_is_box, boxes)))
    return has_boxes and (text is None or _is_text(text))


def _phrase(phrase: Mapping[str, Any]) -> Any:
    return phrase.get("text") or phrase.get("phrase")


def _read_pair(row: dict[str, Any]) -> None:
    """``images`` as bytes, and the first of them as image where there is none."""
    images = row.pop("images", None)
    if images is None:
        return
    if isinstance(images, list):
        images = [image.get("bytes") if isinstance(image, Mapping) else image for image in images]
    if isinstance(images, list) and len(images) == 2 and all(isinstance(image, bytes | None) for image in images):
        row["images"] = images
        if row.get("image") is None:
            row["image"] = images[0]
        if None in images:
            row |= {"image": "image_missing", "images": []}
    else:
        row |= {"image": "images_unreadable", "images": []}


def _read_entries(row: dict[str, Any]) -> None:
    """``qas`` and ``statements`` with the entries that can be used."""
    sentence, label = (row.pop(name, None) for name in STATEMENT)
    if row.get("statements") is None and sentence is not None:
        row["statements"] = [{"text": sentence, "label": label}]
    for name, usable in (("qas", _qa), ("statements", _statement)):
        if row.get(name) is None:
            row.pop(name, None)
            continue
        try:
            if not isinstance(row[name], list):
                raise TypeError
            row[name] = [entry for entry in map(usable, row[name]) if entry is not None]
        except TypeError:
            row |= {"image": f"{name}_unreadable", name: []}


def _qa(entry: Any) -> dict[str, Any] | None:
    """A question with its answers; None where it has no word or no answer.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(entry, Mapping):
        raise TypeError
    answers = entry.get("answers")
    answers = answers if isinstance(answers, list) else [answers]
    question, kind = _said(entry.get("question")), _said(entry.get("type"))
    answers = [answer for answer in map(_said, answers) if answer]
    if not clean(question, 1) or not answers:
        return None
    return {"question": question, "answers": answers, "type": kind or None}


def _statement(entry: Any) -> dict[str, str] | None:
    """A text with its label; None where one is not there. Truth values become "true" and "false".

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(entry, Mapping):
        raise TypeError
    label = _said(str(entry["label"]) if isinstance(entry.get("label"), bool) else entry.get("label"))
    label = label.lower() if label.lower() in ("true", "false") else label
    text = _said(entry.get("text"))
    return {"text": text, "label": label} if clean(text, 1) and label else None


def _said(value: Any) -> str:
    """As text; empty where there is none.

    Raises:
        TypeError: a structure, a truth value, or no UTF-8.
    """
    if value is None or value != value:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not _is_text(str(value)):
        raise TypeError
    return str(value).strip()


#: Columns that are lists -> what one entry is.
_ENTRIES = {
    "keywords": _is_text, "phrases": _is_phrase, "boxes": _is_box, "box_labels": _is_text, "region_feats": _is_feature,
    "tags": _is_text,
}  # fmt: skip


def utf8(value: Any) -> str:
    """As text that can be written: halves of surrogate pairs, which CSV and JSON let in, become question marks."""
    return str(value).encode("utf-8", "replace").decode("utf-8")
