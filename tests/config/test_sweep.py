"""A sweep file -> a checked plan: what trials draw and run, what is refused, what can be read back."""

import pickle
import random

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from simla_ray.config.load import load_run, to_dict
from simla_ray.config.sweep import best_yaml, grace_of, load_sweep, to_yaml
from simla_ray.config.sweep_schema import STORAGE_VARIABLE, Sweep, storage_of
from simla_ray.errors import UserError

PSL = "objectives.psl."
SMALL = "size: tiny\nsweep:\n  space:\n    objectives.psl.weight: {log: [2, 100]}\n"


def error_of(overrides=(), files=()):
    with pytest.raises(UserError) as caught:
        load_sweep(files, overrides)
    return str(caught.value)


@pytest.fixture
def small(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    return file


@pytest.fixture(scope="module")
def default():
    return load_sweep()


class Drawn:
    """A trial that draws at random."""

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def suggest_float(self, name, low, high, *, log=False):
        return self.rng.uniform(low, high)

    def suggest_int(self, name, low, high):
        return self.rng.randint(low, high)

    def suggest_categorical(self, name, choices):
        return self.rng.choice(choices)


def test_the_default_sweep_is_small_enough_for_two_cores(default):
    sweep, base = default.sweep, default.base
    assert (sweep.trials, sweep.metrics, sweep.seeds, sweep.pareto) == (8, ["retrieval_r10"], 3, False)
    assert (base.optim.max_steps, base.optim.warmup_steps, base.ray.workers) == (100, 30, 1)
    assert (base.batch.global_, base.batch.micro) == (32, 32)
    names = "weight heads_top_k max_keywords min_attention recommend recommend_threshold soft_alpha start_step"
    assert set(sweep.space) >= {PSL + name for name in names.split()}
    assert sweep.space[f"{PSL}recommend"].choice == ["soft", "hard", "off"]
    rung = default.grace() * 100
    assert 0 < rung < 100 and rung % base.eval.every_steps == 0  # trials are judged where they are measured


def test_every_draw_is_a_run(default):
    for seed in range(20):
        params = default.suggest(Drawn(seed))
        run = default.run(params)
        assert run.objectives.psl.weight == params[f"{PSL}weight"]
        assert str(run.objectives.psl.recommend) == params[f"{PSL}recommend"]


def test_the_base_itself_is_a_trial(default):
    params, why = default.default_params()
    assert why is None and default.run(params) == default.base
    assert params[f"{PSL}recommend"] == "soft" and f"{PSL}recommend_threshold" not in params


def test_a_base_outside_the_space_says_where(small):
    params, why = load_sweep([small], ["objectives.psl.weight=1"]).default_params()
    assert params is None and why == "objectives.psl.weight: 1.0 of the base is not in {'log': [2.0, 100.0]}"
    params, why = load_sweep([small], ["objectives.psl=null"]).default_params()
    assert params is None and why.startswith("objectives.psl.weight: no value of the base")


def test_what_lies_over_the_params_wins(small):
    run = load_sweep([small]).run({f"{PSL}weight": 5}, {"name": "trial-000", "data.test": ["world:val"], "seed": 3})
    assert (run.objectives.psl.weight, run.name, run.data.test, run.seed) == (5.0, "trial-000", ["world:val"], 3)
    with pytest.raises(UserError, match=r"objectives\.psl\.weight"):
        load_sweep([small]).run({f"{PSL}weight": -1})


def test_a_plan_travels(default):
    assert pickle.loads(pickle.dumps(default)) == default


def test_files_then_overrides(small, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(
        "optim: {lr: 0.002}\nsweep: {trials: 5, space: {objectives: {psl: {start_step: {int: [0, 9]}}}}}\n"
    )
    plan = load_sweep([small, other], ["sweep.trials=20", "seed=3", "sweep.space.objectives.psl.weight.uniform=[1,2]"])
    assert (plan.sweep.trials, plan.base.seed, plan.base.optim.lr) == (20, 3, 0.002)
    assert {path: p.to_dict() for path, p in plan.sweep.space.items()} == {
        f"{PSL}weight": {"uniform": [1.0, 2.0]},
        f"{PSL}start_step": {"int": [0, 9]},
    }
    fewer = load_sweep([small, other], ["sweep.space={objectives.psl.weight: null}"])
    assert list(fewer.sweep.space) == [f"{PSL}start_step"]
    assert "sweep.space.optim.lr" in error_of(["sweep.space.optim.lr=null"], [small])


@pytest.mark.parametrize("off", ["off", "'off'", "false"])
def test_off_is_a_word_in_a_space_too(off, small):
    space = (
        f"{{objectives.psl.recommend: {{choice: [soft, {off}]}}, "
        f"objectives.psl.soft_alpha: {{uniform: [0, 1], when: {{objectives.psl.recommend: {off}}}}}}}"
    )
    plan = load_sweep([small], [f"sweep.space={space}"])
    assert plan.sweep.space[f"{PSL}recommend"].choice == ["soft", "off"]
    assert plan.sweep.space[f"{PSL}soft_alpha"].when == {f"{PSL}recommend": ["off"]}


def test_choices_that_are_one_value_are_refused(small):
    said = error_of(["sweep.space={objectives.psl.recommend: {choice: [off, 'off']}}"], [small])
    assert said == "sweep.space.objectives.psl.recommend.choice: off stands twice"


def test_all_mistakes_come_at_once(small):
    lines = error_of(
        [
            "sweep.trails=3",
            "sweep.reduction=1",
            "sweep.space.objectives.psl.wieght.log=[1,2]",
            "sweep.space.objectives.itm.weight.unifrom=[1,2]",
            "optim.lrr=1",
            "size=tinny",
        ],
        [small],
    ).splitlines()
    assert "sweep.trails: unknown key; did you mean sweep.trials?" in lines
    assert any(line.startswith("sweep.reduction: ") and "1" in line for line in lines)
    unknown = "sweep.space.objectives.itm.weight.unifrom: unknown key"
    assert f"{unknown}; did you mean sweep.space.objectives.itm.weight.uniform?" in lines
    assert "optim.lrr: unknown key; did you mean optim.lr?" in lines
    assert any(line.startswith("size: tinny") for line in lines)


def test_mistakes_between_keys_of_a_sweep_come_at_once(small):
    lines = error_of(
        [
            "sweep.metrics=[retrieval_r1]",
            "sweep.space.objectives.psl.wieght.log=[1,2]",
            "sweep.space.optim.lr={log: [1e-4, 1.0e-2], when: {objectives.psl.weight: 3}}",
            "sweep.storage=postgresql://me:secret@host/db",
        ],
        [small],
    ).splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        "sweep.space.optim.lr.when.objectives.psl.weight",
        "sweep.space.objectives.psl.wieght",
        "sweep.metrics",
        "sweep.storage",
    ]
    assert "did you mean objectives.psl.weight?" in lines[1] and "did you mean retrieval_r10?" in lines[2]
    assert STORAGE_VARIABLE in lines[3] and "secret" not in lines[3]


def test_a_file_without_a_sweep(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("size: tiny\n")
    assert error_of(files=[file]).startswith("sweep: missing")
    assert error_of(["sweep.trials=3"], [file]) == "sweep.space: missing"
    file.write_text("sweep: 3\n")
    assert error_of(files=[file]) == "sweep: expected keys and values, found 3"
    for space in ("3", "[1]", "{}", "{optim.lr: 3}", "{3: {log: [1, 2]}}"):
        file.write_text(f"sweep: {{space: {space}}}\n")
        assert error_of(files=[file]).startswith("sweep.space")


def test_an_impossible_value_is_refused_with_its_path_and_reason(small):
    said = error_of(["sweep.space.objectives.psl.recommend={choice: [soft, hard]}"], [small])
    assert said == (
        "sweep.space.objectives.psl.recommend: hard cannot be run "
        "(objectives.psl.recommend: hard needs recommend_threshold > 0 or recommend_top_k)"
    )
    said = error_of(["sweep.space={objectives.mlm.p: {uniform: [0.1, 1.0]}, text.heads: {choice: [2, 3]}}"], [small])
    assert [line.split(" cannot")[0] for line in said.splitlines()] == [
        "sweep.space.objectives.mlm.p: 1",
        "sweep.space.text.heads: 3",
    ]
    said = error_of(["sweep.space.text.heads.uniform=[2,4]"], [small])  # its ends are whole, what lies between is not
    assert said.startswith("sweep.space.text.heads: ") and "valid integer" in said


def test_an_impossible_combination_is_refused(small):
    space = "{optim.lr: {log: [1e-6, 1.0e-2]}, optim.min_lr: {choice: [1.0e-7, 1.0e-4]}}"
    (line,) = error_of([f"sweep.space={space}", "optim.min_lr=1e-7"], [small]).splitlines()
    assert line.startswith("sweep.space.optim.min_lr: 0.0001 with optim.lr=1e-06 cannot be run (optim.min_lr: 0.0001")


def test_the_metric_must_be_there_in_every_trial(small):
    said = error_of(["sweep.metrics=[mim_accuracy]", "objectives.mim=null"], [small])
    assert said == "sweep.metrics: mim_accuracy needs objectives.mim"
    said = error_of(["sweep.metrics=[mim_accuracy]", "sweep.space.objectives.mim.weight={choice: [0, 1]}"], [small])
    assert said.startswith("sweep.space.objectives.mim.weight: 0 cannot be run (sweep.metrics: mim_accuracy needs")
    assert "last is not one of retrieval_r10" in error_of(["sweep.metrics=[last]"], [small])


def test_two_metrics_are_a_front_of_the_final_evaluation(small):
    assert load_sweep([small], ["sweep.metrics=[retrieval/itc/t2i_r10, keywords/ap]"]).sweep.pareto
    assert "final evaluation" in error_of(["sweep.metrics=[retrieval_r10, keywords/ap]"], [small])
    assert "stands twice" in error_of(["sweep.metrics=[keywords/ap, keywords/ap]"], [small])
    said = error_of(["sweep.metrics=[retrieval/itc/t2i_r10, keywords/precison]"], [small])
    assert "did you mean keywords/precision?" in said
    both = "sweep.metrics=[retrieval/itc/t2i_r10, words/mim_accuracy]"
    assert error_of([both, "objectives.mim=null"], [small]) == "sweep.metrics: words/mim_accuracy needs objectives.mim"
    assert error_of(["sweep.metrics=[a/b, c/d, e/f]"], [small]).startswith("sweep.metrics: ")
    assert error_of(["sweep.metrics=[]"], [small]).startswith("sweep.metrics: ")


def test_trials_of_a_trunk_have_its_heads_and_its_architecture(small):
    plan = load_sweep([small], ["sweep.trunk_steps=100"])
    assert plan.sweep.trunk_steps == 100
    assert "text.dropout: cannot differ" in error_of(
        ["sweep.trunk_steps=100", "sweep.space.text.dropout.uniform=[0,0.1]"], [small]
    )
    said = error_of(["sweep.trunk_steps=100", "sweep.space.objectives.mim.weight.choice=[0,1]"], [small])
    assert said.startswith("sweep.space.objectives.mim.weight: 0 cannot be run (objectives.mim: on in")
    assert error_of(["sweep.trunk_steps=1000"], [small]) == (
        "sweep.trunk_steps: 1000 is not less than optim.max_steps=1000"
    )
    assert error_of(["sweep.trunk_steps=10", "optim.max_steps=null"], [small]).startswith("optim.max_steps: missing")


def grace(**overrides):
    schedule = {"schedule.kind": "joint", "schedule.phases": []}
    off = {f"objectives.{name}.soft_alpha": 0 for name in ("itc", "mlm", "mim", "psl")}
    return grace_of(load_run(overrides={**schedule, **off, **{k.replace("__", "."): v for k, v in overrides.items()}}))


def test_grace_by_hand():
    phases = [{"until": 0.3, "objectives": ["itc", "psl"]}, {"until": 0.6, "objectives": ["itc", "itm", "mlm"]}]
    phases.append({"until": 1.0, "objectives": ["itc", "mim"]})
    phased = {"schedule.kind": "phases", "schedule.phases": phases}
    assert grace() == pytest.approx(1 / 9)
    assert grace(objectives__mlm__soft_alpha=0.1) == 0.5  # tiny's ramp
    assert grace(objectives__mlm={"soft_alpha": 0.1, "weight": 0}) == pytest.approx(1 / 9)  # off
    assert grace(objectives__mim__soft_alpha=0.1, objectives__mim__alpha_ramp=1.0) == 1
    assert grace(**phased) == 0.6  # mim comes on
    assert grace(**phased, objectives__mim=None) == 0.3
    assert grace(objectives__psl__start_step=250, optim__max_steps=1000) == 0.25
    assert grace(objectives__psl__start_step=2000, optim__max_steps=1000) == 1
    assert grace(objectives__psl__start_step=250, optim__max_steps=None) == pytest.approx(1 / 9)


def test_grace_waits_for_the_slowest_trial_of_the_space(small):
    assert load_sweep([small]).grace() == 0.5
    assert load_sweep([small], ["sweep.grace=0.2"]).grace() == 0.2
    assert load_sweep([small], ["sweep.space.objectives.psl.alpha_ramp.uniform=[0.1,0.8]"]).grace() == 0.8
    assert load_sweep([small], ["sweep.space.objectives.psl.start_step.int=[0,600]"]).grace() == 0.6


def test_a_sweep_is_read_back_unchanged(default, small, tmp_path):
    overrides = [
        "name=mine",
        "objectives.mim=null",
        "sweep.metrics=[keywords/ap, match/auc_random]",
        "sweep.timeout_s=9",
    ]
    for plan in (default, load_sweep([small], overrides)):
        file = tmp_path / "sweep.yaml"
        file.write_text(to_yaml(plan))
        assert load_sweep([file]) == plan
        assert list(load_sweep([file]).sweep.space) == list(plan.sweep.space)


def test_the_best_trial_runs_as_an_ordinary_run(default, tmp_path):
    params = {f"{PSL}weight": 7.0, f"{PSL}recommend": "off", "objectives.mlm.weight": 3.0}
    file = tmp_path / "best.yaml"
    file.write_text(best_yaml(default, params))
    run, trial, ordinary = load_run([file]), default.run(params), load_run()
    learned = ("objectives", "schedule", "optim", "vision", "text", "teacher", "temperature", "batch", "seed", "world")
    for name in learned:
        assert getattr(run, name) == getattr(trial, name), name
    assert run.objectives.psl.weight == 7 and str(run.objectives.psl.recommend) == "off"
    assert (run.name, run.storage) == (None, ordinary.storage)
    assert (run.ray, run.checkpoint, run.log, run.report) == (
        ordinary.ray.model_copy(update={"workers": 1}),  # its step is one micro-batch
        ordinary.checkpoint,
        ordinary.log,
        ordinary.report,
    )
    assert run.data == ordinary.data and "name" not in yaml.safe_load(file.read_text())


def test_the_best_trial_keeps_what_its_objectives_and_batch_need(small, tmp_path):
    overrides = [
        "objectives.itc=null",
        "schedule={kind: joint, phases: []}",
        "objectives.psl=null",
        "eval.best=itm_accuracy",
        "sweep.metrics=[itm_accuracy]",
        "sweep.space={objectives.itm.weight: {log: [1, 3]}, objectives.psl.weight: null}",
        "batch={micro: 64, global: 64}",
        "ray.workers=1",
    ]
    plan = load_sweep([small], overrides)
    file = tmp_path / "best.yaml"
    file.write_text(best_yaml(plan, {"objectives.itm.weight": 2}))
    run = load_run([file])
    assert to_dict(run)["objectives"] == to_dict(plan.run({"objectives.itm.weight": 2}))["objectives"]
    assert run.eval.best == "itm_accuracy" and (run.batch.micro, run.ray.workers) == (64, 1)


def test_where_the_study_is(small, monkeypatch):
    monkeypatch.delenv(STORAGE_VARIABLE, raising=False)
    assert storage_of(load_sweep([small]).sweep) is None
    monkeypatch.setenv(STORAGE_VARIABLE, "postgresql://me:secret@host/db")
    assert storage_of(load_sweep([small]).sweep) == "postgresql://me:secret@host/db"
    for url in ("sqlite:///study.db", "studies/journal.log", "postgresql://me@host/db", "s3://bucket/a:b@c"):
        assert storage_of(load_sweep([small], [f"sweep.storage={url}"]).sweep) == url
    for url in ("postgresql://me:secret@host/db", "mysql://host/db?password=secret", "redis://:secret@host:6379/db"):
        said = error_of([f"sweep.storage={url}"], [small])
        assert "password" in said and "secret" not in said


def test_every_key_is_documented_and_of_a_kind():
    for name, field in Sweep.model_fields.items():
        assert field.description, name
        assert field.json_schema_extra["kind"] in ("identity", "operational"), name


scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=3)
numbers = st.lists(st.integers(-2, 9) | st.floats(-1, 9), max_size=3)
names = st.sampled_from(["uniform", "log", "int", "choice", "when", "uniforn"])
paths = st.sampled_from(
    ["objectives.psl.weight", "objectives.psl", "optim.lr", "mlm", "objectives.psl.unit", "a..b", ""]
)
entries = st.dictionaries(names, scalars | numbers | st.lists(scalars, max_size=3) | st.dictionaries(paths, scalars))
spaces = st.dictionaries(
    paths | st.integers(), scalars | entries | st.dictionaries(paths, entries, max_size=2), max_size=3
)


@settings(max_examples=150, deadline=None)
@given(space=spaces | scalars, key=st.sampled_from(list(Sweep.model_fields)), value=scalars | st.lists(scalars))
def test_any_sweep_is_a_plan_or_a_mistake(tmp_path_factory, space, key, value):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(yaml.safe_dump({"sweep": {"space": space}}))
    try:
        plan = load_sweep([file], [f"sweep.{key}={yaml.safe_dump(value, default_flow_style=True)}"])
    except UserError as error:
        assert str(error)
    else:
        file.write_text(to_yaml(plan))
        assert load_sweep([file]) == plan
