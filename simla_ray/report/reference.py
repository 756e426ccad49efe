"""Reference curves: what the losses of a config have looked like, so that a reader sees whether a run's own are usual.

One JSON file for each config that was measured lies in ``reference/``: the curves of runs that differ only in the seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata, resources
from typing import Any

import numpy as np

from simla_ray.config.load import leaves_of, load_run
from simla_ray.config.schema import Run
from simla_ray.errors import UserError
from simla_ray.report.figures import Band, Points, arrays, smoothed
from simla_ray.report.folder import RunFolder

FOLDER = resources.files("simla_ray.report") / "reference"
#: Points kept of a curve.
POINTS = 100
#: Significant digits kept of a loss.
DIGITS = 5
#: Seeds of a band -> share of sound runs that lie outside it by more than its width, were values normal (simulated).
FAR = {2: "33 %", 3: "13 %", 4: "6 %", 5: "3 %", 6: "2 %"}
#: Identity keys that do not touch the curves, except as one more draw.
APART = ("seed", "data.test", "data.test_split")
#: Operational keys that do: what sees each other in a loss, and how many rows are ranked.
CURVES_TOO = ("batch.micro", "batch.global", "eval.pairs")


def reference_of(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Curves of finished runs that differ only in the seed, as a packaged file holds them.

    Returns:
        "objectives" and "retrieval_r10": at about ``POINTS`` steps, or at those of the validations, the mean, least and
        most over the seeds of the smoothed training losses and of R@10 as it is.

    Raises:
        UserError: fewer than two runs, one that has not ended, a seed twice, or runs that differ in more than the seed.
    """
    if len(runs) < 2:
        raise UserError(f"reference curves: two runs with different seeds are needed, found {len(runs)}")
    first = runs[0]
    for run in runs:
        if run.summary is None:
            raise UserError(f"{run.name}: this run has not ended; reference curves are made from finished runs")
        _same(first, run)
    seeds = sorted(run.run.seed for run in runs)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"reference curves: seeds must differ, found {', '.join(map(str, seeds))}")
    curves = {name: _curve([run.loss(name) for run in runs], smoothed) for name in first.run.objectives.active()}
    return {
        "label": first.label,
        "size": str(first.run.size),
        "data": {"train": _data(first)},
        "config": _leaves(first.run),
        "steps": first.total_steps,
        "seeds": seeds,
        "simla_ray": metadata.version("simla_ray"),
        "objectives": {name: curve for name, curve in curves.items() if curve is not None},
        "retrieval_r10": _curve([run.validation("retrieval_r10") for run in runs]),
    }


def find_reference(run: RunFolder) -> dict[str, Any] | None:
    """The packaged curves of this run's config on this run's data, or None."""
    if not FOLDER.is_dir():
        return None
    data = _data(run)
    for file in sorted(FOLDER.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".json"):
            reference: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if reference["data"]["train"] == data and is_of(reference, run.run):
                return reference
    return None


def is_of(reference: Mapping[str, Any], run: Run) -> bool:
    """Whether the curves are of this run's config: the keys that curves hang on are all the same.

    A key that came after the curves has the schema's default in them, so a new key does not part them from their runs.
    """
    try:
        return _leaves(load_run(overrides=reference["config"], presets=False)) == _leaves(run)
    except UserError:  # of a key or a value that is no more
        return False


def band_of(reference: Mapping[str, Any], name: str) -> Band | None:
    """The band of an objective's loss, or of ``retrieval_r10``."""
    curve = reference[name] if name == "retrieval_r10" else reference["objectives"].get(name)
    if not curve:
        return None
    title = f"reference, {len(reference['seeds'])} seeds"
    return Band(title, curve["step"], curve["mean"], curve["low"], curve["high"])


def beside_reference(run: RunFolder, reference: Mapping[str, Any]) -> str:
    """Whether the last smoothed losses lie inside the band; if not, how far outside, in widths of the band there."""
    inside, outside = [], []
    for name in run.run.objectives.active():
        band, points = band_of(reference, name), run.loss(name)
        if band is None or not points:
            continue
        step, value = points[-1][0], float(smoothed(arrays(points)[1])[-1])
        low, high = (float(np.interp(step, band.steps, ends)) for ends in (band.low, band.high))
        if low <= value <= high:
            inside.append(name)
            continue
        if not np.isfinite(value):
            outside.append(f"{name} is {value}")
            continue
        far, where = (value - high, "above") if value > high else (low - value, "below")
        # Seeds that agree to the last digit kept leave no width to measure by.
        outside.append(f"{name} {far / (high - low):.1f} widths {where}" if high > low else f"{name} {where}")
    seeds = len(reference["seeds"])
    share, far_share = 100 * 2 / (seeds + 1), FAR.get(seeds, "hardly any")
    text = f"Grey band: least to most of {seeds} runs of this config that differ only in the seed. "
    text += f"The last smoothed losses: inside it {', '.join(inside) or 'none'}"
    text += f"; outside {', '.join(outside)}." if outside else "; none is outside."
    text += f" Of sound runs about {share:.0f} % lie outside the band of {seeds} at any one step, {far_share} by more"
    return text + " than its width."


def _same(first: RunFolder, other: RunFolder) -> None:
    a, b = _leaves(first.run), _leaves(other.run)
    for path in dict.fromkeys([*a, *b]):
        if a.get(path) != b.get(path):
            raise UserError(
                f"{other.name}: {path} is {b.get(path)}, but {a.get(path)} in {first.name}; runs for reference curves "
                "may differ only in seed"
            )
    for what, x, y in (("training data", _data(first), _data(other)), ("steps", first.total_steps, other.total_steps)):
        if x != y:
            raise UserError(f"{other.name}: other {what} than {first.name} ({y}, not {x})")


def _leaves(run: Run) -> dict[str, Any]:
    """Keys that curves hang on: the identity keys, without the seed and the test set, and the batch."""
    operational = leaves_of(run, "operational")
    leaves = {path: value for path, value in leaves_of(run, "identity").items() if path not in APART}
    return leaves | {path: operational[path] for path in CURVES_TOO}


def _data(run: RunFolder) -> str | None:
    """What the run was trained on: keys describe the built-in world in full, other data have their fingerprint."""
    if all(uri.startswith("world:") for uri in run.run.data.train):
        return "world"
    found = run.manifest.get("data", {}).get("train", {}).get("fingerprint")
    return None if found is None else str(found)


def _curve(
    runs: Sequence[Points], treat: Callable[[np.ndarray], np.ndarray] | None = None
) -> dict[str, Sequence[float]] | None:
    """Mean, least and most over the runs at steps that all of them cover; None where a run has no finite value."""
    lines = []
    for points in runs:
        steps, values = arrays(points)
        values = values if treat is None else treat(values)
        good = np.isfinite(values)
        if not good.any():
            return None
        lines.append((steps[good], values[good]))
    first, last = max(steps[0] for steps, _ in lines), min(steps[-1] for steps, _ in lines)
    if last < first:
        return None
    if treat is None:
        common = set.intersection(*(set(steps) for steps, _ in lines))
        grid = np.array(sorted(common))
    else:
        grid = np.unique(np.linspace(first, last, POINTS).round())
    if not len(grid):
        return None
    values = np.stack([np.interp(grid, steps, line) for steps, line in lines])
    kept = {"mean": values.mean(0), "low": values.min(0), "high": values.max(0)}
    curve: dict[str, Sequence[float]] = {"step": [int(step) for step in grid]}
    return curve | {name: [float(f"{value:.{DIGITS}g}") for value in line] for name, line in kept.items()}
