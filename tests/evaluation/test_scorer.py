import numpy as np
import pytest
import torch

from .conftest import make_scorer


def images(world_rows, n):
    return np.random.default_rng(0).integers(0, 256, (n, 3, 48, 48), dtype=np.uint8)


def test_shapes_and_unit_vectors(scorer, world_rows):
    tokens, vectors = scorer.encode_images(images(world_rows, 5), batch_size=2)
    assert tokens.shape == (5, 37, 64) and vectors.shape == (5, 64)
    ids, mask, text = scorer.encode_texts(["a red circle", "there is a large blue star and a ring"], batch_size=1)
    assert ids.shape == mask.shape and mask[1].all() and not mask[0].all()
    for v in (vectors, text):
        assert v.dtype == torch.float32
        torch.testing.assert_close(v.norm(dim=1), torch.ones(len(v)))


def test_batch_size_and_padding_change_nothing(scorer, world_rows):
    picture, texts = images(world_rows, 4), ["a red circle", "there is a large blue star and a ring", "a"]
    tokens, vectors = scorer.encode_images(picture)
    torch.testing.assert_close(scorer.encode_images(picture, batch_size=1)[1], vectors)
    ids, mask, vectors = scorer.encode_texts(texts)
    for i, text in enumerate(texts):
        torch.testing.assert_close(scorer.encode_texts([text])[2][0], vectors[i])
    image, text = torch.arange(4).repeat_interleave(3), torch.arange(3).repeat(4)
    logits = scorer.match_logits(tokens, image, ids[text], mask[text])
    for i in range(12):
        one_ids, one_mask = scorer.tokenize([texts[text[i]]])
        one = scorer.match_logits(tokens[image[i]][None], torch.tensor([0]), one_ids, one_mask)
        torch.testing.assert_close(one[0], logits[i], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scorer.match_logits(tokens, image, ids[text], mask[text], batch_size=5), logits)


def test_logit_is_that_of_a_match_less_that_of_a_mismatch(scorer, world_rows):
    tokens, _ = scorer.encode_images(images(world_rows, 1))
    ids, mask = scorer.tokenize(["a red circle"])
    with torch.no_grad():
        two = scorer.model.itm_head(scorer.fuse(tokens, torch.tensor([0]), ids, mask)[:, 0])
    torch.testing.assert_close(scorer.match_logits(tokens, torch.tensor([0]), ids, mask), two[:, 1] - two[:, 0])


def test_equal_texts_of_pairs_run_once(scorer, world_rows, monkeypatch):
    tokens, _ = scorer.encode_images(images(world_rows, 3))
    ids, mask = scorer.tokenize(["a red circle", "there is a large blue star", "a red circle"])
    image, text = torch.tensor([2, 0, 0, 1, 2]), torch.tensor([0, 1, 2, 2, 2])
    made, match_texts = [], scorer.match_texts
    monkeypatch.setattr(scorer, "match_texts", lambda *texts: made.append(match_texts(*texts)) or made[-1])
    logits = scorer.match_logits(tokens, image, ids[text], mask[text])
    assert [len(texts) for texts in made] == [2]
    again = scorer.match_pairs(tokens, made[0], np.array([2]), np.array([0]))
    torch.testing.assert_close(logits[[0, 4]], again.expand(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("overrides", [{}, {"method": "albef"}])
def test_match_logits_equal_those_of_every_pair_from_its_token_ids(vocabulary, world_rows, overrides):
    scorer = make_scorer(vocabulary, **overrides)
    tokens, _ = scorer.encode_images(images(world_rows, 4))
    ids, mask = scorer.tokenize([caption for row in world_rows["train"][:9] for caption in row["captions"]])
    rng = np.random.default_rng(0)
    image, text = (torch.from_numpy(rng.integers(0, n, 60)) for n in (4, len(ids)))
    with torch.no_grad():
        two = scorer.model.itm_head(scorer.fuse(tokens, image, ids[text], mask[text])[:, 0])
    logits = scorer.match_logits(tokens, image, ids[text], mask[text], batch_size=16)
    torch.testing.assert_close(logits, two[:, 1] - two[:, 0], rtol=1e-5, atol=1e-5)


def test_texts_are_cleaned_and_cut(scorer):
    ids, _ = scorer.tokenize(["A RED, circle!", "a red circle"])
    assert ids[0].tolist() == ids[1].tolist()
    ids, mask = scorer.tokenize(["red circle " * 100])
    assert ids.shape == (1, scorer.run.text.max_tokens) and mask.all()


def test_without_a_teacher_the_student_stands_in(vocabulary):
    alphas = {f"objectives__{name}__soft_alpha": 0 for name in ("itc", "mlm", "mim", "psl")}
    sides = {"objectives__psl__attention": "student"}
    scorer = make_scorer(vocabulary, teacher=None, **alphas, **sides)
    assert scorer.teacher is scorer.model.student


def test_model_is_put_into_evaluation_mode(vocabulary):
    scorer = make_scorer(vocabulary, text__dropout=0.5)
    assert not scorer.model.training
    texts = ["a red circle"]
    assert torch.equal(scorer.encode_texts(texts)[2], scorer.encode_texts(texts)[2])


def test_no_gradients_are_kept(scorer, world_rows):
    tokens, vectors = scorer.encode_images(images(world_rows, 1))
    assert not tokens.requires_grad and not vectors.requires_grad


def test_bfloat16_keeps_unit_vectors_in_float32(vocabulary, world_rows):
    scorer = make_scorer(vocabulary, precision="bf16")
    tokens, vectors = scorer.encode_images(images(world_rows, 2))
    assert vectors.dtype == torch.float32 and tokens.dtype != torch.float64
    assert vectors.norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-5)
