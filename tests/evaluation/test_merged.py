"""Tasks over a model without towers: ITM scores pairs, maps come from self-attention, vectors there are none."""

import numpy as np
import pytest
import torch

from simla_ray.errors import UserError
from simla_ray.evaluation import grounding, match, retrieval, words
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.grad_cam import checked_layers, cross_layers, layer_cams
from simla_ray.evaluation.pairs import score_pairs
from simla_ray.evaluation.tasks import evaluate
from simla_ray.evaluation.work import Work
from simla_ray.release.pretrained import Pretrained

from .conftest import make_scorer, on_ranks


@pytest.fixture(scope="module")
def merged(vocabulary):
    return make_scorer(vocabulary, method="vilt", vision__depth=2, vision__patch_px=8)


@pytest.fixture
def few(merged, world_rows):
    return EvalSet.load(merged, world_rows["train"][:6], Work())


def test_every_task_gives_numbers_or_says_what_is_missing(merged, world_rows):
    results = evaluate(merged, world_rows["train"][:6])
    assert set(results) == {"data", "retrieval", "match", "grounding", "words"}
    missing = results["data"].metrics["not_run"]
    assert set(missing) == {"keywords", "classification", "ratings", "vqa", "statements"}
    assert missing["keywords"] == "no objective psl" and missing["classification"] == "no objective itc"
    assert "itc" not in results["retrieval"].metrics and results["retrieval"].metrics["itm"]
    assert {"color_right", "color_wrong", "mlm_accuracy"} <= set(results["words"].metrics)
    assert results["grounding"].metrics["layers"] == [0, 1]


def test_retrieval_scores_every_pair(merged, few):
    logits = few.match_logits(*(a.ravel() for a in np.indices((len(few), len(few.texts)))))
    logits = logits.reshape(len(few), -1)
    for i in range(len(few)):
        tokens = merged.image_tokens(few.images([i]))
        ids, mask = merged.tokenize(few.texts)
        with torch.no_grad():
            states = merged.fuse(tokens, torch.zeros(len(ids), dtype=torch.int64), ids, mask)
            two = merged.model.match(states[:, 0])
        np.testing.assert_allclose(logits[i], (two[:, 1] - two[:, 0]).numpy(), rtol=1e-3, atol=1e-4)
    scores = logits[:, few.text_of_caption]
    right = few.image_of_caption[None] == np.arange(len(few))[:, None]
    found = retrieval.measure(few).metrics["itm"]
    assert found["i2t_r1"] == pytest.approx(np.mean(retrieval.ranks(scores, right) == 1))
    assert found["t2i_r5"] == pytest.approx(np.mean(retrieval.ranks(scores.T, right.T) <= 5))


def test_two_ranks_give_what_one_gives(merged, world_rows):
    rows = world_rows["train"][:5]

    def alone(rank, world, gather):
        data = EvalSet.load(merged, rows[rank::world], Work(rank, world, gather))
        return match.measure(data).metrics, words.measure(data).metrics, grounding.measure(data).metrics

    one = alone(0, 1, lambda own: [own])
    assert on_ranks(2, lambda rank, gather: alone(rank, 2, gather)) == [one, one]


def slow_maps(merged, tokens, ids):
    """One phrase without padding over tokens (N, D): every block by hand in float64, autograd, then loops."""
    model = merged.model.double()
    student, L = model.student, len(ids)
    x = student.text.embeddings(ids[None])[0] + student.merging.type_embeddings.weight[0]
    x, kept = torch.cat([x, tokens.double() + student.merging.type_embeddings.weight[1]]), []
    for block in student.vision.vit.blocks:
        heads, parts = block.attn.num_heads, block.attn.qkv(block.norm1(x)).chunk(3, -1)
        context = torch.empty_like(x)
        for h in range(heads):
            q, k, v = (p.chunk(heads, -1)[h] for p in parts)
            probability = (q @ k.T / q.shape[-1] ** 0.5).softmax(-1)
            probability.retain_grad()
            kept.append(probability)
            context[:, h * v.shape[-1] : (h + 1) * v.shape[-1]] = probability @ v
        x = x + block.attn.proj(context)
        x = x + block.mlp(block.norm2(x))
    model.match(student.vision.vit.norm(x)[:1])[0, 1].backward()
    found = np.zeros((len(student.vision.vit.blocks), len(tokens) - 1))
    for n, probability in enumerate(kept):
        for word in range(L):
            for patch in range(len(tokens) - 1):
                gradient = max(float(probability.grad[word, L + 1 + patch]), 0.0)
                found[n // heads, patch] += float(probability[word, L + 1 + patch].detach()) * gradient / heads
    model.float().zero_grad()
    return found


def test_maps_are_grad_cam_of_words_to_patches(merged, few):
    ids, mask = merged.tokenize([few.captions[0], "red circle"])
    tokens = merged.image_tokens(few.images([0, 1]))
    found = layer_cams(merged, tokens, torch.tensor([0, 1]), ids, mask, cross_layers(merged)).numpy()
    for row, n in enumerate(mask.sum(1).tolist()):
        np.testing.assert_allclose(found[:, row], slow_maps(merged, tokens[row], ids[row, :n]), rtol=1e-3, atol=1e-7)
    with pytest.raises(UserError, match="layers: 2 does not read the image; those that do: 0, 1"):
        checked_layers(merged, [2])


def test_pairs_are_scored_without_vectors(merged, world_rows):
    rows = world_rows["train"][:2]
    for scored in score_pairs(merged, rows):
        assert scored.itc is None and 0 <= scored.itm <= 1


def test_a_loaded_model_matches_and_grounds_but_has_no_vectors(merged, vocabulary, world_rows):
    model = Pretrained(merged.run, merged.model, vocabulary, torch.device("cpu"))
    image = world_rows["train"][0]["image"]
    found = model.ground_boxes(image, "the red circle")
    assert found.heat.shape == (6, 6) and 0 <= found.match <= 1
    for call in (
        lambda: model.encode_image([image]),
        lambda: model.encode_text(["a"]),
        lambda: model.index("somewhere"),
    ):
        with pytest.raises(UserError, match="vilt-tiny was trained without itc"):
            call()
    with pytest.raises(UserError, match="trained without psl"):
        model.keywords([image])
