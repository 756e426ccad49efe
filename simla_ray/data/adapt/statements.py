"""Sentences with a label about a picture or a pair: SNLI-VE, NLVR2, NLVR, and tables of hypotheses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simla_ray.data.adapt.gathered import Gathered
from simla_ray.data.adapt.reading import read_entries, read_table
from simla_ray.data.schema import by_our_names
from simla_ray.errors import UserError

ENTAILMENT = ("entailment", "neutral", "contradiction")
TRUTH = ("true", "false")
#: SNLI-VE's first files have it so.
OLDER = {"Flikr30kID": "Flickr30K_ID"}
#: NLVR shows the three boxes of an example in every order.
PERMUTATIONS = 6


def snli_ve(files: Sequence[Path], gathered: Gathered) -> None:
    """SNLI-VE's JSON lines (https://github.com/necla-ml/SNLI-VE) on Flickr30k: ``sentence2`` is the hypothesis."""
    for path in files:
        for place, entry in read_entries(path, ("Flickr30K_ID", "sentence2", "gold_label"), OLDER):
            photo = _text(entry.get("Flickr30K_ID"))
            if not photo:
                gathered.drop(entry.get("pairID", place), "entry_unreadable", path)
                continue
            uid = photo.removesuffix(".jpg")  # some files name the picture, others its number
            names = dict.fromkeys((photo, f"{uid}.jpg", uid))
            gathered.state(
                entry.get("pairID", place), path, ENTAILMENT, entry.get("sentence2"), entry.get("gold_label"),
                uid, [tuple(names)],
            )  # fmt: skip


def nlvr2(files: Sequence[Path], gathered: Gathered) -> None:
    """NLVR2's JSON lines (https://github.com/lil-lab/nlvr), or ALBEF's list with ``images``; a row is a pair.

    The pictures of ``split-set-pair-sentence`` are ``split-set-pair-img0.png`` (left) and ``-img1.png``, in training in
    folders named by ``directory``.
    """
    for path in files:
        for place, entry in read_entries(path, ("sentence", "label")):
            name, given = _text(entry.get("identifier")), entry.get("images")
            split, images = None, list[tuple[str, ...]]()
            if isinstance(given, list) and len(given) == 2 and all(isinstance(image, str) for image in given):
                pair, images = (
                    "+".join(image.rpartition("/")[2].rpartition(".")[0] for image in given),
                    [(i,) for i in given],
                )
            elif name.count("-") >= 3:
                pair = name.rpartition("-")[0]
                split = name.partition("-")[0]
                stems = _in_directory(entry, (pair, name))
                images = [tuple(f"{stem}-img{side}.png" for stem in stems) for side in (0, 1)]
            else:
                gathered.drop(name or place, "entry_unreadable", path)
                continue
            if gathered.wants(split or gathered.split):
                gathered.state(name or place, path, TRUTH, entry.get("sentence"),
                               entry.get("label"), pair, images, split)  # fmt: skip


def nlvr(files: Sequence[Path], gathered: Gathered) -> None:
    """NLVR's JSON lines (https://github.com/lil-lab/nlvr): a row for each of the six pictures of an example.

    They are ``split-identifier-permutation.png``; the split is that asked for, else the file's name.
    """
    for path in files:
        split = gathered.split or path.stem
        for place, entry in read_entries(path, ("identifier", "sentence", "label")):
            name = _text(entry.get("identifier"))
            if not name:
                gathered.drop(place, "entry_unreadable", path)
                continue
            before = len(gathered.dropped)
            for permutation in range(PERMUTATIONS):
                if len(gathered.dropped) > before:  # the sentence cannot be used, whatever the picture
                    break
                uid = f"{split}-{name}-{permutation}"
                names = tuple(f"{stem}.png" for stem in _in_directory(entry, (uid,)))
                gathered.state(uid, path, TRUTH, entry.get("sentence"), entry.get("label"), uid, [names], split)


def entailment(files: Sequence[Path], gathered: Gathered) -> None:
    """A table of hypotheses with labels and the ids of their pictures; ``split`` is heeded where there is one.

    Where an entry names its picture (``image_id``, ``image``), its own id says nothing of the picture.

    Raises:
        UserError: a column is missing.
    """
    for path in files:
        checked = False
        for place, entry in read_table(path):
            ours = by_our_names(entry)
            names = [_text(ours.get(name)) for name in ("image_id", "image") if _text(ours.get(name))]
            names = names or [_text(ours.get("uid"))]
            if not checked and not ("sentence" in ours and ours.keys() & {"uid", "image_id", "image"}):
                found = ", ".join(map(str, entry))
                raise UserError(f"{path}: expected columns id, hypothesis (or sentence) and label; found {found}")
            checked = True
            if not names[0]:
                gathered.drop(place, "entry_unreadable", path)
            elif gathered.wants(ours.get("split") or (gathered.split if "split" not in ours else None)):
                gathered.state(place, path, (*ENTAILMENT, *TRUTH), ours.get("sentence"), ours.get("label"),
                               names[0], [names], ours.get("split"))  # fmt: skip


def _in_directory(entry: dict[str, Any], stems: Sequence[str]) -> list[str]:
    """With the folder that the entry names, and without."""
    directory = _text(entry.get("directory"))
    return ([f"{directory}/{stem}" for stem in stems] if directory else []) + list(stems)


def _text(value: Any) -> str:
    return str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else ""
