"""Every key has a kind and a reader; every combination that cannot work names its key."""

import ast
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

import simla_ray
from simla_ray.config.comparison import Comparison
from simla_ray.config.load import leaf_kinds, load_run
from simla_ray.config.schema import Objectives, Run, Section
from simla_ray.config.sweep_schema import Sweep
from simla_ray.errors import UserError

JOINT = {"schedule.kind": "joint", "schedule.phases": []}
SAMPLED = {"schedule.kind": "sampled", "schedule.phases": []}


def sections(model=Run, prefix=""):
    """(dotted prefix, model) of every section, lists of sections included."""
    from simla_ray.config.load import _section_of

    yield prefix, model
    for name, field in model.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is None:
            inner = next((_section_of(a) for a in getattr(field.annotation, "__args__", ())), None)
        if inner is not None:
            yield from sections(inner, f"{prefix}{field.alias or name}.")


LEAVES = [
    (prefix, name)
    for prefix, model in sections()
    for name, field in model.model_fields.items()
    if f"{prefix}{field.alias or name}." not in {p for p, _ in sections()}
]


def test_every_key_is_identity_or_operational_and_documented():
    for prefix, model in sections():
        assert issubclass(model, Section)
        for name, field in model.model_fields.items():
            extra = field.json_schema_extra
            assert isinstance(extra, dict) and extra.get("kind") in ("identity", "operational"), f"{prefix}{name}"
            if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
                assert field.description, f"{prefix}{name} has no description"


def test_a_section_and_its_keys_are_of_one_kind():
    kinds = dict(leaf_kinds(Run))
    for path, kind in kinds.items():
        parent = path.rpartition(".")[0]
        assert not parent or kinds[parent] == kind or parent == "data", path


def test_what_changes_the_weights_is_identity():
    kinds = dict(leaf_kinds(Run))
    for path in ("seed", "queue", "optim.lr", "objectives.mlm.p", "init_from", "data.fraction"):
        assert kinds[path] == "identity", path
    for path in (
        "name",
        "storage",
        "ray.workers",
        "checkpoint.every_steps",
        "data.decode_cpus",
        "batch.micro",
        "batch.global",
    ):
        assert kinds[path] == "operational", path


def reads(*, of_config=False):
    """(file, name of the object, attribute) of every attribute read outside config, or in it.

    getattr with a computed name counts for every string constant of its file, with the f-string's end.
    """
    root = Path(simla_ray.__file__).parent
    for file in sorted(root.rglob("*.py")):
        if (file.parent.name == "config") is not of_config:
            continue
        tree = ast.parse(file.read_text())
        constants = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                yield file.name, tail(node.value), node.attr
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
                end = getattr(node.args[1].values[-1], "value", "") if isinstance(node.args[1], ast.JoinedStr) else ""
                for constant in constants:
                    yield file.name, tail(node.args[0]), f"{constant}{end}"


def tail(node):
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


READS = {(owner, attribute) for _, owner, attribute in reads()}
READS_OF_CONFIG = {(owner, attribute) for _, owner, attribute in reads(of_config=True)}
#: What a section is called where it has been handed on: a constructor's argument, an attribute, a loop's variable.
CALLED = {
    "": {"run", "config"},
    "world": {"w"},
    "vision": {"config"},
    "tower": {"config", "vision"},
    "text": {"config", "limits"},
    "temperature": {"config"},
    "itc": {"objective", "o"},
    "itm": {"objective", "o"},
    "mlm": {"objective", "o"},
    "mim": {"objective", "o"},
    "psl": {"objective", "o"},
    "wpa": {"objective", "o"},
    "mcr": {"objective", "o"},
    "wpg": {"objective", "o"},
    "tags": {"config"},
    "concepts": {"config"},
    "mrfr": {"objective", "o"},
    "mrc": {"objective", "o"},
    "mrckl": {"objective", "o"},
    "answers": {"objective", "o"},
    "labels": {"objective", "o"},
    "phases": {"phase", "p"},
}


@pytest.mark.parametrize(("prefix", "name"), LEAVES, ids=[p + n for p, n in LEAVES])
def test_every_key_is_read(prefix, name):
    """A key that nobody reads is a promise that nobody keeps. Reading is `section.key`, on the section's own name."""
    section = prefix.rstrip(".").rpartition(".")[2]
    owners = {section} | CALLED.get(section, set())
    found = any((owner, name) in READS for owner in owners)
    assert found, f"{prefix}{name} is read nowhere in simla_ray outside config"


#: The sections of sweeps and comparisons -> what they are called where they are read, which config may do too.
OF_MANY = [(Sweep, {"sweep"}), (Comparison, {"comparison", "asked"})]


@pytest.mark.parametrize(("section", "owners"), OF_MANY, ids=["sweep", "comparison"])
def test_every_key_of_a_sweep_and_of_a_comparison_is_read(section, owners):
    for name, field in section.model_fields.items():
        assert any((owner, name) in READS | READS_OF_CONFIG for owner in owners), f"{section.__name__}.{name}"
        assert field.description and field.json_schema_extra["kind"] in ("identity", "operational"), name


def test_sections_are_frozen_and_closed():
    run = load_run()
    with pytest.raises(ValidationError):
        run.seed = 3
    with pytest.raises(ValidationError):
        run.optim.lr = 3
    with pytest.raises(ValidationError):
        Objectives(itc={}, what={})


def test_active_leaves_out_what_is_absent_or_weighs_nothing():
    objectives = Objectives.model_validate({"itm": {"weight": 0}, "psl": {}, "itc": {}})
    assert list(objectives.active()) == ["itc", "psl"]


def itc_until(*ends):
    return [{"until": end, "objectives": ["itc"]} for end in ends]


BAD = [
    ({"batch.micro": 1, "batch.global": 4}, ["batch.micro: 1", "itm"]),
    ({"objectives.psl.recommend": "hard"}, ["objectives.psl.recommend", "recommend_threshold", "recommend_top_k"]),
    ({"queue": 100}, ["queue: 100", "batch.global=64"]),
    ({"batch.global": 50}, ["batch.global: 50", "batch.micro=32"]),
    ({"ray.workers": 3}, ["ray.workers: 3", "2 micro-batches"]),
    (
        {"teacher": None},
        ["objectives.mlm.soft_alpha", "objectives.psl.soft_alpha", "objectives.psl.attention: teacher"],
    ),
    ({"teacher": None, "queue": 64}, ["queue: 64 keys need a teacher"]),
    ({"teacher": None, "objectives.psl.image_source": "teacher"}, ["objectives.psl.image_source"]),
    ({"vision.image_px": 50}, ["vision.image_px: 50", "vision.patch_px=8"]),
    ({"vision.patch_px": 6, "vision.image_px": 48}, ["vision.patch_px: 6", "vision.stem=conv"]),
    ({"text.heads": 3}, ["text.width: 64", "text.heads=3"]),
    ({"text.max_tokens": 90}, ["text.max_tokens: 90", "text.max_positions=64"]),
    ({"text.max_positions": 30}, ["text.max_positions: 30", "37 image tokens"]),
    ({"codes.kind": "dvae", "codes.source": "x.pkl"}, ["codes.n: 128", "8192"]),
    ({"codes.kind": "features"}, ["codes.source: missing"]),
    ({"schedule.phases": []}, ["schedule.phases"]),
    ({"schedule.kind": "joint"}, ["schedule.phases"]),
    ({"schedule.phases": [{"until": 0.5, "objectives": ["itc"]}]}, ["schedule.phases", "[0.5]"]),
    ({"schedule.phases": itc_until(0.6, 0.4, 1.0)}, ["rise to 1.0", "[0.6, 0.4, 1.0]"]),
    ({"schedule.phases": itc_until(0.5, 0.5, 1.0)}, ["rise to 1.0"]),
    (
        {"schedule.phases": itc_until(1.0), "objectives.itc": None, "eval.best": "last"},
        ["schedule.phases.0.objectives"],
    ),
    ({"schedule.mix": {"itc": 2}}, ["schedule.mix", "sampled"]),
    ({"eval.best": "loss"}, ["eval.best: loss", "retrieval_r10"]),
    ({"objectives.itc": None, **JOINT}, ["eval.best: retrieval_r10", "objectives.itc"]),
    ({"objectives.psl": None, "eval.best": "keyword_ap"}, ["eval.best: keyword_ap", "objectives.psl"]),
    ({f"objectives.{n}": None for n in ("itc", "itm", "mlm", "mim", "psl")}, ["objectives: none is on"]),
    ({f"objectives.{n}.weight": 0 for n in ("itc", "itm", "mlm", "mim", "psl")}, ["objectives: none is on"]),
    ({"data.train": ["my.parquet"]}, ["data.val", "data.train"]),
    ({"data.fraction": 0}, ["data.fraction", "greater than 0", "found 0"]),
    ({"data.fraction": 1.5}, ["data.fraction", "less than or equal to 1", "found 1.5"]),
    ({"data.fraction": 0.001}, ["data.fraction: 0.001", "world.n_train=12000", "batch.global=64"]),
]


@pytest.mark.parametrize(("changes", "said"), BAD, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(BAD)])
def test_what_cannot_work_names_its_key(changes, said):
    with pytest.raises(UserError) as caught:
        load_run(overrides=changes)
    for words in said:
        assert words in str(caught.value)


GOOD = [
    {"batch.micro": 1, "batch.global": 4, "queue": 4, "objectives.itm": None, **JOINT},
    {"objectives.psl.recommend": "hard", "objectives.psl.recommend_threshold": 0.5},
    {"objectives.psl.recommend": "hard", "objectives.psl.recommend_top_k": 3},
    {"teacher": None, "objectives.psl.attention": "student"}
    | {f"objectives.{n}.soft_alpha": 0 for n in ("itc", "mlm", "mim", "psl")},
    {"teacher": None, "objectives.psl.select": "random"}
    | {f"objectives.{n}.soft_alpha": 0 for n in ("itc", "mlm", "mim", "psl")},
    {"queue": 6400},
    {"objectives.itc": None, "eval.best": "last"},
    {"eval.best": "keyword_ap"},
    {"codes.kind": "dvae", "codes.n": 8192, "codes.source": "x.pkl"},
    {"data.train": ["a.parquet"], "data.val": ["b.parquet"]},
    {"data.train": ["a.parquet"], "data.val": ["b.parquet"], "data.fraction": 0.001},
    {"data.fraction": 0.01},
]


@pytest.mark.parametrize("changes", GOOD, ids=[next(iter(c)) + str(i) for i, c in enumerate(GOOD)])
def test_what_can_work_is_taken(changes):
    assert isinstance(load_run(overrides=changes), Run)


UNGUARDED = [
    ({**SAMPLED, "schedule.mix": {"itc": -1}}, "a negative frequency"),
    ({**SAMPLED, "schedule.mix": dict.fromkeys(("itc", "itm", "mlm", "mim", "psl"), 0)}, "no frequency left"),
    ({**SAMPLED, "schedule.mix": {"mim": 3}, "objectives.mim": None}, "a frequency of what is off"),
    ({"optim.lr": float("inf")}, "an infinite rate"),
    ({"optim.betas": [1.5, 0.9]}, "betas from 1 on"),
    ({"optim.min_lr": 1.0}, "min_lr above lr"),
    ({"seed": True}, "booleans as numbers"),
    ({"vision.heads": 5}, "heads that do not divide vision.width"),
]  # fmt: skip


@pytest.mark.parametrize("changes", [c for c, _ in UNGUARDED], ids=[why for _, why in UNGUARDED])
def test_values_that_fail_only_later_are_refused(changes):
    with pytest.raises(UserError):
        load_run(overrides=changes)


def test_label_names_what_is_not_the_method_as_published():
    assert load_run().label == "simla-tiny-kmeans128"
    assert load_run(overrides={"objectives.mim": None}).label == "simla-tiny"
    assert load_run(overrides={"variant": "official", "size": "small"}).label == "simla-official-small-kmeans256"
