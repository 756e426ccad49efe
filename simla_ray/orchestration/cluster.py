"""Joining a Ray cluster, or starting one of our own."""

from __future__ import annotations

import os
from dataclasses import dataclass

import ray
import torch

from simla_ray.config.schema import Device, Run
from simla_ray.data.pipeline import connect
from simla_ray.errors import UserError


@dataclass(frozen=True)
class Cluster:
    """What was joined. ``own``: a Ray of this process, which ends with it."""

    own: bool
    address: str
    nodes: int
    cpus: float
    gpus: float
    dashboard: str | None

    def line(self) -> str:
        """The first line a run prints."""
        kind = "a Ray of its own on this machine" if self.own else f"the Ray cluster at {self.address}"
        has = f"{self.nodes} node{'s' * (self.nodes != 1)}, {self.cpus:g} CPUs, {self.gpus:g} GPUs"
        return f"cluster    {kind}: {has}" + (f"; dashboard http://{self.dashboard}" if self.dashboard else "")


def join(run: Run, runs: int = 1) -> Cluster:
    """Connect to ``ray.address``, else to RAY_ADDRESS, else start a local Ray.

    A local Ray listens on loopback and gets as many logical CPUs as workers, decoding tasks and the controller ask for:
    on a small machine they share the real ones.

    Args:
        runs: how many like this go at a time.

    Raises:
        UserError: no cluster at the address.
    """
    address = joins(run)
    if address is None:
        check_local_devices(run)
    try:
        dashboard = connect(
            address, runs * (run.ray.workers * run.ray.cpus_per_worker + run.data.decode_cpus) + 1 + runs / 8
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address is None:
            raise
        raise UserError(f"ray.address: no cluster at {address} ({str(error).splitlines()[0]})") from None
    resources = ray.cluster_resources()
    return Cluster(
        own=address is None,
        address=address or "local",
        nodes=len([n for n in ray.nodes() if n["Alive"]]),
        cpus=resources.get("CPU", 0),
        gpus=resources.get("GPU", 0),
        dashboard=dashboard or None,
    )


def joins(run: Run) -> str | None:
    """Address of the cluster a run joins; None: a Ray of its own."""
    return run.ray.address or os.environ.get("RAY_ADDRESS")


def uses_gpu(run: Run, gpus: float) -> bool:
    """Whether workers get a GPU each."""
    return run.ray.device is Device.gpu or (
        run.ray.device is Device.auto and gpus >= (run.ray.min_workers or run.ray.workers)
    )


def room_for(run: Run, gpu: bool) -> str:
    """What a run's workers need to start, and how much of it is free."""
    least, most, each = run.ray.min_workers, run.ray.workers, run.ray.cpus_per_worker
    asked = f"{most if least in (None, most) else f'{least} to {most}'} worker{'s' * (most != 1)}"
    text = f"{asked} of {each:g} CPU{'s' * (each != 1)}{' and 1 GPU' * gpu} each to start"
    try:
        free, there = ray.available_resources(), ray.cluster_resources()
        nodes = len([n for n in ray.nodes() if n["Alive"]])
    except (ray.exceptions.RayError, RuntimeError, ConnectionError):  # the cluster's head is busy, or goes away
        return text
    parts = [f"{free.get(kind, 0):g} of {there.get(kind, 0):g} {kind}s" for kind in ("CPU", *["GPU"] * gpu)]
    return f"{text}; free on {nodes} node{'s' * (nodes != 1)}: {' and '.join(parts)}"


def check_local_devices(run: Run) -> None:
    """Without starting anything: does this machine have the GPUs that ``ray.device: gpu`` asks for?"""
    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if run.ray.device is Device.gpu and have < run.ray.workers:
        raise UserError(
            f"ray.device: gpu, but this machine has {have} usable GPUs for {run.ray.workers} workers; use cpu"
        )
