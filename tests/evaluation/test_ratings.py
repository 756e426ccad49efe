import json

import numpy as np
import pytest

from simla_ray.data.text import clean
from simla_ray.errors import UserError
from simla_ray.evaluation import intervals
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.ratings import measure, read_ratings
from simla_ray.evaluation.work import Work

from .conftest import make_scorer
from .test_correlation import slow_spearman, slow_tau_b


def write(path, lines, columns=("uid", "caption", "rating")):
    """CSV, TSV or JSON lines, by the ending."""
    if path.suffix in (".csv", ".tsv"):
        mark = {".csv": ",", ".tsv": "\t"}[path.suffix]
        path.write_text("\n".join(mark.join(map(str, line)) for line in (columns, *lines)))
    else:
        path.write_text("\n".join(json.dumps(dict(zip(columns, line, strict=True))) for line in lines))
    return path


@pytest.fixture(scope="module")
def rows(world_rows):
    return [dict(row) for row in world_rows["train"][:12]]


def lines_of(rows):
    """Every image with its own and three other captions, some of them rated twice."""
    rng = np.random.default_rng(0)
    pairs = [(row["uid"], rows[(i + j) % len(rows)]["captions"][0]) for i, row in enumerate(rows) for j in range(4)]
    pairs += pairs[::5]
    return [(uid, caption, int(r)) for (uid, caption), r in zip(pairs, rng.integers(1, 5, len(pairs)), strict=True)]


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl"])
def test_measure_against_a_loop(scorer, rows, tmp_path, monkeypatch, ending):
    monkeypatch.setattr(intervals, "RESAMPLES", 25)
    lines = lines_of(rows)
    people = read_ratings(write(tmp_path / f"ratings{ending}", lines))
    data = EvalSet.load(scorer, rows[:2], Work())  # what is evaluated otherwise does not matter
    result = measure(data, (people, rows))
    told = {}
    for uid, caption, rating in lines:
        told.setdefault((uid, clean(caption, 30)), []).append(rating)
    # In the order of the images, and in theirs of the file.
    pairs = sorted(told, key=lambda pair: [row["uid"] for row in rows].index(pair[0]))
    target = np.array([np.mean(told[pair]) for pair in pairs])
    alone = EvalSet.load(scorer, rows, Work())
    place = {row["uid"]: i for i, row in enumerate(rows)}
    cosine, logit = [], []
    for uid, caption in pairs:
        tokens, vector = scorer.encode_images(alone.images([place[uid]]))
        ids, mask, text = scorer.encode_texts([caption])
        cosine.append(float(vector[0] @ text[0]))
        logit.append(float(scorer.match_logits(tokens, ids.new_zeros(1), ids, mask)[0]))
    assert result.metrics["n"] == len(pairs) == 48 and result.metrics["n_images"] == 12
    for name, score in (("itc", np.array(cosine)), ("itm", np.array(logit))):
        assert result.metrics[name]["spearman"] == pytest.approx(slow_spearman(score, target), abs=1e-6)
        assert result.metrics[name]["kendall"] == pytest.approx(slow_tau_b(score, target), abs=1e-6)
        draws, found = np.random.default_rng(0), []
        for _ in range(25):
            images = [rows[i]["uid"] for i in draws.integers(0, 12, 12)]  # each with all its pairs
            drawn = [k for uid in images for k, pair in enumerate(pairs) if pair[0] == uid]
            found.append(slow_tau_b(score[drawn], target[drawn]))
        assert result.intervals[name]["kendall"] == pytest.approx(np.percentile(found, [2.5, 97.5]), abs=1e-6)
    for example in result.examples:
        mean = np.mean(told[example["uid"], example["caption"]])
        assert example["rating"] == pytest.approx(mean, abs=1e-4) and example["image"]
        assert 0 < example["place"] <= 1 and 0 < example["human_place"] <= 1


def test_what_cannot_be_used_is_counted(scorer, rows, tmp_path):
    rows = [dict(row) for row in rows[:4]]
    rows[1]["image"] = b"no image"
    rows[2]["image_id"] = "photo.jpg"
    a, broken = rows[0]["uid"], rows[1]["uid"]
    lines = [(a, "a red ring", 1), (a, "A red ring!", 4), ("photo.jpg", "a star", 2), (broken, "a ring", 3),
             (broken, "a star", 3), ("nobody", "a ring", 3), ("", "a ring", 1), (a, "?!", 1), (a, "a star", "good"),
             (a, "a star", "nan")]  # fmt: skip
    people = read_ratings(write(tmp_path / "r.tsv", lines, ("image", "caption", "rating")))
    given = people, [row for row in rows if people.name_of(row) is not None]
    assert len(given[1]) == 3
    result = measure(EvalSet.load(scorer, rows, Work()), given)
    assert result.metrics["dropped"] == {"caption_empty": 1, "image_missing": 1, "image_unknown": 1,
                                         "image_unreadable": 2, "rating_unreadable": 2}  # fmt: skip
    assert result.metrics["n"] == 2, "captions that are equal when cleaned are one pair, rated 2.5"
    assert {example["rating"] for example in result.examples} == {2.5, 2.0}


def test_what_is_missing_is_said(vocabulary, scorer, rows, tmp_path):
    data = EvalSet.load(scorer, rows[:2], Work())
    assert measure(data) == "no --ratings"
    people = read_ratings(write(tmp_path / "same.csv", [(row["uid"], "a ring", 2) for row in rows]))
    assert measure(data, (people, rows)) == "all ratings are the same"
    itc = make_scorer(vocabulary, objectives__itm__weight=0)
    people = read_ratings(write(tmp_path / "r.csv", lines_of(rows)))
    assert "itm" not in measure(EvalSet.load(itc, rows[:2], Work()), (people, rows)).metrics
    with pytest.raises(UserError, match=r"--ratings: .*r\.csv has no rating of a row.*\(image_unknown 58\)"):
        measure(data, (people, []))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.csv", "uid,caption\na,b", r"has no column rating; found caption, uid"),
        ("r.csv", "id,caption,rating\na,b,1", r"has no column uid or image"),
        ("r.csv", "", r"found no line"),
        (
            "r.csv",
            "uid,caption,rating\na,b,much\n,b,1",
            r"can be used \(image_missing 1, rating_unreadable 1\)",
        ),
        ("r.jsonl", '{"uid": "a"', "cannot be read"),
        ("r.jsonl", "[1]", "a line is no JSON object"),
        ("r.csv", b"\xff\xfe", "cannot be read"),
        ("r.parquet", "", r"is none of \.csv, \.tsv, \.jsonl"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        read_ratings(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_ratings(tmp_path / "gone.csv")
