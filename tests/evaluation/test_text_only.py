import numpy as np
import pytest
import torch

from simla_ray.evaluation import text_only
from simla_ray.evaluation.text_only import fit_text_only

COLORS = ["red", "blue", "green"]


def questions(n, seed=0):
    """Questions whose last word is the answer, among words that say nothing."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(COLORS, n).tolist()
    fill = [" ".join(rng.choice(["what", "is", "it", "this"], rng.integers(1, 6))) for _ in range(n)]
    return [f"{a} {b}?" for a, b in zip(fill, labels, strict=True)], labels


def test_learns_what_words_tell():
    texts, labels = questions(200)
    model = fit_text_only(texts, labels, seed=0)
    unseen, expected = questions(500, seed=1)
    assert model.predict(texts) == labels and model.predict(unseen) == expected


def test_learns_what_only_pairs_tell():
    """Neither word alone says whether a statement is true."""
    rng = np.random.default_rng(0)
    words = [rng.choice(["left", "right"], 2).tolist() for _ in range(400)]
    texts, labels = [" ".join(pair) for pair in words], [str(a == b) for a, b in words]
    assert fit_text_only(texts, labels, seed=0).predict(texts) == labels


def test_is_the_majority_where_words_tell_nothing():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["a", "b", "c", "d", "e", "f"], 4)) for _ in range(2000)]
    labels = rng.choice(COLORS, 2000, p=[0.2, 0.6, 0.2]).tolist()
    model = fit_text_only(texts, labels, seed=0)
    assert set(model.predict(texts)) == {"blue"}


def test_unknown_words_and_empty_texts_are_harmless():
    texts, labels = questions(200)
    model = fit_text_only([*texts, *[""] * 60], [*labels, *["blue"] * 60], seed=0)
    assert model.predict(["xyzzy plugh red?", "", "xyzzy", "?!"]) == ["red", "blue", "blue", "blue"]
    assert model.predict([]) == []


def test_equal_seeds_give_equal_weights():
    texts, labels = questions(300)
    labels[:60] = ["red"] * 60
    one, same, other = (fit_text_only(texts, labels, seed) for seed in (0, 0, 1))
    assert torch.equal(one.weight, same.weight) and torch.equal(one.bias, same.bias)
    assert not torch.equal(one.weight, other.weight)


def test_weights_are_the_optimum_of_the_penalised_likelihood(monkeypatch):
    """Against plain gradient descent on the dense problem."""
    monkeypatch.setattr(text_only, "L2", (3.0,))
    monkeypatch.setattr(text_only, "STEPS", 1000)
    texts, labels = questions(60)
    labels[::5] = ["red"] * 12
    rows = [text_only._row(text, features := text_only._frequent(iter(texts))) for text in texts]
    target = torch.tensor([COLORS.index(label) for label in labels])
    *_, (weight, bias) = text_only._fits(rows, target, np.arange(60), (len(features), 3), 0)
    x = torch.zeros(60, len(features), dtype=torch.float64)
    for i, row in enumerate(rows):
        x[i].index_add_(0, torch.from_numpy(row), torch.ones(len(row), dtype=torch.float64))
    w = torch.zeros(len(features), 3, dtype=torch.float64)
    b = torch.zeros(3, dtype=torch.float64)
    for _ in range(4000):
        residual = ((x @ w + b).softmax(1) - torch.nn.functional.one_hot(target, 3)) / 60
        w -= 0.2 * (x.T @ residual + 3.0 / 60 * w)
        b -= 0.2 * residual.sum(0)
    torch.testing.assert_close(weight, w.float(), atol=5e-3, rtol=0)
    torch.testing.assert_close(bias - bias.mean(), (b - b.mean()).float(), atol=5e-3, rtol=0)


def test_a_text_is_held_out_with_all_its_rows():
    texts = [f"statement {i}" for i in range(60) for _ in range(5)]
    held = text_only._tenth(texts, seed=0).reshape(60, 5)
    assert (held.all(1) == held.any(1)).all() and held.all(1).sum() == 6
    assert text_only._tenth(["is it red"] * 30, seed=0).sum() == 3


def test_rare_labels_are_left_out(monkeypatch):
    monkeypatch.setattr(text_only, "LABELS", 3)
    texts, labels = questions(200)
    model = fit_text_only([*texts, "a purple one"], [*labels, "purple"], seed=0)
    assert sorted(model.labels) == sorted(COLORS) and "purple" not in model.features


def test_few_rows_give_the_most_frequent_label():
    model = fit_text_only(["a", "b", "c"], ["no", "yes", "yes"], seed=0)
    assert model.predict(["a", "b"]) == ["yes", "yes"] and model.l2 is None
    with pytest.raises(ValueError, match="no texts"):
        fit_text_only([], [], seed=0)
