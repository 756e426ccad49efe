"""Other methods as whole runs through Ray: what they train, what they measure, what they leave out."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simla_ray.config.load import load_run
from simla_ray.data import world
from simla_ray.orchestration.launch import pretrain
from simla_ray.orchestration.preflight import check
from tests.ray.alone import losses_alone, losses_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def start(ray_session, tmp_path_factory, world_rows):
    """-> a function that trains a method with two workers, and with one in this process.

    It gives the folder and summary of the two, and the losses of both.
    """
    folder = tmp_path_factory.mktemp("methods")
    for split in ("train", "val"):
        pq.write_table(pa.Table.from_pylist(world_rows[split], schema=world.SCHEMA), folder / f"{split}.parquet")

    def run(method: str):
        settings = [
            f"method={method}", f"name={method}", f"storage={folder}", f"data.train=[{folder}/train.parquet]",
            f"data.val=[{folder}/val.parquet]", "batch.micro=8", "batch.global=16", "ray.workers=2",
            "text.dropout=0.1", "vision.width=32", "text.width=32", "text.ffn=64", "joint_width=16",
            "optim.warmup_steps=2", "optim.max_steps=6", "checkpoint.every_steps=3", "eval.every_steps=3",
            "eval.batches=2", "eval.pairs=24", "eval.rerank_top_k=4", "log.every_steps=1", "ray.device=cpu",
        ]  # fmt: skip
        summary = pretrain(load_run(overrides=settings), lambda _: None)
        run, _ = check(load_run(overrides=[*settings, "ray.workers=1"]))
        alone = losses_alone(run, folder / method / "prepared", folder / f"{method}-alone")
        together = losses_of(folder / method)
        assert len(alone) == len(together) == 6
        return folder / method, summary, alone, together

    return run


def test_two_towers_contrast_the_whole_step_at_any_number_of_workers(start):
    folder, summary, one, two = start("siglip")
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() == {"itc", "total"}
        assert b["itc"] == pytest.approx(a["itc"], rel=1e-5)
    assert set(summary["eval"]) == {"data", "retrieval"} and "itm" not in summary["eval"]["retrieval"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert "kmeans" not in json.dumps(manifest["label"]) and (folder / "report.html").is_file()


def test_albef_measures_what_it_has(start):
    folder, summary, one, two = start("albef")
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() <= {"itc", "itm", "mlm", "total"}
        assert b == {name: pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in a.items()}
    assert {"retrieval", "match", "grounding", "words"} <= set(summary["eval"]) and "keywords" not in summary["eval"]
    assert not (folder / "prepared" / "codes.safetensors").exists()


def test_vilt_matches_words_and_patches_at_any_number_of_workers(start):
    folder, summary, one, two = start("vilt")
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() == {"itm", "mlm", "wpa", "total"}
        assert b == {name: pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in a.items()}
    assert set(summary["eval"]) == {"data", "retrieval", "match", "grounding", "words"}
    assert summary["eval"]["retrieval"]["n_images"] == 24 and "itc" not in summary["eval"]["retrieval"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["label"] == "vilt-tiny" and manifest["fallbacks"][0].startswith("towers: none; patches of 12 px")
    assert not (folder / "prepared" / "codes.safetensors").exists() and (folder / "report.html").is_file()


@pytest.mark.parametrize(("method", "regions"), [("uniter", "annotated boxes"), ("uniter-grid", "4 x 4 cells")])
def test_uniter_reads_boxes_or_cells_at_any_number_of_workers(start, method, regions):
    folder, summary, one, two = start(method)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert b == {name: pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in a.items()}
    assert set(summary["eval"]) == {"data", "retrieval", "match", "words"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["label"] == {"uniter": "uniter-boxes-tiny", "uniter-grid": "uniter-grid-tiny"}[method]
    assert manifest["fallbacks"][0].startswith("regions: ") and regions in manifest["fallbacks"][0]
    assert (folder / "prepared" / "region_codes.safetensors").exists() and (folder / "report.html").is_file()


def test_mvptr_makes_its_concepts_and_reads_tags_at_any_number_of_workers(start):
    folder, summary, one, two = start("mvptr")
    for a, b in zip(one, two, strict=True):
        assert set(a) == set(b)
        own = {"itc", "itm", "mlm", "mcr", "wpg"} & set(a)
        assert {name: a[name] for name in own} == pytest.approx({name: b[name] for name in own}, rel=1e-4)
    assert {"itc", "mlm", "mcr", "wpg"} <= set(one[0]) and "itm" in one[-1]
    assert summary["steps"] == 6
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["label"] == "mvptr-boxes-tiny" and len(manifest["concepts"]["sha256"]) == 64
    assert any(line.startswith("tags: annotated labels") for line in manifest["fallbacks"])
