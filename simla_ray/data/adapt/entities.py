"""Flickr30k Entities: sentences with marked phrases, and boxes in XML (github.com/BryanPlummer/flickr30k_entities)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from simla_ray.data.adapt.gathered import Box, Gathered, worded
from simla_ray.errors import UserError

MARK = re.compile(r"\[/EN#(\d+)(?:/[^\s\]]*)?\s+([^\[\]]+)\]")
SENTENCES, ANNOTATIONS = "Sentences", "Annotations"


class _NoDoctype(ElementTree.TreeBuilder):
    """An annotation declares no entities; what does is not read on."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("declares a document type")


def flickr30k_entities(files: Sequence[Path], gathered: Gathered) -> None:
    """Captions without the marks, and ``phrases`` with the boxes of what they mean.

    There are boxes of mentioned things only, so they are no ``boxes`` to choose from: these would leak the caption.
    With a split asked for, the list of that name (``val.txt``) beside the folders tells its images.

    Args:
        files: the folder that holds Sentences and Annotations, or these two.

    Raises:
        UserError: a folder or the split's list is not there.
    """
    sentences, annotations = (_folder(files, name) for name in (SENTENCES, ANNOTATIONS))
    kept = _listed(sentences.parent, gathered)
    for path in sorted(sentences.glob("*.txt")):
        if kept is not None and path.stem not in kept:
            continue
        _gather(path, annotations / f"{path.stem}.xml", gathered)


def _folder(files: Sequence[Path], name: str) -> Path:
    for path in files:
        for folder in (path, path / name):
            if folder.name == name and folder.is_dir():
                return folder
    raise UserError(f"--annotations: no folder {name} in {', '.join(map(str, files))}; give the folder that holds it")


def _listed(folder: Path, gathered: Gathered) -> set[str] | None:
    if gathered.split is None:
        return None
    path = folder / f"{gathered.split}.txt"
    if not path.is_file():
        raise UserError(f"--split: {gathered.split}, but there is no {path} with the images of that split")
    gathered.wants(gathered.split)
    return set(path.read_text(encoding="utf-8-sig").split())


def _gather(path: Path, xml: Path, gathered: Gathered) -> None:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError):
        gathered.drop(path.stem, "markup_unreadable", path)
        return
    boxes, size = _boxes(xml, gathered)
    record = gathered.record(path.stem, [(f"{path.stem}.jpg", path.stem)], captions=[])
    record.size = size
    phrases: dict[tuple[str, str], dict[str, Any]] = {}
    for number, line in enumerate(lines):
        caption = MARK.sub(r"\2", line).strip()
        if "[/EN#" in caption:
            gathered.drop(f"{path.stem}#{number}", "markup_unreadable", path)
        elif not worded(caption):
            gathered.drop(f"{path.stem}#{number}", "caption_empty", path)
        else:
            record.columns["captions"].append(caption)
            for entity, text in MARK.findall(line):
                if entity in boxes and worded(text):
                    phrases.setdefault((entity, text), {"text": worded(text), "boxes": boxes[entity]})
                elif boxes:
                    gathered.drop(f"{path.stem}#{number} {text}", "phrase_without_box", path)
    if boxes:
        record.columns["phrases"] = list(phrases.values())


def _boxes(path: Path, gathered: Gathered) -> tuple[dict[str, list[Box]], tuple[float, float] | None]:
    """Boxes by entity, in pixels from 0 (the files count them from 1, and the last one belongs to the box)."""
    found: dict[str, list[Box]] = {}
    try:
        root = ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_NoDoctype()))
        size = (float(root.findtext("size/width", "0")), float(root.findtext("size/height", "0")))
        for entity, box in _objects(root):
            found.setdefault(entity, []).append(box)
    except (OSError, ValueError, ElementTree.ParseError):
        gathered.drop(path.stem, "xml_unreadable", path)
        return {}, None
    return found, size if min(size) > 0 else None


def _objects(root: ElementTree.Element) -> Iterator[tuple[str, Box]]:
    for thing in root.findall("object"):
        box = thing.find("bndbox")
        if box is not None:
            left, upper, right, lower = (float(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax"))
            for name in thing.findall("name"):
                yield (name.text or "").strip(), (left - 1, upper - 1, right, lower)
