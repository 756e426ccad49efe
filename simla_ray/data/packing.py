"""A worker's stream of samples -> its micro-batches, full ones only, with the place each leaves its lane at."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from simla_ray.config.schema import Run
from simla_ray.data.collate import collate
from simla_ray.data.order import Position
from simla_ray.data.sample import Sample, joined
from simla_ray.errors import UserError
from simla_ray.types import Batch


@dataclass(frozen=True)
class Dropped:
    uid: str
    reason: str
    epoch: int


@dataclass(frozen=True)
class Packed:
    """A micro-batch, the lane it belongs to and the lane's position after it.

    ``dropped`` are the rows that were packed over on the way; ``truncated`` counts captions that were cut.
    """

    batch: Batch
    lane: int
    position: Position
    dropped: list[Dropped] = field(default_factory=list)
    truncated: int = 0


def pack(blocks: Iterable[dict[str, np.ndarray]], lanes: Sequence[int], run: Run, n_rows: int) -> Iterator[Packed]:
    """Yield micro-batches of the lanes in turn, lane after lane, step after step.

    Args:
        blocks: column -> stacked values, as ``training_stream`` gives them; lanes may come interleaved in any way, rows
        of a
            lane come in its order.
        n_rows: rows of the training set.

    Raises:
        UserError: more distinct rows than ``data.max_drop_fraction`` cannot be used.
    """
    micro = run.batch.micro
    waiting: dict[int, deque] = {lane: deque() for lane in lanes}
    good = dict.fromkeys(lanes, 0)
    turn = 0
    unusable: dict[str, str] = {}
    for block in blocks:
        meta = [block[c].tolist() for c in ("lane", "epoch", "offset", "uid", "drop")]
        arrays = {n: v for n, v in block.items() if n not in ("lane", "epoch", "offset", "uid", "drop")}
        for i, (lane, epoch, offset, uid, drop) in enumerate(zip(*meta, strict=True)):
            waiting[lane].append((epoch, offset, uid, drop, None if drop else arrays, i))
            good[lane] += not drop
            if drop:
                unusable[uid] = drop
                check_drops(unusable, n_rows, run)
        while good[lanes[turn]] >= micro:
            lane = lanes[turn]
            yield _take(waiting[lane], lane, micro, run)
            good[lane] -= micro
            turn = (turn + 1) % len(lanes)


def check_drops(unusable: Mapping[str, str], n_rows: int, run: Run) -> None:
    """Stop a run whose data are not what its owner thinks.

    Args:
        unusable: uid -> reason.
    """
    if len(unusable) > run.data.max_drop_fraction * n_rows:
        counts = Counter(unusable.values()).most_common()
        raise UserError(
            f"data.max_drop_fraction: {len(unusable)} of {n_rows} training rows cannot be used "
            f"({', '.join(f'{reason} {n}' for reason, n in counts)}; first {next(iter(unusable))}), "
            f"more than the allowed {run.data.max_drop_fraction}"
        )


def _take(waiting: deque, lane: int, micro: int, run: Run) -> Packed:
    runs: list[tuple[Sample, int, int]] = []
    uids, epochs, dropped = [], [], []
    while len(uids) < micro:
        epoch, offset, uid, drop, arrays, i = waiting.popleft()
        if drop:
            dropped.append(Dropped(uid, drop, epoch))
            continue
        if runs and runs[-1][0] is arrays and runs[-1][2] == i:
            runs[-1] = arrays, runs[-1][1], i + 1
        else:
            runs.append((arrays, i, i + 1))
        uids.append(uid)
        epochs.append(epoch)
    samples = joined(runs)
    return Packed(
        collate(samples, run, uids, epochs), lane, Position(epoch, offset + 1), dropped, int(samples["truncated"].sum())
    )
