"""Where a run stands: everything beside the weights that a checkpoint must bring back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from simla_ray.data.cursor import Cursor


@dataclass
class State:
    """``step`` updates are done; the weights have consumed exactly what ``cursor`` says.

    ``total`` steps were planned, with micro-batches of ``micro`` pairs; ``samples`` are those of all steps. Batch sizes
    may change between two legs. ``score`` is that of this step's validation, None where none was made.

    There is no random state to keep: every draw derives from (seed, epoch, uid) or (seed, step, micro-batch).
    """

    step: int
    cursor: Cursor
    total: int = 0
    micro: int = 0
    samples: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    best_step: int = 0
    best_score: float | None = None
    best_metric: str = ""
    score: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"cursor": self.cursor.to_json()}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> State:
        return cls(**(stored | {"cursor": Cursor.from_json(stored["cursor"])}))
