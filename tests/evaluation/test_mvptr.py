"""Evaluation over tags, regions and phrase concepts: what pairs share changes no score, and pictures alone will do."""

import numpy as np
import pytest
import torch

from simla_ray.config.load import load_run
from simla_ray.data.collate import collate
from simla_ray.data.region_source import with_regions
from simla_ray.data.sample import SampleMaker, stacked
from simla_ray.data.tag_source import with_tags
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.pairs import score_pairs
from simla_ray.evaluation.retrieval import measure
from simla_ray.evaluation.scorer import Scorer, seen
from simla_ray.evaluation.words import color_words
from simla_ray.evaluation.words import measure as measure_words
from simla_ray.evaluation.work import Work
from simla_ray.models.model import Model
from tests.models.toy import with_concepts

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["mvptr", "mvptr-grid"])
def scorer(request, world_rows, vocabulary):
    keys = ["concepts.most=300", "regions.grid=3", "batch.global=32", "ray.workers=1"]
    run = with_tags(with_regions(load_run(overrides=[f"method={request.param}", *keys]), None), None)
    vocabulary = with_concepts(vocabulary, world_rows["train"], run)
    torch.manual_seed(0)
    model = Model(run, len(vocabulary))
    with torch.no_grad():  # scores of fresh weights are all alike
        for parameter in model.student.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return Scorer(run, model, vocabulary, CPU)


def test_scores_of_pairs_are_those_of_the_training_pass(scorer, world_rows):
    """Clean inputs, the matched pass: vectors and ITM's logits, computed the other way round."""
    run, model, rows = scorer.run, scorer.model, world_rows["val"][:6]
    maker = SampleMaker(run, scorer.vocabulary, training=False)
    samples = [maker(row, 0) for row in rows]
    batch = collate(stacked(samples), run)
    student = model.student
    with torch.no_grad():
        words = student.text.encode(batch.token_ids, batch.token_mask)
        tags = student.text.embeddings.word_embeddings(batch.tag_ids)
        features = student.vision.look(batch.image, None, batch.region_boxes)
        image = student.vision.states(tags, batch.tag_ids != 0, features, batch.region_boxes, batch.region_mask)
        both = torch.cat([words, image[:, batch.tag_ids.shape[1] :]], 1)
        fused = student.merging.encoder(both, torch.cat([batch.token_mask, batch.region_mask], 1))
        two = model.match(fused[:, 0])
    tokens, vectors = scorer.encode_images(seen(samples))
    ids, mask, texts = scorer.encode_texts([row["captions"][0] for row in rows])
    torch.testing.assert_close(vectors, student.image_vector(image), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(texts, student.text_vector(words), rtol=1e-5, atol=1e-6)
    own = np.arange(6)
    logits = scorer.match_pairs(tokens, scorer.match_texts(ids, mask), own, own)
    torch.testing.assert_close(logits, two[:, 1] - two[:, 0], rtol=1e-4, atol=1e-5)
    assert ids.max() >= len(scorer.vocabulary)  # concepts are among them
    turned = scorer.match_pairs(tokens, scorer.match_texts(ids, mask), own[::-1].copy(), own[::-1].copy(), batch_size=2)
    torch.testing.assert_close(turned.flip(0), logits, rtol=1e-4, atol=1e-5)


def test_retrieval_over_a_set_and_scores_of_rows(scorer, world_rows):
    rows = world_rows["val"][:12]
    result = measure(EvalSet.load(scorer, rows, Work()))
    assert {"itc", "itm"} <= set(result.metrics)
    scored = list(score_pairs(scorer, rows))
    assert len(scored) == 12 and all(0 <= s.itm <= 1 and -1 <= s.itc <= 1 for s in scored)


def test_a_picture_alone_has_cells_of_the_grid_and_no_tags(scorer, world_rows):
    maker = SampleMaker(scorer.run, scorer.vocabulary, training=False)
    images = np.stack([maker(row, 0)["image"] for row in world_rows["val"][:3]])
    tokens, vectors = scorer.encode_images(images)
    assert tokens.shape[:2] == (3, 1 + 9) and vectors.isfinite().all()


def test_a_masked_colour_is_told_by_no_concept(scorer, world_rows):
    """Of every concept behind the words that is still to be seen, the masked word is no part."""
    data = EvalSet.load(scorer, world_rows["val"][:24], Work())
    cases = color_words(data)
    ids, _ = scorer.tokenize([data.items[c.item].captions[0] for c in cases], [c.position for c in cases])
    plain, _ = scorer.tokenize([data.items[c.item].captions[0] for c in cases])
    name = {i: concept for concept, i in scorer.vocabulary.concepts.ids.items()}
    hidden = 0
    for case, row, shown in zip(cases, ids.tolist(), plain.tolist(), strict=True):
        words = data.items[case.item].captions[0].split()
        n = len(scorer.vocabulary.encode(" ".join(words), scorer.run.text.max_tokens).ids)
        assert row[:n] == shown[:n]
        told = [i for i in shown[n:] if case.word in name.get(i, ())]
        hidden += len(told)
        if words.count(case.word) == 1:
            assert not any(case.word in name.get(i, ()) for i in row[n:])
    assert hidden > 10 and measure_words(data).metrics["n"] == len(cases)
