"""UNITER's step: it learns, whatever its regions are made of, and goes on after a stop as if there had been none."""

import copy
from collections import Counter

import pytest
import torch

from simla_ray.config.load import load_run
from simla_ray.data.collate import collate
from simla_ray.data.sample import SampleMaker, stacked
from simla_ray.models.model import Model
from simla_ray.orchestration.cost import shares_of_steps
from simla_ray.training.comm import Comm
from simla_ray.training.step import Losses, Step, active_at
from simla_ray.training.validation import fixed_losses

CPU = torch.device("cpu")
TASKS = "{kind: sampled, phases: [], mix: {mlm: 8, itm: 6, mrfr: 4, mrckl: 4}}"
KEYS = [f"schedule={TASKS}", "batch.global=32", "optim.warmup_steps=5", "ray.workers=1", "codes.n=8"]
FEATURES = {"column": ["regions.source=column", "regions.width=12"], "boxes": ["regions.source=boxes"]}


def begin(run, vocabulary, total=40):
    torch.manual_seed(0)
    losses = Losses(run, Model(run, len(vocabulary)), None, vocabulary.cls_id, None).train()
    codes = losses.model.region_codes
    codes.centroids = torch.randn(codes.centroids.shape, generator=torch.Generator().manual_seed(3))
    return Step(run, losses, total, Comm(), CPU)


def rows_with(rows, source):
    """Rows; of a column their features are those of a detector that knows colours and shapes."""
    if source != "column":
        return rows
    names = sorted({word for row in rows for label in row["box_labels"] for word in label.split()})
    found = []
    for row in rows:
        features = [[float(name in label.split()) for name in names[:12]] for label in row["box_labels"]]
        found.append(row | {"region_feats": [f + [0.0] * (12 - len(f)) for f in features]})
    return found


@pytest.fixture(scope="module", params=["boxes", "column", "grid"])
def made(request, world_rows, vocabulary):
    """Run, three micro-batches of training, one of validation."""
    source = request.param
    method = "uniter-grid" if source == "grid" else "uniter"
    run = load_run(overrides=[f"method={method}", *KEYS, *FEATURES.get(source, ["regions.grid=3"])])
    makers = {split: SampleMaker(run, vocabulary, training=split == "train") for split in ("train", "val")}
    rows = [rows_with(world_rows["train"][i : i + 32], source) for i in (0, 32, 64)]
    rows.append(rows_with(world_rows["val"][:32], source))
    batches = [
        collate(stacked([makers["val" if n == 3 else "train"](row, 0) for row in part]), run)
        for n, part in enumerate(rows)
    ]
    return run, batches[:3], batches[3]


def test_words_and_regions_are_learnt_in_a_few_dozen_steps(made, vocabulary):
    run, batches, val = made
    step = begin(run, vocabulary, 60)

    def measure():
        return fixed_losses(run, step.losses, [(0, val)], 1, Comm(), CPU)

    before = measure()
    assert set(before) == {
        "itm_hard", "itm_accuracy", "mlm_hard", "mlm_accuracy", "wpa_hard", "mrfr_hard", "mrckl_hard", "mrckl_accuracy",
    }  # fmt: skip
    for i in range(60):
        assert step(i, [(0, batches[i % 3])]).grad_norm.isfinite()
    after = measure()
    assert after["mlm_hard"] < 0.8 * before["mlm_hard"] and after["mrfr_hard"] < 0.9 * before["mrfr_hard"]


def test_one_task_is_drawn_a_step_and_alignment_comes_with_matching(made):
    run, _, _ = made
    drawn = [frozenset(active_at(run, step, 1000)) for step in range(1000)]
    counts = Counter(drawn)
    assert set(counts) == {frozenset({"mlm"}), frozenset({"itm", "wpa"}), frozenset({"mrfr"}), frozenset({"mrckl"})}
    for active, share in shares_of_steps(run, 1000).items():
        assert counts[active] / 1000 == pytest.approx(share, abs=0.05)
    assert shares_of_steps(run, 1000)[frozenset({"itm", "wpa"})] == pytest.approx(6 / 22)
    assert drawn[500:] == [frozenset(active_at(run, step, 1000)) for step in range(500, 1000)]  # after a stop


def test_going_on_after_a_stop_changes_nothing(made, vocabulary):
    run, batches, _ = made
    whole = begin(run, vocabulary)
    straight = [whole(i, [(0, batches[i % 3])]).sums for i in range(8)]
    first = begin(run, vocabulary)
    for i in range(4):
        first(i, [(0, batches[i % 3])])
    kept = copy.deepcopy((first.model.state_dict(), first.optimizer.state_dict()))
    torch.manual_seed(99)
    second = begin(run, vocabulary)
    second.model.load_state_dict(kept[0])
    second.optimizer.load_state_dict(kept[1])
    for i in range(4, 8):
        again = second(i, [(0, batches[i % 3])]).sums
        assert {name: float(v) for name, v in again.items()} == {name: float(v) for name, v in straight[i].items()}
