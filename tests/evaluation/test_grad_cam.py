import math

import numpy as np
import pytest
import torch

from simla_ray.errors import UserError
from simla_ray.evaluation.grad_cam import cam_of, checked_layers, cross_layers, grad_cam, layer_cams, over_layers

from .conftest import make_scorer


def test_cam_by_hand():
    probability = torch.tensor(
        [[[[0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [0.4, 0.4, 0.2]]]]
    )  # one head, 3 rows, CLS + 2 patches
    gradient = torch.tensor([[[[9.0, 1.0, -1.0], [9.0, 2.0, 0.5], [9.0, 9.0, 9.0]]]])
    mask = torch.tensor([[True, True, False]])
    one = cam_of(probability, gradient, mask)
    torch.testing.assert_close(one, torch.tensor([[0.5 * 1 + 0.1 * 2, 0.8 * 0.5]]))
    two_heads = cam_of(probability.repeat(1, 2, 1, 1), torch.cat([gradient, 0 * gradient], 1), mask)
    torch.testing.assert_close(two_heads, one / 2)
    assert torch.equal(over_layers(torch.stack([one, two_heads, two_heads])), one + two_heads + two_heads)


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


def test_layers_add_up(data):
    scorer = data.scorer
    tokens, _ = scorer.encode_images(data.images([0, 1]))
    given = tokens, torch.tensor([0, 1]), *scorer.tokenize(["a red circle", "a star"])
    each = layer_cams(scorer, *given, cross_layers(scorer))
    assert len(each) == len(cross_layers(scorer)) == 3 and (each.amax((1, 2)) > 0).all()
    assert torch.equal(grad_cam(scorer, *given), each[0] + each[1] + each[2])
    torch.testing.assert_close(grad_cam(scorer, *given, layers=(2, 0)), each[0] + each[2])
    torch.testing.assert_close(grad_cam(scorer, *given, layers=[1]), each[1])


def test_only_upper_layers_fuse_in_albef(vocabulary, data):
    scorer = make_scorer(vocabulary, method="albef", text__depth=4, schedule__kind="joint", schedule__phases=[])
    assert cross_layers(scorer) == (2, 3)
    tokens, _ = scorer.encode_images(data.images([0]))
    given = tokens, torch.tensor([0]), *scorer.tokenize(["a red circle"])
    each = layer_cams(scorer, *given, (2, 3))
    torch.testing.assert_close(grad_cam(scorer, *given, layers=(3,)), each[1])
    with pytest.raises(UserError, match="layers: 1 does not read the image; those that do: 2, 3"):
        checked_layers(scorer, (3, 1))
    with pytest.raises(UserError, match="layers: none given"):
        checked_layers(scorer, ())
    assert checked_layers(scorer, (3, 2, 3)) == (2, 3) == checked_layers(scorer, None)
