"""What a check is, and what it is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from simla_ray.config.schema import Run
from simla_ray.errors import UserError
from simla_ray.orchestration.preflight.footprint import Footprint
from simla_ray.orchestration.preflight.nodes import Node
from simla_ray.orchestration.preflight.probes import Answers
from simla_ray.orchestration.preflight.trial import Trial


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. ``miss`` and ``warning`` are whole lines: key, what was found, needed, remedy."""

    what: str
    found: str
    needed: str = ""
    miss: str = ""
    warning: str = ""

    def line(self) -> str:
        """Of something that is no miss."""
        if self.warning:
            return f"warning    {self.warning}"
        return f"ready      {self.what}: {self.found}" + (f" (needs {self.needed})" if self.needed else "")


@dataclass(frozen=True)
class Case:
    """What is judged.

    Args:
        own: the one node is this machine, with a Ray of its own.
        gpu: workers get a GPU each.
        driver: what the driver's process sees of its machine; where nodes are asked, what they are compared with.
        storage: free bytes where the runs are.
        files: how many every node was asked to read.
        trials: of a step, by the machine's name.
        samples_per_s: that one CPU of the driver's machine makes.
        resumes: the run has checkpoints already.
    """

    run: Run
    nodes: Sequence[Node]
    own: bool
    gpu: bool
    driver: Answers
    storage: int
    footprint: Footprint
    files: int = 0
    trials: Mapping[str, Trial] = field(default_factory=dict)
    samples_per_s: float | None = None
    resumes: bool = False

    @property
    def heard(self) -> list[tuple[Node, Answers]]:
        return [(node, node.answers) for node in self.nodes if node.answers is not None]


def require(checks: Iterable[Check]) -> None:
    """Raise all that is missing at once.

    Raises:
        UserError: a line for each miss.
    """
    if misses := [check.miss for check in checks if check.miss]:
        raise UserError("\n".join(misses))


def listed(by_name: Mapping[str, str]) -> str:
    """Nodes with what each of them has, those of one kind together."""
    names: dict[str, list[str]] = {}
    for name, what in by_name.items():
        names.setdefault(what, []).append(name)
    return ", ".join(f"{what} on {', '.join(where)}" for what, where in names.items())


def count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def size(n: float) -> str:
    """Bytes, for a reader."""
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
