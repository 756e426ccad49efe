"""Reference curves: what goes into them, whom they fit, and what a page says beside them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from simla_ray.config.load import load_run
from simla_ray.errors import UserError
from simla_ray.report import reference
from simla_ray.report.figures import smoothed
from simla_ray.report.folder import RunFolder, read_folder
from simla_ray.report.page import write_report
from simla_ray.report.reference import beside_reference, find_reference, is_of, reference_of
from tests.report.conftest import fabricate
from tests.report.test_page import text_of

STEPS = 240


def run_of(folder: Path, seed: int, offset: float, **keys) -> RunFolder:
    """A finished run whose losses are a slope, higher by ``offset``."""
    run = read_folder(fabricate(folder / f"seed{seed}", {"seed": seed, "optim.max_steps": STEPS, **keys}, ("data",)))
    names = run.run.objectives.active()
    train = [
        {"step": step, "losses": {name: 3 - step / STEPS + offset for name in names}} for step in range(1, STEPS + 1)
    ]
    val = [{"step": step, "metrics": {"retrieval_r10": 0.2 + offset + step / 1000}} for step in (80, 160, 240)]
    return dataclasses.replace(run, train=train, val=val, summary=run.summary | {"steps": STEPS})


@pytest.fixture
def runs(tmp_path: Path) -> list[RunFolder]:
    return [run_of(tmp_path, seed, offset) for seed, offset in ((3, 0.0), (1, 0.1), (2, 0.05))]


def test_a_curve_is_mean_least_and_most_of_the_smoothed_losses(runs):
    found = reference_of(runs)
    assert found["label"] == "simla-tiny-kmeans128" and found["steps"] == STEPS and found["seeds"] == [1, 2, 3]
    assert found["data"] == {"train": "world"} and found["config"]["optim.max_steps"] == STEPS
    curve = found["objectives"]["itc"]
    assert curve["step"][0] == 1 and curve["step"][-1] == STEPS and len(curve["step"]) == 100
    slope = smoothed(np.array([3 - step / STEPS for step in range(1, STEPS + 1)]))
    for i in (0, 50, 99):
        value = slope[curve["step"][i] - 1]
        assert [curve[end][i] for end in ("low", "mean", "high")] == pytest.approx(
            [value, value + 0.05, value + 0.1], rel=1e-4
        )
    recall = found["retrieval_r10"]
    assert recall["step"] == [80, 160, 240] and recall["low"] == [0.28, 0.36, 0.44]
    assert recall["high"] == [0.38, 0.46, 0.54]
    assert list(found["objectives"]) == list(runs[0].run.objectives.active())


def test_runs_that_differ_in_more_than_the_seed_are_refused(runs, tmp_path: Path):
    for keys, path in (({"optim.lr": 0.01}, "optim.lr"), ({"batch.global": 128}, "batch.global")):
        other = run_of(tmp_path / path, 9, 0.0, **keys)
        with pytest.raises(UserError, match=rf"seed9: {path} is .*may differ only in seed"):
            reference_of([*runs, other])
    with pytest.raises(UserError, match="has not ended"):
        reference_of([runs[0], dataclasses.replace(runs[1], summary=None)])
    with pytest.raises(UserError, match="seeds must differ, found 3, 3"):
        reference_of([runs[0], runs[0]])
    with pytest.raises(UserError, match="two runs"):
        reference_of(runs[:1])
    with pytest.raises(UserError, match=r"seed1: other steps than seed3 \(120, not 240\)"):
        reference_of([runs[0], dataclasses.replace(runs[1], summary={"steps": 120})])


def test_an_objective_without_a_finite_loss_has_no_band(runs):
    for line in runs[1].train:
        line["losses"]["psl"] = float("nan")
    found = reference_of(runs)
    assert "psl" not in found["objectives"] and "itc" in found["objectives"]
    assert reference.band_of(found, "psl") is None


def test_curves_are_of_the_keys_that_they_hang_on(runs, tmp_path: Path):
    found = json.loads(json.dumps(reference_of(runs)))
    same = {"a": {"data.test": ["world:val"]}, "b": {"ray.workers": 2}, "c": {"log.every_steps": 7}}
    for name, keys in same.items():
        assert is_of(found, run_of(tmp_path / name, 5, 0.0, **keys).run)
    for name, keys in {"d": {"data.hflip": "never"}, "e": {"objectives.psl.soft_alpha": 0.37}}.items():
        assert not is_of(found, run_of(tmp_path / name, 5, 0.0, **keys).run)


def test_a_key_that_came_after_the_curves_has_its_default_in_them(runs, tmp_path: Path):
    found = reference_of(runs)
    assert found["config"].pop("data.fraction") == 1.0
    assert is_of(found, runs[0].run)
    assert not is_of(found, run_of(tmp_path / "half", 5, 0.0, **{"data.fraction": 0.5}).run)
    assert not is_of(found | {"config": found["config"] | {"data.gone": 1}}, runs[0].run)


def test_a_page_has_the_band_of_its_own_config_only(runs, tmp_path: Path, monkeypatch):
    shelf = tmp_path / "reference"
    folder = fabricate(tmp_path / "mine", {"optim.max_steps": STEPS}, ("data",))
    monkeypatch.setattr(reference, "FOLDER", shelf)
    assert find_reference(read_folder(folder)) is None, "no folder, no reference"
    before = write_report(folder).read_text()
    shelf.mkdir()
    (shelf / "other.json").write_text(json.dumps(reference_of(runs) | {"config": {"seed": "none"}}))
    assert find_reference(read_folder(folder)) is None
    assert write_report(folder).read_text() == before
    (shelf / "simla.json").write_text(json.dumps(reference_of(runs)))
    assert find_reference(read_folder(folder)) == reference_of(runs)
    after = write_report(folder).read_text()
    assert "Grey band: least to most of 3 runs of this config that differ only in the seed." in text_of(after)
    assert after == write_report(folder).read_text() and after != before


def test_other_files_under_the_same_name_are_other_data(runs, tmp_path: Path, monkeypatch):
    keys = {"data.train": ["photos.parquet"], "data.val": ["more.parquet"]}
    photos = [run_of(tmp_path / "p", seed, 0.1 * seed, **keys) for seed in (1, 2)]
    found = reference_of(photos)
    assert found["data"] == {"train": "a1b2c3d4"}
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "photos.json").write_text(json.dumps(found))
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "shelf")
    assert find_reference(photos[0]) == found
    other = dataclasses.replace(photos[0], manifest={"data": {"train": {"fingerprint": "ffff"}}})
    assert find_reference(other) is None


@pytest.mark.parametrize(
    ("offset", "said"),
    [(0.03, "inside it itc, itm, mlm, mim, psl; none is outside"), (0.3, "itc 2.0 widths above"),
     (-0.05, "itc 0.5 widths below"), (float("nan"), "itc is nan")],
)  # fmt: skip
def test_how_far_outside(runs, tmp_path: Path, offset: float, said: str):
    text = beside_reference(run_of(tmp_path / "mine", 7, offset), reference_of(runs))
    assert said in text
    assert "about 50 % lie outside the band of 3 at any one step, 13 % by more than its width." in text


def test_packaged_references_are_whole():
    seen = set()
    for file in (file for file in reference.FOLDER.iterdir() if file.name.endswith(".json")):
        found = json.loads(file.read_text())
        assert len(found["seeds"]) >= 2
        curves = [*found["objectives"].values(), *filter(None, [found["retrieval_r10"]])]
        for curve in curves:
            steps, mean, low, high = (np.array(curve[key]) for key in ("step", "mean", "low", "high"))
            assert (np.diff(steps) > 0).all() and steps[-1] <= found["steps"]
            assert (low <= mean).all() and (mean <= high).all()
        place = json.dumps([found["config"], found["data"]["train"]])
        assert place not in seen, "two files for one config: only one would be found"
        seen.add(place)


@pytest.mark.parametrize("method", ["simla", "albef", "clip"])
def test_the_package_has_the_curves_of_the_tiny_presets(method: str):
    run = load_run(overrides=[f"method={method}", "size=tiny"])
    found = json.loads((reference.FOLDER / f"{run.label}.json").read_text(encoding="utf-8"))
    assert is_of(found, run), "a preset has changed: make its curves anew with compare.py --curves"
    assert found["steps"] == run.optim.max_steps and found["seeds"] == [0, 1, 2] and found["data"] == {"train": "world"}
    assert set(found["objectives"]) == set(run.objectives.active())
