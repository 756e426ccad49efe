"""UNITER's presets: what they switch on, what they are called, and what they refuse."""

import pytest

from simla_ray.config.load import load_run, to_yaml
from simla_ray.errors import UserError
from simla_ray.orchestration.manifest import fallbacks


def test_the_preset_is_the_published_set_of_tasks():
    run = load_run(overrides=["method=uniter", "size=base"])
    assert set(run.objectives.active()) == {"itm", "mlm", "wpa", "mrfr", "mrckl"} and run.teacher is None
    assert run.schedule.kind == "sampled" and run.schedule.mix == {"mlm": 8, "itm": 6, "mrfr": 4, "mrckl": 4}
    assert run.text.depth == 12 and run.objectives.wpa.weight == 0.1 and not run.objectives.wpa.exclude_special
    assert run.regions.source == "auto" and run.objectives.mrckl.reduction == "element"
    official = load_run(overrides=["method=uniter", "size=base", "variant=official"])
    assert official.regions.source == "column" and official.optim.max_steps == 200_000


def test_the_name_says_where_regions_come_from(tmp_path):
    grid = load_run(overrides=["method=uniter-grid"])
    assert grid.method == "uniter" and grid.label == "uniter-grid-tiny" and grid.regions.source == "grid"
    assert load_run(overrides=["method=uniter-grid", "regions.grid=4"]).regions.grid == 4
    assert load_run(overrides=["method=uniter", "regions.source=boxes"]).label == "uniter-boxes-tiny"
    assert load_run(overrides=["method=uniter", "regions.source=column"]).label == "uniter-tiny"
    stored = tmp_path / "config.yaml"
    stored.write_text(to_yaml(grid))
    assert load_run([stored], presets=False) == grid


def test_what_is_not_as_published_is_named():
    grid = fallbacks(load_run(overrides=["method=uniter-grid"]))
    assert grid[0].startswith("regions: 4 x 4 cells") and "8 x 8" in grid[0]
    assert [line.partition(":")[0] for line in grid] == [
        "regions", "region classes", "layers", "vocabulary", "schedule", "words", "ITM",
    ]  # fmt: skip
    column = ["method=uniter", "size=base", "regions.source=column"]
    assert [line.partition(":")[0] for line in fallbacks(load_run(overrides=column))] == [
        "region classes", "layers", "vocabulary", "words", "ITM",
    ]  # fmt: skip


def test_a_mix_of_a_preset_is_taken_away_by_null():
    keys = ["method=uniter", "size=base", "schedule.kind=joint"]
    with pytest.raises(UserError, match=r"schedule\.mix: only read with schedule\.kind=sampled"):
        load_run(overrides=keys)
    assert load_run(overrides=[*keys, "schedule.mix=null"]).schedule.mix == {}


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (["method=simla", "objectives.mrfr={}"], "objectives.mrfr: hides regions of the image; needs vision.source"),
        (["method=uniter", "objectives.itc={}"], "objectives.itc: reads towers that text.fusion=merged does not have"),
        (["method=uniter", "data.augment=full"], "data.augment: full turns the image away from its boxes; use crop"),
        (["method=uniter", "text.depth=0"], "text.depth: 0 does not go with vision.source=regions; use at least 1"),
    ],
)
def test_rules_name_the_key(keys, line):
    with pytest.raises(UserError) as error:
        load_run(overrides=keys)
    assert line in str(error.value)
