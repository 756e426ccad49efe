"""The train function: what every worker of a run does."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from simla_ray.config.load import load_run
from simla_ray.config.schema import Run
from simla_ray.data import pipeline
from simla_ray.data.cursor import Cursor
from simla_ray.data.packing import Packed, pack
from simla_ray.data.prefetch import Prefetched
from simla_ray.errors import UserError
from simla_ray.evaluation.scorer import Scorer
from simla_ray.evaluation.tasks import evaluate, to_json
from simla_ray.jsonl import read_lines
from simla_ray.models.checkpoint_io import load_bert, load_vit
from simla_ray.models.compiling import eager
from simla_ray.models.model import Model
from simla_ray.models.precision import autocast_dtype
from simla_ray.orchestration.prepare import Prepared, keyword_columns, load_tokenizer
from simla_ray.orchestration.start import load_into
from simla_ray.orchestration.validation import Validation
from simla_ray.training.checkpoint import find_checkpoint, load_checkpoint, load_weights, save_checkpoint
from simla_ray.training.comm import Comm
from simla_ray.training.log import RunLog
from simla_ray.training.loop import Loop
from simla_ray.training.state import State
from simla_ray.training.step import Losses, Step

#: Micro-batches that wait for the step, collated and in pinned memory.
PREFETCHED = 2


def train_worker(config: dict[str, Any]) -> None:
    """Train to the last step, then evaluate the best checkpoint.

    Args:
        config: ``folder`` of the run, its ``name``, ``prepared`` (indexes, vocabulary), ``total_steps``, the number of
            ``leg``s before this one and the keys ``changed`` since the last.
    """
    folder, prepared, total = Path(config["folder"]), config["prepared"], config["total_steps"]
    run = load_run([folder / "config.yaml"], presets=False)
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(run.ray.cpus_per_worker)))
        # Scattered additions of several threads come in any order; on a GPU the deterministic kernels cost too much.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    comm = Comm()
    pipeline.quiet()
    logging.getLogger("ray.train").setLevel(logging.WARNING)

    newest = find_checkpoint(folder / "checkpoints")
    losses = build_losses(run, prepared, device, fresh=newest is None).to(device)
    step = Step(run, losses, total, comm, device)
    order = pipeline.order_of(run, prepared.indexes["train"])
    state = State(0, Cursor.start(order.lanes))
    if newest is not None:
        state = load_checkpoint(newest, losses.model, step.optimizer)
        state.cursor = state.cursor.dealt_to(order)
    log = None
    if comm.rank == 0:
        log = RunLog(folder, state.step, metrics_publisher(config["name"]))
        kind, changed = ("resume", {"changed": config["changed"]}) if config["leg"] else ("start", {})
        log.event(kind, step=state.step, world_size=comm.world, **changed)

    loop = Loop(
        run,
        step,
        state,
        order,
        comm,
        log,
        Validation(run, prepared, losses, comm, device),
        _saver(run, losses.model, step.optimizer, prepared, comm),
        {line["uid"]: line["reason"] for line in read_lines(folder / "dropped.jsonl")},
    )
    if state.step < total:
        stream = Prefetched(_stream(run, prepared, state.cursor, total - state.step, comm, device), PREFETCHED)
        loop(stream)
        stream.close()
    _evaluate_best(run, folder, prepared, losses, state, comm, device, log)
    if log is not None:
        log.event("end", step=state.step)
        log.close()


def build_losses(run: Run, prepared: Prepared, device: torch.device, *, fresh: bool = True) -> Losses:
    """Model with its starting weights, and everything its losses need; the same on every rank, on the host.

    Args:
        device: where it will run; decides the precision of the teacher's copy.
        fresh: False leaves out weights that a checkpoint will overwrite.

    Raises:
        UserError: weights, codes or word list that the config names cannot be used.
    """
    torch.manual_seed(run.seed)
    overwritten = not fresh or run.init_from is not None
    vision = run.vision.model_copy(update={"pretrained": False}) if overwritten else run.vision
    low = autocast_dtype(run, device) or torch.float32
    model = Model(run.model_copy(update={"vision": vision}), len(prepared.vocabulary), low)
    if fresh:
        _load_start(run, model)
    tokenizer = load_tokenizer(run, prepared.folder)
    return Losses(run, model, tokenizer, prepared.vocabulary.cls_id, keyword_columns(run, prepared.vocabulary))


def _load_start(run: Run, model: Model) -> None:
    """The towers' weights, or all that ``init_from`` names; the teacher starts as the student's copy."""
    if run.init_from is not None:
        load_into(model, run)
    else:
        if run.vision.weights is not None:
            load_vit(model.student.vision, run.vision.weights)
        if run.text.weights is not None:
            load_bert(model.student.text, run.text.weights, fold_type0=run.text.fold_type0)
    if model.teacher is not None:
        model.teacher.copy_from(model.student)


def _stream(
    run: Run, prepared: Prepared, cursor: Cursor, steps: int, comm: Comm, device: torch.device
) -> Iterator[Packed]:
    """This worker's micro-batches, from the cursor on."""
    lanes = pipeline.worker_lanes(run.micro_batches, comm.world, comm.rank)
    tasks = max(1, run.data.decode_cpus // comm.world)
    dataset = pipeline.training_stream(
        run, prepared.indexes["train"], prepared.vocabulary, lanes, cursor, steps, tasks, prepared.repeated
    )
    for packed in pack(pipeline.blocks_of(dataset), lanes, run, len(prepared.indexes["train"])):
        yield replace(packed, batch=packed.batch.pin()) if device.type == "cuda" else packed


def _saver(
    run: Run, model: Model, optimizer: torch.optim.Optimizer, prepared: Prepared, comm: Comm
) -> Callable[[State, dict[str, float]], None]:
    """Collective: rank 0 writes, Ray uploads, registers and retires checkpoints."""

    def save(state: State, metrics: dict[str, float]) -> None:
        score = {run.eval.best: float(state.step) if run.eval.best == "last" else metrics[run.eval.best]}
        checkpoint = None
        if comm.rank == 0:
            folder = Path(tempfile.mkdtemp(prefix="simla-ray-"))
            save_checkpoint(folder, run, model, optimizer, state, prepared.folder)
            checkpoint = ray.train.Checkpoint.from_directory(str(folder))
        ray.train.report(
            score | {"step": state.step},
            checkpoint=checkpoint,
            checkpoint_dir_name=f"step-{state.step:08d}",
            delete_local_checkpoint_after_upload=True,
        )

    return save


def _evaluate_best(
    run: Run,
    folder: Path,
    prepared: Prepared,
    losses: Losses,
    state: State,
    comm: Comm,
    device: torch.device,
    log: RunLog | None,
) -> None:
    """Evaluate the best checkpoint on the test rows, every worker a share of them; rank 0 writes evaluation.json."""
    if state.best_step != state.step:
        best = find_checkpoint(folder / "checkpoints", state.best_step)
        if best is None:
            raise UserError(
                f"checkpoint.keep: the best checkpoint, step {state.best_step}, is not in {folder} any more"
            )
        load_weights(best, losses.model)
    rows = list(pipeline.iterate_rows(prepared.indexes["test"], comm.rank, comm.world, run.eval.pairs))
    began = time.perf_counter()
    scorer = Scorer(run, losses.model, prepared.vocabulary, device)
    with eager():
        results = evaluate(
            scorer, rows, rank=comm.rank, world=comm.world, gather=comm.gather, tokenizer=losses.tokenizer
        )
    if log is not None:
        temporary = folder / "evaluation.tmp"
        temporary.write_text(json.dumps(to_json(results)))
        temporary.replace(folder / "evaluation.json")
        (folder / "state.json").write_text(json.dumps(state.to_json()))
        log.event("evaluation", step=state.best_step, seconds=round(time.perf_counter() - began, 2))


def metrics_publisher(name: str) -> Callable[[dict[str, float]], None]:
    """Gauges ``ray_simla_<metric>{run="..."}`` on Ray's metrics port, which the dashboard shows."""
    from ray.util.metrics import Gauge

    gauges: dict[str, Gauge] = {}

    def publish(values: dict[str, float]) -> None:
        for key, value in values.items():
            metric = "simla_" + "".join(c if c.isalnum() else "_" for c in key)
            if metric not in gauges:
                gauges[metric] = Gauge(metric, description=key, tag_keys=("run",))
            gauges[metric].set(value, tags={"run": name})

    return publish
