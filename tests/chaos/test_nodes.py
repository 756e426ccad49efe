"""Nodes that come and go under a run: it takes what is there, its losses do not tell, and no sample is lost."""

import http.server
import json
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.chaos.machines import cluster
from tests.chaos.test_faults import every_sample_once
from tests.chaos.test_group import Group, overrides, write_rows
from tests.chaos.test_runs import Run

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.timeout(1800)]

EPOCHS = 4
#: A worker takes two CPUs of a node of three, so there is one on each; the third CPU makes samples.
ELASTIC = [
    "ray.min_workers=1", "ray.cpus_per_worker=2", "checkpoint.every_steps=40", "log.every_steps=5",
    f"optim.epochs={EPOCHS}",
]  # fmt: skip


class Metadata(http.server.BaseHTTPRequestHandler):
    """A spot instance's metadata service; ``gone_at`` is when it will be taken."""

    gone_at: float | None = None

    def do_PUT(self):
        self.answer("token")

    def do_GET(self):
        if self.gone_at is None:
            self.send_error(404)
        else:
            at = datetime.fromtimestamp(self.gone_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            self.answer(json.dumps({"action": "terminate", "time": at}))

    def answer(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def metadata():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    Metadata.gone_at = None


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    return folder / "a.parquet", write_rows(folder / "a.parquet", "a", 10_000, 100)


def test_exactly_once_while_nodes_are_lost_added_and_drained(data, metadata, tmp_path):
    """2 workers, then 1 because a node dies, 2 because one comes, 1 because it gets a spot notice."""
    with cluster(tmp_path, 1, 3, 3) as machines:
        run = Run(tmp_path, "run", [*overrides(data[0]), *ELASTIC], machines.address)
        driver = run.begin(2)
        run.reach(driver, 60)
        _, second = machines.nodes
        machines.remove_node(second, allow_graceful=False)
        run.until(driver, lambda: run.legs() == 2)
        run.reach(driver, run.events("resume")[-1]["step"] + 30)

        third = machines.add_node(num_cpus=3)
        run.until(driver, lambda: run.legs() == 3)
        run.reach(driver, run.events("resume")[-1]["step"] + 30)

        watch = subprocess.Popen(
            [
                sys.executable, "-m", "simla_ray.orchestration.spot_watch", "--metadata", metadata, "--poll-s", "1",
                "--node-id", third.node_id, "--address", machines.address,
                "--ray", str(Path(sys.executable).with_name("ray")),
            ],
            env=run.environment,
        )  # fmt: skip
        told = time.time()
        Metadata.gone_at = told + 120
        run.until(driver, lambda: run.legs() == 4)
        assert watch.wait(30) == 0
        run.finish(driver)
        events = run.events("start", "resume", "notice")
        assert [e["world_size"] for e in events if "world_size" in e] == [2, 1, 2, 1]
        lost, grown, moved = run.events("resume")
        assert "worker" in lost["reason"] and lost["lost_steps"] <= 40 + 5
        assert grown["reason"] == "the group takes another size" and grown["lost_steps"] <= 40 + 5
        (notice,) = run.events("notice")
        assert moved["lost_steps"] == 0
        assert moved["reason"] in ("nodes of workers [0] go", "nodes of workers [1] go")  # as Ray ranks them
        assert notice["time"] - told < 15
        every_sample_once(run, data[1], epochs=EPOCHS)

    calm = Group(tmp_path / "calm", [*overrides(data[0]), *ELASTIC], run.folder / "prepared")
    calm.until_killed(1, moved["step"] + 20)
    ours, theirs = run.losses(), calm.losses()
    for event in (lost, grown, moved):
        for step in range(event["step"], event["step"] + 20):
            assert ours[step] == pytest.approx(theirs[step], rel=1e-4), step
