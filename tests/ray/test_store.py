"""A whole run whose shards lie in a store on loopback, which throttles: trained, killed, resumed, as from disk."""

import http.client
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from simla_ray.jsonl import read_lines

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
STEPS = 14
THROTTLED = 7  # every so many reads


class Throttling(http.server.BaseHTTPRequestHandler):
    """Hands requests on to the store; answers some of the reads with "slow down"."""

    protocol_version = "HTTP/1.1"
    store: tuple[str, int]
    reads = 0
    refused = 0

    def do_GET(self):
        cls = type(self)
        cls.reads += 1
        if cls.reads % THROTTLED == 0:
            cls.refused += 1
            self._answer(503, {}, b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>")
            return
        self._forward()

    def do_HEAD(self):
        self._forward()

    def _forward(self):
        connection = http.client.HTTPConnection(*self.store)
        connection.request(self.command, self.path, headers=dict(self.headers))
        answer = connection.getresponse()
        headers = {k: v for k, v in answer.getheaders() if k.lower() not in ("transfer-encoding", "connection", "date")}
        self._answer(answer.status, headers, answer.read())

    def _answer(self, status, headers, body):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def store(world_files):
    """Options of a URI, and who counts the reads."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
    client.create_bucket(Bucket="pairs")
    for name in ("train", "val"):
        client.upload_file(str(world_files / f"{name}.parquet"), "pairs", f"shards/{name}.parquet")
    handler = type("Handler", (Throttling,), {"store": (host, port)})
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield f"?endpoint_override=127.0.0.1:{proxy.server_port}&scheme=http&region=us-east-1", handler
    proxy.shutdown()
    server.stop()


def command(train: str, val: str, storage: Path, name: str) -> list[str]:
    return [
        sys.executable, str(ROOT / "experiments" / "pretrain.py"), f"name={name}", f"storage={storage}",
        f"data.train=[{json.dumps(train)}]", f"data.val=[{json.dumps(val)}]", "data.shuffle_window=40",
        "batch.micro=8", "batch.global=16", "vision.width=32", "text.width=32", "text.ffn=64", "joint_width=16",
        "codes.n=16", "codes.fit_images=40", f"optim.max_steps={STEPS}", "checkpoint.every_steps=4",
        "eval.every_steps=100", "eval.batches=2", "eval.pairs=24", "eval.rerank_top_k=4", "log.every_steps=1",
        "queue=32", "ray.device=cpu", "data.audit=true",
    ]  # fmt: skip


def losses(folder: Path) -> list[dict]:
    return [line["losses"] for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "train"]


def test_trained_killed_and_resumed_from_a_store_exactly_once(ray_session, store, world_files, tmp_path):
    options, handler = store
    environment = os.environ | {"RAY_ADDRESS": ray_session.get_runtime_context().gcs_address}
    uris = [f"s3://pairs/shards/{name}.parquet{options}" for name in ("train", "val")]
    from_store = command(*uris, tmp_path, "store")
    driver = subprocess.Popen(
        from_store, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    folder, deadline = tmp_path / "store", time.monotonic() + 240
    while time.monotonic() < deadline and driver.poll() is None and len(losses(folder)) < 6:
        time.sleep(0.02)
    assert driver.poll() is None, "the run ended before it could be killed"
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(3)  # the cluster notices that the driver is gone and ends its workers

    again = subprocess.run(from_store, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert [e["event"] for e in read_lines(folder / "events.jsonl")].count("resume") == 1
    from_disk = command(*(str(world_files / f"{name}.parquet") for name in ("train", "val")), tmp_path, "disk")
    subprocess.run(from_disk, env=environment, capture_output=True, check=True, timeout=300)
    assert losses(folder) == losses(tmp_path / "disk")
    key = lambda line: (line["step"], line["lane"], line["epoch"], line["uid"])  # noqa: E731
    ours, theirs = (read_lines(f / "consumed.jsonl") for f in (folder, tmp_path / "disk"))
    assert sorted(map(key, ours)) == sorted(map(key, theirs))
    assert len({(line["epoch"], line["uid"]) for line in ours}) == len(ours) == 16 * STEPS
    assert handler.refused > 3
