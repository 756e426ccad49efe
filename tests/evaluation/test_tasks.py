import json

import pytest
import torch

from simla_ray.errors import UserError
from simla_ray.evaluation.tasks import TASKS, evaluate, summary, to_json
from simla_ray.models.visual_codes import PatchCodes

from .conftest import make_scorer, on_ranks


@pytest.fixture(scope="module")
def tokenizer():
    return PatchCodes(torch.rand(128, 3 * 8 * 8, generator=torch.Generator().manual_seed(0)), 8)


@pytest.fixture(scope="module")
def rows(world_rows):
    """Four chunks of images, a broken one, two rows of one image, and a rank with fewer rows than the others."""
    rows = [dict(row) for row in (*world_rows["train"], *world_rows["test"][:4])]
    rows[7]["image"] = b"no image"
    rows[50]["image_id"] = rows[3]["image_id"]
    return rows


@pytest.fixture(scope="module")
def alone(scorer, rows, tokenizer):
    return evaluate(scorer, rows, tokenizer=tokenizer)


def test_all_tasks_and_plain_json(alone):
    assert list(alone) == ["data", *TASKS]
    text = json.dumps(to_json(alone), allow_nan=False)
    assert json.loads(text)["grounding"]["metrics"] == alone["grounding"].metrics
    assert json.loads(json.dumps(summary(alone))) == summary(alone)
    for name in TASKS:
        assert 0 < len(alone[name].examples) <= 12
        for example in alone[name].examples:
            assert example["uid"] and ("caption" in example or "phrase" in example) and example["image"]
    assert set(alone["match"].metrics) == {"auc_random", "auc_hard", "n"}
    assert {"color_right", "color_wrong", "n", "mlm_accuracy", "mim_accuracy"} == set(alone["words"].metrics)


def test_dropped_rows_are_counted(alone):
    assert alone["data"].metrics == {
        "n_rows": 100, "n_images": 98, "n_captions": 94 * 3 + 3 + 4, "dropped": {"image_unreadable": 1},
    }  # fmt: skip
    assert alone["retrieval"].metrics["n_images"] == 98


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_gives_the_same_to_the_last_bit(vocabulary, rows, tokenizer, alone, world):
    def run(rank, gather):
        return evaluate(scorers[rank], rows[rank::world], rank=rank, world=world, gather=gather, tokenizer=tokenizer)

    scorers = [make_scorer(vocabulary) for _ in range(world)]
    for results in on_ranks(world, run):
        assert to_json(results) == to_json(alone)


def test_more_ranks_than_rows(scorer, rows):
    few = rows[:2]
    expected = to_json(evaluate(scorer, few))
    found = on_ranks(3, lambda rank, gather: evaluate(scorer, few[rank::3], rank=rank, world=3, gather=gather))
    assert [to_json(results) for results in found] == [expected] * 3


def test_tasks_can_be_chosen(scorer, rows):
    assert list(evaluate(scorer, rows[:6], tasks=["words", "match"])) == ["data", "match", "words"]


def test_unknown_task_names_the_allowed_ones(scorer, rows):
    with pytest.raises(UserError, match="grouding is not one of retrieval, match, grounding, keywords, words"):
        evaluate(scorer, rows[:2], tasks=["grouding"])


def test_tasks_that_the_run_or_the_data_do_not_allow_are_absent(vocabulary, scorer, rows, tokenizer):
    bare = [{name: row[name] for name in ("uid", "image", "captions", "image_id")} for row in rows[97:100]]
    assert list(evaluate(scorer, bare)) == ["data", "retrieval", "match", "words"]
    off = {f"objectives__{name}__weight": 0 for name in ("itm", "mlm", "mim", "psl")}
    itc = make_scorer(vocabulary, **off, schedule__kind="joint", schedule__phases=[])
    assert list(evaluate(itc, rows[:6], tokenizer=tokenizer)) == ["data", "retrieval"]
    off = {f"objectives__{name}__weight": 0 for name in ("itc", "itm", "mlm", "mim")}
    psl = make_scorer(vocabulary, **off, schedule__kind="joint", schedule__phases=[], eval__best="last")
    assert list(evaluate(psl, rows[:6])) == ["data", "keywords"]


def test_model_in_training_mode_is_evaluated_all_the_same(vocabulary, rows):
    scorer = make_scorer(vocabulary, text__dropout=0.3)
    first = to_json(evaluate(scorer, rows[:4], tasks=["retrieval"]))
    scorer.model.train()
    assert to_json(evaluate(scorer, rows[:4], tasks=["retrieval"])) == first
