"""Karpathy's splits: dataset_coco.json, dataset_flickr30k.json, dataset_flickr8k.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simla_ray.data.adapt.gathered import Gathered, worded
from simla_ray.data.adapt.reading import need, read_json
from simla_ray.errors import UserError


def karpathy(files: Sequence[Path], gathered: Gathered, restval: str) -> None:
    """Captions and split of every image.

    Args:
        restval: what becomes of COCO's split of that name: ``train``, as retrieval is trained, or ``keep``.
    """
    for path in files:
        found = read_json(path)
        if not isinstance(found, dict) or not isinstance(found.get("images"), list):
            raise UserError(f"{path}: expected an object with images, as in dataset_coco.json")
        for number, entry in enumerate(found["images"]):
            if number == 0:
                need(path, entry if isinstance(entry, dict) else {}, ("filename", "split", "sentences"))
            name = entry.get("filename") if isinstance(entry, dict) else None
            if not isinstance(name, str) or not isinstance(entry.get("sentences"), list):
                gathered.drop(name or f"image {number}", "entry_unreadable", path)
                continue
            split = entry.get("split")
            split = "train" if split == "restval" and restval == "train" else split
            if not gathered.wants(split):
                continue
            folder = entry.get("filepath")
            names = (f"{folder}/{name}", name) if isinstance(folder, str) and folder else (name,)
            record = gathered.record(name, [names], split, captions=[])
            for at, sentence in enumerate(entry["sentences"]):
                text = worded(sentence.get("raw")) if isinstance(sentence, dict) else ""
                if text:
                    record.columns["captions"].append(text)
                else:
                    gathered.drop(f"{name}#{at}", "caption_empty", path)
