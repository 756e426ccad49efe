"""Nodes that come and go under a run: it takes what is there, and its losses do not tell."""

import pytest

from tests.chaos.test_group import write_rows

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(1200)]

EPOCHS = 3
#: A worker takes two CPUs of a node of three; the third makes samples.
ELASTIC = ("ray.min_workers=1", "ray.cpus_per_worker=2", "checkpoint.every_steps=50")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    return folder / "a.parquet", write_rows(folder / "a.parquet", "a", 40_000, 400)
