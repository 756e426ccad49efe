"""Placement groups that a dead controller left: given back; used, fresh and other jobs' ones: left alone."""

import time

import pytest
import ray

from simla_ray.orchestration import reclaim as room
from simla_ray.orchestration.reclaim import UNUSED_S, reclaim, reclaiming

pytestmark = pytest.mark.ray

KEPT = {"CPU": 0.1}


class Controller:
    """As Ray Train's: reserves a group, and starts its workers or dies before."""

    def reserve(self, cpus: float, start: bool) -> str:
        from ray.util import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = placement_group([{"CPU": cpus}])
        ray.get(group.ready())
        if start:
            where = PlacementGroupSchedulingStrategy(group)
            self.worker = ray.remote(num_cpus=cpus)(Worker).options(scheduling_strategy=where).remote()
            ray.get(self.worker.up.remote())
        return group.id.hex()


class Worker:
    def up(self) -> bool:
        return True


@pytest.fixture
def groups(ray_session):
    """Groups of controllers: with workers, dead before they had any, and one of Tune's."""
    actors = [ray_session.remote(num_cpus=0)(Controller).remote() for _ in range(3)]
    what = (("used", 1.0, True), ("left", 1.0, False), ("tune", KEPT["CPU"], False))
    found = {
        name: ray_session.get(actor.reserve.remote(cpus, start))
        for actor, (name, cpus, start) in zip(actors, what, strict=True)
    }
    ray_session.kill(actors[1])
    yield found
    for actor in (actors[0], actors[2]):
        ray_session.kill(actor)
    for group in found.values():
        room.remove_placement_group(room.PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))


def states(groups: dict[str, str]) -> dict[str, str]:
    table = room.placement_group_table()
    return {name: table[group]["state"] for name, group in groups.items()}


def until(true, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_only_what_nobody_used_for_a_while_is_given_back(groups):
    left = groups["left"]
    until(lambda: f"CPU_group_{left}" in ray.available_resources())
    since: dict[str, float] = {}
    assert reclaim(since, KEPT, 100.0) == {} and since == {left: 100.0}
    assert reclaim(since, KEPT, 99.0 + UNUSED_S) == {}
    free = ray.available_resources()["CPU"]
    assert reclaim(since, KEPT, 100.0 + UNUSED_S) == {left: {"CPU": 1.0}}
    until(lambda: ray.available_resources()["CPU"] == free + 1)
    assert states(groups) == {"used": "CREATED", "left": "REMOVED", "tune": "CREATED"}
    assert reclaim(since, KEPT, 101.0 + UNUSED_S) == {} and since == {}


def test_a_group_that_came_into_use_begins_anew(groups):
    since = {groups["used"]: 0.0}
    assert reclaim(since, KEPT, 10 * UNUSED_S) == {} and groups["used"] not in since


def test_other_jobs_groups_are_not_ours(groups, monkeypatch):
    monkeypatch.setattr(
        room.ray, "get_runtime_context", lambda: type("Of", (), {"get_job_id": lambda self: "ff000000"})()
    )
    assert reclaim({groups["left"]: 0.0}, KEPT, 10 * UNUSED_S) == {}
    assert states(groups)["left"] == "CREATED"


def test_what_was_given_back_is_said(groups, monkeypatch):
    monkeypatch.setattr(room, "LOOK_S", 0.05)
    monkeypatch.setattr(room, "UNUSED_S", 0.2)
    said: list[str] = []
    with reclaiming(said.append, KEPT):
        until(lambda: said)
    assert said == [f"reclaimed  1 CPU: reserved for workers whose run had ended ({groups['left']})"]
    assert states(groups) == {"used": "CREATED", "left": "REMOVED", "tune": "CREATED"}
