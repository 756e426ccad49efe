"""PSL: keyword choice against a slow reference, the targets, the recommendations and the loss."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simla_ray.config.schema import Psl
from simla_ray.objectives.keywords import keyword_targets, psl_loss, recommendations, select_keywords


def choose(attention, ok, psl, word_start=None, prior=None):
    """select_keywords on plain lists; -> list of chosen positions per row."""
    ok = torch.tensor(ok)
    if attention is not None:
        attention = torch.tensor(attention)
    L = ok.shape[1]
    start = torch.arange(L).expand(ok.shape) if word_start is None else torch.tensor(word_start)
    prior = torch.zeros(ok.shape) if prior is None else torch.tensor(prior)
    chosen = select_keywords(attention, ok, start, prior, psl)
    assert chosen.shape == ok.shape and chosen.dtype == torch.bool
    return [row.nonzero()[:, 0].tolist() for row in chosen]


def reference(attention, ok, word_start, psl):
    """One row, by the spec: votes of each head, then votes, mean attention, position."""
    H, L = attention.shape
    units = sorted({int(s) for s in word_start}) if psl.unit == "word" else list(range(L))
    pieces = {u: [i for i in range(L) if (word_start[i] if psl.unit == "word" else i) == u] for u in units}
    weight = {u: [sum(attention[h, i] for i in pieces[u]) for h in range(H)] for u in units}
    eligible = [u for u in units if ok[u]]
    votes = dict.fromkeys(eligible, 0)
    for h in range(H):
        best = sorted(eligible, key=lambda u: -weight[u][h])[: psl.heads_top_k]
        for u in best:
            votes[u] += weight[u][h] >= psl.min_attention
    ranked = sorted(eligible, key=lambda u: (-votes[u], -np.mean(weight[u]), u))
    if not psl.zero_vote_fill:
        ranked = [u for u in ranked if votes[u] > 0]
    taken = ranked[: psl.max_keywords]
    return sorted(i for u in taken for i in pieces[u] if ok[i])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_votes_equal_the_reference(data):
    seed = data.draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    H, L = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 10))
    psl = Psl(
        heads_top_k=data.draw(st.integers(1, 6)),
        max_keywords=data.draw(st.integers(1, 6)),
        min_attention=data.draw(st.sampled_from([0.0, 0.05, 0.2, 0.6])),
        unit=data.draw(st.sampled_from(["piece", "word"])),
    )
    attention = rng.dirichlet(np.full(L, 0.5), H)  # distinct with probability one, so that no tie is left to topk
    ok = rng.random(L) < data.draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    starts = np.maximum.accumulate(np.where(rng.random(L) < 0.6, np.arange(L), 0))
    got = choose(attention[None].tolist(), ok[None].tolist(), psl, starts[None].tolist())
    # float32 against float64: means of votes that tie in exact arithmetic do not occur here
    assert got[0] == reference(attention.astype(np.float32), ok, starts, psl)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 9))
def test_zero_vote_fill_takes_as_many_positions_as_there_are(seed, H, L):
    """Official: five positions, voted for or not, where the caption has them; every position may become one."""
    rng = np.random.default_rng(seed)
    psl = Psl(unit="piece", zero_vote_fill=True, exclude_special=False, stop_words=None, heads_top_k=2, max_keywords=5)
    attention = rng.dirichlet(np.full(L, 0.5), H).astype(np.float32)
    got = choose(attention[None].tolist(), [[True] * L], psl)[0]
    assert len(got) == min(5, L)
    assert got == reference(attention, np.ones(L, bool), np.arange(L), psl)


PIECE = {"unit": "piece", "heads_top_k": 1, "max_keywords": 1}


def test_most_votes_win_over_more_attention():
    attention = [[[0.0, 0.4, 0.3, 0.3], [0.0, 0.4, 0.3, 0.3], [0.0, 0.0, 0.99, 0.01]]]
    assert choose(attention, [[False, True, True, True]], Psl(**PIECE)) == [[1]]


def test_equal_votes_go_to_the_larger_mean_attention():
    attention = [[[0.0, 0.6, 0.1, 0.3], [0.0, 0.1, 0.2, 0.7]]]
    assert choose(attention, [[True] * 4], Psl(**PIECE)) == [[3]]


def test_equal_votes_and_attention_go_to_the_lower_position():
    attention = [[[0.0, 0.25, 0.5, 0.25], [0.0, 0.25, 0.25, 0.5]]]
    assert choose(attention, [[True] * 4], Psl(**PIECE)) == [[2]]
    mirrored = [[[0.0, 0.25, 0.25, 0.5], [0.0, 0.25, 0.5, 0.25]]]
    assert choose(mirrored, [[True] * 4], Psl(**PIECE)) == [[2]]


def test_heads_top_k_is_clipped_to_what_is_eligible():
    """One eligible position, four votes per head: the other three votes go nowhere."""
    attention = [[[0.7, 0.1, 0.1, 0.1]] * 3]
    assert choose(attention, [[False, False, True, False]], Psl(unit="piece")) == [[2]]


def test_captions_shorter_than_the_vote():
    assert choose([[[0.6, 0.4]]], [[False, True]], Psl()) == [[1]]


def test_min_attention_is_read_on_the_raw_probability():
    """After excluding [CLS], 0.2 of 0.3 is two thirds of what is left; the vote still counts as 0.2."""
    attention = [[[0.7, 0.2, 0.1]]]
    ok = [[False, True, True]]
    assert choose(attention, ok, Psl(unit="piece", min_attention=0.15)) == [[1]]
    assert choose(attention, ok, Psl(unit="piece", min_attention=0.25)) == [[]]


def test_stop_words_never_become_keywords():
    attention = [[[0.1, 0.8, 0.1], [0.1, 0.8, 0.1]]]
    assert choose(attention, [[False, False, True]], Psl(unit="piece")) == [[2]]


def test_a_row_without_candidates_stays_empty():
    attention = [[[0.5, 0.5]], [[0.5, 0.5]]]
    for unit in ("piece", "word"):
        assert choose(attention, [[False, False], [False, True]], Psl(unit=unit)) == [[], [1]]


def test_a_word_collects_the_attention_of_its_pieces():
    """Word 1 has two pieces of 0.25, word 3 one piece of 0.4: pieces favour 3, words favour 1 with both pieces."""
    attention, start = [[[0.1, 0.25, 0.25, 0.4]]], [[0, 1, 1, 3]]
    ok = [[False, True, True, True]]
    assert choose(attention, ok, Psl(**PIECE), start) == [[3]]
    assert choose(attention, ok, Psl(**{**PIECE, "unit": "word"}), start) == [[1, 2]]


@pytest.mark.parametrize("unit", ["piece", "word"])
@pytest.mark.parametrize("select", ["content", "tfidf", "random"])
def test_controls_take_the_highest_prior(select, unit):
    psl = Psl(select=select, unit=unit, max_keywords=2)
    prior = [[9.0, 0.1, 0.3, 0.2, 8.0]]
    assert choose(None, [[False, True, True, True, False]], psl, prior=prior) == [[2, 3]]
    assert choose(None, [[False] * 5], psl, prior=prior) == [[]]
    # equal priors (`content`): the first words
    assert choose(None, [[False, True, True, True, False]], psl) == [[1, 2]]


def test_zero_vote_fill_leaves_excluded_positions_out():
    """`exclude_special`: specials and padding can never be keywords, filled up or not."""
    psl = Psl(unit="piece", zero_vote_fill=True, heads_top_k=1, max_keywords=5)
    attention = [[[0.5, 0.3, 0.2, 0.0]]]
    assert choose(attention, [[False, True, True, False]], psl) == [[1, 2]]


def test_targets_are_multi_hot_and_never_cls():
    ids = torch.tensor([[2, 7, 7, 9, 0], [2, 5, 6, 0, 0]])
    chosen = torch.tensor([[True, True, True, False, True], [False, False, False, False, False]])
    target = keyword_targets(ids, chosen, 12, cls_id=2, dtype=torch.float32)
    assert target.sum(1).tolist() == [2, 0]  # the word 7 once, and the [PAD] that was chosen
    assert target[0, 7] == 1 and target[0, 0] == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_targets_equal_a_loop(seed):
    rng = np.random.default_rng(seed)
    ids, chosen = rng.integers(0, 9, (3, 6)), rng.random((3, 6)) < 0.4
    expected = np.zeros((3, 9))
    for b in range(3):
        for i in range(6):
            if chosen[b, i] and ids[b, i] != 2:
                expected[b, ids[b, i]] = 1
    got = keyword_targets(torch.from_numpy(ids), torch.from_numpy(chosen), 9, 2, torch.float64)
    np.testing.assert_array_equal(got, expected)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_recommendations():
    logits = torch.tensor([[2.0, -1.0, 0.5, -4.0]])
    p = sigmoid(logits.numpy())
    np.testing.assert_allclose(recommendations(logits, Psl()), p, rtol=1e-6)  # dense by default, as published
    np.testing.assert_allclose(
        recommendations(logits, Psl(recommend_threshold=0.5)), [[p[0, 0], 0, p[0, 2], 0]], rtol=1e-6
    )
    np.testing.assert_allclose(recommendations(logits, Psl(recommend_top_k=1)), [[p[0, 0], 0, 0, 0]], rtol=1e-6)
    assert recommendations(logits, Psl(recommend="hard", recommend_top_k=3)).tolist() == [[1, 1, 1, 0]]
    both = Psl(recommend="hard", recommend_top_k=3, recommend_threshold=0.6)
    assert recommendations(logits, both).tolist() == [[1, 0, 1, 0]]
    assert recommendations(logits, Psl(recommend_top_k=99)).shape == (1, 4)
    edge = Psl(recommend="hard", recommend_threshold=0.5)
    assert recommendations(torch.zeros(1, 2), edge).tolist() == [[1, 1]]  # at the threshold counts


def bce(u, y):
    p = sigmoid(u)
    return -(y * np.log(p) + (1 - y) * np.log(1 - p))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.4, 1.0]), st.booleans(), st.sampled_from(["soft", "hard"]))
def test_one_bce_equals_two(seed, alpha, restricted, recommend):
    """(1 - alpha) BCE(u, y) + alpha BCE(u, r), mean over rows with a keyword times columns."""
    rng = np.random.default_rng(seed)
    B, V = 4, 9
    u, teacher = rng.normal(size=(B, V)) * 2, rng.normal(size=(B, V))
    y = (rng.random((B, V)) < 0.3).astype(float)
    y[rng.integers(B)] = 0
    columns = np.sort(rng.permutation(V)[:4]) if restricted else np.arange(V)
    psl = Psl(recommend=recommend, recommend_threshold=0.4)
    r = sigmoid(teacher) * (sigmoid(teacher) >= 0.4)
    r = (r > 0).astype(float) if recommend == "hard" else r
    total, cells = 0.0, 0
    for b in range(B):
        if y[b, columns].sum() == 0:
            continue
        for v in columns:
            total += (1 - alpha) * bce(u[b, v], y[b, v]) + alpha * bce(u[b, v], r[b, v])
            cells += 1
    term = psl_loss(
        *(torch.from_numpy(x) for x in (u, y, teacher)), alpha, psl, torch.from_numpy(columns) if restricted else None
    )
    assert term.loss.item() == pytest.approx(total / max(cells, 1), rel=1e-9, abs=1e-12)
    assert term.metrics["empty"].item() == sum(y[b, columns].sum() == 0 for b in range(B))


def test_the_loss_starts_at_log_two():
    y = torch.zeros(2, 30).index_fill_(1, torch.tensor([3]), 1.0)
    assert psl_loss(torch.zeros(2, 30), y, None, 0.0, Psl()).loss.item() == pytest.approx(math.log(2))


def test_gradient_per_positive_is_one_over_the_cells():
    u = torch.zeros(2, 10, requires_grad=True)
    y = torch.zeros(2, 10)
    y[:, 4] = 1
    psl_loss(u, y, None, 0.0, Psl()).loss.backward()
    assert u.grad[0, 4].item() == pytest.approx((0.5 - 1) / 20)
    assert u.grad[0, 5].item() == pytest.approx(0.5 / 20)


def test_rows_without_a_keyword_get_no_gradient():
    u = torch.randn(3, 6, requires_grad=True)
    y = torch.zeros(3, 6)
    y[1, 2] = 1
    term = psl_loss(u, y, torch.randn(3, 6), 0.4, Psl())
    term.loss.backward()
    assert u.grad.abs().amax(1).gt(0).tolist() == [False, True, False]
    assert term.metrics["empty"] == 2
    assert term.metrics["keywords"].item() == pytest.approx(1 / 3)


def test_a_batch_without_any_keyword_is_zero():
    u = torch.randn(2, 6, requires_grad=True)
    term = psl_loss(u, torch.zeros(2, 6), torch.randn(2, 6), 0.4, Psl(), torch.tensor([1, 2]))
    assert term.loss.item() == 0
    term.loss.backward()
    assert (u.grad == 0).all()


def test_columns_outside_the_vocabulary_get_no_gradient():
    u = torch.randn(1, 6, requires_grad=True)
    y = torch.ones(1, 6)
    psl_loss(u, y, None, 0.0, Psl(), torch.tensor([1, 4])).loss.backward()
    assert u.grad[0].abs().gt(0).tolist() == [False, True, False, False, True, False]


def test_bfloat16_logits_are_computed_in_float32():
    u = torch.randn(2, 6, dtype=torch.bfloat16)
    assert psl_loss(u, torch.ones(2, 6), u, 0.4, Psl()).loss.dtype == torch.float32
