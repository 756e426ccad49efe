"""report.html: what is in it, what must not be in it, and what it does with half a run."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from simla_ray.errors import UserError
from simla_ray.report.page import write_report
from tests.report.conftest import fabricate

CLIP = {f"objectives.{name}": None for name in ("itm", "mlm", "mim", "psl")}


class Outline(HTMLParser):
    """Tags with their attributes, text, and whether every element is closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def sections(self) -> list[str | None]:
        return [attributes["id"] for tag, attributes in self.tags if tag == "section"]


@pytest.fixture(scope="module")
def page(finished: Path) -> str:
    report = write_report(finished)
    assert report == finished / "report.html"
    return report.read_text(encoding="utf-8")


def text_of(page: str) -> str:
    return " ".join(" ".join(Outline(page).text).split())


def test_sections_and_links_agree(page: str):
    outline = Outline(page)
    assert outline.open == []
    assert outline.sections() == [
        "results", "curves", "retrieval", "grounding", "keywords", "words", "match", "classification", "ratings",
        "data", "configuration", "manifest",
    ]  # fmt: skip
    links = [attributes["href"] for tag, attributes in outline.tags if tag == "a"]
    assert links == [f"#{name}" for name in outline.sections()]


def test_numbers_stand_beside_their_baselines(page: str):
    text = text_of(page)
    for piece in (
        "R@10 caption → picture 71.9 % chance 2.0 %",
        "Match AUC, random pairs 97.2 % chance 50.0 %",
        "Pointing accuracy 69.7 % a random object 35.5 %",
        "948 phrases, the centre 20.3 %, a random patch 10.1 %, layers 0, 1, 2",
        "Box from the map, IoU 0.5 65.5 % 1.2 % its middle 948 phrases, the whole picture 0.0 %",
        "Box among candidates, IoU 0.5 83.8 % 31.0 % the largest 940 phrases, a random one 30.0 %",
        "Unsaid words, average precision 85.3 % word frequency 37.1 %",
        "Masked colour words 55.4 % another picture 12.1 %",
        "re-ranked by ITM 21.3 % ± 2.2 52.1 % ± 2.2 71.9 % ± 2.2",
        "Match AUC, random pairs 97.2 % ± 1.0 50.0 % chance 500 true pairs",
        "Match AUC, hard pairs 78.3 % 50.0 % chance",
        "Zero-shot class 42.0 % ± 4.0 31.0 % the most frequent class 480 pictures, 8 classes",
        "Zero-shot class among the first 5 90.0 % 62.5 % chance",
        "Human ratings, Spearman, ITC 0.412 ± 0.060 0.000 no relation 900 pairs",
        "± is half of the interval that holds 95 % of 1,000 resamples",
        "Classes most often confused class taken for pictures ring <b>star 12",
    ):
        assert piece in text
    assert "40 steps of 64 pairs, 2,560 pairs or 2.0 epochs, in 1 h 2 min on 2 workers" in text
    assert "the checkpoint of step 20, the best by retrieval_r10" in text
    assert "Not the method as published: visual codes: 128 kmeans codes" in text


def test_data_configuration_and_manifest(page: str):
    text = text_of(page)
    assert "image_unreadable 1 0.0083 % world-train-000<7>" in text, "a row passed twice counts once"
    assert "train world:train – 12,000 a1b2c3d4" in text
    assert re.search(r"optim\.lr 0\.00\d+ 0\.00213 identity", text)
    assert "commit 4f1c9d27b0a3" in text and "CC0-1.0" in text and "torch 2.13.0" in text
    assert "nodes 1, cpus 4, gpus 0" in text


def test_examples(page: str):
    text = text_of(page)
    assert "rank 2" in text and "rank 1,217" in text
    assert "✓ hit" in text and "✗ miss" in text
    assert "✓ blue" in text and "✓ star" not in text
    assert "a ▢ ring" in text and "✓ red" in text and "✗ <i>" in text
    assert "its own: 2.12" in text and "another: –" in text
    assert "ring ✗ <b>star <b>star 0.510, ring –" in text
    assert "3.25 75.0 % ✓ 90.0 %" in text
    rings = [attributes for tag, attributes in Outline(page).tags if tag == "circle"]
    assert [(r["cx"], r["cy"]) for r in rings] == [("50.00", "50.00")] * 2, "no ring on a heat map that is zero"
    dashed = [a for tag, a in Outline(page).tags if tag == "rect" and "proposed" in (a["class"] or "")]
    assert [(r["x"], r["y"], r["width"], r["height"]) for r in dashed] == [("10.00", "20.00", "40.00", "40.00")] * 2


def test_a_run_without_a_summary_has_its_intervals(tmp_path: Path):
    folder = fabricate(tmp_path / "run", tasks=("data", "match"))
    (folder / "summary.json").unlink()
    text = text_of(write_report(folder).read_text(encoding="utf-8"))
    assert "Match AUC, random pairs 97.2 % ± 1.0 50.0 %" in text and "Match AUC, hard pairs 78.3 % 50.0 %" in text


def test_tasks_that_were_not_run_are_named(tmp_path: Path):
    folder = fabricate(tmp_path / "run", tasks=("data", "match"))
    summary = json.loads((folder / "summary.json").read_text())
    summary["eval"]["data"] = summary["eval"]["data"] | {"not_run": {"keywords": "no objective psl"}}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "Not run: keywords (no objective psl)." in text_of(write_report(folder).read_text(encoding="utf-8"))


def test_captions_are_escaped(page: str):
    assert "<script" not in page and "<b>ring</b>" in page
    assert "<b>star" not in page and "a <b>ring" not in page and "<i>" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; a red ring" in page


def test_nothing_is_fetched(page: str):
    assert not re.search(r"https?://|@import|url\(|<link|<script|<iframe", page)
    for tag, attributes in Outline(page).tags:
        for name in ("src", "srcset", "href", "data", "action", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/")), (tag, name)
    # The figures are documents of their own: they must not refer to anything either.
    for encoded in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page):
        figure = base64.b64decode(encoded).decode()
        assert not re.findall(r"(?:href|src)=\"(?!#)", figure) and "DOCTYPE" not in figure


def test_every_picture_has_words_for_it(page: str):
    pictures = [attributes for tag, attributes in Outline(page).tags if tag == "img"]
    assert len(pictures) > 15
    assert all(attributes.get("alt") for attributes in pictures)


def test_the_same_folder_gives_the_same_bytes(finished: Path, page: str):
    assert write_report(finished).read_text(encoding="utf-8") == page


def test_curves_have_phases_and_restarts(page: str):
    figures = [base64.b64decode(e).decode() for e in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)]
    assert len(figures) == 9
    assert all("phase 2" in figure and "restart" in figure for figure in figures)


def test_without_pictures(tmp_path: Path):
    folder = fabricate(tmp_path / "run", pictures=False)
    (folder / "metrics.jsonl").unlink()
    page = write_report(folder).read_text(encoding="utf-8")
    assert "data:image/jpeg" not in page
    text = text_of(page)
    assert "world-test-000002" in text, "pictures that cannot be shown are named"
    assert "a <b>ring" in text and "✓ hit" in text and "✓ blue" in text and "its own: 2.12" in text


def test_a_method_with_itc_alone(tmp_path: Path):
    overrides = CLIP | {"teacher": None, "schedule": {"kind": "joint", "phases": []}}
    folder = fabricate(tmp_path / "clip-like", overrides, tasks=("retrieval",))
    evaluation = json.loads((folder / "evaluation.json").read_text())
    del evaluation["retrieval"]["metrics"]["itm"], evaluation["retrieval"]["metrics"]["itc_satisfied"]
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    summary = json.loads((folder / "summary.json").read_text())
    summary["eval"] = {"retrieval": evaluation["retrieval"]["metrics"]}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = write_report(folder).read_text(encoding="utf-8")
    text = text_of(page)
    assert Outline(page).sections() == ["results", "curves", "retrieval", "data", "configuration", "manifest"]
    assert "R@10 caption → picture 66.4 % chance 2.0 %" in text
    assert "ITM" not in text and "phase" not in text.split("Configuration")[0]


def test_an_interrupted_run_gets_a_partial_page(tmp_path: Path):
    folder = fabricate(tmp_path / "cut")
    (folder / "summary.json").unlink()
    (folder / "evaluation.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:25]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 26, "ki')
    page = write_report(folder).read_text(encoding="utf-8")
    text = text_of(page)
    assert "Unfinished. This run has not ended: the page shows what it had written by step 25 of 40." in text
    assert "25 steps of 64 pairs" in text
    assert Outline(page).sections() == ["curves", "data", "configuration", "manifest"]


def test_a_run_that_has_only_begun(tmp_path: Path):
    folder = fabricate(tmp_path / "new")
    for path in folder.iterdir():
        if path.name != "config.yaml":
            path.unlink()
    page = write_report(folder).read_text(encoding="utf-8")
    assert Outline(page).sections() == ["data", "configuration"]
    assert "No row was dropped." in text_of(page)


def test_losses_that_are_not_numbers(tmp_path: Path):
    folder = fabricate(tmp_path / "diverged")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(re.sub(r'"(itc|psl)": [\d.e-]+', r'"\1": NaN', text))
    assert "curves" in Outline(write_report(folder).read_text(encoding="utf-8")).sections()


@pytest.mark.parametrize("picture", ["", "not base64!", base64.b64encode(b"<svg onload='x()'>").decode()])
def test_a_broken_picture_is_left_out(tmp_path: Path, picture: str):
    folder = fabricate(tmp_path / "run", tasks=("retrieval", "grounding"))
    (folder / "metrics.jsonl").unlink()
    evaluation = json.loads((folder / "evaluation.json").read_text())
    for task in evaluation.values():
        for example in task["examples"]:
            example["image"] = picture
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    page = write_report(folder).read_text(encoding="utf-8")
    assert "onload" not in page and "a ring" in page


def test_what_is_no_run(tmp_path: Path):
    with pytest.raises(UserError, match=r"no config\.yaml"):
        write_report(tmp_path)
    folder = fabricate(tmp_path / "run")
    (folder / "evaluation.json").write_text("[")
    with pytest.raises(UserError, match=r"evaluation\.json: not JSON"):
        write_report(folder)
