import math

import numpy as np
import pytest
import torch

from simla_ray.evaluation import grounding
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.grounding import cam_of, grad_cam, patch_centres, points_inside
from simla_ray.evaluation.work import Work

from .conftest import make_scorer


def test_cam_by_hand():
    probability = torch.tensor(
        [[[[0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [0.4, 0.4, 0.2]]]]
    )  # one head, 3 rows, CLS + 2 patches
    gradient = torch.tensor([[[[9.0, 1.0, -1.0], [9.0, 2.0, 0.5], [9.0, 9.0, 9.0]]]])
    mask = torch.tensor([[True, True, False]])
    one = cam_of([probability], (gradient,), mask)
    torch.testing.assert_close(one, torch.tensor([[0.5 * 1 + 0.1 * 2, 0.8 * 0.5]]))
    two_heads = cam_of([probability.repeat(1, 2, 1, 1)] * 2, [torch.cat([gradient, 0 * gradient], 1)] * 2, mask)
    torch.testing.assert_close(two_heads, one)  # half by the heads' mean, double by the layers' sum


def slow_cam(model, image_tokens, ids):
    """One phrase without padding over image_tokens (N, D): float64 forward by hand, autograd, then loops."""
    text, memory = model.student.text, image_tokens.double()
    kept = []

    def attend(block, x, source, keep):
        heads, width = block.heads, x.shape[-1]
        query, key, value = (block.self[name](t) for name, t in (("query", x), ("key", source), ("value", source)))
        context, probabilities = torch.empty_like(x), []
        for h in range(heads):
            part = slice(h * width // heads, (h + 1) * width // heads)
            scores = query[:, part] @ key[:, part].T / math.sqrt(width // heads)
            probability = scores.exp() / scores.exp().sum(1, keepdim=True)
            if keep:
                probability.retain_grad()
                probabilities.append(probability)
            context[:, part] = probability @ value[:, part]
        if keep:
            kept.append(probabilities)
        return block.output.LayerNorm(block.output.dense(context) + x)

    x = text.embeddings.word_embeddings(ids) + text.embeddings.position_embeddings.weight[: len(ids)]
    x = text.embeddings.LayerNorm(x)
    for layer in text.encoder.layer:
        x = attend(layer.attention, x, x, False)
        x = attend(layer.crossattention, x, memory, True)
        inner = torch.nn.functional.gelu(layer.intermediate["dense"](x))
        x = layer.output.LayerNorm(layer.output.dense(inner) + x)
    model.itm_head(x[0])[1].backward()
    cam = [0.0] * (len(memory) - 1)
    for layer in kept:
        for probability in layer:
            for row in range(len(ids)):
                for patch in range(len(cam)):
                    gradient = max(float(probability.grad[row, patch + 1]), 0.0)
                    cam[patch] += float(probability.detach()[row, patch + 1]) * gradient / len(layer)
    return np.array(cam)


def test_grad_cam_against_a_slow_one(vocabulary, data):
    phrases = ["a red circle", "a large blue star", "ring"]
    scorer = data.scorer
    tokens, _ = scorer.encode_images(data.images([0, 1]))
    ids, mask = scorer.tokenize(phrases)
    index = torch.tensor([1, 0, 1])
    fast = grad_cam(scorer, tokens, index, ids, mask).numpy()
    assert fast.shape == (3, 36) and (fast >= 0).all()
    double = make_scorer(vocabulary).model.double().eval()
    for i in range(3):
        slow = slow_cam(double, tokens[index[i]], ids[i][mask[i]])
        np.testing.assert_allclose(fast[i], slow, rtol=1e-3, atol=1e-5 * slow.max())
        assert slow.max() > 0


def test_parameters_need_no_gradients_and_get_none(vocabulary, data):
    scorer = make_scorer(vocabulary)
    tokens, _ = scorer.encode_images(data.images([0]))
    ids, mask = scorer.tokenize(["a red circle"])
    index = torch.tensor([0])
    expected = grad_cam(scorer, tokens, index, ids, mask)
    assert all(p.grad is None for p in scorer.model.parameters())
    scorer.model.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(grad_cam(scorer, tokens, index, ids, mask), expected)


def test_points_and_patches():
    centres = patch_centres(2)
    assert centres.tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    boxes = np.array([[0.5, 0.0, 1.0, 0.5], [0.0, 0.75, 0.25, 1.0]])
    assert points_inside(centres, boxes).tolist() == [False, True, True, False]  # the third on an edge


def at(grid, x, y):
    """A map that is hot at the patch which holds the point."""
    heat = np.zeros(grid * grid, np.float32)
    heat[int(y * grid) * grid + int(x * grid)] = 1
    return heat


def test_measure_against_maps_by_hand(scorer, world_rows, monkeypatch):
    rows = [dict(row) for row in world_rows["test"][:4]]
    corner = [0.0, 0.0, 0.5, 0.5]
    for row, boxes in zip(rows, ([corner], [[0.4, 0.4, 1.0, 1.0]], [corner, [0.5, 0.5, 1.0, 1.0]], []), strict=True):
        row["phrases"] = [{"text": "A thing!", "boxes": boxes}]
        row["boxes"] = [corner, [0.5, 0.5, 1.0, 1.0]]
    rows[3]["phrases"] += [{"text": "?", "boxes": [corner]}, {"text": "none", "boxes": None}]
    data = EvalSet.load(scorer, rows, Work())
    # right; in the wrong corner; zero everywhere, which must not count as the first patch
    maps = np.stack([at(6, 0.1, 0.3), at(6, 0.1, 0.1), np.zeros(36, np.float32)])
    monkeypatch.setattr(grounding, "_maps", lambda data, phrases: maps)
    result = grounding.measure(data)
    assert result.metrics == {
        "pointing": pytest.approx(1 / 3),
        "chance": pytest.approx((9 + 16 + 18) / 36 / 3),
        "center": 1.0,
        "random_object": pytest.approx((1 / 2 + 1 / 2 + 1) / 3),
        "n": 3,
    }
    assert [example["hit"] for example in result.examples] == [True, False, False]
    assert result.examples[0]["phrase"] == "a thing"
    assert np.array(result.examples[0]["heat"]).shape == (6, 6) and result.examples[0]["heat"][1][0] == 1.0


def test_many_phrases_are_thinned_the_same_way_every_time(data, monkeypatch):
    every = grounding.phrases_of(data)
    monkeypatch.setattr(grounding, "MAX_PHRASES", 7)
    few = grounding.phrases_of(data)
    assert len(few) == 7 < len(every)
    assert [(p.item, p.text) for p in few] == [
        (every[i * len(every) // 7].item, every[i * len(every) // 7].text) for i in range(7)
    ]


def test_phrases_point_into_their_own_image(data):
    """A map of the whole set is the map of each phrase alone."""
    phrases = grounding.phrases_of(data)[:9]
    together = grounding._maps(data, phrases)
    for i in (0, 4, 8):
        np.testing.assert_allclose(grounding._maps(data, [phrases[i]])[0], together[i], rtol=1e-3, atol=1e-6)


def test_rows_without_all_objects_have_no_such_baseline(scorer, world_rows):
    rows = [{k: v for k, v in row.items() if k not in ("boxes", "box_labels")} for row in world_rows["test"][:3]]
    assert set(grounding.measure(EvalSet.load(scorer, rows, Work())).metrics) == {"pointing", "chance", "center", "n"}
