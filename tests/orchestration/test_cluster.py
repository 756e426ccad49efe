"""What is said of the cluster that a run has joined."""

import pytest
import ray

from simla_ray.config.load import load_run
from simla_ray.orchestration.cluster import room_for


@pytest.mark.ray
@pytest.mark.parametrize(
    ("overrides", "gpu", "said"),
    [
        (["ray.workers=1", "ray.cpus_per_worker=0.5"], False, "1 worker of 0.5 CPUs each to start; "),
        (["ray.workers=2", "ray.cpus_per_worker=1"], True, "2 workers of 1 CPU and 1 GPU each to start; "),
        (
            ["ray.workers=4", "ray.min_workers=2", "ray.cpus_per_worker=8", "data.decode_cpus=4"],
            False,
            "2 to 4 workers of 8 CPUs each ",
        ),
    ],
)
def test_what_workers_wait_for(ray_session, overrides, gpu, said):
    text = room_for(load_run(overrides=["size=tiny", "batch.global=64", "batch.micro=16", *overrides]), gpu)
    has = f"{ray.cluster_resources()['CPU']:g}"
    assert text.startswith(said), text
    assert "free on 1 node: " in text and f" of {has} CPUs" in text and text.endswith("0 of 0 GPUs") == gpu


def test_a_head_that_does_not_answer_is_no_reason_to_end(monkeypatch):
    def lost():
        raise ray.exceptions.RaySystemError("gone")

    monkeypatch.setattr(ray, "available_resources", lost)
    assert room_for(load_run(overrides=["ray.workers=2", "ray.cpus_per_worker=1"]), False) == (
        "2 workers of 1 CPU each to start"
    )
