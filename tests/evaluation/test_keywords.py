from dataclasses import replace

import numpy as np
import pytest
import torch

from simla_ray.data.text import load_stop_words
from simla_ray.evaluation import keywords
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.intervals import mean_interval
from simla_ray.evaluation.keywords import Candidates, average_precision, truth_of
from simla_ray.evaluation.work import Work

from .conftest import make_scorer, on_ranks


def slow_ap(order, truth):
    """order: words, best first."""
    precisions = []
    for k, word in enumerate(order, start=1):
        if word in truth:
            precisions.append(len(truth & set(order[:k])) / k)
    return sum(precisions) / len(truth)


def test_average_precision_by_hand():
    assert average_precision(np.array([True, True, False])) == 1.0
    assert average_precision(np.array([False, True, False, True])) == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert average_precision(np.array([False, False, True])) == pytest.approx(1 / 3)


def test_average_precision_against_a_loop():
    rng = np.random.default_rng(0)
    for _ in range(50):
        words = [f"w{i}" for i in rng.permutation(20)]
        truth = set(rng.choice(words, int(rng.integers(1, 6)), replace=False))
        hits = np.array([word in truth for word in words])
        assert average_precision(hits) == pytest.approx(slow_ap(words, truth))


def test_score_of_a_word_is_the_mean_of_its_pieces(vocabulary):
    candidates = Candidates.of(vocabulary, load_stop_words("en"))
    assert candidates.words == sorted(candidates.words) and "red" in candidates.words and "the" not in candidates.words
    logits = torch.randn(3, len(vocabulary))
    scores = candidates.scores(logits)
    for n, word in enumerate(candidates.words):
        torch.testing.assert_close(scores[:, n], logits[:, vocabulary.word_ids(word)].mean(1))


def test_words_that_cannot_be_spelt_are_left_out(vocabulary):
    odd = type(vocabulary)(vocabulary.tokenizer, {"red": 0.5, "☃": 0.1, "blue": 0.2})
    assert Candidates.of(odd, frozenset()).words == ["blue", "red"]


def test_truth(data):
    stop_words = load_stop_words("en")
    item = replace(
        data.items[0], captions=["a red circle", "the large ring"], keywords=["Red", "large ring", "the", "circle"]
    )
    assert truth_of(item, stop_words) == ({"large", "ring"}, {"red", "large", "ring", "the", "circle"})
    item = replace(item, captions=["a red circle", "a red ring", "there is the blue ring"], keywords=None)
    assert truth_of(item, stop_words) == ({"ring", "blue"}, None)
    assert truth_of(replace(item, captions=["a red circle"]), stop_words) == (frozenset(), None)


def test_measure_against_a_loop(vocabulary, world_rows):
    scorer = make_scorer(vocabulary)
    data = EvalSet.load(scorer, world_rows["train"][:40], Work())
    with torch.no_grad():  # a teacher that is not the student
        for parameter in scorer.model.teacher.master.concept_head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    stop_words = load_stop_words("en")
    words = sorted(word for word in vocabulary.frequency if word not in stop_words)
    rows, selected = [], []
    for i, item in enumerate(data.items):
        said = set(item.captions[0].split())
        truth = (set(item.keywords) - said) & set(words)
        if not truth:
            continue
        towers = scorer.model.teacher.master
        with torch.no_grad():
            vector = towers.image_vector(towers.vision(torch.from_numpy(data.images([i]))))
            logits = towers.concept_head(vector)[0]
        score = {word: float(np.mean([float(logits[p]) for p in vocabulary.word_ids(word)])) for word in words}
        order = sorted((w for w in words if w not in said), key=lambda w: -score[w])
        by_frequency = sorted(order, key=lambda w: (-vocabulary.frequency[w], w))
        top = set(order[:5])
        rows.append(
            (slow_ap(order, truth), slow_ap(by_frequency, truth), len(top & truth) / 5, len(top & truth) / len(truth))
        )
        selected.append(i)
    result = keywords.measure(data)
    expected = dict(zip(("ap", "baseline_ap", "precision", "recall"), np.mean(rows, axis=0), strict=True))
    assert {name: result.metrics[name] for name in expected} == pytest.approx(expected)
    assert result.metrics["n"] == len(selected)
    for name, column in zip(expected, np.array(rows).T, strict=True):
        assert result.intervals[name] == pytest.approx(mean_interval(column))
    low, high = result.intervals["selected_precision"]
    assert low <= result.metrics["selected_precision"] <= high
    assert 0 <= result.metrics["selected_precision"] <= 1
    for example in result.examples:
        assert len(example["recommended"]) == 5 and not set(example["recommended"]) & set(example["caption"].split())
        assert 1 <= len(example["selected"]) <= 5 and set(example["selected"]) <= set(example["said"])


def test_the_quality_while_training_is_that_of_the_evaluation(vocabulary, world_rows):
    """Two rows show one image, one cannot be read; with the weights of the moment, whoever computes what."""
    rows = [dict(row) for row in world_rows["train"][:40]]
    rows[9]["image_id"], rows[20]["image"] = rows[4]["image_id"], b"no image"

    def on_rank(scorer, rank, gather, world):
        scorer.eval_mode()
        found = keywords.unsaid(EvalSet.load(scorer, rows[rank::world], Work(rank, world, gather)))
        before = found.ap()
        with torch.no_grad():
            for parameter in scorer.model.teacher.master.concept_head.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        return before, found.ap(), keywords.measure(found.data).metrics["ap"]

    expected = on_rank(make_scorer(vocabulary), 0, lambda own: [own], 1)
    assert expected[0] != expected[1] == expected[2]
    scorers = [make_scorer(vocabulary) for _ in range(3)]
    assert on_ranks(3, lambda rank, gather: on_rank(scorers[rank], rank, gather, 3)) == [expected] * 3


def test_selected_keywords_are_those_of_training(data):
    """Against the forward and the selection that the training step runs."""
    from simla_ray.data.collate import collate
    from simla_ray.data.sample import stacked
    from simla_ray.models.forward import Needs, forward_cross
    from simla_ray.objectives.keywords import select_keywords

    scorer = data.scorer
    psl = data.run.objectives.psl
    batch = collate(stacked([item.sample for item in data.items]), data.run)
    with torch.no_grad():
        record = forward_cross(
            scorer.model, batch, data.run.objectives, Needs.of(data.run.objectives, {"psl"}, has_teacher=True)
        )
    chosen = select_keywords(record.cls_attention, batch.keyword_ok, batch.word_start, batch.keyword_prior, psl)
    tokens, _ = scorer.encode_images(data.images(range(len(data))))
    found = keywords.selected_words(data, psl, data.items, tokens)
    for item, row, words in zip(data.items, chosen, found, strict=True):
        encoded = scorer.vocabulary.encode(item.captions[0], 25)
        assert set(words) == {encoded.words[p] for p in torch.nonzero(row)[:, 0]}


def test_rows_with_captions_only(scorer, world_rows):
    rows = [{k: v for k, v in row.items() if k != "keywords"} for row in world_rows["train"][:12]]
    result = keywords.measure(EvalSet.load(scorer, rows, Work()))
    assert "selected_precision" not in result.metrics and result.metrics["n"] > 0
    for row in rows:
        row["captions"], row["claims"] = row["captions"][:1], row["claims"][:1]
    assert "no column keywords" in keywords.measure(EvalSet.load(scorer, rows, Work()))


@pytest.mark.parametrize("select", ["content", "tfidf", "random"])
def test_controls_need_no_attention(vocabulary, world_rows, select):
    scorer = make_scorer(vocabulary, objectives__psl__select=select)
    result = keywords.measure(EvalSet.load(scorer, world_rows["test"][:6], Work()))
    assert all(example["selected"] for example in result.examples)
    if select == "content":
        assert all(example["selected"] == example["said"][:5] for example in result.examples)


def test_official_variant_may_select_padding(vocabulary, world_rows):
    scorer = make_scorer(
        vocabulary,
        objectives__psl__zero_vote_fill=True,
        objectives__psl__exclude_special=False,
        objectives__psl__stop_words=None,
        objectives__psl__unit="piece",
    )
    rows = [dict(row) for row in world_rows["test"][:2]]
    rows[0]["captions"] = ["red"]
    result = keywords.measure(EvalSet.load(scorer, rows, Work()))
    (short,) = [example for example in result.examples if example["caption"] == "red"]
    assert short["selected"] == ["red", "[PAD]"]
