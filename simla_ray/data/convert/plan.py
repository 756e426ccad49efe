"""Which rows go into which shard, and the folder that remembers it until the last one is written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simla_ray.data.convert.survey import Survey
from simla_ray.data.sources import MANIFEST
from simla_ray.errors import UserError
from simla_ray.whole import write_whole

STATE = ".convert"
MB = 2**20
#: Part of the plan; raise it with every change that alters what is written.
VERSION = 3
#: What errors call a setting whose option has another name.
NAMES = {"version": "version of the converter", "image_roots": "--image-root"}


@dataclass(frozen=True)
class Options:
    """What the result depends on, beside the rows."""

    shard_mb: int = 256
    row_group_mb: int = 8
    max_px: int | None = None
    max_pixels: int = 50_000_000
    split: str | None = None
    image_roots: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Shard i has the ordinals ``cuts[i]`` to ``cuts[i + 1]``."""

    asked: dict[str, Any]  # options, source and version, to tell another plan
    uris: tuple[str, ...]
    columns: tuple[str, ...]
    duplicates: tuple[int, ...]
    cuts: tuple[int, ...]
    prefix: str

    @property
    def names(self) -> list[str]:
        n = len(self.cuts) - 1
        return [f"{self.prefix}-{i:05d}-of-{n:05d}.parquet" for i in range(n)]

    @property
    def rows(self) -> int:
        return self.cuts[-1]


def asked_for(options: Options, fingerprint: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for a conversion to go on; ``more``: settings of an annotation."""
    return {**json.loads(json.dumps(asdict(options))), **more, "fingerprint": fingerprint, "version": VERSION}


def make_plan(asked: dict[str, Any], uris: Sequence[str], found: Survey, options: Options) -> Plan:
    """Shards of about ``shard_mb`` each, the last one not much smaller than the others."""
    total = np.cumsum(found.row_bytes, dtype=np.float64)
    n = min(len(total), max(1, round(float(total[-1]) / (options.shard_mb * MB))))
    inner = np.searchsorted(total, np.arange(1, n) * (total[-1] / n))
    cuts = sorted({0, len(total), *(int(i) for i in inner)})
    prefix = re.sub(r"[^A-Za-z0-9_.-]+", "-", options.split or "").strip("-.") or "data"
    return Plan(asked, tuple(uris), found.columns, found.duplicates, tuple(cuts), prefix)


def stored_plan(folder: Path) -> Plan | None:
    """The plan of an interrupted conversion."""
    path = folder / STATE / "plan.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        return Plan(**{name: tuple(v) if isinstance(v, list) else v for name, v in found.items()})
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a readable plan ({error}); empty the folder first") from None


def store_plan(folder: Path, plan: Plan) -> None:
    (folder / STATE).mkdir(parents=True, exist_ok=True)
    write_whole(folder / STATE / "plan.json", json.dumps(asdict(plan)))


def check_same(was: dict[str, Any], asked: dict[str, Any], where: str) -> None:
    """Refuse to mix two conversions in one folder.

    Raises:
        UserError: naming what differs.
    """
    for key in {**asked, **was}:
        if was.get(key) == asked.get(key):
            continue
        if key == "fingerprint":
            raise UserError(
                f"{where}: was begun with other source files; give their URIs again, or another --to folder"
            )
        name = NAMES.get(key, f"--{key.replace('_', '-')}")
        raise UserError(
            f"{where}: was begun with {name} {_shown(was.get(key))}, now it is {_shown(asked.get(key))}; "
            "give the same, or another --to folder"
        )


def check_folder(folder: Path, sources: Sequence[str]) -> None:
    """Refuse a folder whose other files a reader would take for rows of the result, or that is read from.

    Raises:
        UserError: naming the file.
    """
    for source in dict.fromkeys(sources):
        path = Path(source)
        if folder == path.parent or folder == path or (path.is_dir() and folder.is_relative_to(path)):
            raise UserError(f"--to: {folder} holds what is converted ({path.name}); give a folder of its own")
    strange = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
    if strange:
        what = "a conversion's manifest that is not finished" if MANIFEST in strange else strange[0]
        raise UserError(f"--to: {folder} is not empty ({what}); give an empty or a new folder")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "not given"
    return "not given" if value is None else str(value)
