"""A leg of a run without Ray: its stream, loop, checkpoints and files, in processes that can be killed."""

from pathlib import Path

import torch
import torch.distributed

from simla_ray.config.load import load_run
from simla_ray.config.schema import Run
from simla_ray.data import pipeline
from simla_ray.data.blocks import table_block
from simla_ray.data.cursor import Cursor
from simla_ray.data.index import Index, build_index
from simla_ray.data.map_functions import BlockMaker, WindowReader
from simla_ray.data.packing import pack
from simla_ray.data.prefetch import Prefetched
from simla_ray.data.text import Vocabulary
from simla_ray.jsonl import read_lines
from simla_ray.models.model import Model
from simla_ray.orchestration.plan import total_steps
from simla_ray.training.checkpoint import find_checkpoint, load_checkpoint
from simla_ray.training.comm import Comm
from simla_ray.training.log import RunLog
from simla_ray.training.loop import Loop
from simla_ray.training.saver import Saver
from simla_ray.training.state import State
from simla_ray.training.step import Losses, Step

DONE = "done"


def leg(folder: Path, overrides: list[str], rank: int, world: int, number: int) -> None:
    """Go on from the newest checkpoint to the end of the run, unless killed."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous-{number}", rank=rank, world_size=world
        )
    run = load_run(overrides=[*overrides, f"ray.workers={world}", f"data.decode_cpus={world}"])
    index = build_index(run.data.train, None, [], "data.train")
    vocabulary, order = Vocabulary.load(folder / "prepared"), pipeline.order_of(run, index)
    newest = find_checkpoint(folder / "checkpoints")
    torch.manual_seed(run.seed)
    losses = Losses(run, Model(run, len(vocabulary)), None, vocabulary.cls_id, None)
    comm = Comm()
    step = Step(run, losses, total_steps(run, order, newest), comm, torch.device("cpu"))
    state = State(0, Cursor.start(order.lanes))
    if newest is not None:
        state = load_checkpoint(newest, losses.model, step.optimizer)
        state.cursor = state.cursor.dealt_to(order)

    log = RunLog(folder, state.step) if rank == 0 else None
    known = {line["uid"]: line["reason"] for line in read_lines(folder / "dropped.jsonl")}
    if log is not None:
        log.event("leg", step=state.step, world_size=world, batch=run.batch.global_)
    lanes = pipeline.worker_lanes(order.lanes, world, rank)
    packed = pack(_blocks(run, index, vocabulary, lanes, state.cursor), lanes, run, order.rows)
    checkpoints = folder / "checkpoints"
    saver = Saver(checkpoints, run, losses.model, step.optimizer, folder / "prepared") if rank == 0 else None
    loop = Loop(run, step, state, order, comm, log, lambda: {run.eval.best: 0.0}, saver, lambda saved: None, known)
    with Prefetched(packed, 2) as stream:
        loop(stream)
    if rank == 0:
        (folder / DONE).touch()


def _blocks(run: Run, index: Index, vocabulary: Vocabulary, lanes: list[int], cursor: Cursor):
    """Both stages of the training stream, one after the other."""
    order = pipeline.order_of(run, index)
    read, make = WindowReader(index, order), BlockMaker(run, vocabulary)
    streams = [order.windows(lane, cursor.positions[lane], cursor.deals) for lane in lanes]
    windows = [next(stream) for stream in streams for _ in range(1000)]
    for together in pipeline.rounds_of(windows, order.window):
        for encoded in read.read(together):
            yield from map(table_block, make(encoded))
