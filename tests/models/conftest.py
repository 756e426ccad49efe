import pytest
import torch

import simla_ray.models  # noqa: F401  before transformers: makes it importable beside a CPU-only torch


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
