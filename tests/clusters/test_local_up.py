"""``ray up`` of local.yaml through an sshd, on a machine made of a network namespace: a real head, runs and ports."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.clusters.own_machine import ADDRESS, ROOT, cluster_file, listening, machine, missing, probe
from tests.clusters.test_monitoring import documented

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.ray,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
DASHBOARD = "http://127.0.0.1:8265"
PRETRAIN = "python experiments/pretrain.py optim.max_steps=20"
#: Gathers the names of our gauges while runs come and go, until it is ended.
GATHER = """
import pathlib, re, sys, time, urllib.request
opener, seen = urllib.request.build_opener(urllib.request.ProxyHandler({})), {}
while True:
    try:
        text = opener.open(sys.argv[1], timeout=5).read().decode()
        for name, run in re.findall(r'^ray_simla_(\\w+)\\{[^}]*run="([^"]+)"', text, re.MULTILINE):
            seen.setdefault(run, set()).add(name)
        lines = [f"{run} {name}" for run, names in seen.items() for name in sorted(names)]
        pathlib.Path(sys.argv[2]).write_text("\\n".join(lines))
    except OSError:
        pass
    time.sleep(1)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The machine, with ``file`` (the cluster's), ``gauges`` (where the names of gauges are gathered)."""
    folder = tmp_path_factory.mktemp("own")
    with machine(folder) as made:
        made.file, made.gauges = cluster_file(made, cpus=6), folder / "gauges"
        done = made.run("ray", "up", str(made.file), "-y", "--no-config-cache", timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        gather = [sys.executable, "-c", GATHER, f"http://{ADDRESS}:8080/metrics", str(made.gauges)]
        subprocess.Popen(made.command(*gather))  # ends with the machine
        yield made


@pytest.fixture(scope="module")
def by_exec(cluster) -> str:
    """Name of a run started by ``ray exec``. While it trains, ``cluster.ports`` and ``cluster.answers`` are noted."""
    with (cluster.folder / "exec.log").open("w") as log:
        command = cluster.command("ray", "exec", str(cluster.file), PRETRAIN)
        process = subprocess.Popen(command, env=cluster.env, cwd=ROOT, stdout=log, stderr=log)
    end = time.monotonic() + 600
    while process.poll() is None and not list(cluster.home.glob("simla_ray/runs/*/metrics.jsonl")):
        assert time.monotonic() < end
        time.sleep(1)
    cluster.ports = listening(cluster)
    cluster.answers = probe(cluster, sorted(cluster.ports))
    assert process.wait(timeout=600) == 0, Path(log.name).read_text()
    return finished(Path(log.name).read_text())


@pytest.fixture(scope="module")
def by_job(cluster, by_exec) -> str:
    """Name of a run started by ``ray job submit``, as clusters/README.md says."""
    submit = ["ray", "job", "submit", "--address", DASHBOARD, "--"]
    command = ["sh", "-c", f"cd ~/simla_ray && {PRETRAIN}"]
    done = cluster.run(*submit, *command, timeout=600, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=cluster.token())
    assert done.returncode == 0, done.stdout + done.stderr
    return finished(done.stdout)


def finished(out: str) -> str:
    """Name of the run that was printed, which said that it joined this cluster."""
    out = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert re.search(rf"cluster    the Ray cluster at \S+: 1 node, 6 CPUs, 0 GPUs; dashboard {DASHBOARD}", out), out
    return re.findall(r"report     runs/([\w.-]+)/report\.html", out)[-1]


def rest(cluster, path, token=None):
    """Status and body of the dashboard's REST API."""
    header = f"Authorization: Bearer {token or cluster.token()}"
    done = cluster.run("curl", "-s", "-w", "\n%{http_code}", "-H", header, DASHBOARD + path)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


def test_both_commands_train(cluster, by_exec, by_job):
    assert by_exec != by_job
    for name in (by_exec, by_job):
        folder = cluster.home / "simla_ray" / "runs" / name
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 21))
        assert json.loads((folder / "summary.json").read_text())["name"] == name


def test_dashboard_shows_runs_and_jobs(cluster, by_exec, by_job):
    status, body = rest(cluster, "/api/train/v2/runs/v1")
    runs = json.loads(body)["train_runs"]
    assert status == 200 and len(runs) == 2 and {run["status"] for run in runs} == {"FINISHED"}, body
    status, body = rest(cluster, "/api/jobs/")
    jobs = json.loads(body)
    assert status == 200
    (submitted,) = [job for job in jobs if job["type"] == "SUBMISSION"]
    assert submitted["status"] == "SUCCEEDED" and PRETRAIN in submitted["entrypoint"]
    assert any(job["type"] == "DRIVER" and "pretrain.py" in job["entrypoint"] for job in jobs)


def test_gauges_are_the_documented_ones(cluster, by_exec, by_job):
    seen: dict[str, set[str]] = {}
    for line in cluster.gauges.read_text().splitlines():
        run, name = line.split()
        seen.setdefault(run, set()).add(name)
    for run in (by_exec, by_job):
        assert {"loss_total", "loss_psl", "train_pairs_per_s", "val_retrieval_r10"} <= seen[run]
        assert seen[run] <= documented(), seen[run] - documented()


def test_only_what_the_readme_lists_answers_without_a_token(cluster, by_exec):
    assert rest(cluster, "/api/jobs/", "0" * 64)[0] in (401, 403)
    assert rest(cluster, "/api/jobs/")[0] == 200
    ports, answers = cluster.ports, answering(cluster.answers)
    assert {6379, 8076, 8077, 8080, 8265} <= set(ports)
    assert cluster.answers[8265] == "closed", "the dashboard listens on loopback"
    workers = [port for port, (_, program) in ports.items() if program.startswith("ray::")]
    assert len(workers) > 3, "the train workers' ports are among those that were looked at"
    section = (ROOT / "clusters" / "README.md").read_text().split("\n## Who may reach what\n", 1)[1]
    listed = {int(port): what for port, what in re.findall(r"^\| (\d+) \|[^|]*\| (\w+) \|$", section, re.MULTILINE)}
    # A health check may answer on workers' ports, too, which have no fixed number.
    fixed = {port: what for port, what in answers.items() if port in listed or what != "health"}
    assert fixed == listed, {port: (ports[port], cluster.answers[port]) for port in fixed.keys() ^ listed.keys()}


def answering(found: dict) -> dict[int, str]:
    """Port -> what it gives to somebody without a token: ``metrics``, ``health``, or the calls carried out."""
    said = {}
    for port, what in found.items():
        if what == "closed":
            continue
        web = {path for path, code in what["http"].items() if code is not None and code < 400}
        calls = {name for name, code in what["grpc"].items() if code == "OK"}
        if web:
            said[port] = "metrics" if what["metrics_only"] and not calls else f"{web} {calls}"
        elif calls:
            said[port] = "health" if calls == {"health"} else str(calls)
    return said


def test_a_second_session_finds_the_same_token(cluster):
    """The token is made once, for its owner only, and is not in the files that were copied."""
    path = cluster.home / ".ray" / "auth_token"
    assert path.stat().st_mode & 0o077 == 0
    copied = [p for p in (cluster.home / "simla_ray").rglob("*") if p.is_file() and ".venv" not in p.parts]
    assert copied and not [p for p in copied if cluster.token().encode() in p.read_bytes()]
    started = time.monotonic()
    done = cluster.run("ray", "exec", str(cluster.file), "ray get-auth-token")
    assert cluster.token() in done.stdout and time.monotonic() - started < 60


def test_the_watcher_drains_a_real_node(cluster, by_job):
    """Last, because a node that is drained and idle ends itself."""
    done = cluster.run("ray", "exec", str(cluster.file), "python -m simla_ray.orchestration.spot_watch --drain-now 90")
    assert done.returncode == 0 and "spot_watch: draining, 9" in done.stdout, done.stdout + done.stderr
    log = "grep 'HandleDrainNode, reason: stop at' /tmp/ray/session_latest/logs/gcs_server.out"
    assert cluster.run("ray", "exec", str(cluster.file), log).returncode == 0
