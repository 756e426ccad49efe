import numpy as np
import pytest

from simla_ray.errors import UserError
from simla_ray.evaluation import classification, intervals
from simla_ray.evaluation.classification import TEMPLATES, measure, read_templates
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.work import Work

from .conftest import make_scorer

CLASSES = ["red circle", "blue_star", "green ring", "black cross", "white square", "diamond", "triangle"]


def labelled(world_rows, n=30, classes=CLASSES):
    return [dict(row, label=classes[i * i % len(classes)]) for i, row in enumerate(world_rows["train"][:n])]


@pytest.fixture
def data(scorer, world_rows):
    """Thirty images of four of seven classes, two without a label."""
    rows = labelled(world_rows)
    rows[3]["label"], rows[9]["label"] = None, " "
    return EvalSet.load(scorer, rows, Work())


def slow_scores(data, classes, templates):
    """(images, classes), prompt by prompt."""
    columns = []
    for name in classes:
        prompts = [t.replace("{}", name.replace("_", " ")) for t in templates]
        mean = np.mean([data.scorer.encode_texts([prompt])[2][0].numpy() for prompt in prompts], axis=0)
        columns.append(data.image_vectors @ (mean / np.linalg.norm(mean)))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("templates", [TEMPLATES, ("there is a {} and a {}",)])
def test_measure_against_a_loop(data, templates, monkeypatch):
    monkeypatch.setattr(classification, "CLASSES", 3)
    result = measure(data, templates)
    labels = [item.label for item in data.items]
    assert labels[3] is None and labels[9] is None
    classes = sorted({label for label in labels if label})
    scores = slow_scores(data, classes, templates)
    guesses = [(label, classes[row.argmax()]) for label, row in zip(labels, scores, strict=True) if label]
    metrics = result.metrics
    assert metrics["accuracy"] == pytest.approx(np.mean([a == b for a, b in guesses]))
    of_class = [np.mean([a == b for a, b in guesses if a == name]) for name in classes]
    assert metrics["class_accuracy"] == pytest.approx(np.mean(of_class))
    assert (metrics["n"], metrics["unlabelled"], metrics["classes"]) == (28, 2, len(classes))
    assert metrics["chance"] == 1 / len(classes)
    assert metrics["majority"] == max(labels.count(name) for name in classes) / 28
    wrong = {pair: guesses.count(pair) for pair in guesses if pair[0] != pair[1]}
    assert {(one["label"], one["predicted"]): one["n"] for one in metrics["confused"]}.items() <= wrong.items()
    assert metrics["confused"][0]["n"] == max(wrong.values())
    assert "top5" not in metrics and len(classes) <= 5
    for example in result.examples:
        assert example["hit"] == (example["label"] == example["predicted"]) and example["image"]
        assert example["top"][0]["label"] == example["predicted"]


def test_first_five_of_more_classes(scorer, world_rows):
    classes = sorted([*CLASSES, "ring", "large red star"])
    rows = labelled(world_rows, 27, classes)
    for row, name in zip(rows, classes, strict=False):
        row["label"] = name
    data = EvalSet.load(scorer, rows, Work())
    scores = slow_scores(data, classes, ["{}"])
    expected = [
        item.label in [classes[c] for c in np.argsort(-s)[:5]] for item, s in zip(data.items, scores, strict=True)
    ]
    assert measure(data, ["{}"]).metrics["top5"] == pytest.approx(np.mean(expected))


def test_intervals_against_a_loop(data, monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 50)
    classes = sorted({item.label for item in data.items if item.label})
    truth = np.array([classes.index(item.label) for item in data.items if item.label])
    scores = slow_scores(data, classes, TEMPLATES)[[i for i, item in enumerate(data.items) if item.label]]
    hit = scores.argmax(1) == truth
    draws, means, of_classes = np.random.default_rng(0), [], []
    for _ in range(50):
        drawn = draws.integers(0, len(truth), len(truth))
        means.append(hit[drawn].mean())
        of_classes.append(np.mean([hit[drawn][truth[drawn] == c].mean() for c in set(truth[drawn].tolist())]))
    found = measure(data).intervals
    assert found["accuracy"] == pytest.approx(np.percentile(means, [2.5, 97.5]))
    assert found["class_accuracy"] == pytest.approx(np.percentile(of_classes, [2.5, 97.5]))


def test_a_model_that_says_the_same_of_all_classes_names_none(scorer, world_rows):
    data = EvalSet.load(scorer, labelled(world_rows), Work())
    data.__dict__["image_vectors"] = np.zeros_like(data.image_vectors)
    metrics = measure(data).metrics
    assert metrics["accuracy"] == metrics["class_accuracy"] == 0


def test_what_is_missing_is_said(vocabulary, scorer, world_rows):
    rows = world_rows["train"][:6]
    assert measure(EvalSet.load(scorer, rows, Work())) == "no column label"
    same = [dict(row, label=7) for row in rows]
    assert measure(EvalSet.load(scorer, same, Work())) == "all labels are 7"
    without = make_scorer(vocabulary, objectives__itc__weight=0, eval__best="last")
    assert measure(EvalSet.load(without, labelled(world_rows, 6), Work())) == "no objective itc"


def test_labels_that_name_nothing(scorer, world_rows):
    given = [None, float("nan"), ["red"], {"a": 1}, b"red", " red ", 3, True]
    rows = [dict(row, label=label) for row, label in zip(world_rows["train"][:8], given, strict=True)]
    data = EvalSet.load(scorer, rows, Work())
    assert [item.label for item in data.items] == [None, None, None, None, None, "red", "3", "True"]


def test_rows_of_one_image_share_a_label(scorer, world_rows):
    a, b = (dict(row) for row in world_rows["train"][:2])
    b |= {"image_id": a["image_id"], "label": "red"}
    assert [item.label for item in EvalSet.load(scorer, [a, b], Work()).items] == ["red"]


def test_templates(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a drawing of a {}\n\n  {}, an emoji\n")
    assert read_templates([str(file), "the {}"]) == ("a drawing of a {}", "{}, an emoji", "the {}")
    with pytest.raises(UserError, match=r"--templates: 'a photo' is no file and has no \{\}"):
        read_templates(["a photo"])
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no template"):
        read_templates([str(file)])
    file.write_bytes(b"\xff{}")
    with pytest.raises(UserError, match="cannot be read"):
        read_templates([str(file)])
