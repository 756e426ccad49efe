"""evaluate.py on a run's folder: columns and files of the user's own, tasks that are not run, and scores of pairs."""

import csv
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from simla_ray.config.load import load_run
from simla_ray.errors import UserError
from simla_ray.evaluation import pairs
from simla_ray.orchestration import cli, evaluate
from simla_ray.orchestration.evaluate import evaluate_run, score_file
from tests.models.toy import with_concepts
from tests.release.conftest import make_run_folder

PACKS = Path(os.environ.get("SIMLA_PACKS_DIR", Path(__file__).parents[3] / "shared" / "packs"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, vocabulary):
    return make_run_folder(tmp_path_factory.mktemp("runs") / "mine", vocabulary, torch.rand(128, 192))[0]


@pytest.fixture
def listed(tmp_path, world_rows):
    """A CSV of images in files: two captions of one image, an image that is missing, one that is broken."""
    lines = []
    for i, row in enumerate(world_rows["test"][:9]):
        (tmp_path / f"{i}.jpg").write_bytes(row["image"] if i != 5 else b"no image")
        lines.append([f"{i}.jpg", row["captions"][0], ["ring", "star", ""][i % 3]])
    lines[3:3] = [["0.jpg", "a red, small ring", "ring"], ["gone.jpg", "a star", "star"], ["1.jpg", "?!", "star"]]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "caption", "kind"], *lines])
    return tmp_path / "pairs.csv"


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def labels_of_all_rows(monkeypatch):
    """Fewer rows of a unit, so that labels are joined over units."""
    from simla_ray.data.sources import listed

    monkeypatch.setattr(listed, "UNIT_ROWS", 5)


def test_classes_of_a_column_by_its_own_name(run_folder, listed):
    results = evaluate_run(
        run_folder, ["classification"], data=[str(listed)], label_column="kind", templates=["{} here", "one {}"]
    )
    metrics = results["classification"].metrics
    assert (metrics["classes"], metrics["n"], metrics["unlabelled"]) == (2, 6, 2)
    named = {example["uid"].rpartition(":")[2]: example["label"] for example in results["classification"].examples}
    assert named == {"0": "ring", "1": "star", "6": "ring", "7": "star", "9": "ring", "10": "star"}
    with pytest.raises(UserError, match=r"--label-column: sort has no value in .*pairs\.csv"):
        evaluate_run(run_folder, data=[str(listed)], label_column="sort")


def test_classes_of_parquet(run_folder, tmp_path, world_files):
    table = pq.read_table(world_files / "test.parquet")
    kinds = [["a", "b", "c"][i % 3] for i in range(len(table))]
    pq.write_table(table.append_column("group", [kinds]), tmp_path / "rows.parquet", row_group_size=7)
    results = evaluate_run(run_folder, ["classification"], data=[str(tmp_path / "rows.parquet")], label_column="group")
    uids = table["uid"].to_pylist()
    for example in results["classification"].examples:
        assert example["label"] == kinds[uids.index(example["uid"])]
    pq.write_table(table.append_column("label", [kinds]), tmp_path / "same.parquet", row_group_size=11)
    again = evaluate_run(run_folder, ["classification"], data=[str(tmp_path / "same.parquet")])
    assert again["classification"] == results["classification"]


def test_ratings_are_of_all_rows_however_many_are_evaluated(run_folder, tmp_path, world_files, world_rows, monkeypatch):
    monkeypatch.setattr(evaluate.pipeline, "iterate_rows", lambda index, *share: iter(world_rows["test"][:2]))
    uids, captions = zip(*((row["uid"], row["captions"][0]) for row in world_rows["test"]), strict=True)
    pairs_of = [(i, (i + j) % 48) for i in range(0, 48, 5) for j in range(3)]
    lines = [f"{uids[i]}\t{captions[c]}\t{c % 4}" for i, c in pairs_of]
    (tmp_path / "r.tsv").write_text("\n".join(["uid\tcaption\trating", *lines]))
    results = evaluate_run(run_folder, data=[str(world_files / "test.parquet")], ratings=tmp_path / "r.tsv")
    metrics = results["ratings"].metrics
    assert (metrics["n"], metrics["n_images"], metrics["dropped"]) == (30, 10, {})
    assert set(metrics["itm"]) == set(results["ratings"].intervals["itm"]) == {"spearman", "kendall"}


@pytest.mark.ray
@pytest.mark.slow
def test_workers_share_the_rows_and_nothing_changes(vocabulary, tmp_path, world_files, world_rows, ray_session, capsys):
    """Labels of a column, ratings and layers that are chosen among them."""
    table = pq.read_table(world_files / "test.parquet")
    kinds = [["a", "b", None][i % 3] for i in range(len(table))]
    pq.write_table(table.append_column("group", [kinds]), tmp_path / "rows.parquet", row_group_size=7)
    lines = [f"{row['uid']}\t{row['captions'][0]}\t{i % 4}" for i, row in enumerate(world_rows["test"][:20])]
    (tmp_path / "r.tsv").write_text("\n".join(["uid\tcaption\trating", *lines]))
    sets = {f"data__{name}": [str(world_files / f"{name}.parquet")] for name in ("train", "val")}
    mine, _ = make_run_folder(tmp_path / "mine", vocabulary, torch.rand(128, 192), **sets)
    arguments = [str(mine), "--data", str(tmp_path / "rows.parquet"), "--label-column", "group", "--json"]
    arguments += ["--ratings", str(tmp_path / "r.tsv"), "--layers", "auto"]
    found = []
    for more in ([], ["--workers", "3"]):
        assert cli.evaluate_main([*arguments, *more]) == 0
        out, err = capsys.readouterr()
        found.append(json.loads(out))
        assert ("cluster    " in err) == bool(more)
    alone, shared = (dict(numbers(each)) for each in found)
    assert set(alone) == set(shared) and len(alone) > 60
    assert alone == pytest.approx(shared, abs=1e-5, nan_ok=True)
    assert {"classification", "ratings", "grounding"} <= set(found[1]) and list(mine.glob(".workers*")) == []


@pytest.mark.ray
@pytest.mark.slow
def test_mistakes_of_the_user_are_one_error_among_workers_too(run_folder, world_files, ray_session):
    data = [str(world_files / "test.parquet")]
    for workers, label, said in (
        (2, "sort", "--label-column: sort has no value in "),
        (1000, None, "--workers: 1000 of 1 CPUs each, but the cluster has "),
        (0, None, "--workers: 0 is below 1"),
    ):
        with pytest.raises(UserError, match=said):
            evaluate_run(run_folder, data=data, label_column=label, workers=workers, say=lambda line: None)


def numbers(tree, path=()):
    """Path -> number, of all in a tree of JSON."""
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list):
            yield from numbers(value, (*path, name))
        elif not isinstance(value, str):
            yield (*path, name), value


def test_a_task_asked_for_by_name_says_what_it_lacks(run_folder, listed, capsys):
    arguments = [str(run_folder), "match", "grounding", "ratings", "--data", str(listed)]
    assert cli.evaluate_main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert list(printed) == ["data", "match"] and set(printed["data"]["not_run"]) == {"grounding", "ratings"}
    assert err.splitlines() == [
        "note: grounding is not run: no column phrases",
        "note: ratings is not run: no --ratings",
    ]
    assert printed["match"]["intervals"]["auc_random"][0] <= printed["match"]["auc_random"]
    assert cli.evaluate_main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("not run: grounding (no column phrases")
    assert cli.evaluate_main([str(run_folder), "mach", "--data", str(listed)]) == 2
    assert "mach is not one of retrieval, match" in capsys.readouterr().err


def test_scores_of_a_csv(run_folder, listed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pairs, "PAIRS", 4)
    out = tmp_path / "scores.csv"
    assert cli.evaluate_main([str(run_folder), "--score", str(listed), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"scored     9 of 12 pairs, in {out}" in said
    assert "dropped    caption_empty 1, image_missing 1, image_unreadable 1" in said
    found = read(out)
    assert list(found[0]) == ["uid", "image", "caption", "itc", "itm", "dropped"]
    given = read(listed)
    assert [(line["image"], line["caption"]) for line in found] == [(line["image"], line["caption"]) for line in given]
    assert [line["dropped"] for line in found if line["dropped"]] == [
        "image_missing",
        "caption_empty",
        "image_unreadable",
    ]
    for line in found:
        if line["dropped"]:
            assert line["itc"] == line["itm"] == ""
        else:
            assert -1 <= float(line["itc"]) <= 1 and 0 <= float(line["itm"]) <= 1
    assert not list(tmp_path.glob("*.unfinished"))
    first = out.read_bytes()
    assert score_file(run_folder, [str(listed)], out, say=lambda line: None)["scored"] == 9
    assert out.read_bytes() == first


def test_scores_are_those_of_simla_ray_load(run_folder, listed, tmp_path):
    import simla_ray

    score_file(run_folder, [str(listed)], tmp_path / "scores.csv", say=lambda line: None)
    lines = [line for line in read(tmp_path / "scores.csv") if not line["dropped"]]
    model = simla_ray.load(run_folder)
    images = [listed.parent / line["image"] for line in lines]
    captions = [line["caption"] for line in lines]
    cosines = (model.encode_image(images) * model.encode_text(captions)).sum(1)
    assert np.allclose([float(line["itc"]) for line in lines], cosines, atol=2e-5)
    assert np.allclose([float(line["itm"]) for line in lines], model.match(images, captions), atol=2e-5)


def test_scores_of_parquet_with_several_captions(run_folder, world_files, world_rows, tmp_path, capsys):
    out = tmp_path / "scores.csv"
    arguments = [str(run_folder), "--score", str(world_files / "train.parquet"), "--out", str(out), "--json"]
    assert cli.evaluate_main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == {"pairs": 288, "scored": 288, "dropped": {}}
    assert [(line["uid"], line["caption"]) for line in read(out)] == [
        (row["uid"], caption) for row in world_rows["train"] for caption in row["captions"]
    ]


def test_images_of_a_list_that_lie_elsewhere(run_folder, listed, tmp_path):
    (tmp_path / "lists").mkdir()
    moved = listed.rename(tmp_path / "lists" / "pairs.csv")
    out = tmp_path / "scores.csv"
    assert score_file(run_folder, [str(moved)], out, say=lambda line: None)["scored"] == 0
    assert score_file(run_folder, [str(moved)], out, say=lambda line: None, images=[tmp_path])["scored"] == 9


@pytest.fixture(scope="module")
def reads_phrases(tmp_path_factory, vocabulary, world_rows):
    """A run over boxes and tags whose concepts come from a column."""
    keys = {
        "method": "mvptr", "queue": 0, "regions__source": "boxes", "tags__source": "box_labels",
        "concepts__source": "column", "concepts__most": 300, "concepts__min_count": 1,
    }  # fmt: skip
    run = load_run(overrides={key.replace("__", "."): value for key, value in keys.items()})
    words = with_concepts(vocabulary, world_rows["train"], run)
    return make_run_folder(tmp_path_factory.mktemp("runs") / "phrases", words, **keys)[0]


def test_a_column_of_phrases_is_read_wherever_rows_are(reads_phrases, world_files, world_rows, tmp_path):
    file = str(world_files / "test.parquet")
    measured = evaluate_run(reads_phrases, ["retrieval"], data=[file])["retrieval"].metrics
    found = score_file(reads_phrases, [file], tmp_path / "scores.csv", say=lambda line: None)
    assert found == {"pairs": 48, "scored": 48, "dropped": {}} and measured["n_captions"] == 48
    rows = read(tmp_path / "scores.csv")
    cosines = [
        one.itc
        for one in pairs.score_pairs(evaluate._opened(reads_phrases, torch.device("cpu"))[1], world_rows["test"])
    ]
    assert np.allclose([float(row["itc"]) for row in rows], cosines, atol=1e-5)


def test_files_without_the_column_of_phrases_are_refused(reads_phrases, world_files, tmp_path):
    bare = tmp_path / "bare.parquet"
    pq.write_table(pq.read_table(world_files / "test.parquet").drop_columns(["phrases"]), bare)
    why = r"no phrases in the first rows of .*bare\.parquet, which concepts\.source=column reads"
    with pytest.raises(UserError, match=f"^--data: {why}"):
        evaluate_run(reads_phrases, data=[str(world_files / "test.parquet"), str(bare)])
    with pytest.raises(UserError, match=f"^--score: {why}"):
        score_file(reads_phrases, [str(bare)], tmp_path / "scores.csv", say=lambda line: None)
    assert not (tmp_path / "scores.csv").exists()


def test_groups_of_emoji_are_classes(run_folder):
    pack = PACKS / "openmoji.parquet"
    if not pack.exists():
        pytest.skip(f"{pack} is not there")
    table = pq.read_table(pack, columns=["id", "group", "split"]).to_pylist()
    groups = {row["id"]: row["group"] for row in table if row["split"] == "val"}
    result = evaluate_run(run_folder, ["classification"], data=[str(pack)], split="val", label_column="group")
    metrics = result["classification"].metrics
    assert metrics["n"] == len(groups) and metrics["classes"] == len(set(groups.values()))
    assert metrics["majority"] == pytest.approx(max(Counter(groups.values()).values()) / len(groups))
    assert all(example["label"] == groups[example["uid"]] for example in result["classification"].examples)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--score", "LIST"], "--score, --out: give both"),
        (["--out", "x.csv"], "--score, --out: give both"),
        (["match", "--score", "LIST", "--out", "x.csv"], "--score: measures nothing, so it takes no tasks"),
        (["--score", "LIST", "--out", "x.csv", "--label-column", "a"], "takes no label-column"),
        (["--score", "gone.csv", "--out", "x.csv"], "--score: gone.csv does not exist"),
        (["--score", "LIST", "--out", "LIST"], "pairs.csv is one of the files to score"),
        (["--score", "LIST", "--out", "x.csv", "--images", "gone"], "--images: gone is no folder"),
        (["--score", "LIST", "--out", "nowhere/x.csv"], "--out: nowhere/x.csv cannot be written"),
        (["match", "--label-column", "a"], "--label-column: is about the task classification; found tasks match"),
        (["match", "--ratings", "r.csv"], "--ratings: is about the task ratings; found tasks match"),
        (["--split", "val"], "--split: val is about --data, which is missing"),
        (["--images", "pictures"], "--images: pictures is about --data, which is missing"),
        (["--templates", "a photo", "--data", "LIST"], "--templates: 'a photo' is no file and has no {}"),
        (["--ratings", "gone.csv", "--data", "LIST"], "--ratings: gone.csv cannot be read"),
    ],
)
def test_one_line_for_a_mistake(run_folder, listed, capsys, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [str(listed) if argument == "LIST" else argument for argument in arguments]
    assert cli.evaluate_main([str(run_folder), *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
