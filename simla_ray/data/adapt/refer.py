"""RefCOCO, RefCOCO+ and RefCOCOg: REFER's refs and instances, or ALBEF's lists with the candidate boxes beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simla_ray.data.adapt.gathered import Box, Gathered, Record, corners, worded
from simla_ray.data.adapt.reading import read_json
from simla_ray.errors import UserError

PICKLES = (".p", ".pkl", ".pickle")


@dataclass
class Files:
    """What the files give, told apart by their content; parts of the instances by id, as text."""

    refs: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    pairs: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    images: dict[str, dict[str, Any]] = field(default_factory=dict)
    objects: dict[str, dict[str, Any]] = field(default_factory=dict)
    categories: dict[str, dict[str, Any]] = field(default_factory=dict)
    candidates: dict[str, dict[str, list[Any]]] = field(default_factory=dict)  # "dets" or "cocos" -> boxes by image


def refcoco(files: Sequence[Path], gathered: Gathered) -> None:
    """Expressions as ``captions``, what they mean as ``phrases``, and ``boxes`` to choose from.

    The boxes are those of dets.json where it is given, as the official evaluation scores them, else of cocos.json, else
    all objects of instances.json with their categories as ``box_labels``. ALBEF's lists have no targets: without refs
    and instances there are no ``phrases``.

    Raises:
        UserError: a pickle, which is not opened, or a file of another kind; refs without instances.
    """
    found = Files()
    for path in files:
        _sort(path, found)
    names = ", ".join(path.name for path in files)
    if not found.refs and not found.pairs:
        raise UserError(f"--annotations: no expressions in {names}; give REFER's refs as JSON, or ALBEF's list")
    if found.refs and not found.images:
        raise UserError(f"--annotations: refs without instances.json in {names}; it has the boxes")
    if found.pairs:
        _gather_pairs(found, gathered)
    else:
        _gather_refs(found, gathered)
    _add_candidates(found, gathered)


def _sort(path: Path, found: Files) -> None:
    if path.suffix in PICKLES or _starts_as_pickle(path):
        raise UserError(
            f'{path}: a pickle is not opened; where you trust it, save it as JSON: python -c "import json, pickle; '
            f"json.dump(pickle.load(open('{path.name}', 'rb')), open('refs.json', 'w'))\", and give refs.json"
        )
    content = read_json(path)
    if isinstance(content, list) and content and all(isinstance(entry, dict) for entry in content):
        if "sentences" in content[0] and "image_id" in content[0]:
            found.refs += [(path, entry) for entry in content]
            return
        if "image" in content[0]:
            found.pairs += [(path, entry) for entry in content]
            return
    if isinstance(content, dict) and isinstance(content.get("images"), list) and "annotations" in content:
        for part, ours in (("images", found.images), ("annotations", found.objects), ("categories", found.categories)):
            entries = content.get(part, [])
            if not isinstance(entries, list) or not all(isinstance(e, dict) and "id" in e for e in entries):
                raise UserError(f"{path}: {part} are not objects with an id, as in REFER's instances.json")
            ours |= {str(entry["id"]): entry for entry in entries}
        return
    if isinstance(content, dict) and content and all(isinstance(boxes, list) for boxes in content.values()):
        found.candidates["dets" if "det" in path.stem else "cocos"] = content
        return
    raise UserError(
        f"{path}: neither REFER's refs or instances, nor ALBEF's list of image and text, "
        "nor boxes by image as in dets.json"
    )


def _starts_as_pickle(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(1) == b"\x80"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _gather_refs(found: Files, gathered: Gathered) -> None:
    for path, ref in found.refs:
        if not gathered.wants(ref.get("split")):
            continue
        image = found.images.get(str(ref.get("image_id")))
        if image is None or not isinstance(image.get("file_name"), str):
            gathered.drop(f"ref {ref.get('ref_id')}", "entry_unreadable", path)
            continue
        record = _record(gathered, image["file_name"], ref["image_id"], image, ref.get("split"))
        for sentence in ref["sentences"] if isinstance(ref.get("sentences"), list) else ():
            text = worded(sentence.get("sent") or sentence.get("raw")) if isinstance(sentence, dict) else ""
            _express(gathered, record, text, _target(found, ref), f"ref {ref.get('ref_id')}", path)


def _gather_pairs(found: Files, gathered: Gathered) -> None:
    refs = {str(ref.get("ref_id")): ref for _, ref in found.refs}
    for number, (path, entry) in enumerate(found.pairs):
        name, text = entry.get("image"), entry.get("text", entry.get("caption"))
        place = f"ref {entry['ref_id']}" if "ref_id" in entry else f"entry {number}"
        if not isinstance(name, str):
            gathered.drop(place, "entry_unreadable", path)
            continue
        ref = refs.get(str(entry.get("ref_id")))
        if not gathered.wants(ref.get("split") if ref else gathered.split):
            continue
        number_in_name = re.search(r"(\d+)\.\w+$", name)
        image_id = ref.get("image_id") if ref else int(number_in_name[1]) if number_in_name else name
        record = _record(gathered, name, image_id, found.images.get(str(image_id)), ref.get("split") if ref else None)
        for one in text if isinstance(text, list) else [text]:
            _express(gathered, record, worded(one), _target(found, ref) if ref else None, place, path, bool(ref))


def _record(gathered: Gathered, name: str, image_id: Any, image: dict[str, Any] | None, split: Any) -> Record:
    uid = name.rpartition("/")[2].rpartition(".")[0]
    record = gathered.record(uid, [(name,)], split, image_id=str(image_id), captions=[])
    if image is not None and all(isinstance(image.get(side), int) and image[side] > 0 for side in ("width", "height")):
        record.size = (image["width"], image["height"])
    return record


def _target(found: Files, ref: dict[str, Any]) -> Box | None:
    return corners(found.objects.get(str(ref.get("ann_id")), {}).get("bbox"))


def _express(
    gathered: Gathered, record: Record, text: str, target: Box | None, entry: str, path: Path, expected: bool = True
) -> None:
    """Add an expression, and what it means where that is known."""
    if not text:
        gathered.drop(entry, "caption_empty", path)
        return
    if text not in record.columns["captions"]:
        record.columns["captions"].append(text)
    if target is None and expected:
        gathered.drop(entry, "target_missing", path)
    elif target is not None:
        phrase = {"text": text, "boxes": [target]}
        phrases = record.columns.setdefault("phrases", [])
        if phrase not in phrases:
            phrases.append(phrase)


def _add_candidates(found: Files, gathered: Gathered) -> None:
    by_image: dict[str, list[dict[str, Any]]] = {}
    for entry in found.objects.values():
        by_image.setdefault(str(entry.get("image_id")), []).append(entry)
    given = found.candidates.get("dets") or found.candidates.get("cocos")
    for record in gathered.records.values():
        image_id = record.columns["image_id"]
        if given is not None:
            if image_id in given:
                record.columns["boxes"] = [_candidate(box) for box in given[image_id]]
        elif image_id in by_image:
            objects = by_image[image_id]
            record.columns["boxes"] = [corners(entry.get("bbox")) for entry in objects]
            labels = [found.categories.get(str(entry.get("category_id")), {}).get("name") for entry in objects]
            if all(isinstance(label, str) for label in labels):
                record.columns["box_labels"] = labels


def _candidate(box: Any) -> Box | None:
    """A detector's box, behind which its score may stand."""
    return corners(box[:4]) if isinstance(box, list) else None
