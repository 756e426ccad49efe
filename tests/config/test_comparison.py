"""A comparison file -> runs that differ in what makes an entry, and in nothing else."""

import pickle

import pytest

from simla_ray.config.comparison import Comparison, load_comparison, to_yaml
from simla_ray.config.controlled import HELD, MAY_BE_WITHOUT, OF_FUSION, is_held, unheld
from simla_ray.config.enums import Method
from simla_ray.config.load import difference, leaf_kinds, load_run, preset
from simla_ray.config.schema import Data, Run
from simla_ray.errors import UserError

BUILT_IN = list(preset("comparison", "entries")["comparison"]["entries"])


def error_of(overrides=(), files=(), chosen=()):
    with pytest.raises(UserError) as caught:
        load_comparison(files, overrides, chosen)
    return str(caught.value)


@pytest.fixture
def shared(tmp_path):
    file = tmp_path / "shared.yaml"
    file.write_text("size: tiny\noptim: {max_steps: 50}\n")
    return file


def test_the_default_comparison():
    plan = load_comparison()
    assert plan.entries == ["clip", "albef", "simla", "simla-no-psl"]
    assert (plan.comparison.seeds, plan.comparison.budgets, plan.comparison.fractions) == ([0, 1, 2], ["samples"], [1])
    runs = {entry: plan.run(entry, 2) for entry in plan.entries}
    assert {run.seed for run in runs.values()} == {2} and {run.ray.workers for run in runs.values()} == {1}
    assert {(run.optim.max_steps, run.batch.global_) for run in runs.values()} == {(400, 64)}
    assert list(runs["clip"].objectives.active()) == ["itc"] and runs["clip"].teacher is None
    assert list(runs["albef"].objectives.active()) == ["itc", "itm", "mlm"]
    assert list(runs["simla-no-psl"].objectives.active()) == ["itc", "itm", "mlm", "mim"]


def test_an_entry_is_its_presets_and_nothing_else_differs(shared):
    plan = load_comparison([shared], chosen=BUILT_IN)
    simla = plan.run("simla", 0)
    assert simla == load_run([shared], {"method": "simla", "seed": 0})
    assert plan.run("clip", 1) == load_run([shared], {"method": "clip", "seed": 1})
    assert plan.run("simla-official", 0) == load_run([shared], {"variant": "official"})
    for control in ("content", "tfidf", "random"):
        changed = difference(simla, plan.run(f"simla-psl-{control}", 0), "identity")
        assert changed == [("objectives.psl.select", "attention", control)]
    both = plan.run("simla-no-mim-no-psl", 0)
    assert both.objectives.mim is None and both.objectives.psl is None
    assert plan.overrides("simla-no-mim") == {"method": "simla", "objectives.mim": None}
    assert all(plan.description(entry) for entry in plan.entries)


def test_what_lies_over_an_entry_wins(shared):
    over = {"optim.max_steps": 70, "name": "clip-0", "data.test": ["world:val"]}
    run = load_comparison([shared]).run("clip", 0, over)
    assert (run.optim.max_steps, run.name, run.data.test) == (70, "clip-0", ["world:val"])
    assert load_comparison([shared], ["name=mine"]).base.name == "mine"


def test_entries_of_the_file_are_compared_beside_the_standard_ones(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "size: tiny\n"
        "comparison:\n"
        "  reference: mine\n"
        "  entries:\n"
        "    mine: {method: simla, objectives.psl.weight: 5, objectives: {mlm: {p: 0.2}}, description: lighter}\n"
        "    simla-no-psl: null\n"
    )
    plan = load_comparison([file], ["comparison.entries.mine.objectives.mlm.weight=4", "comparison.seeds=[7]"])
    assert plan.entries == ["clip", "albef", "simla", "mine"] and plan.comparison.seeds == [7]
    objectives = plan.run("mine", 7).objectives
    assert (objectives.psl.weight, objectives.mlm.p, objectives.mlm.weight) == (5, 0.2, 4)
    assert plan.description("mine") == "lighter" and plan.base.seed == 7
    assert load_comparison([file], chosen=["mine", "clip"]).entries == ["mine", "clip"]


def test_an_entrys_own_keys_lie_over_shared_ones(shared):
    own = "comparison.entries.mine={method: albef, optim.lr: 0.002, text: {dropout: 0.2}}"
    plan = load_comparison([shared], [own, "optim.lr=0.001", "text.dropout=0.1"])
    assert [(plan.run(e, 0).optim.lr, plan.run(e, 0).text.dropout) for e in ("albef", "mine")] == [
        (0.001, 0.1),
        (0.002, 0.2),
    ]


def test_a_comparison_is_read_back_unchanged(shared, tmp_path):
    overrides = ["comparison.entries.mine={method: albef, optim: {lr: 0.001}}", "comparison.budgets=[compute, samples]"]
    for plan in (load_comparison(), load_comparison([shared], overrides), load_comparison([shared], chosen=BUILT_IN)):
        file = tmp_path / "comparison.yaml"
        file.write_text(to_yaml(plan))
        again = load_comparison([file])
        assert again == plan and again.entries == plan.entries
        assert [again.run(e, 0) for e in again.entries] == [plan.run(e, 0) for e in plan.entries]
        assert pickle.loads(pickle.dumps(plan)) == plan


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objectives.psl.weight=3", "it would switch it on"),
        ("teacher.m=0.9", "it would switch it on"),
        ("queue=64", "it would switch it on"),
        ("schedule.kind=joint", "it would switch it on"),
        ("method=clip", "comparison.entries.<name>"),
        ("seed=4", "comparison.seeds"),
        ("data.fraction=0.5", "comparison.fractions"),
        ("task=retrieval", "pretrainings"),
        ("text.fusion=every_layer", "would undo what albef has"),
    ],
)
def test_shared_keys_may_not_touch_what_makes_an_entry(override, said, shared):
    first = error_of([override], [shared]).splitlines()[0]
    assert first.startswith(override.partition("=")[0] + ": ") and said in first


def test_a_quirk_of_the_official_code_is_not_undone_by_a_shared_key(shared):
    assert load_comparison([shared], ["optim.clip=0.5"]).run("simla", 0).optim.clip == 0.5
    said = error_of(["optim.clip=0.5"], [shared], ["simla", "simla-official"])
    assert said.startswith("optim.clip: would undo what simla-official has")


@pytest.mark.parametrize(
    "path", ["optim.max_steps", "batch.global", "world.n_val", "seed", "data.test", "name", "task"]
)
def test_an_entry_has_the_budget_and_the_data_of_the_others(path, shared):
    said = error_of([f"comparison.entries.mine={{method: simla, {path}: 128}}"], [shared])
    assert said.splitlines()[0].startswith(f"comparison.entries.mine.{path}: ")


def test_mistakes_of_one_entry_and_of_all_come_at_once(shared):
    lines = error_of(
        [
            "comparison.entries.mine={method: simba, objectives.psl.wieght: 3}",
            "optim.lrr=1",
            "comparison.reference=simba",
        ],
        [shared],
        ["clip", "simla", "mine", "albfe"],
    ).splitlines()
    assert lines == [
        "comparison.chosen: albfe is not one of " + ", ".join([*BUILT_IN, "mine"]) + "; did you mean albef?",
        "comparison.reference: simba is not one of the chosen entries (clip, simla, mine); did you mean simla?; "
        "choose it too, or name another",
        "optim.lrr: unknown key; did you mean optim.lr?",
        f"comparison.entries.mine.method: simba is not one of {', '.join(Method)}; did you mean simla?",
        "comparison.entries.mine.objectives.psl.wieght: unknown key; did you mean objectives.psl.weight?",
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("comparison.seedz=[1]", "comparison.seedz: unknown key; did you mean comparison.seeds?"),
        ("comparison.seeds=[1,1]", "comparison.seeds: 1 stands twice"),
        ("comparison.seeds=[]", "comparison.seeds: "),
        ("comparison.seeds=[-1]", "comparison.seeds.0: "),
        ("comparison.budgets=[steps]", "comparison.budgets.0: "),
        ("comparison.fractions=[0]", "comparison.fractions.0: "),
        ("comparison.metrics=[retrieval_r10]", "comparison.metrics: retrieval_r10 is not like"),
        ("comparison.chosen=[]", "comparison.chosen: is empty"),
        ("comparison.entries={a/b: {method: clip}}", "comparison.entries: 'a/b' must be"),
        ("comparison.entries={mine: 3}", "comparison.entries.mine: "),
        ("comparison.entries={mine: {description: [1]}}", "comparison.entries.mine.description: [1] is not a text"),
        ("comparison=3", "comparison: expected keys and values"),
    ],
)
def test_wrong_values_name_their_key(override, said, shared):
    assert error_of([override], [shared]).startswith(said)


CONTROLLED = ["comparison.controlled=true"]


def test_controlled_entries_differ_in_fusion_and_objectives_alone(shared):
    chosen = ["simla", "albef", "clip", "vilt", "simla-no-psl", "simla-psl-random"]
    plan = load_comparison([shared], [*CONTROLLED, "optim.lr=0.002", "vision.depth=3"], chosen)
    base = plan.run("simla", 0)
    assert (base.optim.lr, base.vision.depth) == (0.002, 3)
    for entry in chosen[1:]:
        for kind in ("identity", "operational"):
            for path, _, value in difference(base, plan.run(entry, 0), kind):
                assert not is_held(path, value), f"{entry}: {path}={value}"
    assert load_comparison([shared], CONTROLLED, ["simla"]).run("simla", 0) == load_run([shared], {"method": "simla"})


def test_controlled_leaves_of_recipes_what_is_fusion_and_objectives_and_says_so(shared):
    plan = load_comparison([shared], CONTROLLED, ["simla", "vilt"])
    run, simla = plan.run("vilt", 0), plan.run("simla", 0)
    assert run.optim == simla.optim and run.vision.depth == simla.vision.depth and run.schedule.phases == []
    assert run.objectives.wpa == load_run([shared], {"method": "vilt"}).objectives.wpa
    assert (plan.recipe("vilt"), plan.recipe("simla")) == (None, None)
    notes = " ".join(plan.notes())
    assert notes.startswith("Controlled: ")
    assert "vilt is without what its method or recipe sets otherwise: vision.patch_px, vision.depth, optim.lr" in notes
    assert "No text tower, and one stack as deep as the others' image tower: vilt." in notes
    free = load_comparison([shared], [], ["simla", "vilt"])
    assert free.run("vilt", 0) == load_run([shared], {"method": "vilt"}) and free.recipe("vilt") == "vilt-tiny"
    assert free.notes() == [] and free.recipe("simla") is None


BOXES = ["simla", "clip", "mvptr", "uniter"]


@pytest.mark.parametrize("size", ["small", "base"])
def test_with_boxes_everybody_has_the_augmentation_that_boxes_follow(size, tmp_path):
    """Sizes turn pictures in other ways too; a controlled comparison neither refuses boxes nor treats them apart."""
    plan = load_comparison((), [*CONTROLLED, f"size={size}"], BOXES)
    runs = {entry: plan.run(entry, 0) for entry in BOXES}
    assert {run.data.augment for run in runs.values()} == {"crop"}
    for entry in BOXES[1:]:
        for path, _, value in difference(runs["simla"], runs[entry], "identity"):
            assert not is_held(path, value), f"{entry}: {path}={value}"
    (note,) = [note for note in plan.notes() if "data.augment" in note]
    assert note.startswith("All entries only crop and flip pictures (data.augment=crop; the size has full): boxes ")
    assert note.endswith("images are made of them in mvptr, uniter.")
    stored = tmp_path / "comparison.yaml"
    stored.write_text(to_yaml(plan))
    again = load_comparison([stored])
    assert to_yaml(again) == to_yaml(plan) and again.notes() == plan.notes()


def test_without_boxes_the_size_decides_how_pictures_are_augmented(shared):
    grid = load_comparison((), [*CONTROLLED, "size=small"], ["simla", "mvptr-grid", "uniter-grid", "vilt"])
    assert {grid.run(entry, 0).data.augment for entry in grid.entries} == {"full"}
    assert not any("crop and flip" in note for note in grid.notes())
    tiny = load_comparison([shared], CONTROLLED, BOXES)  # its pictures are only cropped anyway
    assert "data" not in tiny.shared and not any("crop and flip" in note for note in tiny.notes())
    free = load_comparison((), ["size=small"], BOXES)
    assert [free.run(entry, 0).data.augment for entry in BOXES] == ["full", "full", "crop", "crop"]
    said = error_of([*CONTROLLED, "size=small", "data.augment=full"], (), BOXES)
    assert "mvptr.data.augment: full turns the image away from its boxes; use crop" in said


def test_a_method_that_sets_what_is_held_goes_without_it():
    layer = {"vision": {"source": "patches", "depth": 6}, "text": {"fusion": "merged", "depth": 0, "max_tokens": 40}}
    layer |= {"optim": {"betas": [0.9, 0.98]}, "queue": 0, "objectives": {"itm": {"eps": 0.1}, "psl": None}}
    assert unheld(layer) == {
        "vision": {"source": "patches"},
        "text": {"fusion": "merged", "depth": 0},
        "queue": 0,
        "objectives": {"itm": {"eps": 0.1}, "psl": None},
    }
    assert unheld({"text": {"depth": 6}}) == {}


def test_the_note_names_what_a_method_goes_without(shared, monkeypatch):
    given = {"optim": {"lr": 5e-5}, **preset("method", "clip")}
    for module in ("comparison", "load"):
        monkeypatch.setattr(
            f"simla_ray.config.{module}.preset", lambda a, v: given if (a, v) == ("method", "clip") else preset(a, v)
        )
    plan = load_comparison([shared], CONTROLLED, ["simla", "clip"])
    assert plan.run("clip", 0).optim == plan.run("simla", 0).optim
    assert plan.notes()[1:] == ["clip is without what its method or recipe sets otherwise: optim.lr."]


@pytest.mark.parametrize("path", ["optim.lr", "vision.depth", "text.width", "data.augment", "batch.micro", "size"])
def test_an_entry_may_not_set_what_is_held(path, shared):
    own = f"comparison.entries.mine={{method: albef, {path}: {'small' if path == 'size' else 8}}}"
    chosen = ["simla", "mine"]
    said = error_of([*CONTROLLED, own], [shared], chosen).splitlines()
    assert f"comparison.entries.mine.{path}: is held equal by comparison.controlled; set it beside" in "\n".join(said)


def test_an_official_variant_is_not_controlled(shared):
    said = error_of(CONTROLLED, [shared], ["simla", "simla-official"])
    assert said.startswith("comparison.entries.simla-official.variant: official changes pictures and optimiser too")
    assert "\n" not in said


def test_what_is_held_are_sections_and_keys_of_a_run():
    paths = {path for path, _ in leaf_kinds(Run)}
    for path in (*HELD, *OF_FUSION, *MAY_BE_WITHOUT):
        assert path in paths, path


@pytest.mark.skipif("fraction" not in Data.model_fields, reason="a run has no data.fraction")
def test_a_fraction_of_the_data_is_set_over_an_entry(shared):
    plan = load_comparison([shared], ["comparison.fractions=[0.5, 1.0]"])
    assert plan.comparison.fractions == [0.5, 1.0]
    assert plan.run("clip", 0, {"data.fraction": 0.5}).data.fraction == 0.5


def test_every_key_is_documented_and_of_a_kind():
    for name, field in Comparison.model_fields.items():
        assert field.description, name
        assert field.json_schema_extra["kind"] in ("identity", "operational"), name
