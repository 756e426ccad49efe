"""The model card with little to say, and with a history."""

from simla_ray.config.load import load_run
from simla_ray.release.card import card


def test_an_unfinished_run_without_licences():
    run = load_run(overrides=["data.train=[a.parquet]", "data.val=[b.parquet]"])
    text = card(run, {"data": {"train": {"uris": ["a.parquet"], "rows": 5}}}, {}, {})
    assert text.startswith("# simla-tiny-kmeans128\n")
    assert "None are recorded here" in text
    assert "the training rows name none" in text
    assert "built-in world" not in text


def test_weights_from_outside_have_unknown_data():
    assert "Their authors say" in card(load_run(), {}, {}, {"weights from": "ALBEF.pth"})


def test_methods_without_a_head_do_not_show_its_use():
    text = card(load_run(overrides=["method=clip"]), {}, {}, {})
    assert "encode_image" in text and "model.match" not in text and "keywords(" not in text
    assert "2103.00020" in text


def test_the_data_of_what_it_started_from_are_said():
    earlier = {"data": {"train": {"uris": ["old.parquet"]}}, "licenses": ["CC-BY-NC-4.0"]}
    manifest = {
        "data": {"train": {"uris": ["new.parquet"]}},
        "licenses": ["CC0-1.0"],
        "start": {"name": "first", "manifest": {**earlier, "start": {"name": "ALBEF.pth", "manifest": {}}}},
    }
    text = card(load_run(), manifest, {}, {})
    for said in ("new.parquet", "CC0-1.0", "weights of first", "old.parquet", "CC-BY-NC-4.0", "weights of ALBEF.pth"):
        assert said in text, said


def test_names_from_the_data_break_no_table():
    manifest = {"data": {"train": {"uris": ["a|b\nc<script>"]}}, "licenses": ["<b>\n# x"]}
    text = card(load_run(), manifest, {}, {})
    assert "a\\|b c&lt;script>" in text and "&lt;b> # x" in text
