"""Regions, tags and phrases as columns: what the online tower gives, the run's head says, and a training reads."""

import hashlib
import io
import json
import math
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from simla_ray.config.load import load_run, to_yaml
from simla_ray.data import pipeline, world
from simla_ray.data.convert import conversion
from simla_ray.data.convert.annotation import Annotation
from simla_ray.data.convert.plan import STATE, Options
from simla_ray.data.convert.survey import rows_between
from simla_ray.data.cursor import Cursor
from simla_ray.data.index import build_index
from simla_ray.data.packing import pack
from simla_ray.data.phrases import given_phrases, is_noun, noun_lemma, phrases_of
from simla_ray.data.sample import SampleMaker
from simla_ray.data.schema import normalise
from simla_ray.data.text import clean, load_stop_words
from simla_ray.errors import UserError
from simla_ray.evaluation.scorer import Scorer
from simla_ray.models.checkpoint_io import save_tensors
from simla_ray.models.model import Model
from simla_ray.orchestration.annotate.annotation import _frequency
from simla_ray.orchestration.annotate.annotators import Annotators, Words
from simla_ray.orchestration.annotate.command import main
from simla_ray.orchestration.manifest import fallbacks
from simla_ray.orchestration.preflight import check
from simla_ray.orchestration.prepare import prepare
from simla_ray.orchestration.region_tower import load_region_tower, with_tower
from simla_ray.release.source import find_source, trained_model
from simla_ray.training.comm import Comm
from simla_ray.training.step import Losses, Step
from tests.release.conftest import make_run_folder

MAX_PIXELS = 10**6
NAMES = ("regions", "tags", "phrases")
#: Rows of the source that have no boxes, an empty list of them, no picture, labels of other boxes, and a bad box.
PLAIN, EMPTY, BROKEN, UNLIKE, FLAT = 3, 4, 6, 9, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vocabulary):
    """An exported run of SIMLA's with random weights and a teacher of its own, whose keyword head is sure of itself."""
    folder = tmp_path_factory.mktemp("exported") / "mine"
    vocabulary.save(folder)
    run = load_run()
    (folder / "config.yaml").write_text(to_yaml(run))
    (folder / "manifest.json").write_text(json.dumps({"licenses": ["CC0"]}))
    torch.manual_seed(3)
    model = Model(run, len(vocabulary))
    for towers in (model.student, model.teacher.master):
        for parameter in towers.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        towers.concept_head.weight.data.mul_(60)
        towers.concept_head.bias.data.zero_()
    save_tensors(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory, world_rows):
    """24 rows of the world, in row groups of 8, with what is not as it should be."""
    rows = [dict(row) for row in world_rows["train"][:24]]
    rows[PLAIN] |= {"boxes": None, "box_labels": None}
    rows[EMPTY] |= {"boxes": [], "box_labels": []}
    rows[BROKEN]["image"] = b"no picture"
    rows[UNLIKE]["box_labels"] = ["one", "too", "many", "by", "far"]
    rows[FLAT]["boxes"] = [[0.5, 0.5, 0.5, 0.9]] * len(rows[FLAT]["boxes"])
    file = tmp_path_factory.mktemp("source") / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=world.SCHEMA), file, row_group_size=8)
    return file


def asked(*options, names=NAMES):
    return ["--with", ",".join(names), "--tasks", "2", "--tag-threshold", "0.2", *options]


@pytest.fixture(scope="module")
def annotated(ray_session, folder, source, tmp_path_factory):
    out = tmp_path_factory.mktemp("annotated") / "out"
    assert main([str(source), "--to", str(out), "--run", str(folder), *asked()]) == 0
    return out


def read(uri):
    index = build_index([str(uri)], None, [], "x")
    return [row for _, row in rows_between(index, 0, len(index))]


def manifest_of(out):
    return json.loads((out / "manifest.json").read_text())


def annotators(folder, names, tags=10, threshold=0.2):
    words = Words.of(find_source(folder)) if "tags" in names else None
    return Annotators(names, folder, 7, tags, threshold, words, MAX_PIXELS)


def online(folder, source, **keys):
    """A run of UNITER's whose frozen tower is the run's, its samples as evaluation makes them, and its model."""
    keys = {"method": "uniter", "regions.source": source, "regions.grid": 7, "regions.max": 49, **keys}
    run = load_run(overrides={**keys, "batch.micro": 4, "batch.global": 8, "ray.workers": 1})
    run = with_tower(run)
    model = Model(run, 64).eval()
    load_region_tower(model, run)
    return run, model.student.vision


@pytest.mark.ray
def test_regions_are_what_the_frozen_tower_makes_in_training(annotated, folder, vocabulary):
    frozen = {"regions.features": "tower", "regions.weights": str(folder)}
    (boxed, tower), (celled, _) = (online(folder, name, **frozen) for name in ("boxes", "grid"))
    read_back, _ = online(folder, "column", **{"regions.width": 64})
    of_boxes, of_cells, of_column = (SampleMaker(run, vocabulary, training=False) for run in (boxed, celled, read_back))
    rows = read(annotated)
    assert len(rows) == 21
    of_source = {row["uid"]: row for row in read(next(iter(manifest_of(annotated)["source"]["uris"])))}
    for row in rows:
        given = of_source[row["uid"]]
        expected, found = (of_boxes if given["boxes"] else of_cells)(given, 0), of_column(row, 0)
        n = int(expected["n_regions"])
        assert n == found["n_regions"] == (len(given["boxes"]) + 1 if given["boxes"] else 49)
        np.testing.assert_array_equal(found["image"], expected["image"])
        np.testing.assert_array_equal(found["region_boxes"][:n], expected["region_boxes"][:n])
        image, boxes = (torch.from_numpy(expected[name])[None] for name in ("image", "region_boxes"))
        features = tower.look(image, None, boxes)[0, :n].numpy()
        # Batches of other sizes add in another order: what is left is float16's rounding, and at most one step of it.
        np.testing.assert_allclose(found["regions"][:n], features, rtol=2e-3, atol=1e-5)
        if given["boxes"]:
            labels = dict(zip(map(tuple, given["boxes"]), given["box_labels"], strict=True))
            assert row["box_labels"] == [labels.get(tuple(box), "") for box in row["boxes"]]
            assert row["box_labels"][0] == "" and row["boxes"][0] == [0, 0, 1, 1]


@pytest.mark.ray
def test_the_manifest_says_what_was_added_by_what(annotated, folder, source):
    manifest, rows = manifest_of(annotated), read(annotated)
    assert manifest["dropped"] == {"image_unreadable": 1, "box_labels_unlike_boxes": 1, "boxes_unreadable": 1}
    lines = [json.loads(line) for line in (annotated / "dropped.jsonl").read_text().splitlines()]
    assert {line["row"] for line in lines} == {BROKEN, UNLIKE, FLAT}
    about = manifest["annotation"]
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert about["run"] == {
        "name": "mine", "label": "simla-tiny-kmeans128", "checkpoint": "mine", "sha256": sha256, "licenses": ["CC0"],
    }  # fmt: skip
    assert manifest["options"]["run"] == f"mine ({sha256[:12]})"
    assert {name: manifest["options"][name] for name in ("with", "grid", "tags", "tag_threshold")} == {
        "with": "regions,tags,phrases", "grid": 7, "tags": 10, "tag_threshold": 0.2,
    }  # fmt: skip
    assert about["vocabulary"]["restricted_to"] == "nouns" and about["packages"]["torch"] == torch.__version__
    phrases = sum(phrase["boxes"] is None for row in rows for phrase in row["phrases"])
    assert about["counts"] == {
        "regions": sum(len(row["region_feats"]) for row in rows), "rows_without_boxes": 2, "rows_without_regions": 0,
        "tags": sum(len(row["tags"]) for row in rows), "rows_without_tags": sum(not row["tags"] for row in rows),
        "phrases": phrases, "rows_without_phrases": 0,
    }  # fmt: skip
    assert manifest["licenses"] == {rows[0]["license"]: 21}
    schema = pq.read_schema(next(annotated.glob("*.parquet")))
    assert schema.field("region_feats").type == pa.list_(pa.list_(pa.float16()))
    # All else is as it was.
    mine = {"boxes", "box_labels", "region_feats", "tags", "phrases"}
    was = {row["uid"]: row for row in read(source)}
    for row in rows:
        assert {k: v for k, v in row.items() if k not in mine} == {
            k: v for k, v in was[row["uid"]].items() if k not in mine
        }


@pytest.mark.ray
def test_phrases_are_the_rules_and_those_with_boxes_stay(annotated, source):
    was = {row["uid"]: row for row in read(source)}
    for row in read(annotated):
        given = was[row["uid"]]["phrases"]
        assert row["phrases"][: len(given)] == given
        texts = [phrase["text"] for phrase in row["phrases"]]
        assert len(texts) == len(set(texts))
        for caption in row["captions"]:
            words = clean(caption, 100).split()
            found = {at for phrase in given_phrases(words, texts) for at in phrase.at}
            assert {at for phrase in phrases_of(words) for at in phrase.at} <= found


@pytest.mark.ray
def test_tags_are_the_heads_words_that_say_more_than_their_share(annotated, folder, vocabulary):
    """Against loops over words."""
    found = find_source(folder)
    model = trained_model(found.run, vocabulary, found.read(), found.file)
    scorer = Scorer(found.run, model, vocabulary, torch.device("cpu"))
    maker = SampleMaker(found.run, vocabulary, training=False)
    stop_words, some = load_stop_words("en"), 0
    for row in read(annotated):
        image = maker(row, 0)["image"]
        vector = scorer.encode_images(image[None], towers=model.teacher.master)[1]
        with torch.no_grad():
            logits = model.teacher.master.concept_head(vector)[0].double().tolist()
        scored = []
        for word, share in vocabulary.frequency.items():
            pieces = vocabulary.word_ids(word)
            if word in stop_words or not is_noun(word) or vocabulary.unk_id in pieces:
                continue
            p = 1 / (1 + math.exp(-sum(logits[i] for i in pieces) / len(pieces)))
            if p >= 0.2 and p > share:
                scored.append((-math.log(p / share), word))
        best = {}
        for _, word in sorted(scored):
            best.setdefault(noun_lemma(word), word)
        assert row["tags"] == list(best.values())[:10]
        some += len(row["tags"]) > 0
    assert some > 5


def test_captions_change_neither_tags_nor_regions(folder, world_rows):
    """The leak rule."""
    make = annotators(folder, NAMES)
    rows = [normalise(row, "") for row in world_rows["train"][:40]]
    others = [row | {"captions": ["zebras play chess", "a dog"], "phrases": None} for row in rows]
    (here, there) = (make(part) for part in (rows, others))
    for mine, theirs in zip(here, there, strict=True):
        assert mine.columns["tags"] == theirs.columns["tags"] and mine.columns["boxes"] == theirs.columns["boxes"]
        np.testing.assert_array_equal(mine.columns["region_feats"], theirs.columns["region_feats"])
        assert mine.columns["phrases"] != theirs.columns["phrases"]
    assert len({tuple(mine.columns["tags"]) for mine in here}) > 3


def test_a_threshold_and_a_number_bound_the_tags(folder, world_rows):
    rows = [normalise(row, "") for row in world_rows["train"][:10]]
    limits = ((10, 0.2), (2, 0.2), (10, 1.0))
    many, few, none = (annotators(folder, ("tags",), *of)(rows) for of in limits)
    for more, less, nothing in zip(many, few, none, strict=True):
        assert less.columns["tags"] == more.columns["tags"][:2]
        assert nothing.columns["tags"] == [] and nothing.counts == {"tags": 0, "rows_without_tags": 1}


def test_words_are_those_of_psl_where_it_has_a_list(vocabulary):
    listed = Words(vocabulary.frequency, "run", "objectives.psl.vocab", frozenset({"red", "circle", "the"}))
    assert listed.candidates(load_run(), vocabulary).words == ["circle", "red"]
    nouns = Words(vocabulary.frequency, "run", "nouns", None).candidates(load_run(), vocabulary).words
    assert "circle" in nouns and "red" not in nouns and "picture" not in nouns


def test_a_pair_of_pictures_gets_phrases_alone(folder, world_rows):
    pair = [row["image"] for row in world_rows["train"][:2]]
    row = {"uid": "a", "image": None, "images": pair, "captions": ["a dog left of two cats"]}
    (added,) = annotators(folder, NAMES)([row])
    texts = [phrase["text"] for phrase in added.columns["phrases"]]
    assert set(added.columns) == {"phrases"} and {"dog", "two cats"} <= set(texts)
    assert added.counts["rows_without_regions"] == added.counts["rows_without_tags"] == 1


@pytest.mark.ray
def test_shares_of_words_are_counted_where_the_run_has_none(ray_session, world_files, world_rows):
    found = _frequency([str(world_files / "train.parquet")], Options(), 2, None, print)
    said = [set(clean(c, 100).split()) for row in world_rows["train"] for c in row["captions"]]
    assert found["circle"] == sum("circle" in words for words in said) / len(said)


@pytest.mark.ray
@pytest.mark.slow
def test_what_was_interrupted_goes_on(ray_session, folder, source, tmp_path, monkeypatch, capsys, world_rows):
    """Ended between shards and manifest, a shard short; then the same command, and others."""
    rows = [dict(row, image=_large(i)) for i, row in enumerate(world_rows["train"][:24])]
    (tmp_path / "source").mkdir()
    large = tmp_path / "source" / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=world.SCHEMA), large, row_group_size=8)
    options = ["--shard-mb", "1", "--row-group-mb", "1"]
    command = [str(large), "--to", str(tmp_path / "out"), "--run", str(folder), *asked(*options)]

    def ended(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "_finish", ended)
    assert main(command) == 130
    monkeypatch.undo()
    reports = sorted((tmp_path / "out" / STATE).glob("data-*.json"))
    assert len(reports) > 2 and not (tmp_path / "out" / "manifest.json").exists()
    reports[1].unlink()
    was = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.parquet")}
    again = reports[1].name.removesuffix(".json")
    assert main([*command, "--tags", "3"]) == 2
    assert "was begun with --tags 10, now it is 3" in capsys.readouterr().err
    assert main(command) == 0
    assert f"resumed    {len(reports) - 1} of {len(reports)} shards" in capsys.readouterr().out
    now = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.parquet")}
    assert {name for name in now if now[name] != was[name]} == {again}
    whole = [*command[:2], str(tmp_path / "whole"), *command[3:]]
    assert main(whole) == 0
    assert manifest_of(tmp_path / "out")["shards"] == manifest_of(tmp_path / "whole")["shards"]
    assert manifest_of(tmp_path / "out")["annotation"] == manifest_of(tmp_path / "whole")["annotation"]
    capsys.readouterr()
    assert main(command) == 0 and "finished" in capsys.readouterr().out
    assert main([*command, "--grid", "3"]) == 2
    assert "was begun with --grid 7, now it is 3" in capsys.readouterr().err
    assert main([str(tmp_path / "out"), "--to", str(tmp_path / "twice"), "--run", str(folder), *asked()]) == 2
    assert "--with: rows of the source have region_feats already" in capsys.readouterr().err


@pytest.mark.ray
def test_a_mistake_in_an_actor_is_one_line(ray_session, source, tmp_path):
    make = partial(Annotators, ("regions",), tmp_path / "gone", 7, 10, 0.1, None, MAX_PIXELS)
    annotation = Annotation({}, {}, (), make, loads_model=True, row_bytes=0, about={})
    with pytest.raises(
        UserError, match=r"gone: no file, and no folder of a run or an export \(no config\.yaml in it\)$"
    ):
        conversion.convert([str(source)], str(tmp_path / "out"), Options(), 1, None, print, annotation)


def _large(i):
    """A picture of some 200 KB."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (260, 260, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.ray
@pytest.mark.parametrize("method", ["mvptr", "uniter"])
def test_a_training_reads_the_columns_and_runs_no_tower(annotated, method, tmp_path, ray_session):
    data = {f"data.{name}": [str(annotated)] for name in ("train", "val")}
    keys = {"method": method, "regions.source": "column", "batch.micro": 4, "batch.global": 8, "ray.workers": 1}
    if method == "mvptr":
        keys |= {"tags.source": "column", "concepts.source": "column", "concepts.min_count": 1}
    run, indexes = check(load_run(overrides={**data, **keys, "storage": str(tmp_path)}), devices=False)
    told = [line for line in fallbacks(run) if "mine's" in line or "SPICE" in line]
    assert [line.partition(":")[0] for line in told] == ["regions", "tags", "phrase concepts"][
        : 3 if method == "mvptr" else 1
    ]
    assert run.regions.width == 64 and indexes is not None
    prepared = prepare(run, tmp_path / "prepared", 2)
    lanes = list(range(run.micro_batches))
    stream = pipeline.training_stream(run, indexes["train"], prepared.vocabulary, lanes, Cursor.start(len(lanes)), 1, 1)
    packed = next(pack(pipeline.blocks_of(stream), lanes, run, len(indexes["train"])))
    assert not packed.dropped
    batch = packed.batch
    assert batch.regions.shape[2] == 64 and batch.region_mask.any(1).all()
    if method == "mvptr":
        assert prepared.vocabulary.concepts is not None and len(prepared.vocabulary.concepts) > 5
        assert (batch.tag_ids > 0).sum() > 2 * len(batch.tag_ids)
    model = Model(run, len(prepared.vocabulary))
    assert model.student.vision.features is None
    step = Step(run, Losses(run, model, None, 1, None).train(), 4, Comm(), torch.device("cpu"))
    assert step(0, [(n, batch) for n in lanes]).grad_norm.isfinite()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--with", "regions,poses"], "--with: poses is not one of regions, tags, phrases"),
        (["--with", ""], "--with: nothing is not one of regions, tags, phrases"),
        (["--with", "regions,phrases"], "--run: not given; --with regions,phrases needs a trained run"),
        (["--with", "phrases", "--run", "RUN"], "--run: RUN, but phrases are read by rules"),
        (["--with", "phrases", "--grid", "3"], "--grid: is about regions; found --with phrases"),
        (["--with", "tags", "--run", "RUN", "--tag-threshold", "1"], "--tag-threshold: 1.0, must be 0 or more"),
        (["--with", "regions", "--run", "RUN", "--grid", "0"], "--grid: 0, must be 1 to 32"),
        (["--with", "regions", "--run", "gone"], "--run: gone: no run there"),
        (["--with", "tags", "--run", "clip"], "--run: clip was trained without psl, so it has no keyword head"),
        (["--with", "regions", "--run", "uniter"], "has no image tower of its own (vision.source=regions)"),
        (["--with", "phrases", "--split", "val"], "--split: val, but"),
        (["--with", "phrases", "--to", "rows"], "--to: rows lies in rows, which is read"),
        (["--with", "phrases", "--to", "rows/new"], "--to: rows/new lies in rows, which is read"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, vocabulary, world_rows, options, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    rows = [{name: row[name] for name in ("uid", "image", "captions")} for row in world_rows["train"][:2]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows" / "rows.parquet")
    for method in {"clip", "uniter"}.intersection(options):
        make_run_folder(tmp_path / "runs" / method, vocabulary, method=method, queue=0)
    to = [] if "--to" in options else ["--to", "out"]
    assert main(["rows", *to, *options]) == 2
    error = capsys.readouterr().err
    assert line in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_there_is_said(tmp_path, capsys):
    assert main([str(tmp_path / "gone"), "--to", str(tmp_path / "out"), "--with", "phrases"]) == 2
    assert "gone does not exist" in capsys.readouterr().err
