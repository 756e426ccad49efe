"""The model card with little to say, and with a history."""

from simla_ray.config.load import load_run
from simla_ray.models.model import Model
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


def test_only_the_parts_that_are_there_are_shown():
    """As many layers, and vectors where the model has them: what torch says of it beside what the card says."""
    shown = {
        "clip": ["image tower", "text", "joint space"],
        "vilt": ["one stack"],
        "uniter-grid": ["one stack"],
        "mvptr-grid": ["image tower", "text", "fusion", "joint space"],
        "simla": ["image tower", "text", "joint space"],
    }
    for method, parts in shown.items():
        run = load_run(overrides=[f"method={method}"])
        rows = (line[2:-2].split(" | ") for line in card(run, {}, {}, {}).splitlines() if line.startswith("| "))
        lines = {row[0]: row[1] for row in rows if len(row) == 2}
        found = [name for name in lines if name in ("image tower", "text", "one stack", "fusion", "joint space")]
        assert found == parts and " 0 layers" not in str(lines), method
        model = Model(run, 64).student
        assert ("joint space" in parts) is hasattr(model, "vision_proj"), method
        depth = {
            "text": len(model.text.encoder.layer),
            "fusion": len(getattr(getattr(model.merging, "encoder", None), "layer", [])),
            "one stack": len(model.text.encoder.layer),
        }
        for name in parts:
            if depth.get(name):
                assert lines[name].startswith(f"{depth[name]} layer"), (method, name)
    assert lines["joint space"] == "64 dimensions"
    text = card(load_run(overrides=["method=vilt", "vision.patch_px=8", "text.max_tokens=25"]), {}, {}, {})
    said = "vit_tiny_patch16_224 over words and images of 48 px in patches of 8, at most 25 tokens"
    assert f"| one stack | {said} |" in text
    masked = ["objectives.itc=null", "objectives.itm=null", "objectives.psl=null", "schedule={kind: joint, phases: []}"]
    assert "joint space" not in card(load_run(overrides=[*masked, "eval.best=last"]), {}, {}, {})


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
