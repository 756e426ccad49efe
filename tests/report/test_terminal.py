"""The line of a log point and the table at the end."""

from __future__ import annotations

import re

import pytest

from simla_ray.config.load import load_run
from simla_ray.report.terminal import WIDTH, aligned, clock, event_line, number, progress_line, summary_table
from tests.report.conftest import summary_of, train_line

ALL = ("itc", "itm", "mlm", "mim", "psl")


def test_progress_line():
    line = train_line(10, ALL) | {
        "losses": {"itc": 3.4242, "itm": 0.61234, "mlm": 12.345, "psl": 0.012345, "total": 20.0}
    }
    assert progress_line(line, 1000) == (
        "step   10/1000  itc 3.42  itm 0.612 mlm 12.3  psl 0.0123  256 pairs/s  wait 2 %  ETA 4:08  dropped 2"
    )


@pytest.mark.parametrize("value", [1.0, 1234.5678, 1.23e-9, -4.56e-7, float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("total", [1000, 2_000_000])
def test_progress_line_is_never_too_wide(value: float, total: int):
    line = train_line(10, ALL) | {"losses": dict.fromkeys(ALL, value), "pairs_per_s": 123456.0, "dropped": 123456}
    text = progress_line(line, total)
    assert len(text) <= WIDTH and "\n" not in text
    assert text.startswith("step") and f"10/{total}" in text and "ETA" in text


def test_lines_of_one_run_are_aligned():
    ends = {progress_line(train_line(step, ALL), 1000).index("pairs/s") for step in (10, 100, 500, 1000)}
    assert len(ends) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.4242, "3.42"), (0.61234, "0.612"), (123.4, "123"), (0.00012, "0.000120"), (1.2e-7, "1.20e-07"), (0, "0.00"),
     (0.99999, "1.00"), (float("nan"), "nan")],
)  # fmt: skip
def test_number(value: float, text: str):
    assert number(value) == text


def test_clock():
    assert (clock(0), clock(59.6), clock(3723), clock(90000)) == ("0:00", "1:00", "1:02:03", "25:00:00")


def test_summary_table():
    run = load_run([], {"size": "tiny", "name": "simla-tiny-001"})
    text = summary_table(summary_of(run))
    assert "simla-tiny-001 (simla-tiny-kmeans128), 40 steps, 2.00 epochs, 2,560 pairs" in text
    assert "256 pairs/s" in text and "2 workers, 1 restart, best step 20" in text
    assert re.search(r"^re-ranked by ITM +21\.3 % +52\.1 % +71\.9 %", text, re.M)
    assert re.search(r"^chance +0\.2 % +1\.0 % +2\.0 %", text, re.M)
    assert re.search(r"^Pointing accuracy +69\.7 % +± 3\.0 +a random object 35\.5 %$", text, re.M)
    assert re.search(r"^Match AUC, random pairs +97\.2 % +± 1\.0 +chance 50\.0 %$", text, re.M)
    assert re.search(r"^Human ratings, Spearman, ITC +0\.412 +± 0\.060 +no relation 0\.000$", text, re.M)
    assert re.search(r"^itc +3\.43 +-> +0\.0123$", text, re.M)
    assert all(len(line) <= WIDTH and line == line.rstrip() for line in text.splitlines())


def test_summary_without_evaluation():
    text = summary_table({"name": "x", "label": "x", "steps": 3, "losses": {"itc": {"first": 2.0, "last": 1.0}}})
    assert text.splitlines()[0] == "x, 3 steps"
    assert "retrieval" not in text


def test_aligned():
    assert aligned([["loss", "first"], ["itc", "1.0"], ["mlm", "10.0"]]) == "loss  first\nitc     1.0\nmlm    10.0"


@pytest.mark.parametrize(
    ("event", "line"),
    [
        ({"event": "checkpoint", "step": 5}, None),
        (
            {"event": "resume", "step": 40, "world_size": 1, "before": 2, "lost_steps": 7},
            "resume     from step 40 with 1 worker (before: 2), 7 steps to do again",
        ),
        (
            {"event": "checkpoint_failed", "step": 40, "reason": "No space left on device"},
            "warning    the checkpoint of step 40 cannot be written: No space left on device",
        ),
    ],
)
def test_what_happened_is_a_line(event, line):
    assert event_line(event) == line
