"""A sweep's page and table: every trial once, numbers with their noise, and no more said than is shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from simla_ray.errors import UserError
from simla_ray.report.study.metrics import by_chance, column_name, finding, metric_name, points, shown, with_spread
from simla_ray.report.study.sweep_figures import OFF, _height, _ticks
from simla_ray.report.study.trials import Trials
from simla_ray.report.sweep import sweep_table, write_sweep_report
from simla_ray.report.terminal import WIDTH
from tests.report.studies import SPACE, TRIALS, difference, fabricate_sweep, pareto_summary, sweep_summary
from tests.report.test_page import Outline, text_of


def page_of(folder: Path, summary) -> str:
    report = write_sweep_report(fabricate_sweep(folder, summary))
    assert report == folder / "report.html"
    return report.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return page_of(tmp_path_factory.mktemp("runs") / "psl-001", sweep_summary())


def test_sections_and_links(page: str):
    outline = Outline(page)
    assert outline.open == []
    assert outline.sections() == ["repeats", "best", "curves", "parameters", "trials", "configuration"]
    links = [str(attributes["href"]) for tag, attributes in outline.tags if tag == "a"]
    runs = {link for link in links if not link.startswith("#")}
    trials = {f"trials/trial-{i:03d}/report.html" for i in range(8) if i != 4}
    repeats = {f"repeats/{which}-seed{seed}/report.html" for which in ("best", "default") for seed in (1, 2, 3)}
    assert runs == trials | repeats, "a run without a page is not linked"


def test_every_trial_stands_once_in_the_table(page: str):
    table = page[page.index('<section id="trials"') : page.index('<section id="configuration"')]
    text = text_of(table)
    for i in range(len(TRIALS)):
        assert text.count(f"trial-{i:03d}") == 1
    assert "trial-000 base config 61.0 % finished 160 1:20 – 20 4 0 soft unused 0.2" in text
    assert "trial-002 31.2 % stopped early 40 0:20 below the better third at step 40 4.205 4 0.06 off" in text
    assert "trial-004 – failed 12 0:06 ValueError: <b>boom</b> & more" in text
    assert "trial-006 40.1 % timed out 80 0:40 more than 300 s" in text
    assert "<b>boom" not in page


def test_a_trial_told_twice_is_shown_once(tmp_path: Path):
    summary = sweep_summary()
    summary["trials"].append(summary["trials"][3])
    assert sweep_table(summary).count("trial-003*") == 1
    assert "8 trials over 6 parameters" in text_of(page_of(tmp_path / "s", summary))


def test_head(page: str):
    text = text_of(page)
    assert (
        "8 trials over 6 parameters, 160 steps each at most: 4 finished, 2 stopped early, 1 failed, 1 timed out. "
        "It took 13 min 32 s with 2 at a time." in text
    )
    assert "Best validation R@10 65.5 % trial-003; base config 61.0 %" in text
    assert "ITM text→image R@10 +1.0 points, 95 % -1.5 to +3.5: holds 0, no gain is shown" in text
    assert "Seed noise ± 1.5 points, base config over 3 seeds" in text
    assert "Unfinished" not in text and "No repeats" not in text


def test_the_repeats_claim_no_more_than_they_show(page: str):
    text = text_of(page)
    assert "chosen by validation R@10 on the validation set" in text
    assert "3 seeds that the search did not use, and measured on the test set" in text
    assert "R@10 caption → picture, ITM 62.0 ± 1.1 % 61.0 ± 1.5 % +1.0 -1.5 to +3.5 +0.0, +1.0, +2.0" in text
    assert "+1.0 points (95 % interval -1.5 to +3.5): the interval holds 0, so no difference between the best" in text
    assert "+5.0 points (95 % interval +3.0 to +7.0): the interval excludes 0, the best trial is ahead." in text
    assert "Masked colour words: +0.0 points, without an interval: what is chance in it cannot be said." in text
    assert "Of 2 intervals 1 excludes 0; were there no differences at all, about 0.1 would" in text
    assert "best-seed2 2 62.0 % 80.0 %" in text


def test_missing_repeats_are_named(tmp_path: Path):
    summary = sweep_summary()
    del summary["repeats"]["default"][1]
    assert "No result of the base config with seed 2" in text_of(page_of(tmp_path / "a", summary))
    text = text_of(page_of(tmp_path / "b", sweep_summary(repeats=None)))
    assert "No repeats. The best trial was not trained again with other seeds" in text
    text = text_of(page_of(tmp_path / "c", sweep_summary(repeats=None, unfinished=True)))
    assert "Unfinished. This sweep has not ended" in text and "No repeats" not in text


def test_repeats_of_trials_from_a_trunk_are_another_experiment(tmp_path: Path):
    said = "Trials went on from 40 steps of the base; here both configs are trained from the first step"
    assert said in text_of(page_of(tmp_path / "a", sweep_summary(trunk_steps=40)))
    assert "Trials went on" not in text_of(page_of(tmp_path / "b", sweep_summary(trunk_steps=0)))


def test_best_beside_the_base(page: str):
    text = text_of(page)
    assert "key base config trial-003" in text
    assert "objectives.psl.weight 20 6.097" in text
    assert "objectives.psl.recommend_threshold 0 unused" in text, "the base's own value, from sweep.yaml"
    assert "validation R@10 61.0 % 65.5 %" in text


def test_the_base_itself_can_be_best(tmp_path: Path):
    text = text_of(page_of(tmp_path / "s", sweep_summary(best="trial-000")))
    assert "The best trial is the base config itself" in text


def test_importance_says_on_how_little_it_rests(page: str, tmp_path: Path):
    text = text_of(page)
    assert "from 4 finished trials: so few that a share is a hint at best." in text
    alts = [attributes["alt"] for tag, attributes in Outline(page).tags if tag == "img"]
    assert any("objectives.psl.weight 40 %, objectives.psl.recommend 30 %" in str(alt) for alt in alts)
    without = text_of(page_of(tmp_path / "s", sweep_summary(importance=None)))
    assert "Importance cannot be told from 4 finished trials." in without


def test_space(page: str):
    text = text_of(page)
    assert "objectives.psl.weight log 2 to 50 – 20" in text
    assert "objectives.psl.recommend choice soft, hard, off – soft" in text
    assert "objectives.psl.soft_alpha uniform 0 to 0.6 objectives.psl.recommend: soft or hard 0.2" in text


def test_same_folder_same_bytes(tmp_path: Path):
    folder = fabricate_sweep(tmp_path / "s", sweep_summary())
    first = write_sweep_report(folder).read_bytes()
    assert write_sweep_report(folder).read_bytes() == first
    assert not list(folder.glob("*.tmp"))


def test_a_sweep_that_was_killed(tmp_path: Path):
    page = page_of(tmp_path / "a", None)
    text = text_of(page)
    assert "Unfinished. This sweep has not ended" in text and "8 trials without an end" in text
    assert "trial-006 – running 80 – –" in text
    assert Outline(page).sections() == ["curves", "trials", "configuration"]
    summary = sweep_summary()
    summary["trials"][5]["status"] = "running"
    assert "1 trial without an end" in text_of(page_of(tmp_path / "b", summary))


def test_trials_of_another_cluster(tmp_path: Path):
    summary = sweep_summary()
    summary["trials"][2] |= {"name": "trial-b2", "status": "elsewhere", "reason": None}
    text = text_of(page_of(tmp_path / "s", summary))
    assert "1 on another cluster" in text and "Study psl-001 is fed by several clusters" in text


def test_pareto(tmp_path: Path):
    page = page_of(tmp_path / "p", pareto_summary())
    text = text_of(page)
    assert "sweep for R@10 of ITC and keyword AP" in text and "no other beats in both" in text
    assert "Best R@10 of ITC 65.5 % trial-003; base config 61.0 %" in text
    assert "Best keyword AP 95.0 % trial-007; base config 59.0 %" in text
    assert "key base config trial-003 trial-007" in text and "keyword AP 59.0 % 54.5 % 95.0 %" in text
    alts = [str(attributes["alt"]) for tag, attributes in Outline(page).tags if tag == "img"]
    assert any("R@10 of ITC against keyword AP; on the front: trial-003, trial-007" in alt for alt in alts)
    table = sweep_table(pareto_summary())
    assert "On the Pareto front (*): trial-003, trial-007." in table
    assert re.search(r"^trial-007\* +63\.4 % +95\.0 % +finished", table, re.M)


def test_nothing_yet(tmp_path: Path):
    summary = sweep_summary(trials=[], best=None, repeats=None, importance=None)
    assert Outline(page_of(tmp_path / "s", summary)).sections() == ["configuration"]
    assert "No trial has finished." in sweep_table(summary)


def test_another_folder_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"no sweep\.yaml in it"):
        write_sweep_report(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"kind": "comparison"}))
    with pytest.raises(UserError, match="kind is comparison; give the folder of a sweep"):
        write_sweep_report(tmp_path)


def test_table():
    text = sweep_table(sweep_summary())
    lines = text.splitlines()
    assert all(len(line) <= WIDTH and line == line.rstrip() for line in lines)
    order = [match[0] for line in lines if (match := re.match(r"trial-\d+", line)) and "%" in line]
    assert order == [f"trial-{i:03d}" for i in (3, 7, 0, 1, 6, 2, 5)], "by value"
    head = next(line for line in lines if line.startswith("trial "))
    assert head.split()[-4:] == ["psl.weight", "psl.recommend", "psl.min_attention", "psl.soft_alpha"], "by importance"
    assert "2 more parameters in report.html" in text
    assert "trial-004 failed: ValueError: <b>boom</b> & more" in text
    said = " ".join(text.split("\n\n")[-1].split())
    assert said == (
        "Best: trial-003, 65.5 % on the validation set; the base config: 61.0 %. Again with 3 fresh seeds on the test "
        "set: R@10 caption → picture, ITM: +1.0 points (95 % interval -1.5 to +3.5): the interval holds 0, so no "
        "difference between trial-003 and the base config is shown."
    )


def test_table_is_never_too_wide():
    summary = sweep_summary(name="n" * 200)
    long = {f"objectives.psl.{'k' * 40}{i}": {"uniform": [0, 1]} for i in range(9)}
    summary["space"] = SPACE | long
    for trial in summary["trials"]:
        trial["name"] = f"trial-{'x' * 60}-{trial['number']}"
        trial["params"] |= dict.fromkeys(long, "v" * 70)
        trial["reason"] = "a reason\nof two lines " + "r" * 300
    summary["best"] = None
    assert all(len(line) <= WIDTH for line in sweep_table(summary).splitlines())


def test_heights_on_parallel_coordinates():
    params = {"a": 10.0, "b": 3, "c": "hard"}
    trial = {"number": 0, "name": "t", "params": params}
    beside = 0.05 * -0.5
    assert _height("a", {"log": [1.0, 100.0]}, trial) == pytest.approx(0.5)
    assert _height("b", {"int": [2, 6]}, trial) == pytest.approx(0.25 + beside)
    assert _height("c", {"choice": ["soft", "hard", "off"]}, trial) == pytest.approx(0.5 + beside)
    assert _height("d", {"uniform": [0, 1]}, trial) == pytest.approx(OFF + beside)
    assert _height("a", {"uniform": [0.0, 5.0]}, trial) == pytest.approx(1.05), "outside, at the edge"
    assert _ticks({"log": [0.02, 0.5]}) == ([(0.0, "0.02"), (0.5, "0.1"), (1.0, "0.5")], "log")
    assert _ticks({"choice": [True, None]}) == ([(0.0, "true"), (1.0, "null")], "choice")


def test_names_and_numbers():
    assert metric_name("retrieval/itc/i2t_r1") == "R@1 picture → caption, ITC"
    assert column_name("retrieval/itm/t2i_r10") == "ITM text→image R@10"
    assert metric_name("new/metric") == column_name("new/metric") == "new/metric"
    assert (shown("keywords/ap", 0.8531), shown("ratings/itc/spearman", 0.4123)) == ("85.3 %", "0.412")
    assert (points("keywords/ap", -0.0123), points("ratings/itc/spearman", 0.0123)) == ("-1.2", "+0.012")
    assert with_spread("keywords/ap", 0.85, 0.011) == "85.0 ± 1.1 %"
    assert with_spread("keywords/ap", 0.85, None) == "85.0 %"
    assert (shown("keywords/ap", float("nan")), points("keywords/ap", None)) == ("–", "–")


def test_findings():
    worse = finding(difference("keywords/ap", 0.5, 0.6, 0.02), "a", "b")
    assert worse.endswith("-10.0 points (95 % interval -12.0 to -8.0): the interval excludes 0, b is ahead.")
    assert by_chance([difference("keywords/ap", 0.5, 0.6, None)]) is None


def test_a_base_that_was_stopped_is_no_match_for_one_that_ran_to_its_end():
    base = {"number": 0, "name": "trial-000", "default": True, "stopped_early": True, "steps": 80, "status": "stopped"}
    assert Trials({"trials": [base]}).base_so_far == ", stopped at step 80"
    assert Trials({"trials": [base | {"stopped_early": False}]}).base_so_far == ""
