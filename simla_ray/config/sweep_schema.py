"""Every key of the section ``sweep``, as a frozen pydantic model like those of a run."""

from __future__ import annotations

import os
from urllib.parse import parse_qs, urlsplit

from pydantic import model_validator

from simla_ray.config.feasible import path_problems
from simla_ray.config.load import did_you_mean
from simla_ray.config.rules import VALIDATION_METRICS
from simla_ray.config.schema import Section, identity, operational
from simla_ray.config.space import Parameter, order_problems

#: Stands in for ``sweep.storage`` where that is null, so that passwords need not be in files.
STORAGE_VARIABLE = "SIMLA_RAY_SWEEP_STORAGE"


#: Metric of the final evaluation that a front can be of -> the objective it needs; None: it is the rows that it needs.
FINAL_METRICS: dict[str, str | None] = {
    **{
        f"retrieval/{ranker}{fits}/{direction}_r{k}": ranker
        for ranker in ("itc", "itm")
        for fits in ("", "_satisfied")
        for direction in ("t2i", "i2t")
        for k in (1, 5, 10)
    },
    **dict.fromkeys(("match/auc_random", "match/auc_hard")),
    **dict.fromkeys(("grounding/pointing", "grounding/box_accuracy", "grounding/candidate_accuracy"), "itm"),
    **dict.fromkeys(("keywords/ap", "keywords/precision", "keywords/recall", "keywords/selected_precision"), "psl"),
    **dict.fromkeys(("words/color_right", "words/mlm_accuracy"), "mlm"),
    "words/mim_accuracy": "mim",
    **dict.fromkeys(
        ("classification/accuracy", "classification/class_accuracy", "vqa/accuracy", "statements/accuracy")
    ),
    **{f"ratings/{ranker}/{rank}": ranker for ranker in ("itc", "itm") for rank in ("spearman", "kendall")},
}


class Sweep(Section):
    """Identity: what another value makes another study. Operational keys may change when a sweep goes on."""

    trials: int = operational(8, "trials in all, those of earlier starts of the sweep included", ge=1)
    metrics: list[str] = identity(
        ["retrieval_r10"],
        "one validation metric, by which trials are stopped early, or two of the final evaluation "
        "(task/metric): their Pareto front, no trial stopped; higher is better",
        min_length=1,
        max_length=2,
    )
    reduction: float = identity(3.0, "one in so many trials goes on at each rung (ASHA)", gt=1)
    grace: float | None = identity(
        None,
        "fraction of the run before which no trial is stopped; null: when every objective is on and no alpha ramps",
        gt=0,
        le=1,
    )
    seeds: int = operational(3, "fresh seeds that the best trial and the base are trained again with; 0: none", ge=0)
    concurrent: int | None = operational(None, "trials at a time; null: as many as the cluster holds", ge=1)
    timeout_s: float | None = operational(None, "a trial that takes longer is given up; null: none is", gt=0)
    storage: str | None = operational(
        None,
        "where the study is kept, shared between clusters: an Optuna URL (postgresql://..., sqlite:///...) or the "
        f"path of a journal; null: {STORAGE_VARIABLE} if set, else a journal in the sweep's folder",
        min_length=1,
    )
    study: str | None = operational(None, "name of the study in the storage; null: the sweep's", min_length=1)
    trunk_steps: int = identity(
        0, "trials go on from one checkpoint of the base after so many steps, and what follows is swept; 0: none", ge=0
    )
    seed: int = identity(0, "seed of the search", ge=0)
    space: dict[str, Parameter] = identity(..., "what is swept: {path of a run's key: parameter}", min_length=1)

    @property
    def pareto(self) -> bool:
        return len(self.metrics) > 1

    @model_validator(mode="after")
    def _rules(self) -> Sweep:
        problems = [f"space.{line}" for line in order_problems(self.space)]
        problems += [f"space.{line}" for line in path_problems(self.space, self.trunk_steps > 0)]
        if len(set(self.metrics)) < len(self.metrics):
            problems.append(f"metrics: {self.metrics[0]} stands twice")
        for metric in self.metrics:
            allowed = [name for name, objective in VALIDATION_METRICS.items() if objective is not None]
            if self.pareto and metric not in FINAL_METRICS:
                problems.append(
                    f"metrics: {metric} is no metric of the final evaluation, like retrieval/itc/t2i_r10 or keywords/ap"
                    f"{did_you_mean(metric, list(FINAL_METRICS))}"
                )
            elif not self.pareto and metric not in allowed:
                problems.append(
                    f"metrics: {metric} is not one of {', '.join(allowed)}{did_you_mean(metric, allowed)}; "
                    "trials are stopped by it, so it must be a validation metric"
                )
        if self.storage is not None and _has_password(self.storage):
            problems.append(f"storage: holds a password; put the URL into the environment variable {STORAGE_VARIABLE}")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def needs_of(sweep: Sweep) -> dict[str, str]:
    """Metric -> the objective without which no trial has it; of metrics that need one."""
    needed = {metric: (FINAL_METRICS if sweep.pareto else VALIDATION_METRICS)[metric] for metric in sweep.metrics}
    return {metric: objective for metric, objective in needed.items() if objective is not None}


def storage_of(sweep: Sweep) -> str | None:
    """Where the study is kept; None: in the sweep's folder."""
    return sweep.storage if sweep.storage is not None else os.environ.get(STORAGE_VARIABLE) or None


def _has_password(storage: str) -> bool:
    try:
        url = urlsplit(storage)
    except ValueError:
        return False
    return url.password is not None or any("pass" in name.lower() for name in parse_qs(url.query))
