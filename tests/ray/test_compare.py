"""A whole comparison through Ray: two entries, both budgets, one that cannot be trained; and again, when it can."""

import time

import pytest

from simla_ray.config.comparison import load_comparison
from simla_ray.jsonl import read_lines
from simla_ray.orchestration.compare import compare
from simla_ray.report.comparison import comparison_table
from tests.ray.test_sweep import STEPS, base

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]


def plan_of(storage, file, world_files):
    """Shared keys are those of a sweep, less what belongs to its entries."""
    shared = [
        o
        for o in base(world_files, storage, "versus")
        if not o.startswith(("sweep.", "schedule.")) and not o.startswith("optim.min_lr")
    ]
    more = ["comparison.budgets=[samples, compute]", "comparison.seeds=[0]", "comparison.reference=small"]
    return load_comparison([file], [*shared, *more])


@pytest.fixture(scope="module")
def compared(ray_session, world_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    strangers, file = folder / "strangers.txt", folder / "entries.yaml"
    strangers.write_text("zzzyx\n")
    file.write_text(
        "size: tiny\ncomparison:\n  chosen: [small, large, strange]\n  entries:\n"
        "    small: {method: clip, description: a short text tower, text.depth: 2}\n"
        "    large: {method: clip, description: a tall one, text.depth: 6}\n"
        f"    strange: {{method: simla, description: no word of its vocabulary, objectives.psl.vocab: {strangers}}}\n"
    )
    said: list[str] = []
    return folder, file, compare(plan_of(folder, file, world_files), said.append), said


def test_a_failing_entry_is_named_and_the_others_stand(compared):
    _, _, summary, said = compared
    rows = {(row["entry"], row["budget"]): row for row in summary["rows"]}
    assert list(rows) == [(e, b) for b in ("samples", "compute") for e in ("small", "large", "strange")]
    for entry in ("small", "large"):
        for budget in ("samples", "compute"):
            row = rows[entry, budget]
            assert row["failed"] == [] and len(row["runs"]) == 1, "\n".join(said)
            assert 0 <= row["metrics"]["retrieval/itc/t2i_r10"]["mean"] <= 1
    failed = rows["strange", "samples"]["failed"]
    assert len(failed) == 1 and "objectives.psl.vocab" in failed[0]["reason"]
    assert {d["entry"] for d in summary["differences"]} == {"large"}
    assert "strange" in comparison_table(summary)


def test_equal_arithmetic_is_fewer_steps_of_what_costs_more(compared):
    folder, _, summary, _ = compared
    rows = {(row["entry"], row["budget"]): row for row in summary["rows"]}
    large = rows["large", "compute"]
    assert large["steps"] < STEPS == rows["large", "samples"]["steps"]
    assert large["compute"] == pytest.approx(1, abs=0.5 / large["steps"]) and rows["large", "samples"]["compute"] > 1
    assert rows["small", "compute"]["runs"] == rows["small", "samples"]["runs"]
    lines = read_lines(folder / "versus" / "runs" / large["runs"][0] / "metrics.jsonl")
    assert max(line["step"] for line in lines) == large["steps"]


def test_the_same_command_again_starts_what_failed_and_then_nothing(compared, world_files):
    folder, file, summary, _ = compared
    (folder / "strangers.txt").write_text("red\nblue\n")
    said: list[str] = []
    mended = compare(plan_of(folder, file, world_files), said.append)
    failed = [run["name"] for row in summary["rows"] for run in row["failed"]]
    for word in ("again", "start"):
        found = [line.split()[1].rstrip(",") for line in said if line.startswith(word)]
        assert sorted(found) == sorted(failed), "\n".join(said)
    assert [row["failed"] for row in mended["rows"]] == [[]] * 6
    assert {d["entry"] for d in mended["differences"]} == {"large", "strange"}
    said.clear()
    began = time.monotonic()
    assert compare(plan_of(folder, file, world_files), said.append) == mended
    assert time.monotonic() - began < 10 and said == [f"compare    {folder / 'versus'} is finished"]
