"""What goes together with ``text.fusion: merged``: one line for each thing that does not."""

import pytest

from simla_ray.config.enums import Method
from simla_ray.config.load import load_finetuning, load_run, to_yaml
from simla_ray.errors import UserError


def test_vil_is_vilt_and_the_config_says_so():
    run = load_run(overrides=["method=vil"])
    assert run.method is Method.vilt and "method: vilt" in to_yaml(run)
    assert list(run.objectives.active()) == ["itm", "mlm", "wpa"]
    assert run.teacher is None and not run.queue and run.text.depth == 0 and run.eval.best == "itm_accuracy"


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("variant", ["default", "official"])
def test_every_size_and_variant_loads(size, variant):
    run = load_run(overrides=["method=vilt", f"size={size}", f"variant={variant}"])
    assert run.objectives.mlm.whole_word and run.objectives.itm.negatives == "random"
    assert variant == "default" or (run.vision.image_px, run.vision.patch_px) == (384, 32)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("vision.source=vit", "vision.source: vit does not go with text.fusion=merged; use patches"),
        ("text.depth=3", "text.depth: 3 does not go with text.fusion=merged; use 0"),
        ("objectives.itc={soft_alpha: 0}", "objectives.itc: reads towers"),
        ("objectives.mim={soft_alpha: 0}", "objectives.mim: reads towers"),
        ("objectives.psl={soft_alpha: 0, attention: student}", "objectives.psl: reads towers"),
        ("teacher={}", "teacher: text.fusion=merged has no use for one; set teacher=null"),
        ("queue=64", "queue: 64 keys need a teacher"),
        ("text.weights=bert", "text.weights: bert has no layers to go to"),
        ("text.width=32", "text.width: 32 must equal vision.width=64"),
        ("objectives.itm.negatives=hard", "objectives.itm.negatives: hard needs the similarities of itc; use random"),
        ("objectives.mlm.soft_alpha=0.4", "objectives.mlm.soft_alpha: 0.4 needs a teacher"),
        ("eval.best=retrieval_r10", "eval.best: retrieval_r10 needs objectives.itc"),
        ("batch.micro=1", "batch.micro: 1 leaves no negatives for itm, itc and wpa"),
    ],
)
def test_what_needs_towers_is_refused_in_one_line(override, line):
    with pytest.raises(UserError) as caught:
        load_run(overrides=["method=vilt", override])
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("objectives.wpa={}", "objectives.wpa: needs text.fusion=merged, found every_layer"),
        ("vision.source=patches", "vision.source: patches does not go with text.fusion=every_layer; use vit"),
        ("text.depth=0", "text.depth: 0 does not go with text.fusion=every_layer; use at least 1"),
    ],
)
def test_what_needs_the_merged_stack_is_refused_elsewhere(override, line):
    with pytest.raises(UserError) as caught:
        load_run(overrides=[override])
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


@pytest.mark.parametrize("task", ["retrieval", "grounding", "vqa", "nlvr", "nlvr2", "entailment"])
def test_every_task_can_be_fine_tuned(task):
    run = load_finetuning(load_run(overrides=["method=vilt"]), overrides=[f"task={task}"])
    assert run.text.fusion == "merged" and run.eval.best != "retrieval_r10"
    assert ("wpa" in run.objectives.active()) is (task in ("retrieval", "grounding"))
