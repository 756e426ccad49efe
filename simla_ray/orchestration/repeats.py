"""The best trial of a sweep beside its base, both with seeds that the search never saw, on the test set."""

from __future__ import annotations

from typing import Any

from simla_ray.config.sweep import Plan
from simla_ray.evaluation.paired import PerImage, read_per_image
from simla_ray.orchestration.preflight import with_absolute_paths
from simla_ray.orchestration.runs import run_folder
from simla_ray.orchestration.series import Progress, Series, differences
from simla_ray.orchestration.study import Seen

#: What a validation metric is on the test set.
TEST_OF = {"retrieval_r10": "retrieval/itc/t2i_r10", "keyword_ap": "keywords/ap", "mlm_accuracy": "words/mlm_accuracy"}
#: Metrics of which the difference is told, as far as there are values, behind those that trials were chosen by.
TOLD = (
    "retrieval/itc/t2i_r10",
    "retrieval/itc/i2t_r10",
    "retrieval/itm/t2i_r10",
    "retrieval/itm/i2t_r10",
    "match/auc_random",
    "keywords/ap",
    "grounding/pointing",
    "words/color_right",
    "words/mlm_accuracy",
)


def run_repeats(plan: Plan, series: Series, progress: Progress, rival: Seen | None) -> dict[str, Any]:
    """Train both sides with every fresh seed; those that have ended are not trained again.

    Args:
        rival: the trial beside the base: the best one, or where the base won the best of the others; None: there is
            only the base.

    Returns:
        ``repeats`` of the sweep's summary.
    """
    seeds = [plan.base.seed + 1 + i for i in range(plan.sweep.seeds)]
    sides: dict[str, dict[str, Any]] = {"default": {}} if rival is None else {"best": rival.params, "default": {}}
    # By the trial's own name: of a sweep that has become larger another one may be the best.
    called = {"best": rival.name if rival is not None else "", "default": "default"}
    runs = {
        (side, seed): with_absolute_paths(
            plan.run(params, {"name": series.name_of("repeats", f"{called[side]}-seed{seed}"), "seed": seed})
        )
        for seed in seeds
        for side, params in sides.items()
    }
    said = "the base" if rival is None else f"{rival.name} and the base"
    series.say(f"repeat     {said} with seeds {', '.join(map(str, seeds))}, evaluated on the test set")
    ended = series.run_all([(run, series.steps) for run in runs.values()], progress)
    told = list(dict.fromkeys([*(TEST_OF.get(metric, metric) for metric in plan.sweep.metrics), *TOLD]))
    found: dict[str, Any] = {"seeds": seeds, "trial": rival and rival.name, "best": [], "default": [], "failed": []}
    measured: dict[tuple[str, int], PerImage] = {}
    for (side, seed), run in runs.items():
        outcome, name = ended[str(run.name)], run_folder(run).name
        if outcome.summary is None:
            found["failed"].append({"name": name, "reason": outcome.reason})
            continue
        measured[side, seed] = each = read_per_image(run_folder(run))
        metrics = {metric: each.metrics[metric] for metric in told if metric in each.metrics}
        found[side].append({"seed": seed, "name": name, "metrics": metrics})
    both = [seed for seed in seeds if {("best", seed), ("default", seed)} <= set(measured)]
    ours, base = [measured["best", seed] for seed in both], [measured["default", seed] for seed in both]
    return found | {"differences": differences(ours, base, told) if both else []}
