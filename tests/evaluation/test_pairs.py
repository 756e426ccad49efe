from pathlib import Path

import numpy as np
import pytest
import torch

from simla_ray.errors import UserError
from simla_ray.evaluation import pairs
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.pairs import score_pairs
from simla_ray.evaluation.work import Work

from .conftest import make_scorer


@pytest.fixture
def rows(world_rows, tmp_path):
    """Several captions a row, one image as a file of two rows, and what cannot be scored."""
    rows = [dict(row) for row in world_rows["train"][:14]]
    file = tmp_path / "picture.jpg"
    file.write_bytes(rows[4]["image"])
    rows[4]["image"] = rows[5]["image"] = file
    rows[6]["image"] = b"no image"
    rows[7]["image"] = "image_missing"
    rows[8]["captions"] = []
    rows[9]["captions"] = ["a red ring", "?!", "A red, ring!"]
    return rows


def test_scores_are_those_of_each_pair_alone(scorer, rows, monkeypatch):
    monkeypatch.setattr(pairs, "PAIRS", 8)
    found = list(score_pairs(scorer, rows))
    given = [(row["uid"], caption) for row in rows for caption in row["captions"] or [""]]
    assert [(one.pair.uid, one.pair.caption) for one in found] == given
    dropped = {(one.pair.uid, one.dropped) for one in found if one.dropped}
    uids = [row["uid"] for row in rows]
    assert dropped == {(uids[6], "image_unreadable"), (uids[7], "image_missing"), (uids[8], "caption_empty"),
                       (uids[9], "caption_empty")}  # fmt: skip
    images = {row["uid"]: row["image"] for row in rows}
    for one in found:
        if one.dropped:
            assert one.itc is None and one.itm is None
            continue
        image = images[one.pair.uid]
        data = EvalSet.load(scorer, [{**rows[0], "image": image, "captions": ["a"], "claims": None}], Work())
        tokens, vector = scorer.encode_images(data.images([0]))
        ids, mask, text = scorer.encode_texts([one.pair.caption])
        assert one.itc == pytest.approx(float(vector[0] @ text[0]), abs=1e-5)
        logit = scorer.match_logits(tokens, torch.tensor([0]), ids, mask)
        assert one.itm == pytest.approx(float(torch.sigmoid(logit)[0]), abs=1e-5)


def test_an_image_of_a_batch_is_decoded_once(scorer, rows, monkeypatch):
    decoded, black = [], {"image": np.zeros((3, 48, 48), np.uint8)}
    monkeypatch.setattr(pairs, "_view", lambda scorer, pair: decoded.append(pair.image) or black)
    list(score_pairs(scorer, rows[:6]))
    assert len(decoded) == 5 and sum(isinstance(image, Path) for image in decoded) == 1


def test_no_more_rows_are_read_than_a_batch_needs(scorer, world_rows, monkeypatch):
    monkeypatch.setattr(pairs, "PAIRS", 6)
    taken = []

    def stream():
        for row in world_rows["train"][:20]:
            taken.append(row["uid"])
            yield row

    scored = score_pairs(scorer, stream())
    next(scored)
    assert len(taken) == 2


def test_the_same_rows_give_the_same_numbers(scorer, rows):
    assert [(o.itc, o.itm) for o in score_pairs(scorer, rows)] == [(o.itc, o.itm) for o in score_pairs(scorer, rows)]


def test_only_what_the_run_has(vocabulary, rows):
    itc = make_scorer(vocabulary, objectives__itm__weight=0)
    assert all(one.itm is None and (one.dropped or one.itc is not None) for one in score_pairs(itc, rows))
    off = {f"objectives__{name}__weight": 0 for name in ("itc", "itm", "mlm", "mim")}
    psl = make_scorer(vocabulary, **off, schedule__kind="joint", schedule__phases=[], eval__best="last")
    with pytest.raises(UserError, match="without itc and itm"):
        next(score_pairs(psl, rows))
