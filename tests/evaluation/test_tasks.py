import copy
import json

import numpy as np
import pytest
import torch

from simla_ray.errors import UserError
from simla_ray.evaluation.ratings import read_ratings
from simla_ray.evaluation.scorer import Scorer
from simla_ray.evaluation.tasks import TASKS, evaluate, summary, table, to_json
from simla_ray.models.visual_codes import PatchCodes

from .conftest import make_scorer, on_ranks


@pytest.fixture(scope="module")
def tokenizer():
    return PatchCodes(torch.rand(128, 3 * 8 * 8, generator=torch.Generator().manual_seed(0)), 8)


@pytest.fixture(scope="module")
def rows(world_rows):
    """Three chunks of images, a broken one, two rows of one image, classes, and ranks with fewer rows than others."""
    rows = [dict(row) for row in (*world_rows["train"][:69], *world_rows["test"][:4])]
    rows[7]["image"] = b"no image"
    rows[50]["image_id"] = rows[3]["image_id"]
    for i, row in enumerate(rows[:60]):
        row["label"] = f"class_{i % 7}"
    return rows


@pytest.fixture(scope="module")
def ratings(rows, tmp_path_factory):
    """Ratings of own and other captions of every third image, the broken one, and one that is not there."""
    path = tmp_path_factory.mktemp("ratings") / "ratings.csv"
    lines = [f'{rows[i]["uid"]},"{rows[(i + j) % 60]["captions"][0]}",{1 + (i + 3 * j) % 4}' for i in range(1, 60, 3)
             for j in range(3)]  # fmt: skip
    path.write_text("\n".join(["uid,caption,rating", *lines, f"{rows[1]['uid']},a red ring,?", "nobody,a ring,2"]))
    return read_ratings(path)


#: What a pretrained model cannot do.
FINE_TUNED = {"vqa": "no objective answers", "statements": "no objective labels"}
PRETRAINED = [name for name in TASKS if name not in FINE_TUNED]


def rated_rows(rows, ratings):
    return [row for row in rows if ratings.name_of(row) is not None]


@pytest.fixture(scope="module")
def alone(scorer, rows, tokenizer, ratings):
    return evaluate(scorer, rows, tokenizer=tokenizer, rated=(ratings, rated_rows(rows, ratings)))


def test_all_tasks_and_plain_json(alone):
    assert list(alone) == ["data", *PRETRAINED]
    text = json.dumps(to_json(alone), allow_nan=False)
    assert json.loads(text)["grounding"]["metrics"] == alone["grounding"].metrics
    assert json.loads(json.dumps(summary(alone))) == summary(alone)
    for name in PRETRAINED:
        assert 0 < len(alone[name].examples) <= 12
        for example in alone[name].examples:
            assert example["uid"] and {"caption", "phrase", "label"} & set(example) and example["image"]
    assert set(alone["match"].metrics) == {"auc_random", "auc_hard", "n"}
    assert {"color_right", "color_wrong", "n", "mlm_accuracy", "mim_accuracy"} == set(alone["words"].metrics)


def test_every_interval_holds_its_metric(alone):
    def check(metrics, intervals):
        for name, found in intervals.items():
            if isinstance(found, dict):
                check(metrics[name], found)
            else:
                low, high = found
                assert low <= metrics[name] <= high, name

    for name in PRETRAINED:
        check(alone[name].metrics, alone[name].intervals)
    assert {name for name in PRETRAINED if alone[name].intervals} >= set(PRETRAINED) - {"grounding"}
    retrieval = summary(alone)["retrieval"]
    assert set(retrieval["intervals"]) == {"itc", "itm", "itc_satisfied", "itm_satisfied"}
    assert set(retrieval["intervals"]["itc"]) == set(retrieval["itc"])
    assert to_json(alone)["words"]["intervals"] == alone["words"].intervals


def at(metrics, path):
    """A metric by the names that lead to it."""
    for name in path.split("/"):
        metrics = metrics[name]
    return metrics


def paths(nested, prefix=""):
    for name, found in nested.items():
        yield from paths(found, f"{prefix}{name}/") if isinstance(found, dict) else [prefix + name]


def check_sums(results):
    """What the images give adds up to the metric; every one with an interval has it."""
    images = len(results["data"].uids)
    for name, result in results.items():
        for path, sums in result.per_image.items():
            assert sums.shape == (images, 2) and sums.dtype == np.float32, path
            total = sums.astype(np.float64).sum(0)
            assert total[0] / total[1] == pytest.approx(at(result.metrics, path), rel=1e-6, abs=1e-9), (name, path)
        if name != "ratings":  # rank correlations are of all pairs together
            assert set(paths(result.intervals)) <= set(result.per_image), name


def test_what_each_image_gives_adds_up_to_the_metric(alone, rows):
    check_sums(alone)
    assert alone["data"].uids == tuple(row["uid"] for i, row in enumerate(rows) if i not in (7, 50))
    assert sum(len(result.per_image) for result in alone.values()) == 24 + 2 + 10 + 5 + 4 + 3
    t2i = alone["retrieval"].per_image["itc/t2i_r10"]
    assert t2i[2].tolist()[1] == 3 and t2i[3].tolist()[1] == 6, "row 50 shows the image of row 3"
    assert (alone["retrieval"].per_image["itc/i2t_r1"][:, 1] == 1).all()


def test_what_each_image_gives_without_a_shortlist_and_with_masks_for_some(vocabulary, rows, tokenizer):
    scorer = make_scorer(
        vocabulary, objectives__itc=None, eval__best="last", objectives__mim__batch_fraction=0.5,
        schedule__kind="joint", schedule__phases=[],
    )  # fmt: skip
    results = evaluate(scorer, rows[:45], tokenizer=tokenizer, tasks=["retrieval", "words"])
    check_sums(results)
    masked = results["words"].per_image["mim_accuracy"][:, 1] > 0
    assert np.flatnonzero(masked).tolist() == [*range(16), *range(32, 38)], "the first half of each 32 images"


def test_the_images_that_are_ranked_exhaustively_are_some_of_all(vocabulary, rows, monkeypatch):
    monkeypatch.setattr("simla_ray.evaluation.retrieval.EXHAUSTIVE_IMAGES", 5)
    scorer = make_scorer(
        vocabulary, objectives__itc=None, eval__best="last", schedule__kind="joint", schedule__phases=[]
    )
    results = evaluate(scorer, rows[:9], tasks=["retrieval"])
    check_sums(results)
    assert results["retrieval"].per_image["itm/t2i_r1"][:, 1].tolist() == [3.0] * 5 + [0.0] * 3


def test_dropped_rows_are_counted(alone):
    counts = {"n_rows": 73, "n_images": 71, "n_captions": 68 * 3 + 4, "dropped": {"image_unreadable": 1}}
    assert alone["data"].metrics == counts | {"not_run": FINE_TUNED}
    assert alone["ratings"].metrics["dropped"] == {"image_unreadable": 3, "image_unknown": 1, "rating_unreadable": 1}
    assert alone["retrieval"].metrics["n_images"] == 71


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_gives_the_same(vocabulary, rows, tokenizer, ratings, alone, world):
    def run(rank, gather):
        given = {"tokenizer": tokenizer, "rated": (ratings, rated_rows(rows, ratings)[rank::world])}
        return evaluate(scorers[rank], rows[rank::world], rank=rank, world=world, gather=gather, **given)

    scorers = [make_scorer(vocabulary) for _ in range(world)]
    expected = to_json(alone)
    for results in on_ranks(world, run):
        for name, result in results.items():
            assert result.per_image.keys() == alone[name].per_image.keys() and result.uids == alone[name].uids
            assert all((sums == alone[name].per_image[path]).all() for path, sums in result.per_image.items())
        found = to_json(results)
        # Backward passes in another thread may round heat maps differently in their last digit; nothing else moves.
        for ours, theirs in zip(found["grounding"]["examples"], expected["grounding"]["examples"], strict=True):
            assert np.allclose(ours["heat"], theirs["heat"], atol=2e-4)
            ours["heat"] = theirs["heat"]
        assert found == expected


def test_more_ranks_than_rows(scorer, rows):
    few = rows[:2]
    expected = to_json(evaluate(scorer, few))
    found = on_ranks(3, lambda rank, gather: evaluate(scorer, few[rank::3], rank=rank, world=3, gather=gather))
    assert [to_json(results) for results in found] == [expected] * 3


def test_tasks_can_be_chosen(scorer, rows):
    assert list(evaluate(scorer, rows[:6], tasks=["words", "match"])) == ["data", "match", "words"]


def test_unknown_task_names_the_allowed_ones(scorer, rows):
    with pytest.raises(UserError, match="grouding is not one of retrieval, match, grounding, keywords, words, class"):
        evaluate(scorer, rows[:2], tasks=["grouding"])


def test_tasks_that_the_run_or_the_data_do_not_allow_are_absent(vocabulary, scorer, rows, tokenizer):
    bare = [{name: row[name] for name in ("uid", "image", "captions", "image_id")} for row in rows[70:73]]
    results = evaluate(scorer, bare)
    assert list(results) == ["data", "retrieval", "match", "words"]
    assert results["data"].metrics["not_run"] == {
        "grounding": "no column phrases",
        "keywords": "no column keywords and no second caption, or they say nothing new",
        "classification": "no column label",
        "ratings": "no --ratings",
        **FINE_TUNED,
    }
    assert table(results).splitlines()[-1].startswith("not run: grounding (no column phrases), ")
    assert evaluate(scorer, bare, tasks=["keywords"])["data"].metrics["not_run"].keys() == {"keywords"}
    off = {f"objectives__{name}__weight": 0 for name in ("itm", "mlm", "mim", "psl")}
    itc = make_scorer(vocabulary, **off, schedule__kind="joint", schedule__phases=[])
    results = evaluate(itc, rows[:6], tokenizer=tokenizer)
    assert list(results) == ["data", "retrieval", "classification"]
    missing = results["data"].metrics["not_run"]
    assert missing["match"] == "no objective itm" and missing["words"] == "no objective mlm or mim"
    off = {f"objectives__{name}__weight": 0 for name in ("itc", "itm", "mlm", "mim")}
    psl = make_scorer(vocabulary, **off, schedule__kind="joint", schedule__phases=[], eval__best="last")
    results = evaluate(psl, rows[:6])
    assert list(results) == ["data", "keywords"]
    missing = results["data"].metrics["not_run"]
    assert missing["retrieval"] == "no objective itc or itm" and missing["classification"] == "no objective itc"


def test_model_in_training_mode_is_evaluated_all_the_same(vocabulary, rows):
    scorer = make_scorer(vocabulary, text__dropout=0.3)
    first = to_json(evaluate(scorer, rows[:4], tasks=["retrieval"]))
    scorer.model.train()
    assert to_json(evaluate(scorer, rows[:4], tasks=["retrieval"])) == first


def test_bfloat16(vocabulary, rows, tokenizer, ratings):
    given = ratings, rated_rows(rows[:12], ratings)
    results = evaluate(make_scorer(vocabulary, precision="bf16"), rows[:12], tokenizer=tokenizer, rated=given)
    assert list(results) == ["data", *PRETRAINED]
    json.dumps(to_json(results), allow_nan=False)


def test_a_model_that_has_diverged_scores_worst(vocabulary, rows, tokenizer, ratings):
    scorer = make_scorer(vocabulary)
    with torch.no_grad():
        for parameter in scorer.model.parameters():
            parameter.fill_(torch.nan)
    results = evaluate(scorer, rows[:30], tokenizer=tokenizer, rated=(ratings, rated_rows(rows, ratings)))
    json.dumps(to_json(results), allow_nan=False)
    assert results["classification"].metrics["accuracy"] == 0
    assert results["ratings"].metrics["itm"] == {"spearman": 0.0, "kendall": 0.0}
    assert results["retrieval"].metrics["itc"]["t2i_r10"] == results["retrieval"].metrics["itm"]["i2t_r10"] == 0
    assert results["match"].metrics["auc_random"] == 0.5 and results["grounding"].metrics["pointing"] == 0


@pytest.mark.gpu
def test_gpu_agrees_with_cpu(vocabulary, rows, tokenizer, ratings, alone):
    scorer = make_scorer(vocabulary, precision="fp32")
    device = torch.device("cuda")
    scorer.model.to(device)
    on_gpu = Scorer(scorer.run, scorer.model, vocabulary, device)
    given = ratings, rated_rows(rows, ratings)
    results = evaluate(on_gpu, rows, tokenizer=copy.deepcopy(tokenizer).to(device), rated=given)
    for task in TASKS:
        for name, value in results[task].metrics.items():
            if name == "confused":  # an image between two classes may be counted for either
                continue
            assert value == pytest.approx(alone[task].metrics[name], abs=0.02), (task, name)
