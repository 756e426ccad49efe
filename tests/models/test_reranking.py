"""Re-ranking against the plain pass of every pair from its token ids, and what it computes once."""

import numpy as np
import pytest
import torch

from simla_ray.config.enums import Fusion
from simla_ray.config.schema import Text
from simla_ray.models import reranking
from simla_ray.models.reranking import TextStarts, fused_cls
from simla_ray.models.stack import Memory
from simla_ray.models.text import TextModel

N, L, IMAGES, TEXTS = 9, 11, 7, 30
FUSIONS = pytest.mark.parametrize("fusion", [Fusion.every_layer, Fusion.upper_half])


def text_model(fusion, depth=4):
    torch.manual_seed(1)
    config = Text(width=16, depth=depth, heads=4, ffn=24, max_positions=20, dropout=0.1, fusion=fusion)
    text = TextModel(config, 50, memory_width=12, mlm_head=False).eval()
    with torch.no_grad():  # biases too, and far from the start's near-constant outputs
        for p in text.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return text


@pytest.fixture
def world():
    """image tokens, ids, mask; texts of 1 to 11 tokens."""
    g = torch.Generator().manual_seed(2)
    lengths = torch.arange(TEXTS) % L + 1
    mask = torch.arange(L) < lengths[:, None]
    ids = torch.randint(1, 50, (TEXTS, L), generator=g).masked_fill(~mask, 0)
    return torch.randn(IMAGES, N, 12, generator=g), ids, mask


def unequal_pairs():
    """Image 0 has no pair, image 1 one, image 6 sixty of thirty texts; in no order."""
    rng = np.random.default_rng(3)
    image = np.repeat(np.arange(IMAGES), [0, 1, 2, 2, 5, 24, 60])
    return rng.permutation(image), rng.integers(0, TEXTS, len(image))


@torch.no_grad()
def plain(text, tokens, ids, mask, image, number):
    """[CLS] of every pair run from its token ids, its image's tokens repeated for it."""
    return text.encode(ids[number], mask[number], Memory(tokens[image]))[:, 0]


@FUSIONS
@pytest.mark.parametrize("depth", [2, 3, 5])
@pytest.mark.parametrize("batch_size", [7, 256])
@pytest.mark.parametrize("memory_bytes", [1, 15_000, 2**29])
def test_equals_the_plain_pass(fusion, depth, batch_size, memory_bytes, world, monkeypatch):
    monkeypatch.setattr(reranking, "MEMORY_BYTES", memory_bytes)
    tokens, ids, mask = world
    text, (image, number) = text_model(fusion, depth), unequal_pairs()
    ours = fused_cls(tokens, TextStarts(text, ids, mask), image, number, batch_size)
    torch.testing.assert_close(ours, plain(text, tokens, ids, mask, image, number), atol=1e-5, rtol=1e-5)
    assert ours.std(0).min() > 0.01, "the outputs should differ for the comparison to say anything"


@FUSIONS
def test_one_pair(fusion, world):
    tokens, ids, mask = world
    text, image, number = text_model(fusion), np.array([5]), np.array([17])
    ours = fused_cls(tokens, TextStarts(text, ids, mask), image, number)
    torch.testing.assert_close(ours, plain(text, tokens, ids, mask, image, number), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fusion", [Fusion.every_layer])
def test_one_layer_is_first_and_last(fusion, world):
    tokens, ids, mask = world
    text, (image, number) = text_model(fusion, depth=1), unequal_pairs()
    ours = fused_cls(tokens, TextStarts(text, ids, mask), image, number)
    torch.testing.assert_close(ours, plain(text, tokens, ids, mask, image, number), atol=1e-5, rtol=1e-5)


def rows_through(module, counted):
    module.register_forward_pre_hook(lambda _, args: counted.append(args[0].shape[:-1].numel()))


@FUSIONS
def test_images_and_texts_run_once(fusion, world, monkeypatch):
    monkeypatch.setattr(reranking, "MEMORY_BYTES", 15_000)  # three images at a time
    monkeypatch.setattr(reranking, "TEXTS", 8)
    tokens, ids, mask = world
    text, (image, number) = text_model(fusion), unequal_pairs()
    starts, layers = TextStarts(text, ids, mask), text.encoder.layer[text.fusion_layers]
    images, firsts, lasts = [], [], []
    for layer in layers:
        rows_through(layer.crossattention.self["key"], images)
    rows_through(layers[0].attention.self["query"], firsts)
    rows_through(layers[-1].output.dense, lasts)
    for _ in range(2):
        fused_cls(tokens, starts, image, number, batch_size=16)
    assert sum(images) == 2 * len(layers) * 6 * N, "keys of six images, once per call whatever their candidates"
    assert sum(firsts) == TEXTS * L, "first self-attention: every text once for both calls"
    assert sum(lasts) == 2 * len(image), "last layer: one position per pair"


def test_only_the_blocks_that_are_asked_for_are_computed(world, monkeypatch):
    monkeypatch.setattr(reranking, "TEXTS", 8)
    _, ids, mask = world
    text, firsts = text_model(Fusion.every_layer), []
    rows_through(text.encoder.layer[0].attention.self["query"], firsts)
    TextStarts(text, ids, mask).of(np.array([9, 10, 29]))
    assert firsts == [8 * L, 6 * L]


def test_states_do_not_depend_on_who_asks_first(world, monkeypatch):
    monkeypatch.setattr(reranking, "TEXTS", 8)
    _, ids, mask = world
    text = text_model(Fusion.upper_half)
    one, other = TextStarts(text, ids, mask), TextStarts(text, ids, mask)
    with torch.no_grad():
        first = [one.of(np.array([i]))[0] for i in range(TEXTS)]
        second = [other.of(np.array([i]))[0] for i in reversed(range(TEXTS))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_pads_are_cut_to_the_longest(world):
    _, ids, mask = world
    states, kept = TextStarts(text_model(Fusion.every_layer), ids, mask).of(np.array([0, 12, 3]))
    assert states.shape == (3, 4, 16) and kept.sum(1).tolist() == [1, 2, 4]
