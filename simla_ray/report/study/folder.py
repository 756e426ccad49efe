"""The folder of a sweep or a comparison, read for its page: a summary, the config, and the runs below."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from simla_ray.config.load import read_yaml
from simla_ray.errors import UserError
from simla_ray.jsonl import read_lines
from simla_ray.markup import Markup, tag
from simla_ray.report.figures import Points
from simla_ray.report.folder import read_tree

#: Kind -> (the file with its config, the folder of its runs).
KINDS = {"sweep": ("sweep.yaml", "trials"), "comparison": ("comparison.yaml", "runs")}


@dataclass(frozen=True)
class Study:
    """What a sweep or a comparison has written so far. ``written`` is False where there is no summary yet."""

    folder: Path
    name: str
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    config_text: str
    written: bool

    @property
    def space(self) -> dict[str, dict[str, Any]]:
        """Path -> what could be drawn, of a sweep; from its config where there is no summary yet."""
        given = self.summary.get("space") or (self.config.get("sweep") or {}).get("space") or {}
        return {path: {key: v for key, v in entry.items() if v is not None} for path, entry in given.items() if entry}

    def base(self, path: str) -> Any:
        """The value of a key in the config; None where it has none."""
        value: Any = self.config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def validation(self, run: str, metric: str) -> Points:
        """(step, value) of a validation metric of the run at this path below the folder, where it is finite."""
        lines = read_lines(self.folder / run / "metrics.jsonl")
        found = ((line["step"], line.get("metrics", {}).get(metric)) for line in lines if line.get("kind") == "val")
        return [(step, value) for step, value in found if value is not None and math.isfinite(value)]

    def link(self, run: str, text: str) -> Markup | str:
        """The text, a link to the run's page where it has one."""
        page = f"{run}/report.html"
        return tag("a", text, href=quote(page)) if (self.folder / page).is_file() else text


def read_study(folder: Path, kind: str) -> Study:
    """Read the folder of a finished or unfinished sweep or comparison.

    Without a summary the runs that lie there are its trials, with what their own files tell.

    Raises:
        UserError: it is neither, or a file in it is not what it should be.
    """
    file, below = KINDS[kind]
    config, summary = folder / file, read_tree(folder / "summary.json")
    if not config.is_file() and summary is None:
        raise UserError(f"{folder}: no {file} in it; give the folder of a {kind}")
    if summary is not None and summary.get("kind") != kind:
        raise UserError(f"{folder / 'summary.json'}: kind is {summary.get('kind')}; give the folder of a {kind}")
    there = summary
    if there is None:
        there = {"kind": kind, "name": folder.resolve().name, "trials": list(_runs(folder / below)), "rows": []}
    return Study(
        folder=folder,
        name=str(there.get("name") or folder.resolve().name),
        summary=there,
        config=read_yaml(config) if config.is_file() else {},
        config_text=config.read_text() if config.is_file() else "",
        written=summary is not None,
    )


def _runs(folder: Path) -> Iterator[dict[str, Any]]:
    for run in sorted(path for path in folder.glob("*") if (path / "config.yaml").is_file()):
        number = re.search(r"\d+$", run.name)
        lines, done = read_lines(run / "metrics.jsonl"), read_tree(run / "summary.json")
        yield {
            "number": int(number[0]) if number else None,
            "name": run.name,
            "params": {},
            "status": "running" if done is None else "finished",
            "steps": max((line["step"] for line in lines), default=0),
            "seconds": (done or {}).get("seconds"),
        }


def yaml_value(value: Any) -> str:
    """A value as a config has it, numbers in few digits and words without quotes."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.4g}"
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def card(uri: str, title: str, alt: str, whole: bool = False) -> Markup:
    """A figure with its caption; ``whole``: as wide as the page."""
    return tag("figure", tag("figcaption", title), tag("img", src=uri, alt=alt), class_="whole" if whole else None)
