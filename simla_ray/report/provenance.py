"""The sections that say where a run comes from: data, configuration, manifest."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from simla_ray.config.load import AXES, difference, load_run
from simla_ray.errors import UserError
from simla_ray.markup import Markup, join, table, tag
from simla_ray.report.folder import RunFolder
from simla_ray.report.results import percent
from simla_ray.report.terminal import number

#: Dropped rows named per reason.
NAMED = 5
SETS = ("train", "val", "test")


def data_section(run: RunFolder) -> tuple[str, str, Markup]:
    """Sources with their rows, and what was dropped."""
    known = run.manifest.get("data", {})
    sets = []
    for name in SETS:
        about = known.get(name, {})
        uris = about.get("uris") or getattr(run.run.data, name)
        if uris:
            rows = about.get("rows")
            sets.append((name, ", ".join(uris), about.get("split") or getattr(run.run.data, f"{name}_split") or "–",
                         f"{rows:,}" if rows is not None else "–", _code(about.get("fingerprint"))))  # fmt: skip
    parts = [table(("set", "sources", "split", "rows", "fingerprint"), sets, "Sources", (3,))]
    parts.append(_dropped(run, known.get("train", {}).get("rows")))
    cut = run.at_log_points("truncated_fraction")
    if cut:
        share = sum(value for _, value in cut) / len(cut)
        parts.append(tag("p", f"Captions cut to length: {percent(share)}.", class_="note"))
    return "data", "Data", join(parts)


def _dropped(run: RunFolder, rows: int | None) -> Markup:
    """Each row once, although every epoch passes it again."""
    reasons: dict[str, dict[str, None]] = defaultdict(dict)
    for line in run.dropped:
        reasons[str(line.get("reason", "unknown"))].setdefault(str(line.get("uid", "?")))
    counts = {reason: len(uids) for reason, uids in reasons.items()} | ((run.summary or {}).get("dropped") or {})
    if not counts:
        return tag("p", "No row was dropped.", class_="note")
    lines = []
    for reason, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        uids = list(reasons.get(reason, {}))[:NAMED]
        first = join([_code(uid) for uid in uids], ", ") if uids else "–"
        more = f" and {count - len(uids):,} more" if uids and count > len(uids) else ""
        share = f"{number(100 * count / rows, 2)} %" if rows else "–"
        lines.append((reason, f"{count:,}", share, join([first, more])))
    return table(("reason", "rows", "of the training set", "first ones"), lines, "Dropped rows", (1, 2))


def config_section(run: RunFolder) -> tuple[str, str, Markup]:
    """The keys that differ from the presets, and the whole config folded away."""
    axes = {axis: str(getattr(run.run, axis)) for axis in AXES}
    named = " ".join(f"--{axis} {value}" for axis, value in axes.items())
    parts: list[Any] = []
    try:
        preset = load_run([], axes)
    except UserError:  # the presets of today refuse what the run was started with
        preset = None
    if preset is not None:
        found = [
            (path, _code(_yaml(old)), _code(_yaml(new)), kind)
            for kind in ("identity", "operational")
            for path, old, new in difference(preset, run.run, kind)
            if path != "name"
        ]
        if found:
            rows = [(_code(path), old, new, kind) for path, old, new, kind in found]
            parts.append(table(("key", "preset", "this run", "kind"), rows, f"Differs from {named}"))
        else:
            parts.append(tag("p", "As the presets ", _code(named), " say; no key differs.", class_="note"))
    parts.append(tag("details", tag("summary", "The whole config.yaml"), tag("pre", run.config_text, tabindex="0")))
    return "configuration", "Configuration", join(parts)


def manifest_section(run: RunFolder) -> tuple[str, str, Markup] | None:
    """Commit, packages, licences and whatever else the manifest has."""
    manifest = run.manifest
    if not manifest:
        return None
    apart = ("label", "git_sha", "packages", "data", "fallbacks", "licenses", "world_size")
    facts: list[tuple[str, Any]] = [("label", run.label), ("commit", _code(manifest.get("git_sha")))]
    if manifest.get("world_size") is not None:
        facts.append(("workers", manifest["world_size"]))
    if manifest.get("licenses"):
        facts.append(("licences of the rows", ", ".join(map(str, manifest["licenses"]))))
    facts += [(key.replace("_", " "), _flat(value)) for key, value in manifest.items() if key not in apart]
    packages = sorted((manifest.get("packages") or {}).items())
    if packages:
        facts.append(("packages", tag("span", *(tag("span", f"{n} {v}") for n, v in packages), class_="packages")))
    pairs = [part for name, value in facts for part in (tag("dt", name), tag("dd", value))]
    return "manifest", "Manifest", tag("dl", *pairs)


def _code(value: Any) -> Any:
    return "–" if value is None else tag("code", value)


def _yaml(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(v)}" for key, v in value.items())
    return ", ".join(map(_flat, value)) if isinstance(value, list) else str(value)
