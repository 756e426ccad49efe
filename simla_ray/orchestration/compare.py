"""A comparison: methods and ablations over the same seeds, at equal samples and at equal arithmetic, in one table."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from simla_ray.config.comparison import ComparisonPlan, load_comparison, to_yaml
from simla_ray.config.load import load_run, merge, to_dict
from simla_ray.config.schema import Run
from simla_ray.errors import UserError, guarded
from simla_ray.evaluation.paired import PerImage, read_per_image
from simla_ray.evaluation.retrieval import EXHAUSTIVE_IMAGES
from simla_ray.orchestration.cli import run_arguments
from simla_ray.orchestration.cost import step_flops
from simla_ray.orchestration.manifest import PACKAGES, fallbacks, versions
from simla_ray.orchestration.preflight import check, dry_run, with_absolute_paths
from simla_ray.orchestration.runs import run_folder
from simla_ray.orchestration.series import (
    Progress,
    Say,
    Series,
    differences,
    fresh,
    opened,
    say_again,
    summary_before,
    write_json,
)
from simla_ray.orchestration.trials import Outcome
from simla_ray.report.comparison import comparison_table, write_comparison_report
from simla_ray.report.folder import read_folder
from simla_ray.report.reference import reference_of
from simla_ray.whole import write_whole

SAMPLES, COMPUTE = "samples", "compute"
#: The paper's claim: how much data a method needs (section 5).
DATA_CURVE = (0.125, 0.25, 0.5, 1.0)
#: Keys in which two runs may differ and still be the same experiment.
OF_NO_MATTER = ("name", "storage", "ray", "log", "report", "checkpoint", "compile", "activation_checkpointing")
#: What of a run's folder is left behind when another comparison takes it over.
HEAVY = ("checkpoints", "tensorboard", "prepared", ".*")


def compare_main(argv: Sequence[str]) -> int:
    """``experiments/compare.py``"""
    parser = argparse.ArgumentParser(
        prog="compare.py",
        description="Methods and ablations side by side over seeds: one table with spreads and paired differences. "
        "Without arguments: CLIP, ALBEF, SIMLA and SIMLA without PSL, three seeds each, on the built-in world.",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="any key of the comparison, or of all its runs"
    )
    parser.add_argument("--methods", metavar="A,B,...", help="entries to compare, of the built-in ones and the files'")
    parser.add_argument(
        "--data-curve", action="store_true", help="train on 1/8, 1/4, 1/2 and all of the rows: comparison.fractions"
    )
    parser.add_argument(
        "--controlled",
        action="store_true",
        help="nothing but fusion and objectives differs between entries: comparison.controlled",
    )
    parser.add_argument(
        "--curves", action="store_true", help="write the band of each entry's losses over its seeds, for reports"
    )
    run_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)

    def main() -> int:
        overrides = list(arguments.overrides)
        if arguments.name is not None:
            overrides.append(f"name={json.dumps(arguments.name)}")
        if arguments.data_curve:
            overrides.append(f"comparison.fractions={list(DATA_CURVE)}")
        if arguments.controlled:
            overrides.append("comparison.controlled=true")
        chosen = [name for name in (arguments.methods or "").split(",") if name]
        plan = ranked_alike(load_comparison(arguments.config or [], overrides, chosen))
        if arguments.print_config:
            print(to_yaml(plan), end="")
            return 0
        say = partial(print, flush=True)
        if arguments.dry_run:
            for line in lines_of(plan):
                say(line)
            dry_run(plan.base.model_copy(update={"name": None}), say)
            return 0
        summary = compare(plan, say)
        folder = plan.base.storage / summary["name"]
        print(comparison_table(summary))
        if arguments.curves:
            for path in write_curves(folder, summary):
                print(f"curves     {path}")
        print(f"report     {folder / 'report.html'}")
        return 0

    return guarded(main, "interrupted; the same command with the same --name goes on")


@dataclass(frozen=True)
class Row:
    """One line of the table: an entry at a budget on a share of the data, over all seeds."""

    entry: str
    budget: str
    fraction: float
    steps: int
    flops: float  # per pair
    runs: tuple[Run, ...]


def compare(plan: ComparisonPlan, say: Say = print) -> dict[str, Any]:
    """Run a comparison, or of one with the same name what is missing, failed runs among it.

    Returns:
        The summary, as in ``summary.json``.

    Raises:
        UserError: anything wrong with config, data or resources.
    """
    storage = plan.base.storage.resolve()
    name = plan.base.name or fresh(storage, "comparison")
    folder = storage / name
    stored, before = folder / "comparison.yaml", summary_before(folder, "comparison")
    if before is not None and stored.read_text() == to_yaml(plan):
        failed = {run["name"] for row in before["rows"] for run in row["failed"]}
        if not before["unfinished"] and not failed:
            say(f"compare    {folder} is finished")
            return before
        say_again(failed, say)
    plan = replace(plan, shared=plan.shared | {"name": name})
    others = [plan.run(entry, plan.comparison.seeds[0]) for entry in plan.entries]
    wanted, limit = plan.comparison.concurrent, plan.comparison.timeout_s
    began = time.time() - (before["seconds"] if before is not None else 0.0)
    with opened(folder, plan.base, others, wanted, "comparison.concurrent", limit, say) as series:
        for line in lines_of(plan):
            say(line)
        decided = {entry: check(run, devices=False)[0] for entry, run in zip(plan.entries, others, strict=True)}
        rows = list(_rows(plan, series, decided))
        every = {str(run.name): (run, row.steps) for row in rows for run in row.runs}
        series.check_unchanged(list(every.values()))
        write_whole(stored, to_yaml(plan))
        _take_over([run for run, _ in every.values()], storage, say)
        progress = Progress(say, plan.base.eval.best, lambda run: "")
        ended = series.run_all(list(every.values()), progress)
        summary = _summary(plan, folder, rows, ended, time.time() - began)
        write_json(folder / "summary.json", summary)
        write_comparison_report(folder)
    return summary


def lines_of(plan: ComparisonPlan) -> list[str]:
    """What is compared."""
    asked = plan.comparison
    lines = [
        f"compare    {len(plan.entries)} entries, seeds {', '.join(map(str, asked.seeds))}, at equal "
        f"{' and at equal '.join(asked.budgets)}; differences are to {asked.reference}"
    ]
    lines += [f"entry      {name}: {plan.description(name)}" for name in plan.entries]
    lines += [f"note       {note}" for note in notes_of(plan)]
    if asked.fractions != [1.0]:
        lines.append(f"data       shares of the rows: {', '.join(f'{f:g}' for f in asked.fractions)}")
    return lines


def ranked_alike(plan: ComparisonPlan) -> ComparisonPlan:
    """A controlled plan in which an entry has no vectors: all are evaluated on as many images as ITM ranks in full."""
    if not plan.comparison.controlled or not _ranked_among_fewer(plan):
        return plan
    shared: dict[str, Any] = {}
    for layer in (plan.shared, {"eval": {"pairs": EXHAUSTIVE_IMAGES}}):
        merge(shared, layer)
    return replace(plan, shared=shared)


def notes_of(plan: ComparisonPlan) -> list[str]:
    """What was held equal, and what of the table is not: a sentence each."""
    found = plan.notes()
    if fewer := _ranked_among_fewer(plan):
        found.append(
            f"Retrieval is among {EXHAUSTIVE_IMAGES} images for {', '.join(fewer)}, without vectors, and among "
            f"{plan.base.eval.pairs} for the others, which is harder; eval.pairs={EXHAUSTIVE_IMAGES} ranks all alike."
        )
    return found


def _ranked_among_fewer(plan: ComparisonPlan) -> list[str]:
    """Entries without ITC, where there are more images than ITM ranks in full."""
    first = {entry: plan.run(entry, plan.comparison.seeds[0]) for entry in plan.entries}
    return [
        e for e, run in first.items() if "itc" not in run.objectives.active() and run.eval.pairs > EXHAUSTIVE_IMAGES
    ]


def _rows(plan: ComparisonPlan, series: Series, decided: Mapping[str, Run]) -> Iterator[Row]:
    """The table's lines. At equal compute an entry has as many steps as the reference's arithmetic pays for.

    Args:
        decided: a run of each entry for which it is decided where its regions and tags come from.
    """
    asked, size = plan.comparison, series.vocabulary_size
    cost = {e: step_flops(decided[e], size, series.steps) for e in plan.entries}
    for fraction in asked.fractions:
        for budget in asked.budgets:
            if budget == COMPUTE and fraction < 1:
                continue  # a method's need of data is asked at equal samples
            for entry in plan.entries:
                steps = series.steps
                if budget == COMPUTE:
                    steps = max(1, round(series.steps * cost[asked.reference] / cost[entry]))
                asked_for = (_run(plan, series, entry, seed, fraction, steps) for seed in asked.seeds)
                runs = tuple(_as_decided(run, decided[entry]) for run in asked_for)
                yield Row(entry, budget, fraction, steps, cost[entry], runs)


def _as_decided(run: Run, decided: Run) -> Run:
    """With regions and tags from where they were found, so that label, fall-backs and reuse go by that."""
    if run.regions is None and run.tags is None:
        return run
    return run.model_copy(update={"regions": decided.regions, "tags": decided.tags, "objectives": decided.objectives})


def _run(plan: ComparisonPlan, series: Series, entry: str, seed: int, fraction: float, steps: int) -> Run:
    parts = [entry]
    over: dict[str, Any] = {}
    if fraction < 1:
        parts.append(f"data{fraction:g}")
        over["data.fraction"] = fraction
    if steps != series.steps:
        parts.append(f"steps{steps}")
    if steps != series.steps or fraction < 1:
        over["optim.max_steps"] = steps  # epochs of fewer rows would be fewer steps
    over["name"] = series.name_of("runs", "-".join([*parts, f"seed{seed}"]))
    return with_absolute_paths(plan.run(entry, seed, over))


def _take_over(runs: Sequence[Run], storage: Path, say: Say) -> None:
    """Copy what other comparisons and sweeps have found for the same config, so that nothing is trained twice."""
    missing = {_same(run): run for run in runs if not run_folder(run).exists()}
    if not missing:
        return
    for pattern in ("*/summary.json", "*/runs/*/summary.json", "*/repeats/*/summary.json"):
        for path in sorted(storage.glob(pattern)):
            if not missing or not (path.parent / "config.yaml").exists():
                continue
            try:
                other = load_run([path.parent / "config.yaml"], presets=False)
            except UserError:  # of another version
                continue
            run = missing.get(_same(other))
            if run is not None and _same_code(path.parent):
                del missing[_same(other)]
                folder = run_folder(run)
                unfinished = folder.with_name(folder.name + ".unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)
                shutil.copytree(path.parent, unfinished, ignore=shutil.ignore_patterns(*HEAVY))
                unfinished.rename(folder)
                say(f"reuse      {folder.name} from {path.parent.relative_to(storage)}")


def _same(run: Run) -> str:
    """Equal for runs that are one experiment, wherever they lie and whatever computes them."""
    tree = {name: value for name, value in to_dict(run).items() if name not in OF_NO_MATTER}
    for name in ("decode_cpus", "audit"):
        del tree["data"][name]
    return json.dumps(tree, sort_keys=True)


def _same_code(folder: Path) -> bool:
    """Whether a run was made by this version of the package."""
    manifest = folder / "manifest.json"
    return manifest.exists() and json.loads(manifest.read_text()).get("packages") == versions(PACKAGES)


def _summary(
    plan: ComparisonPlan, folder: Path, rows: Sequence[Row], ended: dict[str, Outcome], seconds: float
) -> dict[str, Any]:
    asked = plan.comparison
    measured = {
        name: read_per_image(folder.parent / name) for name, outcome in ended.items() if outcome.summary is not None
    }
    reference = {(row.budget, row.fraction): row for row in rows if row.entry == asked.reference}
    told, compared = [], []
    for row in rows:
        base = reference[row.budget, row.fraction]
        told.append(_told(plan, row, base, ended, measured))
        if row.entry != asked.reference:
            pairs = [
                (measured[str(a.name)], measured[str(b.name)])
                for a, b in zip(row.runs, base.runs, strict=True)
                if {str(a.name), str(b.name)} <= set(measured)
            ]
            if pairs:
                ours, theirs = zip(*pairs, strict=True)
                at = {"entry": row.entry, "budget": row.budget, "fraction": row.fraction}
                compared += [at | found for found in differences(ours, theirs, asked.metrics)]
    return {
        "kind": "comparison",
        "name": folder.name,
        "unfinished": len(ended) < len({str(run.name) for row in rows for run in row.runs}),
        "seconds": seconds,
        "seeds": list(asked.seeds),
        "reference": asked.reference,
        "notes": notes_of(plan),
        "rows": told,
        "differences": compared,
    }


def _told(
    plan: ComparisonPlan, row: Row, base: Row, ended: dict[str, Outcome], measured: dict[str, PerImage]
) -> dict[str, Any]:
    """A row of the summary."""
    names = [str(run.name) for run in row.runs]
    done = [name for name in names if name in measured]
    summaries = [summary for name in done if (summary := ended[name].summary) is not None]
    metrics = {}
    for metric in plan.comparison.metrics:
        if done and all(metric in measured[name].metrics for name in done):
            values = [measured[name].metrics[metric] for name in done]
            spread = stdev(values) if len(values) > 1 else None
            metrics[metric] = {"mean": fmean(values), "std": spread, "values": values}
    run = row.runs[0]
    return {
        "entry": row.entry,
        "label": run.label,
        "description": plan.description(row.entry),
        "budget": row.budget,
        "fraction": row.fraction,
        "steps": row.steps,
        "samples": row.steps * run.batch.global_,
        "gflops_per_pair": row.flops / 1e9,
        "compute": row.flops * row.steps / (base.flops * base.steps),
        "train_s": fmean(s["seconds"] for s in summaries) if summaries else None,
        "pairs_per_s": fmean(s["pairs_per_s"] for s in summaries) if summaries else None,
        "runs": [_short(name) for name in done],
        "failed": [{"name": _short(n), "reason": ended[n].reason} for n in names if n in ended and n not in measured],
        "metrics": metrics,
        "fallbacks": fallbacks(run),
        "recipe": plan.recipe(row.entry),
        "overrides": plan.overrides(row.entry),
    }


def write_curves(folder: Path, summary: dict[str, Any]) -> Iterator[Path]:
    """Write ``curves/<entry>.json`` for each entry with two seeds or more, as reports draw them beneath other runs."""
    (folder / "curves").mkdir(exist_ok=True)
    for row in summary["rows"]:
        if row["budget"] == SAMPLES and row["fraction"] == 1 and len(row["runs"]) > 1:
            path = folder / "curves" / f"{row['entry']}.json"  # ablations share a label
            write_json(path, reference_of([read_folder(folder / "runs" / name) for name in row["runs"]]))
            yield path


def _short(name: str) -> str:
    return name.rpartition("/")[2]
