"""Sweeps without runs: a plan, a search that is driven as Tune drives it, folders of trials that never ran."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from ray.tune.search import Searcher
from ray.tune.utils import flatten_dict

from simla_ray.config.sweep import Plan, load_sweep
from simla_ray.orchestration.study import Search
from simla_ray.orchestration.trials import FINISHED

PSL, ITM = "objectives.psl.weight", "objectives.itm.weight"
STEPS = 90
FILE = f"""
size: tiny
name: tuned
optim: {{max_steps: {STEPS}, warmup_steps: 10}}
eval: {{every_steps: 10}}
sweep:
  trials: 6
  seeds: 2
  grace: 0.1
  space:
    {PSL}: {{log: [2, 100]}}
    {ITM}: {{uniform: [1, 9]}}
"""


def plan_of(folder: Path, *overrides: str) -> Plan:
    plan = _loaded(folder.parent, overrides)
    return replace(plan, base=plan.base.model_copy(update={"storage": folder}))


@cache
def _loaded(folder: Path, overrides: tuple[str, ...]) -> Plan:
    file = folder / "sweep.yaml"
    file.write_text(FILE)
    return load_sweep([file], overrides)


def search_of(
    plan: Plan, storage: optuna.storages.BaseStorage | None = None, owner: str = "here", study: str = "tuned"
) -> Search:
    def run_of(name: str, params: dict[str, Any]):
        return plan.run(params, {"name": f"tuned/trials/{name}"})

    return Search(plan, storage or optuna.storages.InMemoryStorage(), study, owner, run_of, STEPS)


class Driven:
    """A search, asked and told by names of trials as Tune does it: results are flat, ids are Tune's own."""

    def __init__(self, search: Search):
        self.search, self.ids, self.asked = search, {}, 0

    def ask(self) -> tuple[str, dict[str, Any]] | None:
        """Name and params of the next trial's run; None where there are no more."""
        self.asked += 1
        config = self.search.suggest(f"id{self.asked}")
        if config == Searcher.FINISHED:
            return None
        name = config["trial"]["run"]["name"].rpartition("/")[2]
        self.ids[name] = f"id{self.asked}"
        objectives = config["trial"]["run"]["objectives"]
        return name, {PSL: objectives["psl"]["weight"], ITM: objectives["itm"]["weight"]}

    def report(self, name: str, step: int, value: float) -> None:
        self.search.on_trial_result(self.ids[name], {"step": step, "retrieval_r10": value})

    def end(self, name: str, status: str | None = FINISHED, value: float | None = None, **more: Any) -> None:
        """``status`` None: stopped by the scheduler, which alone was told the last result."""
        result = {"step": STEPS, "metrics": {"retrieval_r10": value}, **more}
        result |= {} if status is None else {"status": status}
        result |= {} if value is None else {"retrieval_r10": value}
        self.search.on_trial_complete(self.ids[name], flatten_dict(result))

    def lose(self, name: str) -> None:
        """The driver of the trial was lost."""
        self.search.on_trial_complete(self.ids[name], error=True)


def write_run(folder: Path, evaluation: dict[str, Any], **more: Any) -> None:
    """A folder of a run that has ended."""
    folder.mkdir(parents=True)
    summary = {"best_step": STEPS, "steps": STEPS, "seconds": 10.0, "pairs_per_s": 100.0, "eval": evaluation}
    (folder / "summary.json").write_text(json.dumps(summary | more))
