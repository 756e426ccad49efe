"""What is asked for, checked against the run and made part of a conversion."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from simla_ray.data.convert.annotation import Annotation
from simla_ray.data.convert.conversion import convert
from simla_ray.data.convert.jobs import join, run_job
from simla_ray.data.convert.plan import Options
from simla_ray.data.convert.progress import Say
from simla_ray.data.convert.rows import TYPES
from simla_ray.data.index import build_index
from simla_ray.data.map_functions import CaptionReader
from simla_ray.data.sources.files import is_remote, named
from simla_ray.errors import UserError
from simla_ray.orchestration.annotate.annotators import MAX_WORDS, Annotators, Words
from simla_ray.orchestration.manifest import PACKAGES, git_sha, versions
from simla_ray.orchestration.runs import find_run
from simla_ray.release.source import Source, find_source

HALF_LISTS = pa.list_(pa.list_(pa.float16()))
#: Name -> the columns that it writes.
COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "regions": {"region_feats": HALF_LISTS, "boxes": TYPES["boxes"]},
    "tags": {"tags": TYPES["tags"]},
    "phrases": {"phrases": TYPES["phrases"]},
}
#: Columns that say the same, made otherwise: no row may have them before.
NEW = ("region_feats", "tags")


@dataclass(frozen=True)
class Asked:
    """``names`` of what is added; ``run``: a folder or a name, None for phrases alone.

    ``grid``: cells a side; ``tags``: of a picture at most, of at least the probability ``threshold``.
    """

    names: tuple[str, ...]
    run: Path | None
    grid: int
    tags: int
    threshold: float

    def settings(self) -> dict[str, Any]:
        """What the result depends on beside the run, by the names of the options."""
        found: dict[str, Any] = {"with": ",".join(self.names)}
        if "regions" in self.names:
            found["grid"] = self.grid
        if "tags" in self.names:
            found |= {"tags": self.tags, "tag_threshold": self.threshold}
        return found


def annotate(
    uris: Sequence[str],
    to: str,
    asked: Asked,
    options: Options,
    tasks: int | None,
    address: str | None,
    say: Say,
    storage: Path = Path("runs"),
) -> dict[str, Any]:
    """Convert the rows behind ``uris`` into the folder ``to``, with what is asked for; see ``convert``.

    Returns:
        The manifest; ``annotation`` says what was added and by what.

    Raises:
        UserError: no such run, one that lacks what is asked of it, rows that have it already, a source that cannot be
            read or holds the new folder, or a folder that holds something else.
    """
    for uri in uris:
        where = named(uri)[1]
        if not is_remote(where) and Path(where).is_dir() and Path(to).resolve().is_relative_to(Path(where).resolve()):
            raise UserError(f"--to: {to} lies in {uri}, which is read; give a folder outside of it")
    settings = asked.settings()
    about: dict[str, Any] = {"with": list(asked.names), "packages": versions(PACKAGES), "git_sha": git_sha()}
    folder, words = None, None
    if asked.run is not None:
        source = _source(asked.run, storage)
        folder = source.file.parent
        sha256 = _sha256(source.file)
        settings["run"] = f"{source.name} ({sha256[:12]})"
        about["run"] = _about(source, sha256)
        if "tags" in asked.names:
            words = Words.of(source)
            if not words.frequency:
                words = replace(words, frequency=_frequency(uris, options, tasks, address, say), counted="source")
            about["vocabulary"] = words.about()
    make = partial(Annotators, asked.names, folder, asked.grid, asked.tags, asked.threshold, words, options.max_pixels)
    columns = {column: kind for name in asked.names for column, kind in COLUMNS[name].items()}
    annotation = Annotation(
        settings=settings,
        columns=columns,
        new=tuple(name for name in NEW if name in columns),
        make=make,
        loads_model=folder is not None,
        row_bytes=make().row_bytes,  # made here, too, so that what does not fit is said before any row is read
        about=about,
    )
    manifest = convert(uris, to, options, tasks, address, say, annotation)
    if manifest["annotation"]["counts"].get("rows_without_boxes"):
        say(f"note       pictures without boxes have {asked.grid**2} regions; train with at least that in regions.max")
    return manifest


def _source(run: Path, storage: Path) -> Source:
    try:
        return find_source(find_run(run, storage))
    except UserError as error:
        raise UserError(f"--run: {error}") from None


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _about(source: Source, sha256: str) -> dict[str, Any]:
    assert source.run is not None
    return {
        "name": source.name,
        "label": source.run.label,
        "checkpoint": source.file.parent.name,
        "sha256": sha256,
        "licenses": source.manifest().get("licenses"),
    }


def _frequency(
    uris: Sequence[str], options: Options, tasks: int | None, address: str | None, say: Say
) -> dict[str, float]:
    """Word -> share of the source's captions that say it, for a run that brings no counts."""
    index = build_index(uris, options.split, [Path(r) for r in options.image_roots], "source", "--split")
    tasks = join(address, tasks)
    say("count      words of all captions, of which the run has no counts")
    counts: Counter[str] = Counter()
    captions = 0
    for block in run_job([{"unit": i} for i in range(len(index.units))], CaptionReader(index, MAX_WORDS), tasks):
        for caption in filter(None, block["caption"].tolist()):
            counts.update(set(caption.split()))
            captions += 1
    return {word: n / captions for word, n in sorted(counts.items())}
