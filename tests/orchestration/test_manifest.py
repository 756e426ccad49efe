import json

import pytest

from simla_ray.config.load import load_run
from simla_ray.errors import UserError
from simla_ray.orchestration.cluster import Cluster
from simla_ray.orchestration.manifest import check_data, fallbacks, licenses, write_manifest
from simla_ray.orchestration.prepare import Prepared, build_indexes


@pytest.fixture
def run(world_files):
    return load_run(overrides=[f"data.{s}=[{world_files / s}.parquet]" for s in ("train", "val")])


def test_changed_training_data_is_refused(tmp_path, run, vocabulary):
    prepared = Prepared(tmp_path, build_indexes(run), vocabulary)
    check_data(tmp_path, run, prepared)  # nothing stored yet
    description = prepared.describe(run)
    assert description["train"]["rows"] == 96
    (tmp_path / "manifest.json").write_text(json.dumps({"data": description}))
    check_data(tmp_path, run, prepared)
    description["train"] |= {"fingerprint": "other", "rows": 95}
    (tmp_path / "manifest.json").write_text(json.dumps({"data": description}))
    with pytest.raises(UserError, match="changed since it began: 95 rows then, 96 now"):
        check_data(tmp_path, run, prepared)


def test_licences_and_what_is_not_as_published(tmp_path, run, vocabulary):
    assert licenses(Prepared(tmp_path, build_indexes(run), vocabulary)) == ["CC0-1.0"]
    assert len(fallbacks(run)) == 4
    assert not any("codes" in f for f in fallbacks(load_run(overrides=["objectives.mim=null"])))
    base = load_run(overrides=["size=base", "codes.kind=dvae", "codes.source=encoder.pkl"])
    assert fallbacks(base) == []
    given = load_run(overrides=["size=base", "objectives.mim=null", "vision.weights=some/vit.pth"])
    assert fallbacks(given) == ["image tower: starts from vit.pth in place of DeiT-B"]
    vilt = fallbacks(load_run(overrides=["method=vilt", "size=base", "variant=official"]))
    assert [line.partition(":")[0] for line in vilt] == [
        "towers",
        "ITM",
    ]  # pictures' shape, and where negatives are from
    assert "blocks: random start in place of ViT-B/32" in fallbacks(load_run(overrides=["method=vilt"]))
    grid = fallbacks(load_run(overrides=["method=mvptr-grid"]))
    assert [line.partition(":")[0] for line in grid] == ["regions", "tags", "phrase concepts", "layers", "vocabulary"]
    assert grid[1] == "tags: none in place of a detector's, and so nothing for MCR to recover"
    labelled = load_run(overrides=["method=mvptr", "regions.source=column", "tags.source=box_labels"])
    assert fallbacks(labelled)[0] == "tags: annotated labels of all objects in place of a detector's"


def test_what_a_run_started_from_outlives_its_first_leg(tmp_path, run, vocabulary):
    prepared, cluster = Prepared(tmp_path, build_indexes(run), vocabulary), Cluster(True, "local", 1, 2, 0, None)
    write_manifest(tmp_path, run, prepared, cluster)
    assert "start" not in json.loads((tmp_path / "manifest.json").read_text())
    start = {"name": "first", "notes": [], "manifest": {"licenses": ["CC-BY-4.0"]}}
    write_manifest(tmp_path, run, prepared, cluster, start)
    write_manifest(tmp_path, run, prepared, cluster)
    assert json.loads((tmp_path / "manifest.json").read_text())["start"] == start
