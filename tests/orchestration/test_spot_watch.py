"""The watcher against a metadata service on loopback and a stand-in for the ``ray`` command."""

import json
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from simla_ray.orchestration import spot_watch
from simla_ray.orchestration.spot_watch import Metadata, Notice, drain_until, local_node_id


class Service(ThreadingHTTPServer):
    """Answers as the metadata service does: 401 without a valid token, 404 without a notice."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.notice, self.fails, self.redirect = None, 0, None
        self.tokens, self.requests = set(), []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def announce(self, seconds: float) -> None:
        at = datetime.fromtimestamp(time.time() + seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.notice = json.dumps({"action": "terminate", "time": at})


class Answers(BaseHTTPRequestHandler):
    server: Service

    def do_PUT(self):
        if self.path != "/latest/api/token" or "X-aws-ec2-metadata-token-ttl-seconds" not in self.headers:
            return self._answer(400, "")
        token = f"token-{len(self.server.requests)}"
        if self._available("PUT"):
            self.server.tokens.add(token)
            self._answer(200, token)

    def do_GET(self):
        if not self._available("GET"):
            return
        if self.server.redirect:
            self._answer(302, "", Location=self.server.redirect)
        elif self.headers.get("X-aws-ec2-metadata-token") not in self.server.tokens:
            self._answer(401, "")
        elif self.path != "/latest/meta-data/spot/instance-action" or self.server.notice is None:
            self._answer(404, "")
        else:
            self._answer(200, self.server.notice)

    def _available(self, method) -> bool:
        self.server.requests.append((method, self.path))
        if self.server.fails > 0:
            self.server.fails -= 1
            self._answer(503, "")
            return False
        return True

    def _answer(self, code, text, **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(text), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def service():
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def ray_command(tmp_path):
    """A stand-in for ``ray``: writes its arguments down, and fails as often as the file ``fails`` says."""
    script = tmp_path / "ray"
    script.write_text(
        f"""#!{sys.executable}
import json, pathlib, sys
folder = pathlib.Path({str(tmp_path)!r})
with (folder / "calls").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
fails = folder / "fails"
left = int(fails.read_text()) if fails.exists() else 0
if left:
    fails.write_text(str(left - 1))
    sys.exit("Error: the GCS is away")
"""
    )
    script.chmod(0o755)
    return script


def calls(command) -> list[list[str]]:
    path = command.with_name("calls")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def start(service, command, *more) -> subprocess.Popen:
    arguments = ["--metadata", service.url, "--poll-s", "0.1", "--ray", str(command), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "simla_ray.orchestration.spot_watch", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_until(true, what):
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def argument(call, name):
    return call[call.index(name) + 1]


def test_drains_once_with_the_seconds_that_are_left(service, ray_command):
    watcher = start(service, ray_command, "--node-id", "ab" * 28)
    wait_until(lambda: len(service.requests) > 4, "it polls")
    assert calls(ray_command) == []
    service.announce(100)
    out, _ = watcher.communicate(timeout=20)
    assert watcher.returncode == 0, out
    (call,) = calls(ray_command)
    assert call[0] == "drain-node"
    assert argument(call, "--node-id") == "ab" * 28
    assert argument(call, "--reason") == "DRAIN_NODE_REASON_PREEMPTION"
    assert argument(call, "--reason-message").startswith("terminate at 20")
    assert 90 <= int(argument(call, "--deadline-remaining-seconds")) <= 100
    assert "--address" not in call
    assert [line.split(": ", 1)[0].split()[1] for line in out.splitlines()] == ["spot_watch"] * 3, out


def test_a_drain_that_fails_is_tried_again(service, ray_command):
    ray_command.with_name("fails").write_text("2")
    service.announce(100)
    watcher = start(service, ray_command, "--node-id", "ab" * 28, "--address", "10.0.0.1:6379")
    out, _ = watcher.communicate(timeout=20)
    assert watcher.returncode == 0, out
    left = [int(argument(call, "--deadline-remaining-seconds")) for call in calls(ray_command)]
    assert len(left) == 3 and left == sorted(left, reverse=True) and left[0] > left[2], left
    assert {argument(call, "--address") for call in calls(ray_command)} == {"10.0.0.1:6379"}
    assert out.count("drain failed") == 2 and "the GCS is away" in out


def test_trouble_of_the_metadata_service_is_survived_and_said_once(service, ray_command):
    service.fails = 6
    watcher = start(service, ray_command, "--node-id", "ab" * 28)
    wait_until(lambda: service.fails == 0 and len(service.requests) > 9, "it goes on")
    service.tokens.clear()  # as after a restart of the service: 401, then a new token
    wait_until(lambda: service.tokens, "a new token")
    service.announce(60)
    out, _ = watcher.communicate(timeout=20)
    assert watcher.returncode == 0 and len(calls(ray_command)) == 1, out
    assert out.count("503") == 1 and out.count("answers again") == 2, out


def test_a_service_that_is_not_there(ray_command):
    with Service() as closed:
        url = closed.url
    with pytest.raises(OSError):
        Metadata(url).notice()


def test_one_token_serves_many_looks_and_is_renewed(service, monkeypatch):
    metadata = Metadata(service.url)
    assert [metadata.notice() for _ in range(5)] == [None] * 5
    assert [method for method, _ in service.requests] == ["PUT"] + ["GET"] * 5
    now = time.monotonic()
    monkeypatch.setattr(spot_watch.time, "monotonic", lambda: now + spot_watch.TOKEN_S / 2 + 1)
    metadata.notice()
    assert [method for method, _ in service.requests][-2:] == ["PUT", "GET"]


@pytest.mark.parametrize("text", ["", "soon", "[]", "{}", '{"action": "terminate", "time": 5}'])
def test_an_answer_that_is_no_notice(service, text):
    service.notice = text
    with pytest.raises(ValueError, match="not a notice"):
        Metadata(service.url).notice()


def test_no_other_address_is_contacted(service, monkeypatch):
    """Neither a proxy of the environment nor a redirect leads elsewhere."""
    with Service() as elsewhere:
        thread = threading.Thread(target=elsewhere.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        monkeypatch.setenv("http_proxy", elsewhere.url)
        monkeypatch.delenv("no_proxy", raising=False)
        assert Metadata(service.url).notice() is None
        service.redirect = elsewhere.url
        with pytest.raises(OSError, match="302"):
            Metadata(service.url).notice()
        elsewhere.shutdown()
        thread.join()
        assert elsewhere.requests == []


def test_the_notice(service):
    service.announce(120)
    notice = Metadata(service.url).notice()
    assert notice == Notice("terminate", notice.at) and 118 <= notice.at - time.time() <= 120


def test_drain_gives_up_when_the_time_is_up():
    said = []

    def fails(seconds):
        raise subprocess.TimeoutExpired("ray", 1)

    assert not drain_until(time.time() + 0.3, fails, said.append, every_s=0.1)
    assert said[-1] == "the time is up and the node was not drained" and len(said) >= 3


def test_drain_now(ray_command):
    assert spot_watch.main(["--drain-now", "90", "--ray", str(ray_command), "--node-id", "ab" * 28]) == 0
    assert int(argument(calls(ray_command)[0], "--deadline-remaining-seconds")) in (89, 90)


def test_local_node_id(tmp_path):
    def process(pid, *words):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_bytes("\0".join(words).encode() + b"\0")

    process(1, "/sbin/init")
    process(20, "/usr/bin/python3", "--node_id=nobody")
    with pytest.raises(LookupError, match="0 Ray nodes"):
        local_node_id(tmp_path)
    process(21, "/venv/ray/core/src/ray/raylet/raylet", "--raylet_socket_name=/tmp/x", "--node_id=cafe")
    assert local_node_id(tmp_path) == "cafe"
    process(22, "/venv/ray/core/src/ray/raylet/raylet", "--node_id=beef")
    with pytest.raises(LookupError, match="2 Ray nodes"):
        local_node_id(tmp_path)


def test_starts_without_ray_and_torch():
    code = "import sys, simla_ray.orchestration.spot_watch; print({'ray', 'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
