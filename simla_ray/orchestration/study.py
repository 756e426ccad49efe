"""The trials of a sweep in an Optuna storage, from which a killed sweep goes on and several clusters propose.

An Optuna trial is told what it was: complete where it ran to its end, pruned where it was stopped before, failed where
it crashed, took too long or gave no number. What belongs to which sweep stands in its attributes.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import optuna.storages.journal
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from simla_ray.config.load import leaves_of
from simla_ray.config.schema import Run
from simla_ray.config.sweep import Plan
from simla_ray.config.sweep_schema import storage_of
from simla_ray.errors import UserError
from simla_ray.orchestration.trials import FAILED, FINISHED, STOPPED, TIMED_OUT, task_of
from simla_ray.report.reference import CURVES_TOO

#: Attributes of an Optuna trial: the sweep it belongs to, how it ended and why, is it the base itself.
SWEEP, STATUS, REASON, DEFAULT, STEP = "sweep", "status", "reason", "default", "step"
#: Random trials before the search models what it has seen, at most; of a small sweep a third of the trials.
STARTUP = 10
#: Trials below which nothing is said about the importance of parameters.
FEWEST_FOR_IMPORTANCE = 6
RUNNING, ELSEWHERE = "running", "elsewhere"
#: Keys that say where something lies, and what a sweep sets for its trials.
PLACES = ("name", "storage", "init_from", "data.train", "data.val", "data.test", "data.image_roots", "eval.best")


@dataclass(frozen=True)
class Seen:
    """A trial as the study knows it."""

    number: int
    params: dict[str, Any]
    status: str
    reason: str | None
    values: list[float] | None
    default: bool
    step: int
    seconds: float

    @property
    def name(self) -> str:
        return trial_name(self.number)


def trial_name(number: int) -> str:
    return f"trial-{number:03d}"


def open_storage(plan: Plan, folder: Path) -> optuna.storages.BaseStorage:
    """The storage that ``sweep.storage`` names: a database, or a journal file; else a journal in the sweep's folder.

    Raises:
        UserError: it cannot be opened.
    """
    where = storage_of(plan.sweep)
    if where is not None and "://" in where:
        try:
            return optuna.storages.RDBStorage(where)
        except Exception as error:  # a driver's own, by the database
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"sweep.storage: cannot be opened ({first})") from None
    path = Path(where) if where is not None else folder / "study.journal"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    except OSError as error:
        raise UserError(f"sweep.storage: {path} cannot be opened ({error.strerror})") from None


class Search(OptunaSearch):
    """Proposes what Optuna samples, first what an interrupted sweep had begun; tells it how each trial ended.

    Args:
        owner: what the trials of this sweep are marked with.
        run_of: trial's name and parameters -> its run.
        steps: of a trial that runs to its end.

    Raises:
        UserError: the study is of another space, other metrics or a longer run.
    """

    def __init__(
        self,
        plan: Plan,
        storage: optuna.storages.BaseStorage,
        study: str,
        owner: str,
        run_of: Callable[[str, dict[str, Any]], Run],
        steps: int,
    ):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", ExperimentalWarning)
        self.plan, self.owner, self.run_of, self.steps = plan, owner, run_of, steps
        known = _known(storage, study)
        metrics = plan.sweep.metrics
        many = len(metrics) > 1
        sampler = optuna.samplers.TPESampler(
            seed=plan.sweep.seed + 7919 * known,  # a sweep that goes on must not draw again what it began with
            n_startup_trials=max(2, min(STARTUP, plan.sweep.trials // 3)),
            multivariate=True,
            group=True,
            constant_liar=True,
        )
        super().__init__(
            plan.suggest,
            metric=list(metrics) if many else metrics[0],
            mode=["max"] * len(metrics) if many else "max",
            sampler=sampler,
            storage=storage,
            study_name=study,
        )
        self._check_study()
        first, _ = plan.default_params()
        if not known and first is not None:
            self.study.enqueue_trial(first, user_attrs={DEFAULT: True})
        trials = self.study.get_trials(deepcopy=False)
        self.interrupted = [t for t in trials if t.state is TrialState.RUNNING and t.user_attrs.get(SWEEP) == owner]
        done = sum(t.state.is_finished() and t.user_attrs.get(SWEEP) == owner for t in trials)
        #: Trials that this sweep still has to run, interrupted ones among them.
        self.left = max(len(self.interrupted), plan.sweep.trials - done)

    @property
    def study(self) -> optuna.Study:
        assert self._ot_study is not None
        return self._ot_study

    def _check_study(self) -> None:
        sweep = self.plan.sweep
        space = {path: parameter.to_dict() for path, parameter in sweep.space.items()}
        for key, ours in {"metrics": sweep.metrics, "space": space, "steps": self.steps}.items():
            theirs = self.study.user_attrs.get(key, ours)
            if key == "metrics" and len(self.study.directions) != len(sweep.metrics):  # made by somebody else
                theirs = f"{len(self.study.directions)} of them"
            if theirs != ours:
                raise UserError(
                    f"sweep.study: the study {self.study.study_name} in the storage has the {key} {theirs}, this sweep "
                    f"{ours}; name another"
                )
            self.study.set_user_attr(key, ours)
        ours = _base_of(self.plan)
        theirs = self.study.user_attrs.get("base", ours)
        changed = [path for path in ours if path in theirs and theirs[path] != ours[path]]  # a version may add keys
        if changed:
            lines = [f"{path}: the study's trials have {theirs[path]!r}, now {ours[path]!r}" for path in changed]
            raise UserError(
                f"sweep.study: the study {self.study.study_name} in the storage is of another base, and values of the "
                "two cannot be compared; name another, or undo:\n" + "\n".join(lines)
            )
        self.study.set_user_attr("base", ours)

    def suggest(self, trial_id: str) -> Any:
        if self.left <= 0:
            return Searcher.FINISHED
        self.left -= 1
        if self.interrupted:
            trial = optuna.trial.Trial(self.study, self.interrupted.pop(0)._trial_id)
        else:
            trial = self.study.ask()
            trial.set_user_attr(SWEEP, self.owner)
        self._ot_trials[trial_id] = trial
        run = self.run_of(trial_name(trial.number), self.plan.suggest(trial))
        return {"trial": task_of(run, self.steps)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        value = result.get(self.metric) if isinstance(self.metric, str) else None
        trial = self._ot_trials[trial_id]
        known = trial.study._storage.get_trial(trial._trial_id).intermediate_values
        if value is not None and math.isfinite(value) and result["step"] not in known:
            trial.report(value, result["step"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id in self._completed_trials:
            return
        self._completed_trials.add(trial_id)
        trial, result = self._ot_trials[trial_id], result or {}
        status, reason = result.get("status", STOPPED), result.get("reason")
        if result and status == STOPPED:  # Tune told the scheduler alone what made it stop the trial
            self.on_trial_result(trial_id, result)
        if error:
            status, reason = FAILED, "the process of its driver was lost"
        values = self._values(result) if status == FINISHED else None
        if status == FINISHED and (values is None or not all(map(math.isfinite, values))):
            status, reason = FAILED, f"{' and '.join(self.plan.sweep.metrics)} gave no number"
        trial.set_user_attr(STATUS, status)
        trial.set_user_attr(REASON, reason)
        trial.set_user_attr(STEP, result.get("step", 0))
        states = {FINISHED: TrialState.COMPLETE, STOPPED: TrialState.PRUNED}
        self.study.tell(
            trial,
            values if status == FINISHED else None,
            state=states.get(status, TrialState.FAIL),
            skip_if_finished=True,
        )

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what lasts is in the storage. Tune wants to see a file."""
        Path(checkpoint_path).touch()

    def _values(self, result: dict[str, Any]) -> list[float] | None:
        """Of one metric the validation's, at the step that was evaluated; of two those of the evaluation.

        Tune hands results over flat: ``summary["eval"]["keywords"]["ap"]`` is ``summary/eval/keywords/ap``.
        """
        metrics = self.plan.sweep.metrics
        keys = metrics if len(metrics) == 1 else [f"summary/eval/{metric}" for metric in metrics]
        found = [result.get(key) for key in keys]
        numbers = [float(v) for v in found if isinstance(v, int | float) and not isinstance(v, bool)]
        return numbers if len(numbers) == len(keys) else None


def _base_of(plan: Plan) -> dict[str, Any]:
    """Keys of the base on which a trial's value hangs beside its params, as JSON gives them back.

    Without where files lie, which differs between clusters.
    """
    operational = leaves_of(plan.base, "operational")
    leaves = leaves_of(plan.base, "identity") | {path: operational[path] for path in CURVES_TOO}
    kept = {path: leaves[path] for path in leaves if path not in plan.sweep.space and not path.startswith(PLACES)}
    return json.loads(json.dumps(kept | {"objectives": list(plan.base.objectives.active())}))


def seen(study: optuna.Study, owner: str) -> list[Seen]:
    """Every trial of the study that has begun, once, by number; those of other sweeps are elsewhere."""
    return [_seen(trial, owner) for trial in study.get_trials(deepcopy=False) if trial.state is not TrialState.WAITING]


def _seen(trial: FrozenTrial, owner: str) -> Seen:
    status = trial.user_attrs.get(STATUS, RUNNING)
    if trial.user_attrs.get(SWEEP) != owner:
        status = ELSEWHERE
    took = (trial.datetime_complete - trial.datetime_start).total_seconds() if trial.datetime_complete else 0.0  # type: ignore[operator]
    return Seen(
        trial.number,
        dict(trial.params),
        status,
        trial.user_attrs.get(REASON),
        list(trial.values) if trial.state is TrialState.COMPLETE else None,
        bool(trial.user_attrs.get(DEFAULT)),
        int(trial.user_attrs.get(STEP, 0)),
        took,
    )


def importance(study: optuna.Study) -> dict[str, float] | None:
    """Share of each parameter in what separates good trials from all (PED-ANOVA, Watanabe et al. 2023).

    Of one metric; None where too few trials ran to their end, or all have the same parameters.
    """
    complete = [t for t in study.get_trials(deepcopy=False) if t.state is TrialState.COMPLETE]
    if len(complete) < FEWEST_FOR_IMPORTANCE or len(study.directions) > 1:
        return None
    try:
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
        )
    except (ValueError, RuntimeError):
        return None
    return {path: float(share) for path, share in found.items()}


def front(study: optuna.Study) -> Sequence[str]:
    """Names of the study's trials, whoever ran them, that no other one beats in both metrics."""
    if len(study.directions) < 2:
        return []
    return [trial_name(t.number) for t in study.best_trials]


def _known(storage: optuna.storages.BaseStorage, study: str) -> int:
    """Trials that the study has already; 0 where there is none of that name."""
    for summary in optuna.study.get_all_study_summaries(storage):
        if summary.study_name == study:
            return summary.n_trials
    return 0


__all__ = ["ELSEWHERE", "RUNNING", "TIMED_OUT", "Search", "Seen", "front", "importance", "open_storage"]
