"""The train function: what every worker of a run does."""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
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
from simla_ray.evaluation.blind import Blind
from simla_ray.evaluation.paired import write_per_image
from simla_ray.evaluation.scorer import Scorer
from simla_ray.evaluation.tasks import evaluate, to_json
from simla_ray.jsonl import read_lines
from simla_ray.models.checkpoint_io import load_bert, load_vit
from simla_ray.models.compiling import eager
from simla_ray.models.model import Model
from simla_ray.models.precision import autocast_dtype
from simla_ray.orchestration.group import notice, register, registered
from simla_ray.orchestration.prepare import Prepared, keyword_columns, load_tokenizer
from simla_ray.orchestration.prepare_regions import load_region_codes
from simla_ray.orchestration.region_tower import load_region_tower
from simla_ray.orchestration.start import load_into
from simla_ray.orchestration.validation import Validation
from simla_ray.training.checkpoint import find_checkpoint, load_checkpoint, load_weights
from simla_ray.training.comm import Comm
from simla_ray.training.events import legs_of, log_event, note_stop, stopped
from simla_ray.training.legs import Leg, begin, fence
from simla_ray.training.log import RunLog
from simla_ray.training.loop import NON_FINITE, Leaving, Loop, RollBack
from simla_ray.training.saver import Saved, Saver
from simla_ray.training.state import State
from simla_ray.training.step import Losses, Step
from simla_ray.training.watchdog import Beat, Watchdog
from simla_ray.whole import write_whole

#: Micro-batches that wait for the step, collated and in pinned memory.
PREFETCHED = 2


def train_worker(prepared: Prepared, config: dict[str, Any]) -> None:
    """Train to the last step, then evaluate the best checkpoint.

    Args:
        prepared: indexes, vocabulary and codes.
        config: ``folder`` of the run, its ``name``, ``total_steps``, the step ``until`` which it goes, the number of
            ``legs`` before this command and the keys ``changed`` since the last.

    A mistake of the user is noted in the run's folder: Ray would try it again.
    """
    folder = Path(config["folder"])
    if stopped(folder) is not None:
        return
    comm = Comm()
    try:
        with fence(folder) if comm.rank == 0 else nullcontext():
            _train(config, prepared, folder, comm)
    except UserError as error:
        note_stop(folder, str(error))
        if comm.world > 1:
            raise  # the others may wait in a collective; Ray ends them, and the next start finds the note
    except (RollBack, Leaving):
        raise  # said in events.jsonl
    except Exception:
        with (folder / "failures.txt").open("a") as file:  # Ray hands on the error without where it came from
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} worker {comm.rank}\n{traceback.format_exc()}\n")
        raise


def _train(config: dict[str, Any], prepared: Prepared, folder: Path, comm: Comm) -> None:
    total, until = config["total_steps"], config["until"]
    run = load_run([folder / "config.yaml"], presets=False)
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(run.ray.cpus_per_worker)))
        # Scattered additions of several threads come in any order; on a GPU the deterministic kernels cost too much.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    pipeline.quiet()
    logging.getLogger("ray.train").setLevel(logging.WARNING)

    mine = None
    if comm.rank == 0:
        mine = begin(folder, comm.world, config["changed"], first=config["legs"] == legs_of(folder))
    leg: Leg = comm.gather(mine)[0]
    checkpoints = folder / "checkpoints"
    losses = build_losses(run, prepared, device, fresh=leg.checkpoint is None).to(device)
    step = Step(run, losses, total, comm, device)
    order = pipeline.order_of(run, prepared.indexes["train"])
    state = State(0, Cursor.start(order.lanes))
    if leg.checkpoint is not None:
        state = load_checkpoint(checkpoints / leg.checkpoint, losses.model, step.optimizer)
        state.cursor = state.cursor.dealt_to(order)
    log = saver = None
    if comm.rank == 0:
        log = RunLog(folder, state.step, metrics_publisher(config["name"]))
        for kind, details in leg.events:
            log.event(kind, **details)
        saver = Saver(checkpoints, run, losses.model, step.optimizer, prepared.folder)
    known = comm.gather(registered() if comm.rank == 0 else None)[0]
    for name, at, score in leg.complete:
        if name not in known:
            register(run, checkpoints, Saved(name, at, score, 0.0, 0.0), comm.rank)

    def hung(beat: Beat) -> None:
        log_event(folder, "hung", reason=f"worker {beat.rank} hangs {beat.doing} after step {beat.step}")

    if state.step < until:
        with Watchdog(folder / ".beats", comm.rank, comm.world, run.ray.hang_timeout_s, hung) as watchdog:
            loop = Loop(
                run,
                step,
                state,
                order,
                comm,
                log,
                Validation(run, prepared, losses, comm, device),
                saver,
                lambda saved: register(run, checkpoints, saved, comm.rank),
                _known_drops(folder),
                leg.past,
                notice,
                watchdog,
            )
            steps = until - state.step
            with Prefetched(_stream(run, prepared, state.cursor, steps, comm, device), PREFETCHED) as stream:
                loop(stream, until)
    if state.step == total:
        _evaluate_best(run, folder, prepared, losses, state, comm, device, log)
    if log is not None:
        log.event("end", step=state.step)
        log.close()


def _known_drops(folder: Path) -> dict[str, str]:
    """uid -> reason of the rows that an earlier leg could not use."""
    lines = read_lines(folder / "dropped.jsonl")
    return {line["uid"]: line["reason"] for line in lines if line["reason"] != NON_FINITE}


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
        load_region_codes(model, prepared.folder)
        load_region_tower(model, run)
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
    """Evaluate the best checkpoint on the test rows, every worker a share of them; rank 0 writes evaluation.json, and
    beside it what each image gave.
    """
    if state.best_step != state.step:
        best = find_checkpoint(folder / "checkpoints", state.best_step)
        if best is not None:
            load_weights(best, losses.model)
        else:  # damaged or gone: the last weights are worth more than none
            if log is not None:
                log.event("best_lost", step=state.best_step)
            state.best_step = state.step
    rows = list(pipeline.iterate_rows(prepared.indexes["test"], comm.rank, comm.world, run.eval.pairs))
    began = time.perf_counter()
    scorer = Scorer(run, losses.model, prepared.vocabulary, device)
    with eager():
        results = evaluate(
            scorer, rows, rank=comm.rank, world=comm.world, gather=comm.gather, tokenizer=losses.tokenizer,
            blind=Blind.load(prepared.folder),
        )  # fmt: skip
    if log is not None:
        write_per_image(results, folder)
        write_whole(folder / "evaluation.json", json.dumps(to_json(results)))
        write_whole(folder / "state.json", json.dumps(state.to_json()))
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
