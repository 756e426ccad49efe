"""Annotations and pictures -> a folder of Parquet shards with a manifest, which appears in one piece."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from simla_ray.data.adapt.gathered import Gathered
from simla_ray.data.adapt.pictures import FolderPictures, SetPictures, pictures_in
from simla_ray.data.adapt.rows import Rows
from simla_ray.data.convert.conversion import DROPPED, locked
from simla_ray.data.convert.plan import MB, STATE
from simla_ray.data.convert.progress import Progress, Say
from simla_ray.data.convert.rows import encoded_bytes
from simla_ray.data.convert.shards import Report, write_shard
from simla_ray.data.index import build_index
from simla_ray.data.sources import MANIFEST
from simla_ray.errors import UserError
from simla_ray.whole import write_whole

SHARD_BYTES = 256 * MB

Gather = Callable[[Sequence[Path], Gathered], None]


def adapt(
    gather: Gather, asked: dict[str, Any], annotations: Sequence[str], images: str, out: str, max_pixels: int, say: Say
) -> dict[str, Any]:
    """Write a row for each image, or pair of images, that annotations speak of.

    Args:
        asked: format and options, which the manifest repeats; ``split`` is heeded here.

    Returns:
        The manifest.

    Raises:
        UserError: annotations or pictures cannot be read, none of the pictures is there, or the folder holds something.
    """
    began = time.monotonic()
    files = [_existing(path) for path in annotations]
    source = {"annotations": list(annotations), "fingerprint": _fingerprint(files), "images": images}
    folder = Path(out).absolute()
    finished = _finished(folder, asked, source)
    if finished is not None:
        say(f"finished   {out}: {finished['rows']:,} rows in {len(finished['shards'])} shards are there already")
        return finished
    pictures = pictures_in(images)
    gathered = Gathered(asked["split"])
    gather(files, gathered)
    _check(gathered, annotations)
    names = ", ".join(annotations)
    say(f"read       {names}: {len(gathered.records):,} rows, {len(gathered.dropped):,} entries dropped")
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        with locked(unfinished, "--out"):
            try:
                for left in (path for path in unfinished.iterdir() if path.name != STATE):
                    left.unlink()
                manifest = _write(gathered, pictures, unfinished, max_pixels, say)
                manifest |= {
                    "source": source,
                    "options": asked,
                    "simla_ray": metadata.version("simla_ray"),
                    "seconds": round(time.monotonic() - began, 1),
                }
                write_whole(unfinished / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
                shutil.rmtree(unfinished / STATE, ignore_errors=True)
                if folder.exists():
                    folder.rmdir()  # it is empty, see _finished
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror or error})") from None
    return manifest


def _existing(name: str) -> Path:
    path = Path(name)
    if not path.exists():
        raise UserError(f"--annotations: {name} does not exist")
    return path


def _fingerprint(files: Sequence[Path]) -> str:
    """Changes when a file is added, removed, renamed or resized."""
    digest = hashlib.sha256()
    for path in files:
        below = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in below:
            digest.update(repr((str(file.relative_to(path.parent)), file.stat().st_size)).encode())
    return digest.hexdigest()[:16]


def _finished(folder: Path, asked: dict[str, Any], source: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the same adaptation, done before.

    Raises:
        UserError: the folder holds anything else.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise UserError(f"--out: {folder} is a file; give a folder")
    if not any(folder.iterdir()):
        return None
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        same = (manifest["options"], manifest["source"]) == (asked, source)
        whole = all((folder / s["file"]).stat().st_size == s["bytes"] for s in manifest["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        same = whole = False
    if not same:
        raise UserError(f"--out: {folder} is not empty; give an empty or a new folder")
    if not whole:
        raise UserError(f"--out: a shard of {folder} is missing or was changed since; empty the folder first")
    return manifest


def _check(gathered: Gathered, annotations: Sequence[str]) -> None:
    if gathered.records:
        return
    where = ", ".join(annotations)
    if gathered.split is not None and gathered.splits and gathered.split not in gathered.splits:
        raise UserError(f"--split: {gathered.split} is not in {where}; found {', '.join(sorted(gathered.splits))}")
    counts = Counter(entry["reason"] for entry in gathered.dropped)
    reasons = ", ".join(f"{n} {reason}" for reason, n in counts.most_common()) or "there is none"
    raise UserError(f"--annotations: {where}: no entry can be used ({reasons})")


def _write(
    gathered: Gathered, pictures: FolderPictures | SetPictures, folder: Path, max_pixels: int, say: Say
) -> dict[str, Any]:
    """All shards and the list of what was dropped; what the manifest says of them."""
    rows = Rows(gathered, pictures, max_pixels)
    reports: list[Report] = []
    with Progress(len(gathered.records), 0, lambda: rows.done, say):
        groups = rows.groups()
        while (first := next(groups, None)) is not None:
            report = Report(f"data-{len(reports):05d}.parquet")
            reports.append(report)
            write_shard(folder, report, rows.schema, _one_shard(first, groups, report))
    if not reports:
        raise UserError(rows.why_none())
    write_whole(folder / DROPPED, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in gathered.dropped))
    licenses: Counter[str] = sum((report.licenses for report in reports), Counter())
    return {
        "rows": sum(report.rows for report in reports),
        "rows_in": len(gathered.records) - rows.of_other_splits,
        "entries": dict(rows.entries),
        "dropped": dict(Counter(line["reason"] for line in gathered.dropped).most_common()),
        "boxes_clipped": rows.clipped,
        "bytes": sum(report.bytes for report in reports),
        "columns": rows.schema.names,
        "licenses": dict(licenses.most_common()),
        "fingerprint": build_index([str(folder)], None, [], "--out").fingerprint(),
        "shards": [{"file": r.name, "rows": r.rows, "bytes": r.bytes, "sha256": r.sha256} for r in reports],
    }


def _one_shard(
    first: list[dict[str, Any]], groups: Iterator[list[dict[str, Any]]], report: Report
) -> Iterator[list[dict[str, Any]]]:
    size, group = 0, first
    while True:
        for row in group:
            report.keep(row)
            size += encoded_bytes(row)
        yield group
        if size >= SHARD_BYTES:
            return
        following = next(groups, None)
        if following is None:
            return
        group = following
