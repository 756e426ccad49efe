"""A run over columns that ``annotate`` has made says so."""

import json

import pytest

from simla_ray.config.load import load_run
from simla_ray.orchestration.manifest import fallbacks

COLUMNS = {"regions.source": "column", "tags.source": "column", "concepts.source": "column"}
BOXES, CELLS = "annotated boxes of all objects and the whole image", "7 x 7 cells of the image"


@pytest.fixture
def folder(tmp_path):
    def write(without=0, **manifest):
        about = {"with": ["regions", "tags", "phrases"], "run": {"name": "mine"}}
        about |= {"counts": {"rows_without_boxes": without}}
        found = {"rows": 4, "annotation": about, "options": {"grid": 7}, **manifest}
        (tmp_path / "manifest.json").write_text(json.dumps(found))
        return tmp_path

    return write


def lines(uri, **keys):
    data = {f"data.{name}": [str(uri)] for name in ("train", "val")}
    return fallbacks(load_run(overrides={"method": "mvptr", **data, **COLUMNS, **keys}))


@pytest.mark.parametrize(("without", "regions"), [(0, BOXES), (4, CELLS), (1, f"{BOXES}, or {CELLS},")])
def test_columns_are_named_with_what_made_them(folder, without, regions):
    assert lines(folder(without))[:3] == [
        f"regions: {regions} in place of a detector's; their features are patches of mine's frozen tower in place of a "
        "detector's",
        "tags: words that mine's keyword head sees in the image in place of a detector's",
        "phrase concepts: read from the captions by rules in place of the SPICE parser",
    ]


def test_what_is_not_read_is_not_named(folder):
    found = lines(folder(), **{"regions.source": "grid", "tags.source": "box_labels"})
    assert sum("frozen tower" in line for line in found) == sum("keyword head" in line for line in found) == 0
    data = {f"data.{name}": [f"{folder()}/*.parquet"] for name in ("train", "val")}
    uniter = load_run(overrides={"method": "uniter", **data, "regions.source": "column"})
    assert any("mine's frozen tower" in line for line in fallbacks(uniter))


def test_other_manifests_say_nothing(folder, tmp_path):
    first = lines(tmp_path)
    assert lines(folder(annotation=None)) == lines(folder(annotation={})) == lines(folder(options=3)) == first
    (tmp_path / "manifest.json").write_text("[")
    assert lines(tmp_path) == lines("s3://bucket/x.parquet") == first
