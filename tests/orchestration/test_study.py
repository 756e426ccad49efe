"""The trials of a sweep in a storage: asked for, told, gone on with, shared."""

import math

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from simla_ray.config.sweep_schema import STORAGE_VARIABLE
from simla_ray.errors import UserError
from simla_ray.orchestration.study import front, importance, open_storage, seen
from simla_ray.orchestration.trials import FAILED, TIMED_OUT
from tests.orchestration.sweeps import ITM, PSL, STEPS, Driven, plan_of, search_of


@pytest.fixture(params=["memory", "journal"])
def storage(request, tmp_path):
    """Opens the same storage, as each start of a sweep does."""
    if request.param == "memory":
        kept = optuna.storages.InMemoryStorage()
        return lambda: kept
    return lambda: open_storage(plan_of(tmp_path), tmp_path)


def states(search):
    return [t.state for t in search.study.get_trials()]


def test_the_base_goes_first_and_the_trials_have_an_end(tmp_path):
    plan = plan_of(tmp_path, "sweep.trials=3")
    driven = Driven(search_of(plan))
    first = driven.ask()
    assert first == ("trial-000", {PSL: 20.0, ITM: 3.0}) == ("trial-000", plan.default_params()[0])
    second, third = driven.ask(), driven.ask()
    assert (second[0], third[0]) == ("trial-001", "trial-002") and second[1] != third[1] != first[1]
    assert driven.ask() is None and driven.ask() is None
    told = seen(driven.search.study, "here")
    assert [t.default for t in told] == [True, False, False] and [t.status for t in told] == ["running"] * 3
    assert told[1].params == second[1]


def test_a_base_outside_the_space_is_no_trial(tmp_path):
    driven = Driven(search_of(plan_of(tmp_path, "objectives.psl.weight=1")))
    assert 2 <= driven.ask()[1][PSL] <= 100
    assert not any(t.default for t in seen(driven.search.study, "here"))


def test_optuna_is_told_how_each_trial_ended(tmp_path, storage):
    driven = Driven(search_of(plan_of(tmp_path, "sweep.trials=7"), storage()))
    names = [driven.ask()[0] for _ in range(7)]
    for name in names[:2]:
        driven.report(name, 10, 0.25)
        driven.report(name, 10, 0.5)  # a run that is started again tells what it told
        driven.report(name, 20, math.nan)
    driven.end(names[0], value=0.4)
    driven.end(names[1], None, 0.125, step=30)
    driven.end(names[2], FAILED, reason="ValueError: boom", step=4)
    driven.end(names[3], TIMED_OUT, reason="not done after 60 s", step=50)
    driven.end(names[4], value=math.nan)
    driven.end(names[5])  # its best checkpoint was evaluated without a number
    driven.lose(names[6])
    assert states(driven.search) == [TrialState.COMPLETE, TrialState.PRUNED] + [TrialState.FAIL] * 5
    kept = driven.search.study.get_trials()
    assert kept[0].intermediate_values == {10: 0.25} and kept[0].values == [0.4]
    assert kept[1].intermediate_values == {10: 0.25, 30: 0.125}  # what it was stopped for stays known
    no_number = "retrieval_r10 gave no number"
    assert [(t.status, t.reason, t.values, t.step) for t in seen(driven.search.study, "here")] == [
        ("finished", None, [0.4], STEPS),
        ("stopped", None, None, 30),
        ("failed", "ValueError: boom", None, 4),
        ("timed_out", "not done after 60 s", None, 50),
        ("failed", no_number, None, STEPS),
        ("failed", no_number, None, STEPS),
        ("failed", "the process of its driver was lost", None, 0),
    ]


def test_a_trial_is_told_once(tmp_path):
    driven = Driven(search_of(plan_of(tmp_path)))
    name = driven.ask()[0]
    driven.end(name, value=0.4)
    driven.lose(name)
    assert [t.status for t in seen(driven.search.study, "here")] == ["finished"]


def test_going_on_hands_out_what_was_running_and_repeats_nothing(tmp_path, storage):
    plan = plan_of(tmp_path, "sweep.trials=5")
    killed = Driven(search_of(plan, storage()))
    begun = [killed.ask() for _ in range(4)]
    killed.end(begun[0][0], value=0.5)
    killed.end(begun[2][0], None, 0.1, step=10)
    again = Driven(search_of(plan, storage()))
    assert again.search.left == 3
    assert [again.ask(), again.ask()] == [begun[1], begun[3]]  # names and params of what was interrupted
    new = again.ask()
    assert new[0] == "trial-004" and new[1] not in [params for _, params in begun]
    assert again.ask() is None
    for name, value in ((begun[1][0], 0.3), (begun[3][0], 0.4), (new[0], 0.6)):
        again.end(name, value=value)
    last = search_of(plan, storage())
    assert last.left == 0 and last.interrupted == [] and last.suggest("x") == last.FINISHED
    assert [t.number for t in seen(last.study, "here")] == list(range(5))
    more = search_of(plan_of(tmp_path, "sweep.trials=7"), storage())
    assert more.left == 2
    fewer = search_of(plan_of(tmp_path, "sweep.trials=2"), storage())
    assert fewer.left == 0


def test_the_base_that_never_ran_is_still_the_first_to_run(tmp_path, storage):
    search_of(plan_of(tmp_path), storage())  # killed before the first trial was asked for
    driven = Driven(search_of(plan_of(tmp_path), storage()))
    assert driven.ask()[1] == {PSL: 20.0, ITM: 3.0}
    assert driven.ask()[0] == "trial-001"


def play(driven: Driven, n: int, good: float = 2.0) -> list[dict]:
    """Run trials that are the better, the nearer the weight of ITM is to what is good."""
    params = []
    for _ in range(n):
        name, found = driven.ask()
        driven.end(name, value=1.0 - abs(found[ITM] - good) / 10)
        params.append(found)
    return params


def test_another_sweep_proposes_from_what_the_first_has_seen(tmp_path):
    plan = plan_of(tmp_path, "sweep.trials=9")
    told = {}
    for good in (2.0, 8.0):
        kept = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / f"{good}.journal")))
        first = play(Driven(search_of(plan, kept, "one")), 9, good)
        second = Driven(search_of(plan, kept, "two"))
        assert second.search.left == 9  # trials of its own
        told[good] = play(second, 9, good)
        assert [t.status for t in seen(second.search.study, "two")] == ["elsewhere"] * 9 + ["finished"] * 9
        assert [t.status for t in seen(second.search.study, "one")] == ["finished"] * 9 + ["elsewhere"] * 9
        assert not [params for params in told[good] if params in first]
    alone = play(Driven(search_of(plan)), 9)
    assert told[2.0] != alone != told[8.0]
    weights = {good: sum(params[ITM] for params in found) / 9 for good, found in told.items()}
    assert weights[2.0] + 2 < weights[8.0], weights  # from the same seed


def test_what_two_sweeps_interrupt_stays_their_own(tmp_path, storage):
    plan = plan_of(tmp_path)
    one, two = Driven(search_of(plan, storage(), "one")), Driven(search_of(plan, storage(), "two"))
    begun = one.ask(), two.ask()
    assert Driven(search_of(plan, storage(), "two")).ask() == begun[1]
    assert Driven(search_of(plan, storage(), "one")).ask() == begun[0]


def pareto(tmp_path, *overrides):
    metrics = "sweep.metrics=[retrieval/itc/t2i_r10, keywords/ap]"
    return plan_of(tmp_path, metrics, "objectives.psl.weight=30", *overrides)


def test_two_metrics_are_those_of_the_evaluation(tmp_path):
    driven = Driven(search_of(pareto(tmp_path)))
    values = [(0.5, 0.2), (0.4, 0.3), (0.3, 0.1), (0.5, None)]
    names = [driven.ask()[0] for _ in values]
    for name, (retrieval, ap) in zip(names, values, strict=True):
        driven.report(name, 10, 0.9)  # a validation: no trial of a front is told by it
        evaluation = {"retrieval": {"itc": {"t2i_r10": retrieval, "intervals": {"t2i_r10": [0, 1]}}}, "keywords": {}}
        if ap is not None:
            evaluation["keywords"]["ap"] = ap
        driven.end(name, value=0.9, summary={"eval": evaluation, "steps": STEPS})
    found = seen(driven.search.study, "here")
    assert [t.values for t in found] == [[0.5, 0.2], [0.4, 0.3], [0.3, 0.1], None]
    assert found[3].reason == "retrieval/itc/t2i_r10 and keywords/ap gave no number"
    assert front(driven.search.study) == names[:2]
    assert importance(driven.search.study) is None
    assert not any(t.intermediate_values for t in driven.search.study.get_trials())


def test_importance_is_of_what_decides():
    study = optuna.create_study(direction="maximize")
    ranges = {name: optuna.distributions.FloatDistribution(0, 8) for name in ("decides", "idle")}
    for i in range(40):
        params = {"decides": i % 8, "idle": i // 8}
        trial = optuna.create_trial(params=params, distributions=ranges, value=-abs(params["decides"] - 2))
        study.add_trial(trial)
        if i == 4:
            assert importance(study) is None  # too few
    shares = importance(study)
    assert set(shares) == {"decides", "idle"} and sum(shares.values()) == pytest.approx(1)
    assert shares["decides"] > 0.8


@pytest.mark.parametrize(
    "url", ["nosuch://me:hidden@host/studies", "postgresql://me:hidden@127.0.0.1:1/studies", "mysql://x:hidden@"]
)
def test_a_storage_that_cannot_be_opened_is_named_without_its_password(url, tmp_path, monkeypatch):
    monkeypatch.setenv(STORAGE_VARIABLE, url)
    with pytest.raises(UserError, match=r"^sweep\.storage: cannot be opened") as caught:
        open_storage(plan_of(tmp_path), tmp_path)
    assert "hidden" not in str(caught.value) and "\n" not in str(caught.value)


def test_where_the_study_is_kept(tmp_path, monkeypatch):
    Driven(search_of(plan_of(tmp_path), open_storage(plan_of(tmp_path), tmp_path / "a"))).ask()
    assert (tmp_path / "a" / "study.journal").stat().st_size > 0
    elsewhere = plan_of(tmp_path, f"sweep.storage={tmp_path}/deep/down.journal")
    Driven(search_of(elsewhere, open_storage(elsewhere, tmp_path / "b"))).ask()
    assert (tmp_path / "deep" / "down.journal").exists() and not (tmp_path / "b").exists()
    base = plan_of(tmp_path, f"sweep.storage=sqlite:///{tmp_path}/kept.db")
    Driven(search_of(base, open_storage(base, tmp_path))).ask()
    assert len(seen(search_of(base, open_storage(base, tmp_path)).study, "here")) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"sweep\.storage: .*down\.journal cannot be opened"):
        open_storage(plan_of(tmp_path, f"sweep.storage={tmp_path}/file/down.journal"), tmp_path)


def test_a_study_of_another_base_is_refused(tmp_path, storage):
    play(Driven(search_of(plan_of(tmp_path), storage(), "one")), 3)
    for other in ("optim.lr=0.001", "eval.pairs=20", "objectives.mim=null"):
        key = other.partition("=")[0] if "mim" not in other else "objectives"
        with pytest.raises(UserError, match=f"is of another base.*\\n{key}: the study's trials have "):
            search_of(plan_of(tmp_path, other), storage(), "two")
    elsewhere = search_of(plan_of(tmp_path, "data.val=[b.parquet]", "data.train=[c.parquet]"), storage(), "two")
    assert len(seen(elsewhere.study, "two")) == 3


@pytest.mark.parametrize(
    "other",
    ["sweep.space={objectives.psl.weight: {choice: [5, 20]}}", "sweep.metrics=[retrieval/itc/t2i_r10, keywords/ap]"],
)
def test_a_study_of_another_sweep_is_refused(other, tmp_path, storage):
    kept = storage()
    play(Driven(search_of(plan_of(tmp_path), kept, "one")), 3)
    with pytest.raises(UserError, match=r"sweep\.study"):
        search_of(plan_of(tmp_path, other), storage(), "two")
