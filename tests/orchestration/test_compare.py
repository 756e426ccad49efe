"""A comparison without its runs: rows, budgets, what is taken over from other folders, the numbers of the summary."""

import json
from statistics import stdev

import numpy as np
import pytest
from safetensors.numpy import save_file

from simla_ray.config.comparison import load_comparison
from simla_ray.config.load import load_run, to_yaml
from simla_ray.data.region_source import with_regions
from simla_ray.orchestration import compare as compare_module
from simla_ray.orchestration.compare import (
    _rows,
    _same,
    _summary,
    _take_over,
    compare,
    lines_of,
    notes_of,
    ranked_alike,
    write_curves,
)
from simla_ray.orchestration.launch import Within
from simla_ray.orchestration.manifest import PACKAGES, versions
from simla_ray.orchestration.runs import run_folder
from simla_ray.orchestration.series import Series
from simla_ray.orchestration.trials import FAILED, FINISHED, Outcome
from tests.orchestration.sweeps import write_run
from tests.report.conftest import write_lines

STEPS = 40
ENTRIES = ["comparison.chosen=[simla, simla-no-psl]", "comparison.seeds=[0, 1]", f"optim.max_steps={STEPS}"]


def plan_of(tmp_path, *overrides):
    return load_comparison([], [f"storage={tmp_path}", "name=versus", *ENTRIES, *overrides])


def rows_of(plan, series):
    """The table's lines of entries that read no regions."""
    return _rows(plan, series, {entry: plan.run(entry, plan.comparison.seeds[0]) for entry in plan.entries})


def series_of(plan, tmp_path, steps=STEPS):
    return Series(tmp_path / "versus", plan.base, Within(None, tmp_path), steps, 100, 2, None, lambda line: None)


def flops(monkeypatch, **costs):
    """Arithmetic per pair by what a run does."""
    monkeypatch.setattr(
        compare_module, "step_flops", lambda run, size, steps: costs["simla" if run.objectives.psl else "less"]
    )


def test_equal_samples_equal_arithmetic_and_shares_of_the_rows(tmp_path, monkeypatch):
    flops(monkeypatch, simla=3e9, less=2e9)
    plan = plan_of(tmp_path, "comparison.budgets=[samples, compute]", "comparison.fractions=[0.5, 1.0]")
    rows = list(rows_of(plan, series_of(plan, tmp_path)))
    assert [(r.entry, r.budget, r.fraction, r.steps) for r in rows] == [
        ("simla", "samples", 0.5, 40), ("simla-no-psl", "samples", 0.5, 40),
        ("simla", "samples", 1.0, 40), ("simla-no-psl", "samples", 1.0, 40),
        ("simla", "compute", 1.0, 40), ("simla-no-psl", "compute", 1.0, 60),
    ]  # fmt: skip
    assert [[str(run.name) for run in row.runs] for row in rows[1:]] == [
        [f"versus/runs/{name}-seed{seed}" for seed in (0, 1)]
        for name in ("simla-no-psl-data0.5", "simla", "simla-no-psl", "simla", "simla-no-psl-steps60")
    ]
    assert [run.seed for run in rows[0].runs] == [0, 1]
    assert {run.optim.max_steps for run in rows[-1].runs} == {60}
    assert {(run.data.fraction, run.optim.max_steps) for run in rows[0].runs} == {(0.5, 40)}
    assert rows[4].runs == rows[2].runs  # the reference is trained once


def test_a_share_of_the_rows_is_trained_on_for_as_many_steps(tmp_path, monkeypatch):
    """Epochs of fewer rows would be fewer steps, and the budget another one."""
    flops(monkeypatch, simla=3e9, less=2e9)
    plan = plan_of(tmp_path, "optim.max_steps=null", "optim.epochs=2", "comparison.fractions=[0.5, 1]")
    rows = list(rows_of(plan, series_of(plan, tmp_path, steps=375)))
    assert [(r.fraction, r.steps, r.runs[0].optim.max_steps) for r in rows] == [
        (0.5, 375, 375), (0.5, 375, 375), (1.0, 375, None), (1.0, 375, None),
    ]  # fmt: skip


def test_runs_know_their_files_wherever_they_are_trained(tmp_path, monkeypatch):
    flops(monkeypatch, simla=3e9, less=2e9)
    monkeypatch.chdir(tmp_path)
    plan = plan_of(tmp_path, "data.train=[a.parquet]", "data.val=[b.parquet]")
    run = next(rows_of(plan, series_of(plan, tmp_path))).runs[0]
    assert (run.data.train, run.data.val) == ([str(tmp_path / "a.parquet")], [str(tmp_path / "b.parquet")])
    assert run.storage == tmp_path


SMALL = ["size=tiny", "optim.max_steps=40"]


def test_one_experiment_wherever_it_lies_and_whatever_computes_it(tmp_path):
    def same(*overrides):
        return _same(load_run(overrides=[*SMALL, *overrides]))

    assert same() == same(
        "name=x", f"storage={tmp_path}", "ray.workers=1", "data.decode_cpus=7", "data.audit=true", "log.every_steps=3",
        "report.images=false", "checkpoint.every_steps=20",
    )  # fmt: skip
    others = ("seed=1", "optim.lr=0.001", "data.fraction=0.5", "eval.every_steps=20", "batch.micro=16", "world.seed=2")
    assert len({same(), *map(same, others)}) == 1 + len(others)


FUSED_ONLY = ["comparison.chosen=[simla, vilt]", "eval.pairs=300"]


def test_a_controlled_comparison_ranks_all_among_the_same_images(tmp_path):
    plan = ranked_alike(plan_of(tmp_path, *FUSED_ONLY, "comparison.controlled=true"))
    assert {plan.run(entry, 0).eval.pairs for entry in plan.entries} == {200}
    assert notes_of(plan) == plan.notes() and plan.shared["storage"] == str(tmp_path)
    assert any(line == f"note       {plan.notes()[0]}" for line in lines_of(plan))
    alone = plan_of(tmp_path, "comparison.controlled=true", "eval.pairs=300")
    assert ranked_alike(alone) == alone and alone.base.eval.pairs == 300


def test_without_control_the_table_says_who_is_ranked_among_fewer_images(tmp_path):
    plan = plan_of(tmp_path, *FUSED_ONLY)
    assert ranked_alike(plan) == plan
    (note,) = notes_of(plan)
    assert note.startswith("Retrieval is among 200 images for vilt, without vectors, and among 300 for the others")
    assert notes_of(plan_of(tmp_path, *FUSED_ONLY, "eval.pairs=200")) == [] and notes_of(plan_of(tmp_path)) == []


def finished(run, **manifest):
    folder = run_folder(run)
    write_run(folder, {"keywords": {"ap": 0.5}})
    (folder / "config.yaml").write_text(to_yaml(run))
    (folder / "manifest.json").write_text(json.dumps({"packages": versions(PACKAGES)} | manifest))
    for name in ("checkpoints", "tensorboard", "prepared"):
        (folder / name).mkdir()
        (folder / name / "large").write_text("x")
    (folder / ".lock").touch()


def test_what_others_have_found_is_taken_over(tmp_path):
    def run_of(name, *overrides):
        return load_run(overrides=[*SMALL, f"storage={tmp_path}", f"name={name}", *overrides])

    finished(run_of("alone"))
    finished(run_of("old/runs/simla-seed1", "seed=1"), packages={"simla_ray": "0.0.0"})
    finished(run_of("older/runs/simla-seed1", "seed=1"))  # found after one by another version
    finished(run_of("tuned/repeats/default-seed2", "seed=2"))
    finished(run_of("tuned/trials/trial-000", "seed=3"))  # evaluated on the validation set
    finished(run_of("odd", "seed=4"))
    (tmp_path / "odd" / "manifest.json").unlink()
    finished(run_of("versus/runs/simla-seed5", "seed=5"))
    (tmp_path / "versus/summary.json").write_text("{}")
    said = []
    ours = [run_of(f"versus/runs/simla-seed{seed}", f"seed={seed}", "ray.workers=1") for seed in range(6)]
    _take_over(ours, tmp_path, said.append)
    assert sorted(said) == [
        "reuse      simla-seed0 from alone",
        "reuse      simla-seed1 from older/runs/simla-seed1",
        "reuse      simla-seed2 from tuned/repeats/default-seed2",
    ]
    there = [run_folder(run) for run in ours]
    assert [folder.exists() for folder in there] == [True, True, True, False, False, True]
    assert sorted(p.name for p in there[0].iterdir()) == ["config.yaml", "manifest.json", "summary.json"]


def ended_with(tmp_path, values):
    """Name of a run -> how it ended; ``values``: entry, seed -> keywords/ap, None where it failed."""
    ended = {}
    for (entry, seed), value in values.items():
        name = f"versus/runs/{entry}-seed{seed}"
        if value is None:
            ended[name] = Outcome(FAILED, "ValueError: boom", 3)
            continue
        folder = tmp_path / name
        write_run(folder, {"keywords": {"ap": value}}, seconds=10.0 + 2 * seed, pairs_per_s=100.0)
        sums = np.array([[value, 1.0]] * 6, np.float32)
        save_file({"keywords/ap": sums}, folder / "per_image.safetensors", {"uids": json.dumps(list("abcdef"))})
        ended[name] = Outcome(FINISHED, None, STEPS, {}, json.loads((folder / "summary.json").read_text()))
    return ended


def test_the_numbers_of_the_summary(tmp_path, monkeypatch):
    flops(monkeypatch, simla=3e9, less=1.5e9)
    plan = plan_of(tmp_path, "comparison.metrics=[keywords/ap, match/auc_random]")
    rows = list(rows_of(plan, series_of(plan, tmp_path)))
    values = {("simla", 0): 0.5, ("simla", 1): 0.7, ("simla-no-psl", 0): 0.4, ("simla-no-psl", 1): 0.3}
    found = _summary(plan, tmp_path / "versus", rows, ended_with(tmp_path, values), 12.5)
    assert (found["kind"], found["seconds"], found["seeds"], found["unfinished"]) == ("comparison", 12.5, [0, 1], False)
    simla, less = found["rows"]
    assert simla["metrics"] == {
        "keywords/ap": {"mean": pytest.approx(0.6), "std": stdev([0.5, 0.7]), "values": [0.5, 0.7]}
    }
    assert (simla["compute"], less["compute"], less["gflops_per_pair"]) == (1.0, 0.5, 1.5)
    assert (less["samples"], less["train_s"], less["pairs_per_s"]) == (STEPS * 64, 11.0, 100.0)
    assert less["runs"] == ["simla-no-psl-seed0", "simla-no-psl-seed1"] and less["failed"] == []
    assert less["overrides"]["objectives.psl"] is None and less["description"]
    (difference,) = found["differences"]
    assert (difference["entry"], difference["budget"], difference["fraction"]) == ("simla-no-psl", "samples", 1.0)
    assert difference["mean"] == pytest.approx(-0.25) and difference["per_seed"] == pytest.approx([-0.1, -0.4])
    assert difference["images"] == 6
    assert found["notes"] == [] and [row["recipe"] for row in found["rows"]] == [None, None]
    json.dumps(found)


def test_the_summary_says_what_was_held_equal_and_who_has_a_recipe(tmp_path, monkeypatch):
    flops(monkeypatch, simla=3e9, less=1.5e9)
    for controlled, recipe in ((False, "vilt-tiny"), (True, None)):
        plan = plan_of(tmp_path, "comparison.chosen=[simla, vilt]", f"comparison.controlled={controlled}")
        found = _summary(plan, tmp_path / "versus", list(rows_of(plan, series_of(plan, tmp_path))), {}, 1.0)
        assert [row["recipe"] for row in found["rows"]] == [None, recipe]
        assert any(note.startswith("Controlled: ") for note in found["notes"]) is controlled


def test_a_run_that_failed_is_named_and_the_others_stand(tmp_path, monkeypatch):
    flops(monkeypatch, simla=3e9, less=1.5e9)
    plan = plan_of(tmp_path, "comparison.metrics=[keywords/ap]")
    rows = list(rows_of(plan, series_of(plan, tmp_path)))
    values = {("simla", 0): 0.5, ("simla", 1): 0.7, ("simla-no-psl", 0): None, ("simla-no-psl", 1): 0.3}
    found = _summary(plan, tmp_path / "versus", rows, ended_with(tmp_path, values), 1.0)
    less = found["rows"][1]
    assert less["failed"] == [{"name": "simla-no-psl-seed0", "reason": "ValueError: boom"}]
    assert less["metrics"]["keywords/ap"] == {"mean": 0.3, "std": None, "values": [0.3]}
    assert found["differences"][0]["per_seed"] == pytest.approx([-0.4]) and found["differences"][0]["seeds"] == 1
    neither = {key: None if key[0] == "simla-no-psl" else value for key, value in values.items()}
    for path in (tmp_path / "versus" / "runs").iterdir():
        path.rename(tmp_path / path.name)
    found = _summary(plan, tmp_path / "versus", rows, ended_with(tmp_path, neither), 1.0)
    assert found["differences"] == [] and found["rows"][1]["metrics"] == {} and found["rows"][1]["train_s"] is None
    assert len(found["rows"][1]["failed"]) == 2 and found["rows"][0]["metrics"]


def test_bands_are_over_seeds_at_equal_samples(tmp_path):
    runs = {"simla-seed0": 2.0, "simla-seed1": 1.0, "clip-seed0": 3.0}
    for name, loss in runs.items():
        folder = tmp_path / "runs" / name
        write_run(folder, {})
        (folder / "config.yaml").write_text(to_yaml(load_run(overrides=[*SMALL, f"seed={name[-1]}"])))
        lines = [{"step": s, "kind": "train", "losses": {"itc": loss / s}} for s in range(1, 41)]
        write_lines(folder / "metrics.jsonl", lines)
    row = {"budget": "samples", "fraction": 1.0, "entry": "simla", "label": "simla-tiny"}
    row["runs"] = ["simla-seed0", "simla-seed1"]
    rows = [row, row | {"budget": "compute", "label": "b"}, row | {"fraction": 0.5, "label": "c"}]
    rows.append(row | {"entry": "clip", "label": "clip-tiny", "runs": ["clip-seed0"]})
    assert [p.name for p in write_curves(tmp_path, {"rows": rows})] == ["simla.json"]
    assert json.loads((tmp_path / "curves" / "simla.json").read_text())


def test_the_same_command_again_starts_nothing(tmp_path):
    plan = plan_of(tmp_path)
    folder = tmp_path / "versus"
    folder.mkdir()
    (folder / "comparison.yaml").write_text(compare_module.to_yaml(plan))
    summary = {"kind": "comparison", "unfinished": False, "seconds": 1.0, "rows": [{"failed": []}]}
    (folder / "summary.json").write_text(json.dumps(summary))
    said = []
    assert compare(plan, said.append) == summary
    assert said == [f"compare    {folder} is finished"]


def test_an_entry_goes_by_where_its_regions_were_found(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(compare_module, "step_flops", lambda run, *_: asked.setdefault(run.label, 1e9))
    plan = plan_of(tmp_path, "comparison.chosen=[simla, uniter]")
    decided = {entry: with_regions(plan.run(entry, 0), None) for entry in plan.entries}
    rows = list(_rows(plan, series_of(plan, tmp_path), decided))
    labels = [{run.label for run in row.runs} for row in rows if row.entry == "uniter"]
    assert labels == [{"uniter-boxes-tiny"}] and "uniter-boxes-tiny" in asked
    assert all(run.regions.source == "boxes" for row in rows if row.entry == "uniter" for run in row.runs)
