"""Machines for runs that are hurt from outside: a cluster of several nodes on this one, and broken disks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

#: Makes the gradients of the steps that a file names not finite, in whatever process imports the step.
POISON = textwrap.dedent(
    """
    import importlib.abc, importlib.util, os, pathlib, sys


    class Poison(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "simla_ray.training.step":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                update = module.Step._update

                def poisoned(self):
                    file = pathlib.Path(os.environ["POISON_FILE"])
                    if file.exists() and self.number in map(int, file.read_text().split()):
                        for parameter in self.model.parameters():
                            if parameter.grad is not None:
                                parameter.grad.fill_(float("nan"))
                    return update(self)

                call = module.Step.__call__

                def numbered(self, step, batches):
                    self.number = step + 1
                    return call(self, step, batches)

                module.Step._update, module.Step.__call__ = poisoned, numbered

            spec.loader.exec_module = exec_module
            return spec


    if "POISON_FILE" in os.environ:
        sys.meta_path.insert(0, Poison())
    """
)


@contextmanager
def cluster(folder: Path, head_cpus: int, *nodes: int) -> Iterator:
    """A Ray cluster of separate nodes; its processes poison the steps that ``folder / 'poison'`` names."""
    from ray.cluster_utils import Cluster

    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(POISON)
    environment = {
        "RAY_AUTH_MODE": "disabled", "POISON_FILE": str(folder / "poison"),
        "PYTHONPATH": os.pathsep.join([str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": head_cpus, "include_dashboard": False})
        try:
            started.nodes = [started.add_node(num_cpus=cpus) for cpus in nodes]
            yield started
        finally:
            started.shutdown()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@contextmanager
def small_disk(folder: Path, image: Path) -> Iterator[Path]:
    """A file system of its own in a file of 64 MiB, which ``stall`` and ``fill`` may hurt."""
    if shutil.which("fsfreeze") is None or shutil.which("mkfs.ext4") is None:
        pytest.skip("no fsfreeze or mkfs.ext4")
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    mounted(["mount", "-o", "loop", str(image), str(folder)])
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def stall(disk: Path, seconds: float) -> None:
    """Hold up whoever writes to a disk of its own."""
    subprocess.run(["fsfreeze", "--freeze", str(disk)], check=True)
    try:
        time.sleep(seconds)
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Leave no room on a disk of its own; gives the file to remove."""
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            try:
                ballast.write(bytes(1 << 16))
            except OSError:
                return disk / "ballast"


def damage_newest(checkpoints: Path) -> Path:
    """Turn one bit of the newest checkpoint's weights; gives its folder."""
    newest = max(checkpoints.glob("step-*"))
    with (newest / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    return newest


def mounted(command: list[str]) -> None:
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("only root can mount a file system")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
