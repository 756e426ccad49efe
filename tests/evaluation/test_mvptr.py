"""Evaluation over tags, regions and phrase concepts: what pairs share changes no score, and pictures alone will do."""

import numpy as np
import pytest
import torch

from simla_ray.config.load import load_run
from simla_ray.data.collate import collate
from simla_ray.data.region_source import with_regions
from simla_ray.data.sample import SampleMaker, stacked
from simla_ray.data.tag_source import with_tags
from simla_ray.evaluation.eval_set import EvalSet, load_items
from simla_ray.evaluation.keywords import average_precision, unsaid
from simla_ray.evaluation.keywords import measure as measure_keywords
from simla_ray.evaluation.pairs import score_pairs
from simla_ray.evaluation.retrieval import measure, validation_retrieval, vector_retrieval
from simla_ray.evaluation.scorer import Scorer, seen
from simla_ray.evaluation.words import color_words
from simla_ray.evaluation.words import measure as measure_words
from simla_ray.evaluation.work import Work
from simla_ray.models.model import Model
from simla_ray.release.pretrained import Pretrained
from tests.models.toy import with_concepts

CPU = torch.device("cpu")


def make_scorer(method, rows, vocabulary, *more):
    keys = ["concepts.most=300", "regions.grid=3", "batch.global=32", "ray.workers=1", *more]
    run = with_tags(with_regions(load_run(overrides=[f"method={method}", *keys]), None), None)
    vocabulary = with_concepts(vocabulary, rows, run)
    torch.manual_seed(0)
    model = Model(run, len(vocabulary))
    with torch.no_grad():  # scores of fresh weights are all alike
        for parameter in model.student.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return Scorer(run, model, vocabulary, CPU)


@pytest.fixture(scope="module", params=["mvptr", "mvptr-grid"])
def scorer(request, world_rows, vocabulary):
    return make_scorer(request.param, world_rows["train"], vocabulary)


@pytest.fixture(scope="module")
def of_column(world_rows, vocabulary):
    """Reads its concepts from the column of phrases."""
    return make_scorer("mvptr", world_rows["train"], vocabulary, "concepts.source=column", "concepts.min_count=1")


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


def test_texts_have_the_phrases_of_their_rows_as_in_training(of_column, world_rows):
    """Of three captions a row the phrases of the first are named: the others say some of them, or none."""
    data = EvalSet.load(of_column, world_rows["train"][:24], Work())
    ids, mask = of_column.tokenize(data.texts, phrases=data.phrases)
    alone, _ = of_column.tokenize(data.texts)
    known = len(of_column.vocabulary)
    said = 0
    for item, text in zip(data.items, data.text_of_caption[data.first_caption], strict=True):
        row = ids[text][mask[text]].tolist()
        assert row == item.sample["token_ids"][: int(item.sample["n_tokens"])].tolist()
        said += sum(i >= known for i in row)
    assert said > 24 and alone.max() < known  # a text of no row has none
    other = [text for text in range(len(data.texts)) if text not in data.text_of_caption[data.first_caption]]
    assert (ids[other] >= known).sum() < (ids >= known).sum() / 2


def test_every_score_of_a_caption_reads_its_phrases(of_column, world_rows):
    rows = world_rows["val"][:12]
    data = EvalSet.load(of_column, rows, Work())
    _, _, bare = of_column.encode_texts(data.texts)
    assert np.abs(data.text_vectors - bare.numpy()).max() > 1e-3
    scored = list(score_pairs(of_column, rows))
    cosine = (data.image_vectors[data.image_of_caption] * data.text_vectors[data.text_of_caption]).sum(1)
    np.testing.assert_allclose([one.itc for one in scored], cosine, atol=1e-5)
    logits = data.match_logits(data.image_of_caption, data.text_of_caption)
    np.testing.assert_allclose([one.itm for one in scored], 1 / (1 + np.exp(-logits)), rtol=1e-3, atol=1e-5)
    found = validation_retrieval(of_column, load_items(of_column, rows))
    expected = vector_retrieval(data.image_vectors, data.text_vectors[data.text_of_caption], data.image_of_caption)
    assert found == expected
    assert measure_words(data).metrics["n"] > 0


def test_a_caption_of_several_rows_is_one_text_with_the_phrases_of_all(of_column, world_rows):
    first, second = (dict(row) for row in world_rows["val"][:2])
    caption = first["captions"][0]
    second |= {"captions": [caption], "claims": None, "phrases": [{"text": "there is", "boxes": None}]}
    data = EvalSet.load(of_column, [first, second, first | {"uid": "again", "phrases": None}], Work())
    named = [phrase["text"] for phrase in first["phrases"]]
    assert data.texts == [caption] and data.phrases == [(*named, "there is")]
    assert [item.said for item in data.items] == [[tuple(named), ()], [("there is",)]]


def test_a_masked_colour_is_told_by_no_phrase_of_the_column(of_column, world_rows):
    data = EvalSet.load(of_column, world_rows["val"][:24], Work())
    cases = color_words(data)
    items = [data.items[case.item] for case in cases]
    captions, phrases = [item.captions[0] for item in items], [item.said[0] for item in items]
    ids, _ = of_column.tokenize(captions, [case.position for case in cases], phrases)
    plain, _ = of_column.tokenize(captions, phrases=phrases)
    name = {i: concept for concept, i in of_column.vocabulary.concepts.ids.items()}
    told = 0
    for case, row, shown in zip(cases, ids.tolist(), plain.tolist(), strict=True):
        n = len(of_column.vocabulary.encode(data.items[case.item].captions[0], of_column.run.text.max_tokens).ids)
        told += sum(case.word in name.get(i, ()) for i in shown[n:])
        if data.items[case.item].captions[0].split().count(case.word) == 1:
            assert not any(case.word in name.get(i, ()) for i in row[n:])
    assert told > 10


def test_unsaid_words_are_ranked_by_images_with_their_boxes(world_rows, vocabulary):
    """And not as the cells of a grid, as pictures alone are seen."""
    psl = "objectives.psl={select: content, recommend: off, soft_alpha: 0}"
    scorer = make_scorer("mvptr", world_rows["train"], vocabulary, psl)
    data = EvalSet.load(scorer, world_rows["val"][:8], Work())
    found = unsaid(data)
    _, with_boxes = found.scores(data.images(range(8)))
    cells, alone = found.scores(np.stack([item.image for item in data.items]))
    assert cells.shape[1] == 1 + 9 and np.abs(with_boxes - alone).max() > 1e-4
    case_scores = with_boxes[[case.item for case in found.cases]]
    expected = [average_precision(found.ranked(c, s)[1]) for c, s in zip(found.cases, case_scores, strict=True)]
    assert found.ap() == pytest.approx(np.mean(expected))
    assert measure_keywords(data).metrics["ap"] == pytest.approx(np.mean(expected))


def test_an_index_of_pictures_says_that_they_have_no_boxes(world_rows, vocabulary, tmp_path):
    scorer = make_scorer("mvptr", world_rows["train"], vocabulary)
    for i, row in enumerate(world_rows["val"][:3]):
        (tmp_path / f"{i}.jpg").write_bytes(row["image"])
    said = []
    model = Pretrained(scorer.run, scorer.model, scorer.vocabulary, CPU)
    assert len(model.index(tmp_path, tmp_path.parent / "cache", said.append)) == 3
    cells = "seen as the 3 x 3 cells of a grid, without tags"
    assert said[-1] == f"regions    3 pictures have no boxes here; each is {cells}"
