"""What in the columns of a data set ``annotate`` has made, for the manifest of a run that reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from simla_ray.config.enums import ConceptSource, RegionSource, TagSource
from simla_ray.config.schema import Run
from simla_ray.data.sources import MANIFEST
from simla_ray.data.sources.files import named


def column_fallbacks(run: Run) -> list[str]:
    """Regions, tags and phrases that are columns, but neither a detector's nor a parser's."""
    reads = {
        "regions": run.regions is not None and run.regions.source is RegionSource.column,
        "tags": run.tags is not None and run.tags.source is TagSource.column,
        "phrases": bool(run.text.concepts) and run.concepts.source is ConceptSource.column,
    }
    return list(dict.fromkeys(line for uri in run.data.train for line in _lines(uri, reads)))


def _lines(uri: str, reads: dict[str, bool]) -> list[str]:
    """By the manifest beside a URI's files, if it is one of ``annotate``; a manifest may be anybody's."""
    where = Path(named(uri)[1])
    path = (where if where.is_dir() else where.parent) / MANIFEST
    try:
        return _told(json.loads(path.read_text(encoding="utf-8")), reads)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _told(manifest: dict[str, Any], reads: dict[str, bool]) -> list[str]:
    about, grid = manifest["annotation"], manifest["options"].get("grid")
    of_run = f"{about.get('run', {}).get('name')}'s"
    cells, boxes = f"{grid} x {grid} cells of the image", "annotated boxes of all objects and the whole image"
    without = about["counts"].get("rows_without_boxes")
    regions = boxes if not without else cells if without == manifest["rows"] else f"{boxes}, or {cells},"
    lines = {
        "regions": f"regions: {regions} in place of a detector's; their features are patches of {of_run} frozen tower "
        "in place of a detector's",
        "tags": f"tags: words that {of_run} keyword head sees in the image in place of a detector's",
        "phrases": "phrase concepts: read from the captions by rules in place of the SPICE parser",
    }
    return [lines[name] for name in lines if reads[name] and name in about["with"]]
