"""An exported folder holds what use and further training need, and nothing of the machine it was made on."""

import hashlib
import json

import pytest
import torch
import yaml

from simla_ray.errors import UserError
from simla_ray.models.checkpoint_io import load_tensors
from simla_ray.models.official import from_official
from simla_ray.release.export import export, unfinished
from simla_ray.release.source import find_source

from .conftest import make_run_folder


def test_the_folder_holds_everything(exported, run_folder):
    assert {p.name for p in exported.iterdir()} == {
        "README.md", "config.yaml", "codes.safetensors", "manifest.json", "model.safetensors", "summary.json",
        "tokenizer.json", "word_frequency.json",
    }  # fmt: skip
    tensors = load_tensors(exported / "model.safetensors")
    best = find_source(run_folder).read().tensors
    assert all(name.startswith(("student.", "itm_head.", "scale.")) for name in tensors)
    assert all(torch.equal(tensors[name], best[name]) for name in tensors)
    assert tensors.keys() == {name for name in best if not name.startswith(("teacher.", "queue."))}
    assert len({p.stat().st_mode for p in exported.iterdir()}) == 1  # whoever may read one may read all
    codes = load_tensors(exported / "codes.safetensors")
    assert torch.equal(codes["centroids"], load_tensors(run_folder / "prepared" / "codes.safetensors")["centroids"])


def test_no_path_of_the_machine_goes_along(tmp_path, vocabulary):
    words = tmp_path / "my_words.txt"
    words.write_text("circle square")
    overrides = {
        "data__train": [f"{tmp_path}/pairs/*.parquet"],
        "data__val": ["/home/somebody/val.parquet", "tar:/home/somebody/shards", "tar:s3://bucket/shards"],
        "data__image_roots": ["/home/somebody/images"],
        "text__vocab": "/home/somebody/vocab.txt",
        "objectives__psl__stop_words": str(words),
        "init_from": "/home/somebody/runs/earlier",
    }
    folder, _ = make_run_folder(tmp_path / "runs" / "mine", vocabulary, **overrides)
    export(find_source(folder), tmp_path / "out")
    words.unlink()
    for name in ("config.yaml", "manifest.json", "README.md"):
        text = (tmp_path / "out" / name).read_text()
        assert "/home/somebody" not in text and str(tmp_path) not in text, name
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["data"]["val"] == ["val.parquet", "tar:shards", "tar:s3://bucket/shards"]
    assert config["data"]["train"] == ["*.parquet"] and config["init_from"] is None and config["storage"] == "runs"
    source = find_source(tmp_path / "out")
    stop_words = source.run.objectives.psl.stop_words  # copied, and found beside the config
    assert stop_words == str(tmp_path / "out" / "stop_words.txt")
    export(source, tmp_path / "again")
    assert (tmp_path / "again" / "stop_words.txt").read_text() == "circle square"
    assert (tmp_path / "again" / "config.yaml").read_text() == (tmp_path / "out" / "config.yaml").read_text()


def test_the_teachers_towers(run_folder, tmp_path):
    export(find_source(run_folder), tmp_path / "ema", teacher=True)
    tensors, best = load_tensors(tmp_path / "ema" / "model.safetensors"), find_source(run_folder).read().tensors
    name = "vision.vit.blocks.0.mlp.fc1.weight"
    assert torch.equal(tensors[f"student.{name}"], best[f"teacher.master.{name}"])
    assert not torch.equal(best[f"student.{name}"], best[f"teacher.master.{name}"])
    assert torch.equal(tensors["itm_head.weight"], best["itm_head.weight"])
    assert "EMA teacher's" in (tmp_path / "ema" / "README.md").read_text()
    with pytest.raises(UserError, match="--teacher: ema has no EMA teacher"):
        export(find_source(tmp_path / "ema"), tmp_path / "twice", teacher=True)


def test_the_official_layout_beside_it(tmp_path, vocabulary):
    folder, _ = make_run_folder(tmp_path / "plain", vocabulary, vision__stem="patch")
    export(find_source(folder), tmp_path / "out", official=True)
    official = load_tensors(tmp_path / "out" / "official.safetensors")
    assert {"temp", "image_queue", "queue_ptr", "visual_encoder_m.mask_token", "concept_head_m.bias"} <= official.keys()
    assert official["image_queue"].shape == (64, 64)
    back, best = from_official(official).tensors, find_source(folder).read().tensors
    assert best.keys() - back.keys() == {"queue.ids"}
    assert all(torch.equal(back[name], best[name]) for name in back)


def test_albefs_official_layout_has_token_types(tmp_path, vocabulary):
    folder, _ = make_run_folder(tmp_path / "albef", vocabulary, vision__stem="patch", method="albef",
                                schedule__kind="joint", schedule__phases=[])  # fmt: skip
    export(find_source(folder), tmp_path / "out", official=True)
    official = load_tensors(tmp_path / "out" / "official.safetensors")
    assert not official["text_encoder.bert.embeddings.token_type_embeddings.weight"].any()
    assert "text_encoder.bert.encoder.layer.0.crossattention.self.key.weight" not in official
    back, best = from_official(official).tensors, find_source(folder).read().tensors
    assert all(torch.equal(back[name], best[name]) for name in back)


def test_a_stem_has_no_place_in_the_official_layout(run_folder, tmp_path):
    with pytest.raises(UserError, match=r"--layout: .*patch_embed\.stem.*vision\.stem=patch"):
        export(find_source(run_folder), tmp_path / "out", official=True)
    assert list(tmp_path.iterdir()) == []  # nothing half done is left


def test_a_folder_that_is_there_is_not_overwritten(exported, run_folder):
    before = (exported / "README.md").stat().st_mtime_ns
    with pytest.raises(UserError, match="is there already"):
        export(find_source(run_folder), exported)
    assert (exported / "README.md").stat().st_mtime_ns == before


def test_the_folder_appears_in_one_piece(tmp_path):
    with unfinished(tmp_path / "a" / "out") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "x").read_text() == "1"
    with pytest.raises(KeyError), unfinished(tmp_path / "b") as folder:
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), unfinished(tmp_path / "file" / "out"):
        pass


def test_the_card_says_where_the_weights_come_from(exported):
    text = (exported / "README.md").read_text()
    digest = hashlib.sha256((exported / "model.safetensors").read_bytes()).hexdigest()
    for said in (
        "# mine", "simla-tiny-kmeans128", "2203.14395", "itc, itm, mlm, mim, psl", "commit 0123abc", digest,
        "train-*.parquet", "CC-BY-4.0, CC0 \\| 1.0", "| retrieval | t2i_r10 | 0.25 |", "best step | 10",
        "128 kmeans codes in place of", "nothing but the rendered shapes", "model.keywords(",
    ):  # fmt: skip
        assert said in text, said
    assert "secret" not in text
    assert json.loads((exported / "manifest.json").read_text()).keys() == {
        "label", "git_sha", "packages", "data", "fallbacks", "licenses",
    }  # fmt: skip
