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
