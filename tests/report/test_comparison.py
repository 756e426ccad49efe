"""A comparison's page and table: costs, spread, intervals, and what they do not say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from simla_ray.errors import UserError
from simla_ray.report.comparison import comparison_table, write_comparison_report
from simla_ray.report.study.comparison_figures import _over_seeds, fraction_name
from simla_ray.report.study.rows import Rows
from simla_ray.report.terminal import WIDTH
from tests.report.studies import comparison_summary, fabricate_comparison
from tests.report.test_page import Outline, text_of

BIG = comparison_summary((1.0, 0.5, 0.125), ("samples", "compute"))


def page_of(folder: Path, summary) -> str:
    report = write_comparison_report(fabricate_comparison(folder, summary))
    assert report == folder / "report.html"
    return report.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return page_of(tmp_path_factory.mktemp("runs") / "compare-001", comparison_summary())


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> str:
    return page_of(tmp_path_factory.mktemp("runs") / "compare-002", BIG)


def alts(page: str) -> list[str]:
    return [str(attributes["alt"]) for tag, attributes in Outline(page).tags if tag == "img"]


def test_sections_and_links(page: str):
    outline = Outline(page)
    assert outline.open == []
    assert outline.sections() == ["table", "differences", "cautions", "seeds", "curves", "details"]
    links = [str(attributes["href"]) for tag, attributes in outline.tags if tag == "a"]
    runs = [run for row in comparison_summary()["rows"] for run in row["runs"]]
    assert [link for link in links if not link.startswith("#")] == [f"runs/{run}/report.html" for run in sorted_(runs)]


def sorted_(runs: list[str]) -> list[str]:
    """The reference's first."""
    return [run for run in runs if re.match(r"simla-samples", run)] + [
        run for run in runs if not re.match(r"simla-samples", run)
    ]


def test_the_table(page: str):
    text = text_of(page)
    assert "4 entries with seeds 0, 1, 2 at equal samples: 11 finished runs, 1 failed, in 30 min 34 s." in text
    assert "Unfinished" not in text
    assert (
        "simla simla-tiny 400 25,600 1.00 1.00 2:30 171 3 of 3 60.0 ± 1.0 % 62.0 ± 1.0 % 64.0 ± 1.0 % 66.0 ± 1.0 %"
        in text
    )
    assert "clip clip-tiny 400 25,600 0.400 0.40 2:30 171 2 of 3 49.5 ± 1.0 % 51.5 ± 1.0 % – –" in text
    assert "simla-no-psl; 0.2 points before simla, the interval holds 0" in text


def test_differences_are_marked_where_the_interval_excludes_0(page: str):
    text = text_of(page)
    assert "R@10 caption → picture, ITM clip -10.0 -13.0 to -7.0 excludes 0 -11.0, -10.0, -9.0" in text
    assert "Unsaid words, average precision albef -2.0 -5.0 to +1.0 – -3.0, -2.0, -1.0" in text
    assert "Of 10 intervals 2 exclude 0; were there no differences at all, about 0.5 would" in text
    assert any("minus simla: clip -10.0 (-13.0 to -7.0); albef -2.0" in alt for alt in alts(page))
    assert "over the seeds alone" not in text


def test_an_interval_over_seeds_alone_is_said_to_be_one(tmp_path: Path):
    summary = comparison_summary()
    summary["differences"][0] |= {"images": None}
    assert "an interval is over the seeds alone" in text_of(page_of(tmp_path / "c", summary))


def test_what_the_table_does_not_say(page: str):
    text = text_of(page)
    assert "3 seeds: a spread over so few is itself uncertain, up to about 6.3 times as large as it looks." in text
    assert "Smaller than the spread over seeds: simla-no-psl, ITM text→image R@10 (+0.2)" in text
    assert "albef, ITM text→image R@10 (-2.0)" not in text, "larger than the spread"
    assert "Fewer seeds than the others: clip (2 of 3)." in text
    assert "simla, simla-no-psl: not the method as published in this: visual codes: 128 <kmeans> codes" in text
    assert "Equal samples are not equal compute" in text and "All entries share one recipe" in text
    assert "clip-samples-1-seed2 clip loss is <nan>" in text and "<nan>" not in page


def test_cautions_follow_the_data():
    summary = comparison_summary() | {"seeds": [0]}
    summary["rows"][1]["overrides"] = {"optim.lr": 0.1}
    for row in summary["rows"]:
        row["compute"], row["fallbacks"] = 1.0, ["grid <regions>"]
    found = " ".join(Rows(summary).cautions())
    assert found.startswith("One seed: what is chance")
    assert "share one recipe" not in found and "Equal samples are not" not in found and "Fewer seeds" not in found
    assert "All entries: not the method as published in this: grid <regions>." in found


def test_what_was_held_equal_comes_first_and_a_recipe_of_ones_own_is_named():
    summary = comparison_summary() | {"notes": ["Controlled: <all>."]}
    assert Rows(summary).cautions()[0] == "Controlled: <all>."
    clip = next(row for row in summary["rows"] if row["entry"] == "clip")
    clip["recipe"] = "clip-tiny"
    found = " ".join(Rows(summary).cautions())
    assert "Not by the recipe of the others, but by one of its own: clip (clip-tiny)." in found
    assert "share one recipe" not in found


def test_run_by_run(page: str):
    text = text_of(page)
    assert "simla-samples-1-seed2 simla 2 61.0 % 63.0 % 65.0 % 67.0 %" in text
    assert "clip-samples-1-seed1 clip 1 50.0 % 52.0 % – –" in text
    assert "simla-no-psl what <simla-no-psl> is objectives.psl=null visual codes" in text


def test_learning_curves_over_steps_and_compute(page: str):
    found = [alt for alt in alts(page) if alt.startswith("Validation R@10 over")]
    assert found == [
        "Validation R@10 over steps: simla, clip, albef, simla-no-psl",
        "Validation R@10 over compute: simla, clip, albef, simla-no-psl",
    ]


def test_the_data_curve(big: str, page: str):
    assert "data" in Outline(big).sections() and "data" not in Outline(page).sections()
    text = text_of(big)
    assert "at equal samples and at equal compute, on 3 shares of the data" in text
    assert "clip, equal compute, 1/8 of the data clip-tiny 1,000 64,000 0.400 1.00" in text
    found = [alt for alt in alts(big) if "over the data" in alt]
    assert len(found) == 4 and "simla, equal samples, 1/8 of the data 32.2 ± 1.0 %" in found[0]
    assert "On smaller shares of the data" in text
    open_part = big[big.index('id="differences"') : big.index("On smaller shares of the data")]
    assert "of the data" not in text_of(open_part.partition(">")[2]).replace("all data", "")


def test_same_folder_same_bytes(tmp_path: Path):
    folder = fabricate_comparison(tmp_path / "c", comparison_summary())
    first = write_comparison_report(folder).read_bytes()
    assert write_comparison_report(folder).read_bytes() == first


def test_a_comparison_that_was_killed(tmp_path: Path):
    page = page_of(tmp_path / "c", None)
    text = text_of(page)
    assert "Unfinished. This comparison has not ended" in text
    assert "clip-samples-1-seed0 running 400" in text
    assert Outline(page).sections() == ["details"]
    with pytest.raises(UserError, match=r"no comparison.yaml in it; give the folder of a comparison"):
        write_comparison_report(tmp_path)


def test_a_row_without_a_run(tmp_path: Path):
    summary = comparison_summary()
    summary["rows"][0] |= {"runs": [], "failed": [], "metrics": {}, "train_s": None, "pairs_per_s": None}
    summary["differences"] = [d for d in summary["differences"] if d["entry"] != "clip"]
    text = text_of(page_of(tmp_path / "c", summary))
    assert "clip clip-tiny 400 25,600 0.400 0.40 – – 0 of 3 – – – –" in text
    assert "Unfinished. This comparison has not ended: 3 runs are still to come." in text
    assert "clip (0 of 3)" in comparison_table(summary) and "9 finished runs, 3 still to come" in comparison_table(
        summary
    )


def test_a_run_of_two_rows_counts_once():
    summary = comparison_summary(budgets=("samples", "compute"))
    rows = {(row["entry"], row["budget"]): row for row in summary["rows"]}
    rows["simla", "compute"]["runs"] = rows["simla", "samples"]["runs"]
    rows["clip", "compute"]["failed"] = rows["clip", "samples"]["failed"]
    assert len(Rows(summary).runs) == 22 - 3 and len(Rows(summary).failed) == 1


def test_values_that_cannot_be_told_apart(tmp_path: Path):
    summary = comparison_summary()
    summary["rows"][2]["metrics"]["keywords/ap"]["values"].pop()
    text = text_of(page_of(tmp_path / "c", summary))
    assert "simla-samples-1-seed0 simla 0 59.0 % 61.0 % 63.0 % –" in text


def test_terminal():
    text = comparison_table(comparison_summary())
    assert all(len(line) <= WIDTH and line == line.rstrip() for line in text.splitlines())
    assert re.search(r"^simla +400 +25,600 +1\.00 +1\.00 +2:30 +171 +3/3$", text, re.M)
    assert re.search(r"^clip +49\.5 ± 1\.0 % +51\.5 ± 1\.0 % +– +–$", text, re.M)
    assert re.search(r"^clip +-10\.0 \(-13\.0 to -7\.0\)\* +-10\.0 \(-13\.0 to -7\.0\)\* +– +–$", text, re.M)
    assert re.search(r"^albef +-2\.0 \(-5\.0 to \+1\.0\) ", text, re.M)
    assert "failed: clip-samples-1-seed2 (clip): loss is <nan>" in text
    assert "- Fewer seeds than the others: clip (2 of 3)." in text


def test_terminal_is_never_too_wide():
    summary = json.loads(json.dumps(BIG).replace("simla-no-psl", "simla-" + "x" * 80))
    for row in summary["rows"]:
        row["metrics"] |= {f"ratings/{'m' * 20}{i}": {"mean": 0.5, "std": 0.1, "values": [0.5]} for i in range(9)}
    summary["rows"][0]["failed"] = [{"name": "run", "reason": "r\n" * 200}]
    text = comparison_table(summary)
    assert all(len(line) <= WIDTH for line in text.splitlines())
    assert text.count("0.500 ± 0.100") == 9 * len(summary["rows"]), "every column, in several parts"


def test_nothing_yet():
    summary = comparison_summary() | {"rows": [], "differences": []}
    assert comparison_table(summary).startswith("compare-001: 0 entries")


def test_curves_meet_where_all_seeds_are():
    grid, values = _over_seeds([[(1, 0.0), (2, 0.5), (3, 1.0)], [(1, 0.2), (3, 0.4)]])
    assert grid.tolist() == [1, 3] and values.tolist() == [[0.0, 1.0], [0.2, 0.4]]


def test_fractions():
    assert [fraction_name(x) for x in (1.0, 0.5, 0.125, 1 / 3, 0.3)] == ["all", "1/2", "1/8", "1/3", "30 %"]
