import numpy as np
import pytest
import torch

from simla_ray.errors import UserError
from simla_ray.evaluation import grounding
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.grad_cam import grad_cam
from simla_ray.evaluation.grounding import best_layers, layer_scores, patch_centres, points_inside
from simla_ray.evaluation.work import Work

from .conftest import make_scorer, on_ranks


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


CORNER, REST = [0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]


@pytest.fixture
def four(world_rows):
    """Rows with a phrase each, in another place, and two objects; the last has phrases that cannot be used."""
    rows = [dict(row) for row in world_rows["test"][:4]]
    for row, boxes in zip(rows, ([CORNER], [[0.4, 0.4, 1.0, 1.0]], [CORNER, REST], []), strict=True):
        row["phrases"] = [{"text": "A thing!", "boxes": boxes}]
        row["boxes"] = [CORNER, REST]
    rows[3]["phrases"] += [{"text": "?", "boxes": [CORNER]}, {"text": "none", "boxes": None}]
    rows[3]["phrases"] += [{"text": "beside", "boxes": [[1.0, 0.2, 1.5, 0.4]]}]
    return rows


def test_measure_against_maps_by_hand(scorer, four, monkeypatch):
    data = EvalSet.load(scorer, four, Work())
    # right; in the wrong corner; zero everywhere, which must not count as the first patch
    maps = np.stack([at(6, 0.1, 0.3), at(6, 0.1, 0.1), np.zeros(36, np.float32)])
    monkeypatch.setattr(grounding, "_maps", lambda data, phrases, layers: maps[None])
    result = grounding.measure(data)
    assert result.metrics == {
        "pointing": pytest.approx(1 / 3),
        "chance": pytest.approx((9 + 16 + 18) / 36 / 3),
        "center": 1.0,
        "random_object": pytest.approx((1 / 2 + 1 / 2 + 1) / 3),
        "box_accuracy": 0.0,  # one patch is too small a box
        "box_whole": 0.0,
        "box_middle": 0.0,
        "n": 3,
        "candidate_accuracy": pytest.approx(1 / 3),
        "candidate_random": pytest.approx((1 / 2 + 1 / 2 + 1) / 3),
        "candidate_largest": pytest.approx(2 / 3),  # of equals the first
        "candidate_n": 3,
        "layers": [0, 1, 2],
        "skipped": {"box_outside": 1, "no_boxes": 3, "no_words": 1},
    }
    assert [example["hit"] for example in result.examples] == [True, False, False]
    assert result.examples[0]["phrase"] == "a thing"
    assert np.array(result.examples[0]["heat"]).shape == (6, 6) and result.examples[0]["heat"][1][0] == 1.0
    assert result.examples[0]["iou"] > 0 and "proposed" not in result.examples[2]


def test_a_map_that_fills_its_box_finds_it(scorer, four, monkeypatch):
    four[1]["phrases"][0]["boxes"] = [REST]
    four[0]["boxes"] = [[-1.0, 0.0, 0.5, 0.5], REST]  # cut at the edge it is the corner
    four[1]["boxes"] = []
    data = EvalSet.load(scorer, four, Work())
    quarter = np.zeros((6, 6), np.float32)
    quarter[:3, :3] = 1
    maps = np.stack([quarter, quarter, quarter[::-1, ::-1]]).reshape(3, 36)
    monkeypatch.setattr(grounding, "_maps", lambda data, phrases, layers: maps[None])
    m = grounding.measure(data).metrics
    assert m["box_accuracy"] == pytest.approx(2 / 3) == m["pointing"]
    assert m["candidate_accuracy"] == 1.0 and m["candidate_n"] == 2 and "random_object" not in m
    assert m["skipped"]["candidate_box_clipped"] == 1


def test_phrases_that_all_fail_are_counted(scorer, vocabulary, four):
    why = grounding.measure(EvalSet.load(scorer, four[3:], Work()))
    assert why == "no phrase has words and boxes: box_outside 1, no_boxes 3, no_words 1"
    four[3]["phrases"] = []
    assert grounding.measure(EvalSet.load(scorer, four[3:], Work())) == "no column phrases"
    clip = make_scorer(vocabulary, method="clip", queue=0)
    assert grounding.measure(EvalSet.load(clip, four, Work())) == "no objective itm"


def test_intervals_are_over_images(scorer, world_rows):
    """Phrases of an image are drawn together: with one image nothing moves."""
    data = EvalSet.load(scorer, world_rows["test"][:30], Work())
    result = grounding.measure(data)
    assert set(result.intervals) == {"pointing", "box_accuracy", "candidate_accuracy"}
    for name, (low, high) in result.intervals.items():
        assert 0 <= low <= result.metrics[name] <= high <= 1
    low, high = result.intervals["pointing"]
    assert low < high
    alone = grounding.measure(data.first(1))
    assert alone.intervals["pointing"] == [alone.metrics["pointing"]] * 2


def test_many_phrases_are_thinned_the_same_way_every_time(data, monkeypatch):
    every, skipped = grounding.phrases_of(data)
    assert skipped == {}
    monkeypatch.setattr(grounding, "MAX_PHRASES", 7)
    few = grounding.phrases_of(data)[0]
    assert len(few) == 7 < len(every)
    assert [(p.item, p.text) for p in few] == [
        (every[i * len(every) // 7].item, every[i * len(every) // 7].text) for i in range(7)
    ]


def test_phrases_point_into_their_own_image(data):
    """A map of the whole set is the map of each phrase alone."""
    phrases = grounding.phrases_of(data)[0][:9]
    together = grounding._maps(data, phrases, (0, 1))
    assert together.shape == (2, 9, 36)
    for i in (0, 4, 8):
        alone = grounding._maps(data, [phrases[i]], (0, 1))[:, 0]
        np.testing.assert_allclose(alone, together[:, i], rtol=1e-3, atol=1e-6)


def test_rows_without_all_objects_have_no_such_baseline(scorer, world_rows):
    rows = [{k: v for k, v in row.items() if k not in ("boxes", "box_labels")} for row in world_rows["test"][:3]]
    metrics = grounding.measure(EvalSet.load(scorer, rows, Work())).metrics
    assert set(metrics) == {
        "pointing", "chance", "center", "box_accuracy", "box_whole", "box_middle", "n", "layers", "skipped",
    }  # fmt: skip


def slow_pointing(data, layers):
    """Phrase by phrase: one map, the first hottest patch, the boxes one by one."""
    phrases, hits = grounding.phrases_of(data)[0], 0
    for phrase in phrases:
        tokens, _ = data.scorer.encode_images(data.images([phrase.item]))
        ids, mask = data.scorer.tokenize([phrase.text])
        cam = grad_cam(data.scorer, tokens, torch.tensor([0]), ids, mask, layers)[0]
        y, x = divmod(int(cam.argmax()), 6)
        x, y = (x + 0.5) / 6, (y + 0.5) / 6
        hits += any(x1 <= x <= x2 and y1 <= y <= y2 for x1, y1, x2, y2 in phrase.boxes.tolist())
    return hits / len(phrases)


def test_layers_are_chosen_by_pointing(data):
    data = data.first(12)
    scores = layer_scores(data)
    assert list(scores) == [(0, 1, 2), (0,), (1,), (2,)]
    for layers, score in scores.items():
        assert score == grounding.measure(data, layers).metrics["pointing"]
        assert score == pytest.approx(slow_pointing(data, layers), abs=0.04)  # rounding may move a tie
    best = best_layers(scores)
    assert scores[best] == max(scores.values())
    assert grounding.measure(data, best).metrics["layers"] == list(best)


def test_ties_go_to_all_layers_then_to_the_first():
    assert best_layers({(0, 1, 2): 0.5, (0,): 0.5, (1,): 0.5}) == (0, 1, 2)
    assert best_layers({(0, 1, 2): 0.4, (0,): 0.3, (1,): 0.5, (2,): 0.5}) == (1,)


def test_bad_layers_are_one_line(data, four):
    with pytest.raises(UserError, match="layers: 3 does not read the image; those that do: 0, 1, 2"):
        grounding.measure(data, (3,))
    with pytest.raises(UserError, match="no validation row has a phrase with boxes"):
        layer_scores(EvalSet.load(data.scorer, four[3:], Work()))


def test_every_number_of_ranks_gives_the_same(scorer, world_rows):
    rows = world_rows["train"][:30]

    def run(world):
        def rank_of(rank, gather):
            data = EvalSet.load(scorer, rows[rank::world], Work(rank, world, gather))
            return grounding.measure(data).metrics, layer_scores(data)

        return on_ranks(world, rank_of)

    alone = run(1)[0]
    for world in (2, 3):
        assert all(found == alone for found in run(world))
