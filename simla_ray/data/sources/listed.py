"""Sources that are read as a whole and whose images are files: lists in JSON, CSV and TSV, COCO's captions, folders.

Images are only read from allowed folders, whatever a list says. A unit is a stretch of the list.
"""

from __future__ import annotations

import csv
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from simla_ray.data.schema import LISTS, OPTIONAL, columns_behind, resolve_columns
from simla_ray.data.sources.described import IMAGES, WORDS, described
from simla_ray.data.sources.unit import DataFile, Unit
from simla_ray.errors import UserError

UNIT_ROWS = 1000
#: What may separate the columns of a .csv; the one that is in the header most often does.
DELIMITERS = ",\t|;"
#: Entry: what describes the image lies in these files beside it, and is read with the row.
BESIDE = "beside"
#: Entry of a folder: the name that stands in for a uid.
NAME = "name"

Entry = dict[str, Any]


def is_image_folder(path: Path) -> bool:
    """Whether a folder holds images, and no JSON but that which is named as one of them."""
    names = list(path.iterdir())
    stems = {name.stem for name in names if name.suffix[1:].lower() in IMAGES}
    lists = [name for name in names if name.suffix == ".json" and name.stem not in stems]
    return not lists and any(image_files(path))


def units(file: DataFile, split: str | None, split_key: str) -> list[Unit]:
    """Stretches of the list."""
    entries = _entries(file)
    if split is not None and not any("split" in entry for entry in entries):
        raise UserError(f"{split_key}: {split}, but {file.path} has no split column")
    found = []
    for i in range(0, len(entries), UNIT_ROWS):
        part = entries[i : i + UNIT_ROWS]
        kept = tuple(j for j, e in enumerate(part) if e.get("split") == split) if split is not None else None
        found.append(Unit(file.path, i, len(part), kept))
    return found


def rows(
    unit: Unit, inside: np.ndarray, columns: Sequence[str] | None, roots: Sequence[str]
) -> list[tuple[dict[str, Any], str]]:
    """The rows with their own uids' stand-ins."""
    entries, is_folder = _entries(unit), unit.format == "folder"
    base = Path(unit.path) if is_folder else Path(unit.path).parent
    allowed = [Path(r) for r in roots if not is_folder] or [base]  # a folder's own files lie in it
    found = []
    for i in (unit.number + int(p) for p in inside):
        row = dict(entries[i])
        path, own, pair = row.get("image"), row.pop(NAME, None), row.pop("images", None)
        if path:
            row.setdefault("image_id", str(path) if own is None else _below(unit.name, str(path)))
        if path or pair is None:
            row["image"] = within_roots(str(path), allowed) if path else "image_missing"
        if pair is not None and "images" in columns_behind(columns or ("images",), row):
            row |= _pair(pair, allowed)
        for beside in row.pop(BESIDE, ()):
            row |= _described(beside, base)
        found.append((row, f"{unit.name}:{i}" if own is None else _below(unit.name, own)))
    return found


def _below(name: str, path: str) -> str:
    return f"{name}/{path}" if name else path


def share_names(folders: Sequence[DataFile]) -> bool:
    """Whether one folder of images has a row of the same name as another."""
    names = [{entry[NAME] for entry in _entries(folder)} for folder in folders]
    return sum(map(len, names)) > len(set().union(*names))


def column(unit: Unit, name: str) -> list[Any]:
    """See ``read_column``; of COCO's captions and folders only the columns of a row."""
    entries = _entries(unit, None if name in OPTIONAL else name)
    return [entry.get(name) for entry in entries[unit.number : unit.number + unit.n]]


def _pair(paths: Any, roots: Sequence[Path]) -> dict[str, Any]:
    """``images`` of a row, read; or its image as the reason."""
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        return {"image": "images_unreadable"}
    images = []
    for path in paths:
        found = within_roots(path, roots)
        try:
            if isinstance(found, str):
                return {"image": found}
            images.append(found.read_bytes())
        except OSError:
            return {"image": "image_missing"}
    return {"images": images}


def within_roots(path: str, roots: Sequence[Path]) -> Path | str:
    """The file a list names, if it lies in an allowed folder (links resolved); else the drop reason."""
    for root in roots:
        try:
            candidate = (root / path).resolve()
            if candidate.is_relative_to(root.resolve()):
                if candidate.is_file():
                    return candidate
                reason = "image_missing"
                continue
        except (OSError, ValueError, RuntimeError):  # a name that no file system takes, or links in a circle
            return "image_missing"
        reason = "image_outside_roots"
    return reason


def _entries(file: DataFile | Unit, other: str | None = None) -> list[Entry]:
    """Entries under our names, and a column that is not one of the row by its own."""
    stat = Path(file.path).stat()
    return _parse(file.path, file.format, stat.st_mtime_ns, stat.st_size, other)


@functools.lru_cache(maxsize=4)
def _parse(path: str, format: str, changed_ns: int, size: int, other: str | None) -> list[Entry]:
    file = Path(path)
    try:
        if format == "folder":
            return _folder(file)
        return _json(file, format, other) if format in ("json", "coco") else _table(file, format, other)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: {what_is_wrong(error)}") from None
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{path}: not a readable {format.upper()} file ({error})") from None


def what_is_wrong(error: json.JSONDecodeError) -> str:
    """What is wrong with a JSON file; Python's words for the most frequent mistake name everything but the comma."""
    if error.doc[: error.pos].rstrip().endswith(",") and error.doc[error.pos : error.pos + 1] in ("]", "}"):
        return f"not a readable JSON file (a comma before {error.doc[error.pos]})"
    return f"not a readable JSON file ({error.msg})"


def _json(file: Path, format: str, other: str | None) -> list[Entry]:
    """ALBEF's and SIMLA's list of pairs, or COCO's captions, which ``format`` may insist on."""
    found = json.loads(file.read_bytes())
    if isinstance(found, dict) and isinstance(found.get("images"), list):
        return _coco(found, str(file))
    if format == "coco":
        raise UserError(f"{file}: expected COCO captions, an object with images and annotations")
    if not isinstance(found, list) or not all(isinstance(r, dict) for r in found):
        raise UserError(f'{file}: expected a list of {{"image": path, "caption": text}}, or COCO captions')
    if not found:
        return []
    names = resolve_columns(found[0].keys(), str(file)) | ({other: other} if other else {})
    return [{ours: r.get(theirs) for ours, theirs in names.items()} for r in found]


def _coco(found: dict[str, Any], where: str) -> list[Entry]:
    """A row per image, with all its captions, in the order of ``images``."""
    for part in ("images", "annotations", "licenses"):
        listed = found.get(part) or []
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            raise UserError(f"{where}: {part} is not a list of objects, as in the captions file of COCO")
    captions: dict[str, list[Any]] = {}
    for annotation in found.get("annotations") or ():
        if "caption" not in annotation or "image_id" not in annotation:
            raise UserError(f"{where}: annotations without image_id and caption; give the captions file of COCO")
        captions.setdefault(str(annotation["image_id"]), []).append(annotation["caption"])
    licenses = {str(entry["id"]): entry.get("name") for entry in found.get("licenses") or () if "id" in entry}
    entries = []
    for image in found["images"]:
        if "id" not in image or "file_name" not in image:
            raise UserError(f"{where}: images without id and file_name")
        entry = {"uid": image["id"], "image_id": image["id"], "image": image["file_name"]}
        entry["captions"] = captions.get(str(image["id"]), [])
        if (name := licenses.get(str(image.get("license")))) is not None:
            entry["license"] = name
        entries.append(entry)
    return entries


def _table(file: Path, format: str, other: str | None) -> list[Entry]:
    """CSV or TSV with a header; lists in a cell are JSON."""
    csv.field_size_limit(2**24)
    # Captions that are not UTF-8 are dropped by row, later.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        header = lines.readline()
        delimiter = "\t" if format == "tsv" else max(DELIMITERS, key=header.count)
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
        columns = resolve_columns(names, str(file)) | ({other: other} if other else {})
        entries = []
        for values in csv.reader(lines, delimiter=delimiter):
            if not values:
                continue
            cells = dict(zip(names, (value.strip() for value in values), strict=False))
            entries.append({ours: _cell(ours, cells.get(theirs)) for ours, theirs in columns.items()})
        return entries


def _cell(name: str, text: str | None) -> Any:
    if not text:
        return None
    if name in LISTS and text.startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text


def _folder(path: Path) -> list[Entry]:
    """A row per image and per lone description, in the order of their names."""
    images = image_files(path)
    names: dict[str, list[str]] = {}
    for image in images:
        names.setdefault(_stem(image), []).append(image)
    beside: dict[str, list[str]] = {}
    for ending in reversed(WORDS):  # JSON's columns win
        for name in _files(path, (ending,)):
            beside.setdefault(_stem(name), []).append(name)
    entries = []
    for stem in sorted(names.keys() | beside.keys()):
        for image in names.get(stem, [""]):
            name = image if len(names.get(stem, ())) > 1 else stem
            entries.append({NAME: name, "image": image, BESIDE: beside.get(stem, [])})
    return entries


def image_files(path: Path) -> list[str]:
    """Paths of the images below a folder, relative to it, sorted."""
    return _files(path, IMAGES)


def _files(path: Path, endings: Sequence[str]) -> list[str]:
    """Paths below a folder, relative to it, sorted; hidden ones are passed over."""
    found = []
    for folder, inner, names in os.walk(path):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name.rpartition(".")[2].lower() in endings:
                found.append((Path(folder) / name).relative_to(path).as_posix())
    return sorted(found)


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _described(name: str, folder: Path) -> dict[str, Any]:
    path = within_roots(name, [folder])
    if isinstance(path, str):  # a link that leads out
        return {"image": "caption_outside_roots"}
    try:
        return described(path.suffix[1:].lower(), path.read_bytes())
    except OSError:
        return {"image": "caption_unreadable"}
