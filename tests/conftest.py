"""Shared fixtures: one Ray for the whole session, one small built-in world on disk."""

import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
# For stores that tests start on loopback; workers of the shared Ray inherit them.
os.environ.setdefault("AWS_ACCESS_KEY_ID", "testing")
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "testing")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import simla_ray.models  # noqa: F401  before transformers: makes it importable beside a CPU-only torch
from simla_ray.data import world
from simla_ray.data.index import build_index
from simla_ray.data.text import build_vocabulary, clean

WORLD = {"train": 96, "val": 48, "test": 48}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("chaos") or item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.slow)  # needs more than ten seconds, or is not for every machine
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny matrices are slower on more threads, and scattered additions come in any order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ray_session():
    """A local Ray with a few logical CPUs, shared by all tests that need one."""
    import ray

    from simla_ray.data import pipeline

    logging.getLogger("ray").setLevel(logging.ERROR)
    for attempt in (1, 2):  # the raylet has 30 s to come up; under load the first try may miss it
        try:
            # Not only on loopback: commands join it, and Ray takes them to the machine's address.
            with pipeline.known_at(ray.util.get_node_ip_address()):
                ray.init(
                    address="local", num_cpus=6, include_dashboard=False, log_to_driver=False,
                    logging_level=logging.ERROR,
                )  # fmt: skip
            break
        except Exception:
            ray.shutdown()
            if attempt == 2:
                raise
    pipeline.quiet()
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def world_rows():
    """Rows of a small world by split."""
    return {
        split: [world.make_row(0, split, i, 48, 3 if split == "train" else 1) for i in range(n)]
        for split, n in WORLD.items()
    }


@pytest.fixture(scope="session")
def world_files(tmp_path_factory, world_rows) -> Path:
    """The same rows as Parquet files, row groups of 16: train.parquet, val.parquet, test.parquet."""
    folder = tmp_path_factory.mktemp("world")
    for split, rows in world_rows.items():
        pq.write_table(pa.Table.from_pylist(rows, schema=world.SCHEMA), folder / f"{split}.parquet", row_group_size=16)
    return folder


@pytest.fixture(scope="session")
def world_index(world_files):
    return build_index([str(world_files / "train.parquet")], None, [], "data.train")


@pytest.fixture(scope="session")
def vocabulary(world_rows):
    from simla_ray.config.load import load_run

    captions = [clean(c, 30) for row in world_rows["train"] for c in row["captions"]]
    return build_vocabulary(captions, load_run().text)
