"""Presets, files and overrides -> one run; what is wrong is said all at once and nothing is evaluated."""

import itertools
from importlib import resources

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from simla_ray.config.comparison import NOT_OWN
from simla_ray.config.enums import FORMS
from simla_ray.config.load import (
    difference,
    leaf_kinds,
    leaves,
    load_run,
    preset,
    read_yaml,
    recipe_names,
    to_dict,
    to_yaml,
)
from simla_ray.config.schema import Method, Recommend, Run, Size, Variant
from simla_ray.errors import UserError


def error_of(overrides=(), files=(), **options):
    with pytest.raises(UserError) as caught:
        load_run(files, overrides, **options)
    return str(caught.value)


@pytest.mark.parametrize(("variant", "size"), list(itertools.product(Variant, Size)))
def test_every_combination_of_presets_loads_and_comes_back(variant, size, tmp_path):
    run = load_run(overrides={"variant": str(variant), "size": str(size)})
    assert (run.variant, run.size) == (variant, size)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(run))
    assert load_run([file], presets=False) == run


def test_no_arguments_is_simla_tiny():
    run = load_run()
    assert (str(run.method), str(run.variant), str(run.size)) == ("simla", "default", "tiny")
    assert list(run.objectives.active()) == ["itc", "itm", "mlm", "mim", "psl"]


def test_the_default_variant_is_the_table_of_the_spec():
    run = load_run(overrides={"size": "base"})
    o = run.objectives
    assert (run.teacher.m, str(run.teacher.mode), run.queue) == (0.995, "eval", 65536)
    assert {x.soft_alpha for x in (o.itc, o.mlm, o.mim, o.psl)} == {0.4}
    assert o.itm.eps == 1e-4 and o.itm.exclude_same_image and o.itm.negatives == "sample"
    assert o.itc.same_image == "negative"
    assert (o.mlm.p, o.mlm.soft_dim) == (0.15, "vocab")
    assert (o.mim.crop, o.mim.teacher_text) == ("aligned", "student")
    assert o.mim.mask_ratio == pytest.approx(75 / 256)
    p = o.psl
    assert (p.heads_top_k, p.max_keywords, p.min_attention) == (4, 5, 0)
    assert p.exclude_special and not p.zero_vote_fill and p.stop_words == "en" and p.unit == "word"
    assert (p.attention, p.image_source, p.select) == ("teacher", "student", "attention")
    assert (p.recommend, p.recommend_threshold, p.recommend_top_k, p.vocab) == ("soft", 0, None, None)
    assert run.text.fold_type0 and run.optim.no_decay == "standard" and run.data.hflip == "caption_safe"
    assert (run.optim.lr, run.optim.min_lr, run.optim.weight_decay, run.optim.warmup_steps) == (1e-4, 1e-5, 0.02, 2000)


def test_the_official_variant_is_the_table_of_the_spec():
    official = load_run(overrides={"size": "base", "variant": "official"})
    changed = {path: new for path, _, new in difference(load_run(overrides={"size": "base"}), official, "identity")}
    assert changed == {
        "variant": "official",
        "teacher.mode": "train",
        "text.fold_type0": False,
        "text.pad_multiple": 1,
        "data.hflip": "always",
        "optim.no_decay": "official",
        "optim.clip": None,
        "objectives.itm.eps": 0.0,
        "objectives.itm.exclude_same_image": False,
        "objectives.mlm.soft_dim": "sequence",
        "objectives.mim.crop": "independent",
        "objectives.mim.teacher_text": "student_redraw",
        "objectives.psl.exclude_special": False,
        "objectives.psl.zero_vote_fill": True,
        "objectives.psl.stop_words": None,
        "objectives.psl.unit": "piece",
    }


def test_the_official_variant_keeps_its_quirks_at_every_size():
    official = load_run(overrides={"size": "tiny", "variant": "official"})
    assert official.label.startswith("simla-official-tiny")
    assert official.objectives.itm.eps == 0
    assert official.text.pad_multiple == 1


def test_later_layers_win(tmp_path):
    """Defaults, method, variant, size, files in order, overrides in order."""
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("size: small\nseed: 1\noptim: {lr: 0.5, clip: 3}\n")
    second.write_text("optim: {lr: 0.25}\njoint_width: 32\n")
    run = load_run([first, second], ["joint_width=16", "seed=5", "seed=6"])
    assert run.vision.image_px == 128  # size small, named in a file
    assert run.optim.lr == 0.25 and run.optim.clip == 3  # merged key by key
    assert run.joint_width == 16 and run.seed == 6
    assert load_run([first], {"size": "tiny"}).vision.width == 64
    assert load_run([second, first]).optim.lr == 0.5


RECIPES = [
    file.name.removesuffix(".yaml") for file in resources.files("simla_ray.config").joinpath("presets/recipe").iterdir()
]


def test_a_recipe_lies_over_its_method_at_its_size_alone():
    """Under the variant, files and overrides; a method without one trains by the size's own."""
    run, kept = load_run(overrides=["method=vilt"]), preset("recipe", "vilt-tiny")
    changed = dict(leaves(to_dict(run)))
    assert {path: changed[path] for path, _ in leaves(kept)} == dict(leaves(kept))
    assert f"lr: {run.optim.lr}" in to_yaml(run)
    official = load_run(overrides=["method=vilt", "variant=official"])
    assert official.optim.lr == 1e-4 and official.vision.depth == run.vision.depth
    assert load_run(overrides=["method=vilt", "optim.lr=0.5"]).optim.lr == 0.5
    small = load_run(overrides=["method=vilt", "size=small"])
    assert small.optim == load_run(overrides=["size=small"]).optim and small.schedule.phases == []
    assert [recipe_names(m, s) for m in ("simla", "albef", "clip", "siglip") for s in Size] == [[]] * 12
    assert recipe_names("uniter-grid", "tiny") == ["uniter-tiny", "uniter-grid-tiny"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_of_a_method_at_a_size_and_sets_no_budget(name):
    """What comparisons hold equal by the shared keys lies in no recipe."""
    assert name in {f"{method}-{size}" for method in (*Method, *FORMS) for size in Size}
    for path, _ in leaves(preset("recipe", name)):
        assert not any(f"{path}.".startswith(f"{start}.") for start in NOT_OWN), path
    load_run(overrides=dict(zip(("method", "size"), name.rsplit("-", 1), strict=True)))


def test_lists_are_replaced_not_merged():
    phases = [{"until": 1.0, "objectives": ["itc"]}]
    run = load_run(overrides={"schedule.phases": phases})
    assert [(p.until, p.objectives) for p in run.schedule.phases] == [(1.0, ["itc"])]


def test_null_switches_off_and_a_mapping_on_again(tmp_path):
    off = tmp_path / "off.yaml"
    off.write_text("objectives: {mim: null}\n")
    assert load_run([off]).objectives.mim is None
    again = load_run([off], ["objectives.mim.mask_ratio=0.25"])
    assert again.objectives.mim.mask_ratio == 0.25
    assert load_run([off], ["objectives.mim={}"]).objectives.mim is not None


def test_strings_and_mappings_say_the_same():
    text = load_run(overrides=["objectives.psl=null", "optim.lr=1e-3", "optim.betas=[0.8, 0.9]", "batch.global=128"])
    tree = {"objectives.psl": None, "optim.lr": 1e-3, "optim.betas": [0.8, 0.9], "batch.global": 128}
    assert text == load_run(overrides=tree)
    assert text.objectives.psl is None and text.optim.lr == 1e-3 and text.batch.global_ == 128


@pytest.mark.parametrize("off", ["off", "Off", "false", "no", "'off'"])
def test_off_is_a_word_here(off, tmp_path):
    """YAML 1.1 reads it as false."""
    file = tmp_path / "c.yaml"
    file.write_text(f"objectives: {{psl: {{recommend: {off}}}}}\n")
    assert load_run([file]).objectives.psl.recommend is Recommend.off
    run = load_run(overrides=[f"objectives.psl.recommend={off}"])
    assert run.objectives.psl.recommend is Recommend.off
    file.write_text(to_yaml(run))
    assert load_run([file], presets=False) == run


def test_unknown_keys_suggest_the_near_one():
    assert error_of(["optim.lrr=3"]) == "optim.lrr: unknown key; did you mean optim.lr?"
    assert "did you mean objectives.psl.max_keywords?" in error_of(["objectives.psl.max_keyword=3"])
    assert "did you mean optim.lr?" in error_of(["lr=3"])  # known elsewhere
    assert "did you mean batch.global?" in error_of(["batch.global_=64"])
    assert "known here: m, mode" in error_of(["teacher.zzz=3"])


def test_unknown_keys_of_a_phase_suggest_the_near_one():
    assert "did you mean" in error_of(["schedule.phases=[{until: 1.0, objective: [itc], objectives: [itc]}]"])


def test_wrong_axes_suggest_the_near_one():
    assert error_of(["size=tinny"]) == "size: tinny is not one of tiny, small, base; did you mean tiny?"
    assert error_of(["method=simba"]).startswith("method: simba is not one of simla")


def test_wrong_types_name_key_and_value():
    assert error_of(["seed=abc"]).startswith("seed: ") and "'abc'" in error_of(["seed=abc"])
    assert "data.train" in error_of(["data.train=world:train"])
    assert "optim.lr" in error_of(["optim.lr=-1"]) and "-1" in error_of(["optim.lr=-1"])
    assert "objectives.mlm.soft_dim" in error_of(["objectives.mlm.soft_dim=both"])
    assert "vision" in error_of(["vision=3"])
    assert "optim.lr" in error_of(["optim.lr=.nan"])
    assert "name" in error_of(["name=../elsewhere"])


def test_all_errors_come_at_once(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("optim: {lr: fast, lrr: 1}\nseeds: 3\ntext: {width: -4}\n")
    lines = error_of(["queue=x"], [file]).splitlines()
    assert [line.split(":")[0] for line in sorted(lines)] == ["optim.lr", "optim.lrr", "queue", "seeds", "text.width"]


def test_all_broken_combinations_come_at_once():
    lines = error_of(["queue=100", "text.heads=3", "eval.best=loss", "ray.workers=7"]).splitlines()
    assert sorted(line.split(":")[0] for line in lines) == [
        "data.decode_cpus",
        "eval.best",
        "queue",
        "ray.workers",
        "text.width",
    ]


@pytest.mark.parametrize("wrong", ["size=huge", "not an override"])
def test_a_wrong_axis_or_override_hides_no_other_error(wrong):
    message = error_of([wrong, "seed=abc"])
    assert "seed" in message and wrong.split("=")[0] in message


def test_overrides_that_are_none():
    assert "key.subkey=value" in error_of(["seed"])
    assert "key.subkey=value" in error_of(["=3"])
    assert "seed" in error_of(["seed=[1"])
    assert "unknown key" in error_of({"a..b": 1})


TAGS = [
    "!!python/object/apply:os.system ['touch {marker}']",
    "!!python/object:simla_ray.config.schema.Run {{}}",
    "!!python/name:os.system",
    "!!python/object/new:os.system ['touch {marker}']",
]


@pytest.mark.parametrize("tag", TAGS)
def test_nothing_in_yaml_is_evaluated(tag, tmp_path):
    marker, file = tmp_path / "was_run", tmp_path / "c.yaml"
    value = tag.format(marker=marker)
    file.write_text(f"seed: {value}\n")
    with pytest.raises(UserError, match="not YAML"):
        read_yaml(file)
    assert "not YAML" in error_of(files=[file])
    assert "seed" in error_of([f"seed={value}"])
    assert not marker.exists()


def test_files_that_hold_no_config(tmp_path):
    assert "cannot be read" in error_of(files=[tmp_path / "missing.yaml"])
    for text in ("- a\n- b\n", "just words\n", "3\n"):
        file = tmp_path / "c.yaml"
        file.write_text(text)
        assert "keys and values" in error_of(files=[file])
    file.write_text("a: [1\n")
    assert "not YAML" in error_of(files=[file])
    file.write_text("")
    assert load_run([file]) == load_run()


def test_a_file_that_is_not_text(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xff\xfe\x00\x01")
    error_of(files=[file])


@pytest.mark.parametrize(
    "text",
    [
        "3: 4\n",
        "seed: {}\n",
        "optim: [1]\n",
        "null: 1\n",
        "schedule: {phases: {a: 1}}\n",
        "schedule: {mix: [1]}\n",
        "objectives: {psl: 3}\n",
        "size: {a: 1}\n",
        "? [1, 2]\n: 3\n",
    ],
)
def test_odd_trees_are_refused_as_mistakes(text, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    error_of(files=[file])


scalars = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=5)
values = st.recursive(scalars, lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=5), v, max_size=2))
PATHS = [path for path, _ in leaf_kinds(Run)]


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(st.sampled_from(PATHS), values, min_size=1, max_size=3))
def test_any_value_gives_a_run_or_a_user_error(overrides):
    try:
        run = load_run(overrides=overrides)
    except UserError as error:
        assert str(error)
    else:
        again = Run.model_validate(yaml.safe_load(to_yaml(run)))
        assert to_yaml(again) == to_yaml(run)


def test_difference_by_kind():
    old = load_run()
    joint = ["objectives.mim=null", "schedule.kind=joint", "schedule.phases=[]"]
    new = load_run(overrides=["optim.lr=0.5", "ray.workers=1", "log.every_steps=3", *joint])
    identity = {path: (a, b) for path, a, b in difference(old, new, "identity")}
    operational = {path: (a, b) for path, a, b in difference(old, new, "operational")}
    assert identity["optim.lr"] == (4e-3, 0.5)
    assert operational == {"ray.workers": (2, 1), "log.every_steps": (10, 3)}
    assert "schedule.kind" in identity and "schedule.phases" in identity
    assert any(path.startswith("objectives.mim") for path in identity)
    assert difference(old, old, "identity") == [] == difference(old, old, "operational")


def test_difference_inside_free_mappings_and_lists():
    changes = {"schedule.kind": "sampled", "schedule.phases": []}
    a = load_run(overrides={**changes, "schedule.mix": {"itc": 2}})
    b = load_run(overrides={**changes, "schedule.mix": {"itc": 3}})
    c = load_run(overrides=changes)
    assert difference(a, b, "identity") == [("schedule.mix.itc", 2.0, 3.0)]
    assert difference(a, c, "identity")
    assert difference(a, b, "operational") == []
    train = load_run(overrides={"data.train": ["world:train", "world:val"]})
    assert [p for p, *_ in difference(c, train, "identity") if p.startswith("data")] == ["data.train"]


def test_dumps_name_keys_as_they_are_written():
    tree = to_dict(load_run())
    assert tree["batch"] == {"micro": 32, "global": 64}
    assert tree["size"] == "tiny" and isinstance(tree["storage"], str)
