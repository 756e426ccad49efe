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
    lines = (_line(name, about) for uri in run.data.train for about in _annotation(uri) for name in about["with"]
             if reads.get(name))  # fmt: skip
    return list(dict.fromkeys(lines))


def _annotation(uri: str) -> list[dict[str, Any]]:
    """What the manifest beside a URI's files says, if it is one of ``annotate``."""
    where = Path(named(uri)[1])
    path = (where if where.is_dir() else where.parent) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        about = manifest["annotation"]
        run = about.get("run", {}).get("name")
        return [{"with": list(about["with"]), "run": run, "grid": manifest["options"].get("grid")}]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _line(name: str, about: dict[str, Any]) -> str:
    if name == "regions":
        cells = f"{about['grid']} x {about['grid']} cells"
        return (
            f"regions: annotated boxes of all objects and the whole image, without boxes {cells}, in place of a "
            f"detector's; their features are patches of {about['run']}'s frozen tower in place of a detector's"
        )
    if name == "tags":
        return f"tags: words that {about['run']}'s keyword head sees in the image in place of a detector's"
    return "phrase concepts: read from the captions by rules in place of the SPICE parser"
