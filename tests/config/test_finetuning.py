"""A run that fine-tunes another: what it inherits, and what its task and its user set."""

import pytest

from simla_ray.config.enums import Task
from simla_ray.config.load import load_finetuning, load_run, to_yaml
from simla_ray.errors import UserError


@pytest.fixture(scope="module")
def start():
    return load_run(
        overrides={
            "seed": 7, "name": "first", "vision.depth": 3, "data.augment": "geometric", "ray.workers": 2,
            "data.train": ["a.parquet"], "data.val": ["b.parquet"], "data.val_split": "val",
            "eval.best": "itm_accuracy",
        }
    )  # fmt: skip


@pytest.mark.parametrize("task", list(Task))
def test_every_task_gives_a_valid_run_that_reads_back(start, task, tmp_path):
    run = load_finetuning(start, (), [f"task={task}", "init_from=first"])
    assert run.task is task and run.vision == start.vision and run.data.train == ["a.parquet"]
    assert run.seed == 0 and run.name is None
    (tmp_path / "config.yaml").write_text(to_yaml(run))
    assert load_run([tmp_path / "config.yaml"], presets=False) == run


def test_objectives_are_the_tasks(start):
    on = {task: list(load_finetuning(start, (), [f"task={task}"]).objectives.active()) for task in Task}
    assert on["retrieval"] == on["grounding"] == ["itc", "itm"]
    assert on["vqa"] == ["answers"]
    assert on["entailment"] == on["nlvr"] == on["nlvr2"] == ["labels"]
    assert load_finetuning(start, (), ["task=vqa"]).label == "simla-tiny-vqa"


def test_other_data_bring_their_own_splits(start):
    run = load_finetuning(start, (), ["task=vqa", "data.train=[c.parquet]", "data.val=[d.parquet]"])
    assert (run.data.train, run.data.val, run.data.val_split) == (["c.parquet"], ["d.parquet"], None)
    assert run.data.augment == "geometric"
    assert load_finetuning(start, (), ["task=vqa"]).data.val_split == "val"


def test_the_user_wins_over_the_preset(start, tmp_path):
    file = tmp_path / "f.yaml"
    file.write_text("task: entailment\noptim: {lr: 0.5, min_lr: 0.1}\n")
    run = load_finetuning(start, [file], ["optim.min_lr=0.2"])
    assert (run.task, run.optim.lr, run.optim.min_lr) == ("entailment", 0.5, 0.2)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "task: missing one of retrieval"),
        (
            ["task=vqaa"],
            "task: vqaa is not one of retrieval, grounding, vqa, entailment, nlvr, nlvr2; did you mean vqa?",
        ),
        (["task=vqa", "objectives.itm={}"], "objectives.answers: reads other texts than itm; switch one off"),
        (
            ["task=vqa", "objectives.answers.max_tokens=500"],
            "objectives.answers.max_tokens: 500 is more than",
        ),
        (["task=vqa", "eval.best=retrieval_r10"], "eval.best: retrieval_r10 needs objectives.itc"),
        (["task=nlvr", "objectives.labels.pictures=3"], "objectives.labels.pictures: input should be less than"),
    ],
)
def test_mistakes_are_said_in_one_line(start, overrides, said):
    with pytest.raises(UserError) as error:
        load_finetuning(start, (), overrides)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


@pytest.mark.parametrize("first", list(Task))
@pytest.mark.parametrize("second", list(Task))
def test_one_task_can_follow_another(start, first, second):
    """No head of the first stays on, and no key of it is in the way."""
    between = load_finetuning(start, (), [f"task={first}"])
    if {first, second} & {"retrieval", "grounding"} and first not in ("retrieval", "grounding"):
        with pytest.raises(UserError, match=rf"task: {second} needs objectives\.it"):  # they are gone
            load_finetuning(between, (), [f"task={second}"])
        return
    alone = load_finetuning(start, (), [f"task={second}"]).objectives
    assert load_finetuning(between, (), [f"task={second}"]).objectives == alone


def test_workers_are_as_many_as_the_batch_has_work_for():
    many = {"ray.workers": 4, "batch.global": 256, "data.decode_cpus": 8, "vision.weights": "deit.pth"}
    many = load_run(overrides=many)
    run = load_finetuning(many, (), ["task=vqa"])
    assert (run.ray.workers, run.vision.weights) == (2, None)
    with pytest.raises(UserError, match=r"ray\.workers: 3 is more than the 2 micro-batches"):
        load_finetuning(many, (), ["task=vqa", "ray.workers=3"])
    assert load_finetuning(many, (), ["task=vqa", "batch.global=128"]).ray.workers == 4


def test_an_empty_section_is_said(start, tmp_path):
    (tmp_path / "c.yaml").write_text("data:\n")
    with pytest.raises(UserError, match="data: input should be"):
        load_finetuning(start, [tmp_path / "c.yaml"], ["task=vqa"])


def test_pretraining_knows_no_tasks():
    with pytest.raises(UserError, match=r"task: vqa needs objectives\.answers; on are itc, itm, mlm, mim, psl"):
        load_run(overrides=["task=vqa"])
