"""WPG against a double loop over numbers, by hand, and what a batch lacks; MCR beside it."""

import math

import numpy as np
import pytest
import torch

from simla_ray.objectives.masked_tags import mcr_loss
from simla_ray.objectives.phrase_grounding import wpg_loss

DOUBLE = torch.float64


def problem(seed=0, B=4, L=6, R=5, D=8):
    """states, is_phrase, regions, region_mask, other, draws; text 1 has no phrase, image 2 two regions."""
    g = torch.Generator().manual_seed(seed)
    states, regions = (torch.randn(B, n, D, generator=g, dtype=DOUBLE) for n in (L, R))
    is_phrase = torch.rand(B, L, generator=g) < 0.6
    is_phrase[0, 2:4], is_phrase[1] = True, False
    there = torch.arange(R)[None] < torch.tensor([5, 3, 2, 4])[:, None]
    return states, is_phrase, regions, there, torch.tensor([2, 3, 1, 0]), torch.rand(2, B, L, generator=g, dtype=DOUBLE)


def slow(states, is_phrase, regions, there, other, draws, top_k, margin):
    """The formula, number by number."""
    x, y = states.detach().numpy(), regions.detach().numpy()
    hinges = []
    for b in range(len(x)):
        scores = []
        for i, image in enumerate((b, int(other[b]))):
            found = []
            for p in np.flatnonzero(is_phrase[b].numpy()):
                cosines = sorted(
                    (
                        float(x[b, p] @ y[image, r] / np.linalg.norm(x[b, p]) / np.linalg.norm(y[image, r]))
                        for r in np.flatnonzero(there[image].numpy())
                    ),
                    reverse=True,
                )[:top_k]
                found.append(cosines[0 if draws is None else int(float(draws[i, b, p]) * len(cosines))])
            scores.append(found)
        if scores[0]:
            hinges.append(max(0.0, margin + np.mean(scores[1]) - np.mean(scores[0])))
    return float(np.mean(hinges)) if hinges else 0.0


@pytest.mark.parametrize("top_k", [1, 3, 9])
@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_it_equals_a_loop(seed, random, top_k):
    *given, draws = problem(seed)
    draws = draws if random else None
    states, regions = given[0].requires_grad_(), given[2].requires_grad_()
    term = wpg_loss(*given, draws, top_k, 0.2)
    assert term.loss.item() == pytest.approx(slow(*given, draws, top_k, 0.2), rel=1e-12)
    term.loss.backward()
    assert states.grad.isfinite().all() and regions.grad.isfinite().all() and states.grad.any()
    assert not states.grad[1].any()  # it has no phrase


def test_hand_number():
    """One phrase along x: own regions at cosines 0.6 and 0, the other image's at 0.8; hinge 0.2 + 0.8 - 0.6."""
    states = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]])
    regions = torch.tensor([[[0.6, 0.8], [0.0, 3.0]], [[4.0, 3.0], [9.0, 9.0]]])
    there = torch.tensor([[True, True], [True, False]])
    one = torch.tensor([[True], [False]])
    term = wpg_loss(states, one, regions, there, torch.tensor([1, 0]), None, 3, 0.2)
    assert term.loss.item() == pytest.approx(0.4) and term.metrics["accuracy"] == 0
    # The second largest of its own, at cosine 0; the other image has one region, whatever is drawn.
    draws = torch.tensor([[[0.9], [0.0]], [[0.9], [0.0]]])
    term = wpg_loss(states, one, regions, there, torch.tensor([1, 0]), draws, 3, 0.2)
    assert term.loss.item() == pytest.approx(1.0)


def test_no_phrase_gives_zero_and_no_gradient_that_is_not_finite():
    states, is_phrase, regions, there, other, draws = problem()
    states.requires_grad_()
    term = wpg_loss(states, torch.zeros_like(is_phrase), regions, there, other, draws, 3, 0.2)
    term.loss.backward()
    assert term.loss.item() == 0 and not states.grad.any() and term.metrics["accuracy"] == 0


def test_padding_and_places_that_are_no_phrases_change_nothing():
    states, is_phrase, regions, there, other, draws = problem()
    before = wpg_loss(states, is_phrase, regions, there, other, draws, 3, 0.2).loss
    states[~is_phrase], regions[~there] = 7.0, -3.0
    assert wpg_loss(states, is_phrase, regions, there, other, draws, 3, 0.2).loss == before


def test_low_precision_goes_through_float32():
    states, is_phrase, regions, there, other, draws = problem()
    term = wpg_loss(states.bfloat16(), is_phrase, regions.bfloat16(), there, other, draws.float(), 3, 0.2)
    assert term.loss.dtype == torch.float32 and term.loss.isfinite()


def test_mcr_is_the_mean_over_chosen_tags():
    logits = torch.tensor([[[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]], [[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]).log()
    tags, index = torch.tensor([[0, 1, 2], [2, 0, 1]]), torch.tensor([[1, 0], [0, 2]])
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]])  # true tags 1, padding, 2, 1
    term = mcr_loss(logits, tags, index, weight)
    assert term.loss.item() == pytest.approx(-(math.log(0.2) + math.log(0.25) + math.log(0.1)) / 3)
    assert mcr_loss(logits, tags, index, torch.zeros(2, 2)).loss.item() == 0
