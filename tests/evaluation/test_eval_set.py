import base64
import io

import numpy as np
import pytest
from PIL import Image

from simla_ray.data.scene import satisfies
from simla_ray.errors import UserError
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.work import Work

from .conftest import make_scorer, on_ranks


def test_unusable_rows_are_counted_and_left_out(scorer, world_rows):
    rows = [dict(row) for row in world_rows["test"][:6]]
    rows[1]["image"] = b"no image"
    rows[2]["image"] = "image_missing"
    rows[3]["captions"] = ["?!", ""]
    data = EvalSet.load(scorer, rows, Work())
    assert data.dropped == {"caption_empty": 1, "image_missing": 1, "image_unreadable": 1}
    assert [item.uid for item in data.items] == [rows[i]["uid"] for i in (0, 4, 5)]
    assert data.n_rows == 6


def test_nothing_usable_is_an_error_that_says_why(scorer, world_rows):
    row = dict(world_rows["test"][0], image=b"")
    with pytest.raises(UserError, match=r"data\.test.*image_empty 1"):
        EvalSet.load(scorer, [row], Work())
    with pytest.raises(UserError, match="there are none"):
        EvalSet.load(scorer, [], Work())


def test_rows_of_one_image_become_one(scorer, world_rows):
    a, b, c = (dict(row) for row in world_rows["train"][:3])
    c["image_id"] = a["image_id"]
    c["captions"] = ["Hello!", ""]
    c["claims"] = ["{}", "{}"]
    data = EvalSet.load(scorer, [a, b, c], Work())
    assert [item.uid for item in data.items] == [a["uid"], b["uid"]]
    assert data.items[0].captions == [*a["captions"], "hello"]
    assert data.items[0].claims == [*a["claims"], "{}"]
    assert data.items[0].phrases == [*a["phrases"], *c["phrases"]]
    assert data.image_of_caption.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert data.first_caption.tolist() == [0, 4]


def test_equal_captions_are_one_text(scorer, world_rows):
    rows = [dict(row) for row in world_rows["test"][:3]]
    rows[2]["captions"] = [rows[0]["captions"][0].upper()]
    data = EvalSet.load(scorer, rows, Work())
    assert len(data.captions) == 3 and len(data.texts) == 2
    assert data.text_of_caption.tolist() == [0, 1, 0]


def test_satisfied_is_that_of_the_world(data):
    claims = [claim for item in data.items for claim in item.claims]
    expected = [[satisfies(claim, item.scene) for claim in claims] for item in data.items]
    assert data.satisfied.tolist() == expected
    assert data.satisfied[data.image_of_caption, np.arange(len(claims))].all()
    assert data.satisfied.sum() > len(claims), "some captions should fit several scenes"


def test_other_data_know_nothing_of_it(scorer, world_rows):
    rows = [{k: v for k, v in row.items() if k not in ("claims", "scene")} for row in world_rows["test"][:2]]
    assert EvalSet.load(scorer, rows, Work()).satisfied is None


def test_match_logits_of_pairs_in_any_order(data):
    rng = np.random.default_rng(0)
    image, text = rng.integers(0, len(data), 300), rng.integers(0, len(data.texts), 300)
    image[1], text[1] = image[0], text[0]
    logits = data.match_logits(image, text)
    assert logits[0] == logits[1] and np.ptp(logits) > 0
    for i in range(0, 300, 29):
        tokens, _ = data.scorer.encode_images(data.images([image[i]]))
        ids, mask = data.scorer.tokenize([data.texts[text[i]]])
        alone = data.scorer.match_logits(tokens, ids.new_zeros(1), ids, mask)
        assert float(alone) == pytest.approx(float(logits[i]), rel=1e-3, abs=1e-4)


def test_match_logits_are_those_of_any_number_of_ranks(vocabulary, world_rows):
    """To the last bit, and whichever pairs were asked for before."""
    scorer, rows = make_scorer(vocabulary, method="albef"), world_rows["train"][:100]

    def logits(rank, gather, world):
        data = EvalSet.load(scorer, rows[rank::world], Work(rank, world, gather))
        rng = np.random.default_rng(0)
        image, text = rng.integers(0, len(data), 500), rng.integers(0, len(data.texts), 500)
        if world > 1:
            data.match_logits(image[:50][::-1], text[:50])
        return data.match_logits(image, text)

    (alone,) = on_ranks(1, lambda rank, gather: logits(rank, gather, 1))
    for found in on_ranks(2, lambda rank, gather: logits(rank, gather, 2)):
        assert np.array_equal(found, alone)
    for found in on_ranks(3, lambda rank, gather: logits(rank, gather, 3)):
        assert np.array_equal(found, alone)


def test_derangement_moves_every_image(data):
    wrong = data.derangement()
    assert sorted(wrong) == list(range(len(data))) and (wrong != np.arange(len(data))).all()
    assert (data.first(2).derangement() == [1, 0]).all()


def test_pictures_keep_their_aspect(scorer, world_rows):
    out = io.BytesIO()
    Image.new("RGB", (90, 30)).save(out, "PNG")
    data = EvalSet.load(scorer, [dict(world_rows["test"][0], image=out.getvalue())], Work())
    with Image.open(io.BytesIO(base64.b64decode(data.picture(0)["image"]))) as picture:
        assert picture.format == "JPEG" and picture.size == (48, 16)


def test_no_pictures_where_the_report_has_none(vocabulary, world_rows):
    data = EvalSet.load(make_scorer(vocabulary, report__images=False), world_rows["test"][:1], Work())
    assert data.picture(0) == {}
