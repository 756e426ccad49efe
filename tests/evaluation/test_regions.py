"""Tasks over images that are made of regions: boxes and columns go with their images wherever these go."""

import numpy as np
import pytest
import torch

from simla_ray.config.load import load_run
from simla_ray.errors import UserError
from simla_ray.evaluation.eval_set import EvalSet
from simla_ray.evaluation.pairs import score_pairs
from simla_ray.evaluation.scorer import Scorer
from simla_ray.evaluation.tasks import evaluate
from simla_ray.evaluation.work import Work
from simla_ray.models.model import Model
from simla_ray.release.pretrained import Pretrained


def make_scorer(vocabulary, *keys):
    run = load_run(overrides=["method=uniter", "codes.n=6", *keys])
    torch.manual_seed(0)
    model = Model(run, len(vocabulary))
    with torch.no_grad():  # far from the start's near-constant outputs
        for parameter in model.student.text.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return Scorer(run, model, vocabulary, torch.device("cpu"))


def with_features(rows):
    rng = np.random.default_rng(0)
    return [row | {"region_feats": rng.normal(size=(len(row["boxes"]), 5)).tolist()} for row in rows]


@pytest.fixture(scope="module", params=["boxes", "column", "grid"])
def made(request, vocabulary, world_rows):
    keys = {"column": ["regions.width=5"], "grid": ["regions.grid=3"]}.get(request.param, [])
    rows = world_rows["train"][:6]
    return make_scorer(vocabulary, f"regions.source={request.param}", *keys), with_features(rows)


def test_every_task_gives_numbers_or_says_what_is_missing(made):
    scorer, rows = made
    results = evaluate(scorer, rows)
    assert set(results) == {"data", "retrieval", "match", "words"}
    missing = results["data"].metrics["not_run"]
    assert missing["grounding"] == "images are made of regions, not of patches"
    assert "itc" not in results["retrieval"].metrics and results["retrieval"].metrics["itm"]
    assert {"color_right", "color_wrong", "mlm_accuracy"} <= set(results["words"].metrics)


def test_a_pair_scores_the_same_alone_and_among_fuller_images(made):
    scorer, rows = made
    data = EvalSet.load(scorer, rows, Work())
    logits = data.match_logits(*(a.ravel() for a in np.indices((len(data), len(data.texts)))))
    logits = logits.reshape(len(data), -1)
    for i in range(len(data)):
        ids, mask = scorer.tokenize(data.texts)
        with torch.no_grad():
            tokens = scorer.image_tokens(data.images([i]))
            states = scorer.fuse(tokens, torch.zeros(len(ids), dtype=torch.int64), ids, mask)
            two = scorer.model.match(states[:, 0])
        np.testing.assert_allclose(logits[i], (two[:, 1] - two[:, 0]).numpy(), rtol=1e-3, atol=1e-4)
    probability = [scored.itm for scored in score_pairs(scorer, rows)]
    own = logits[data.image_of_caption, data.text_of_caption]
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(-own)), rtol=1e-3)


def test_regions_are_read(made):
    """Other boxes or features over the same picture: other scores."""
    scorer, rows = made
    if scorer.run.regions.source == "grid":
        pytest.skip("cells are the same in every image")
    other = [row | {"boxes": [[0, 0, 0.3, 0.3]] * len(row["boxes"])} for row in rows]
    one, two = ([scored.itm for scored in score_pairs(scorer, some)] for some in (rows, other))
    assert np.abs(np.subtract(one, two)).max() > 1e-4


def test_rows_without_regions_are_dropped_with_the_reason(made):
    scorer, rows = made
    bare = {name: value for name, value in rows[0].items() if name not in ("boxes", "region_feats")}
    dropped = next(iter(score_pairs(scorer, [bare]))).dropped
    assert dropped == ("" if scorer.run.regions.source == "grid" else "boxes_missing")


def test_a_loaded_model_matches_pictures_alone_but_has_no_maps(made, vocabulary):
    scorer, rows = made
    model = Pretrained(scorer.run, scorer.model, vocabulary, torch.device("cpu"))
    image = rows[0]["image"]
    if scorer.run.regions.source == "column":
        with pytest.raises(UserError, match=r"column reads region_feats; a picture without them cannot be used"):
            model.match([image], ["a red circle"])
    elif scorer.run.regions.source == "boxes":
        said = r"uniter-boxes-tiny: a picture given alone has no boxes; it is seen as the 6 x 6 cells of a grid$"
        with pytest.warns(UserWarning, match=said) as once:
            assert 0 <= float(model.match([image], ["a red circle"])[0]) <= 1
            model.match([image, rows[1]["image"]], ["a red circle"] * 2)
        assert len(once) == 1 and model.without_boxes == 3
    else:
        assert 0 <= float(model.match([image], ["a red circle"])[0]) <= 1 and model.without_boxes == 0
    with pytest.raises(UserError, match="has images made of regions; a map needs patches"):
        model.ground([image], ["a red circle"])
