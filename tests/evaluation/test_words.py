import numpy as np
import pytest
import torch

from simla_ray.data.collate import collate
from simla_ray.data.sample import stacked
from simla_ray.evaluation import words
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.intervals import mean_interval
from simla_ray.evaluation.work import Work
from simla_ray.models.visual_codes import PatchCodes

from .conftest import make_scorer


@pytest.fixture
def tokenizer():
    return PatchCodes(torch.rand(128, 3 * 8 * 8, generator=torch.Generator().manual_seed(0)), 8)


def test_every_colour_word_is_masked_alone(scorer, world_rows):
    rows = [dict(row) for row in world_rows["test"][:2]]
    rows[0]["captions"] = ["a red circle and a red ring with a blue star"]
    rows[1]["captions"] = ["a circle"]
    data = EvalSet.load(scorer, rows, Work())
    cases = words.color_words(data)
    assert [(c.item, c.word) for c in cases] == [(0, "red"), (0, "red"), (0, "blue")]
    encoded = scorer.vocabulary.encode(rows[0]["captions"][0], 25)
    assert all(encoded.ids[c.position] == c.token_id for c in cases)
    masked = [words._with_mask(scorer.vocabulary, rows[0]["captions"][0], c, 25) for c in cases]
    assert masked == [
        "a [MASK] circle and a red ring with a blue star",
        "a red circle and a [MASK] ring with a blue star",
        "a red circle and a red ring with a [MASK] star",
    ]


def test_colours_against_one_at_a_time(data):
    scorer, vocabulary = data.scorer, data.scorer.vocabulary
    wrong = data.derangement()
    cases = words.color_words(data)
    right_hits, wrong_hits = [], []
    for case in cases:
        ids, mask = scorer.tokenize([data.items[case.item].captions[0]])
        assert ids[0, case.position] == vocabulary.word_ids(case.word)[0]
        ids[0, case.position] = vocabulary.mask_id
        for image, hits in ((case.item, right_hits), (wrong[case.item], wrong_hits)):
            tokens, _ = scorer.encode_images(data.images([image]))
            with torch.no_grad():
                hidden = scorer.fuse(tokens, torch.tensor([0]), ids, mask)
                guess = scorer.model.student.text.word_logits(hidden[0, case.position]).argmax()
            hits.append(int(guess) == case.token_id)
    metrics = words.measure(data).metrics
    assert metrics["color_right"] == pytest.approx(np.mean(right_hits))
    assert metrics["color_wrong"] == pytest.approx(np.mean(wrong_hits))
    assert metrics["n"] == len(cases) > 40
    owner = np.array([case.item for case in cases])
    assert words.measure(data).intervals["color_right"] == pytest.approx(mean_interval(np.array(right_hits), owner))


def test_only_the_picture_differs(data, monkeypatch):
    """With every picture its own wrong one both columns are equal."""
    monkeypatch.setattr(data, "derangement", lambda: np.arange(len(data)))
    metrics = words.measure(data).metrics
    assert metrics["color_right"] == metrics["color_wrong"]


def test_accuracies_against_a_loop(data, tokenizer):
    scorer, run = data.scorer, data.run
    student = scorer.model.student
    mlm, mim, mlm_owner = [], [], []
    for start in range(0, len(data), 32):
        samples = [item.sample for item in data.items[start : start + 32]]
        batch = collate(stacked(samples), run)
        codes = tokenizer(batch.image)
        with torch.no_grad():
            for b in range(len(samples)):
                tokens, _ = scorer.encode_images(batch.image[b : b + 1])
                mask = batch.token_mask[b : b + 1]
                hidden = scorer.fuse(tokens, torch.tensor([0]), batch.masked_ids[b : b + 1], mask)
                guess = student.text.word_logits(hidden)[0].argmax(-1)
                positions = batch.mlm_index[b][batch.mlm_weight[b] > 0]
                mlm += (guess[positions] == batch.token_ids[b][positions]).tolist()
                mlm_owner += [start + b] * len(positions)
            for c, patch_mask in enumerate(batch.patch_mask):
                from simla_ray.models.stack import Memory

                tokens = student.vision(batch.image[c : c + 1], patch_mask[None])
                n = int(batch.token_mask[c].sum())
                memory = Memory(student.text.embeddings(batch.token_ids[c : c + 1, :n]))
                every = torch.arange(1, tokens.shape[1])[None]
                guess = student.mim_head(student.text.query_with_image(tokens, memory, every))[0].argmax(-1)
                mim += (guess[patch_mask] == codes[c][patch_mask]).tolist()
    result = words.measure(data, tokenizer)
    metrics = result.metrics
    # Images without a masked word are drawn too: they change nothing but the draws.
    low, high = mean_interval(np.array(mlm), np.array(mlm_owner))
    assert result.intervals["mlm_accuracy"] == pytest.approx([low, high], abs=0.02)
    low, high = result.intervals["mim_accuracy"]
    assert low <= metrics["mim_accuracy"] <= high
    assert metrics["mlm_accuracy"] == pytest.approx(np.mean(mlm))
    assert metrics["mim_accuracy"] == pytest.approx(np.mean(mim))
    assert "mim_accuracy" not in words.measure(data).metrics


def test_examples_name_both_guesses(data):
    for example in words.measure(data).examples:
        assert example["caption"].count("[MASK]") == 1 and example["word"] in words.COLORS
        assert example["hit"] == (example["right"] == example["word"])


def test_a_run_that_predicts_neither(vocabulary, world_rows, tokenizer):
    scorer = make_scorer(vocabulary, objectives__mlm__weight=0, objectives__mim__weight=0)
    assert words.measure(EvalSet.load(scorer, world_rows["test"][:4], Work()), tokenizer) == "no objective mlm or mim"


def test_patches_without_words(vocabulary, world_rows, tokenizer):
    scorer = make_scorer(vocabulary, objectives__mlm__weight=0)
    data = EvalSet.load(scorer, world_rows["test"][:4], Work())
    assert set(words.measure(data, tokenizer).metrics) == {"mim_accuracy"}
