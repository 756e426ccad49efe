"""experiments/ground.py, search.py and ask.py: what they print and write, and what they refuse."""

import json
import os
import re

import pytest
from PIL import Image

from simla_ray.data.text import Vocabulary
from simla_ray.orchestration.people import ask_main, ground_main, search_main

from ..release.conftest import make_run_folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory, vocabulary):
    storage = tmp_path_factory.mktemp("runs")
    make_run_folder(storage / "mine", vocabulary)
    make_run_folder(storage / "clip", vocabulary, method="clip", queue=0)
    known = Vocabulary(vocabulary.tokenizer, vocabulary.frequency, ["red", "blue", "two"])
    off = {f"objectives__{name}": None for name in ("itc", "itm", "mlm", "mim", "psl")}
    alone = {"schedule__kind": "joint", "schedule__phases": [], "eval__best": "last", "teacher": None, "queue": 0}
    make_run_folder(storage / "asked", known, **off, **alone, objectives__answers={})
    return storage


@pytest.fixture
def folder(tmp_path, world_rows, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my pictures"
    folder.mkdir()
    for i, row in enumerate(world_rows["test"][:6]):
        (folder / f"{i} & co.jpg").write_bytes(row["image"])
    (folder / "bad.png").write_bytes(b"no picture")
    return folder


def ground(storage, *arguments):
    return ground_main(["mine", *map(str, arguments), "--storage", str(storage), "--device", "cpu"])


def search(storage, *arguments, run="mine"):
    return search_main([run, *map(str, arguments), "--storage", str(storage), "--device", "cpu"])


def test_ground_prints_boxes_and_writes_a_picture(storage, folder, tmp_path, capsys):
    image = folder / "0 & co.jpg"
    assert ground(storage, image, "a red circle", "a star") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["phrase", "match", "left", "upper", "right", "lower", "score"]
    assert re.match(r"a red circle +\d+\.\d % +\d+ +\d+ +\d+ +\d+ +\d", lines[1])
    assert any(line.startswith("a star ") for line in lines)
    for line in lines[1:-1]:
        left, upper, right, lower = map(int, re.findall(r" (\d+)(?= )", line)[-4:])
        assert 0 <= left < right <= 48 and 0 <= upper < lower <= 48
    assert lines[-1] == "picture    0 & co-ground.png"
    assert Image.open(tmp_path / "0 & co-ground.png").width > 3 * 300


def test_ground_reads_the_layers_that_are_named(storage, folder, capsys):
    tables = []
    for layers in ("all", "0,1,2", "0"):
        assert ground(storage, folder / "1 & co.jpg", "a blue ring", "--layers", layers, "--out", "o.png") == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] != tables[2]


def test_search_prints_a_table_and_writes_a_page(storage, folder, tmp_path, capsys):
    assert search(storage, folder, "a red circle", "--top", 4, "--index", tmp_path / "cache") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "index      6 pictures, 7 of them read just now"
    assert lines[1] == "dropped    image_unreadable 1: bad.png"
    assert lines[2].split() == ["match", "similarity", "picture"] and lines[3].split()[0] == "1"
    assert len(lines) == 3 + 4 + 1 and lines[-1] == "page       search.html"
    assert "pictures   7/7  100 %" in err
    page = (tmp_path / "search.html").read_text()
    name = re.search(r"(\d) & co\.jpg", lines[3])[1]
    assert f'href="my%20pictures/{name}%20%26%20co.jpg"' in page and "bad.png" in page
    assert search(storage, folder, "a star", "--index", tmp_path / "cache") == 0
    assert "6 pictures, 0 of them read just now" in capsys.readouterr().out


def test_search_in_a_folder_whose_name_is_no_utf8(storage, folder, tmp_path, capsys):
    renamed = folder.rename(os.fsdecode(os.fsencode(tmp_path) + b"/b\xffd"))
    assert search(storage, renamed, "a red circle", "--index", tmp_path / "cache") == 0
    assert capsys.readouterr().out.startswith("index      6 pictures, 7 of them read just now")
    assert 'href="b%FFd/' in (tmp_path / "search.html").read_text()
    assert search(storage, renamed, "a star", "--json", "--index", tmp_path / "cache") == 0
    assert json.loads(capsys.readouterr().out)["encoded"] == 0


def test_json_is_all_that_is_printed(storage, folder, tmp_path, capsys):
    query = folder / "2 & co.jpg"
    assert search(storage, folder, query, "--json", "--index", tmp_path / "cache") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["hits"][0]["name"] == "2 & co.jpg" and found["hits"][0]["path"] == str(query)
    assert found["hits"][0]["match"] is None and found["dropped"] == {"bad.png": "image_unreadable"}
    assert found["pictures"] == 6 and not (tmp_path / "search.html").exists()
    command = ("--json", "--out", "like.html", "--index", tmp_path / "cache")
    assert search(storage, folder, query, *command, run="clip") == 0
    assert json.loads(capsys.readouterr().out)["encoded"] == 7  # another model's index
    assert "the picture searched for" in (tmp_path / "like.html").read_text()


GROUND = {
    "no picture": (["gone.jpg", "a"], "gone.jpg: image_missing"),
    "broken picture": (["PICTURES/bad.png", "a"], "bad.png: image_unreadable"),
    "no words": (["PICTURES/0 & co.jpg", "?!"], "'?!': a phrase without a word"),
    "no such layer": (["PICTURES/0 & co.jpg", "a", "--layers", "9"], "layers: 9 does not read the image"),
    "not a layer": (["PICTURES/0 & co.jpg", "a", "--layers", "auto"], "--layers: auto; give all, or numbers from 0"),
    "no picture's name": (["PICTURES/0 & co.jpg", "a", "--out", "x.txt"], "--out: x.txt; give a name that ends in"),
    "the picture itself": (
        ["PICTURES/0 & co.jpg", "a", "--out", "PICTURES/0 & co.jpg"],
        "co.jpg is the picture itself",
    ),
    "no such place": (["PICTURES/0 & co.jpg", "a", "--out", "no/x.png"], "--out: no/x.png cannot be written"),
}
SEARCH = {
    "no folder": (["gone", "a"], "pictures: gone does not exist"),
    "no words": (["PICTURES", "?!"], "'?!': a query without a word"),
    "no such picture": (["PICTURES", "dog.jpg"], "dog.jpg: no such picture"),
    "broken query": (["PICTURES", "PICTURES/bad.png"], "bad.png): image_unreadable"),
    "none": (["PICTURES", "a", "--top", "0"], "--top: 0; at least 1"),
    "less than none": (["PICTURES", "a", "--rerank", "-1"], "--rerank: -1; at least 0"),
    "no such place": (["PICTURES", "a", "--out", "no/x.html"], "--out: no/x.html cannot be written"),
    "index is a file": (["PICTURES", "a", "--index", "PICTURES/bad.png"], "cannot be written (Not a directory)"),
}


@pytest.mark.parametrize(("main", "case"), [(ground, c) for c in GROUND] + [(search, c) for c in SEARCH])
def test_mistakes_are_one_line(main, case, storage, folder, capsys):
    arguments, message = (GROUND if main is ground else SEARCH)[case]
    arguments = [argument.replace("PICTURES", str(folder)) for argument in arguments]
    assert main(storage, *arguments) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if not line.startswith("pictures ")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0] and not out


def test_an_interruption_says_what_becomes_of_the_index(storage, folder, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("simla_ray.release.search._view", stop)
    assert search(storage, folder, "a", "--index", tmp_path / "cache") == 130
    assert "goes on after the pictures read so far" in capsys.readouterr().err


def test_no_such_run(storage, folder, capsys):
    assert search(storage, folder, "a", run="nobody") == 2
    assert "nobody: no run there" in capsys.readouterr().err
    assert ground_main(["clip", str(folder / "0 & co.jpg"), "a", "--storage", str(storage)]) == 2
    assert "was trained without itm" in capsys.readouterr().err


def ask(storage, *arguments, run="asked"):
    return ask_main([run, *map(str, arguments), "--storage", str(storage), "--device", "cpu"])


def test_ask_prints_the_likeliest_answers(storage, folder, capsys):
    assert ask(storage, folder / "0 & co.jpg", "What color is it?", "How many?", "--top", "2") == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["question", "answer", "probability"]
    assert [line[:17].strip() for line in lines] == ["What color is it?", "", "How many?", ""]
    assert all(line.endswith(" %") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "run", "said"),
    [
        (("0 & co.jpg", "what"), "mine", "not fine-tuned to answer questions"),
        (("nothing.jpg", "what"), "asked", "nothing.jpg"),
        (("bad.png", "what"), "asked", "bad.png"),
        (("0 & co.jpg", "what", "--top", "0"), "asked", "--top: 0; at least 1"),
    ],
)
def test_what_cannot_be_asked_is_one_line(storage, folder, capsys, arguments, run, said):
    name, *rest = arguments
    assert ask(storage, folder / name, *rest, run=run) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and said in error
