import copy
import json

import numpy as np
import pytest
import torch

from simla_ray.errors import UserError
from simla_ray.evaluation.scorer import Scorer
from simla_ray.evaluation.tasks import TASKS, evaluate, summary, to_json
from simla_ray.models.visual_codes import PatchCodes

from .conftest import make_scorer, on_ranks


@pytest.fixture(scope="module")
def tokenizer():
    return PatchCodes(torch.rand(128, 3 * 8 * 8, generator=torch.Generator().manual_seed(0)), 8)


@pytest.fixture(scope="module")
def rows(world_rows):
    """Three chunks of images, a broken one, two rows of one image, and ranks with fewer rows than the others."""
    rows = [dict(row) for row in (*world_rows["train"][:69], *world_rows["test"][:4])]
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
    counts = {"n_rows": 73, "n_images": 71, "n_captions": 68 * 3 + 4, "dropped": {"image_unreadable": 1}}
    assert alone["data"].metrics == counts
    assert alone["retrieval"].metrics["n_images"] == 71


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_ranks_gives_the_same(vocabulary, rows, tokenizer, alone, world):
    def run(rank, gather):
        return evaluate(scorers[rank], rows[rank::world], rank=rank, world=world, gather=gather, tokenizer=tokenizer)

    scorers = [make_scorer(vocabulary) for _ in range(world)]
    expected = to_json(alone)
    for results in on_ranks(world, run):
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
    with pytest.raises(UserError, match="grouding is not one of retrieval, match, grounding, keywords, words"):
        evaluate(scorer, rows[:2], tasks=["grouding"])


def test_tasks_that_the_run_or_the_data_do_not_allow_are_absent(vocabulary, scorer, rows, tokenizer):
    bare = [{name: row[name] for name in ("uid", "image", "captions", "image_id")} for row in rows[70:73]]
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


def test_bfloat16(vocabulary, rows, tokenizer):
    results = evaluate(make_scorer(vocabulary, precision="bf16"), rows[:12], tokenizer=tokenizer)
    assert list(results) == ["data", *TASKS]
    json.dumps(to_json(results), allow_nan=False)


def test_a_model_that_has_diverged_scores_worst(vocabulary, rows, tokenizer):
    scorer = make_scorer(vocabulary)
    with torch.no_grad():
        for parameter in scorer.model.parameters():
            parameter.fill_(torch.nan)
    results = evaluate(scorer, rows[:30], tokenizer=tokenizer)
    json.dumps(to_json(results), allow_nan=False)
    assert results["retrieval"].metrics["itc"]["t2i_r10"] == results["retrieval"].metrics["itm"]["i2t_r10"] == 0
    assert results["match"].metrics["auc_random"] == 0.5 and results["grounding"].metrics["pointing"] == 0


@pytest.mark.gpu
def test_gpu_agrees_with_cpu(vocabulary, rows, tokenizer, alone):
    scorer = make_scorer(vocabulary, precision="fp32")
    device = torch.device("cuda")
    scorer.model.to(device)
    on_gpu = Scorer(scorer.run, scorer.model, vocabulary, device)
    results = evaluate(on_gpu, rows, tokenizer=copy.deepcopy(tokenizer).to(device))
    for task in TASKS:
        for name, value in results[task].metrics.items():
            assert value == pytest.approx(alone[task].metrics[name], abs=0.02), (task, name)
