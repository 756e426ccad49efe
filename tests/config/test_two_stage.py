"""What goes together with ``text.fusion: two_stage``: one line for each thing that does not."""

import pytest

from simla_ray.config.enums import Method
from simla_ray.config.load import load_finetuning, load_run, to_yaml
from simla_ray.errors import UserError


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("method", ["mvptr", "mvptr-grid", "mvptr-psl"])
def test_every_size_and_form_loads(method, size):
    run = load_run(overrides=[f"method={method}", f"size={size}"])
    assert run.method is Method.mvptr and "method: mvptr\n" in to_yaml(run)
    own = {"mvptr": ["mcr", "wpg"], "mvptr-grid": ["wpg"], "mvptr-psl": ["psl", "wpg"]}[method]
    assert set(run.objectives.active()) == {"itc", "itm", "mlm", *own}
    assert run.text.length == run.text.max_tokens + 6 and run.objectives.itm.negatives == "sample"
    assert run.label.startswith("mvptr-grid" if method != "mvptr" else f"mvptr-{size}")


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("vision.source=patches", "regions: given, but vision.source=patches"),
        ("text.depth=1", "text.depth: 1 has no halves for text.fusion=two_stage"),
        ("tags=null", "tags: null, but text.fusion=two_stage reads [CLS] before them"),
        ("tags.source=none", "objectives.mcr: tags.source=none leaves nothing to recover; set it to null"),
        ("tags.max_tokens=65", "tags.max_tokens: 65 is more than text.max_positions=64"),
        ("text.concepts=50", "text.max_positions: 64 is less than the 76 tokens of text.max_tokens=25"),
        ("text.concepts=0", "text.concepts: 0 leaves wpg no phrases to ground"),
        ("objectives.mim={soft_alpha: 0}", "objectives.mim: reads patches"),
        (
            "objectives.psl={soft_alpha: 0, attention: student}",
            "objectives.psl.select: attention needs words that read",
        ),
        ("teacher={}", "teacher: text.fusion=two_stage has no use for one"),
        ("text.weights=bert", "text.weights: bert is one stack, text.fusion=two_stage has three; set it to null"),
        ("objectives.itc.scope=step", "objectives.itc.scope: step"),
        ("data.augment=full", "data.augment: full turns the image away from its boxes"),
    ],
)
def test_what_does_not_go_is_said(override, line):
    with pytest.raises(UserError) as caught:
        load_run(overrides=["method=mvptr", override])
    assert any(found.startswith(line) for found in str(caught.value).splitlines()), caught.value


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("objectives.mcr={}", "objectives.mcr: needs text.fusion=two_stage, found every_layer"),
        ("objectives.wpg={}", "objectives.wpg: needs text.fusion=two_stage, found every_layer"),
        ("text.concepts=5", "text.concepts: 5, which text.fusion=every_layer does not read; set it to 0"),
        ("tags={}", "tags: given, which text.fusion=every_layer does not read; set it to null"),
    ],
)
def test_what_only_two_stages_have_is_refused_elsewhere(override, line):
    with pytest.raises(UserError) as caught:
        load_run(overrides=[override])
    assert str(caught.value) == line


def test_retrieval_can_be_fine_tuned_and_questions_are_refused():
    start = load_run(overrides=["method=mvptr"])
    run = load_finetuning(start, overrides=["task=retrieval"])
    assert set(run.objectives.active()) == {"itc", "itm"} and run.tags == start.tags and run.regions == start.regions
    with pytest.raises(UserError, match=r"objectives.labels: reads statements over whole pictures"):
        load_finetuning(start, overrides=["task=nlvr"])


def test_the_official_variant_takes_the_hardest_negatives():
    run = load_run(overrides=["method=mvptr", "variant=official", "size=base"])
    assert run.objectives.itm.negatives == "hard" and run.text.length == 40 and run.optim.lr == 5e-5
