"""A machine for ``ray up`` of local.yaml: a network namespace with an sshd in it, and a home folder of its own.

Nothing in it can reach a network: its one link leads to a second namespace, from which its ports are looked at.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
from ray.autoscaler._private.local.config import get_lock_path, get_state_path

ROOT = Path(__file__).parents[2]
ADDRESS, NEIGHBOUR = "10.200.0.1", "10.200.0.2"
SSH_PORT = 2222


def missing() -> str | None:
    """Why such a machine cannot be had here; None when it can."""
    for name in ("sshd", "ssh", "rsync", "ip", "ss"):
        if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin") is None:
            return f"{name} is not installed"
    if os.geteuid() != 0 or subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode != 0:
        return "network namespaces may not be made here"
    return None


class Machine:
    """``run`` on it, as the user at its keyboard; ``pids`` of everything it runs."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name, self.neighbour = folder, name, name + "n"
        self.home = folder / "home"
        self.home.mkdir()
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_"))} | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "TMPDIR": str(folder),
        }

    def command(self, *words: str, neighbour: bool = False) -> list[str]:
        return ["ip", "netns", "exec", self.neighbour if neighbour else self.name, *words]

    def run(self, *words: str, neighbour: bool = False, timeout: float = 300, **env: str):
        return subprocess.run(
            self.command(*words, neighbour=neighbour),
            env=self.env | env, cwd=ROOT, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip

    def pids(self) -> list[int]:
        return [int(pid) for pid in subprocess.check_output(["ip", "netns", "pids", self.name], text=True).split()]

    def token(self) -> str:
        return (self.home / ".ray" / "auth_token").read_text()


@contextmanager
def machine(folder: Path):
    """A machine with an sshd; everything that runs on it is ended with it, by its process id."""
    made = Machine(folder, f"simla{os.getpid()}")
    sshd = None
    try:
        _make_network(made)
        _make_environment(made)
        sshd = _start_sshd(made)
        yield made
    finally:
        for kill in (signal.SIGTERM, signal.SIGKILL):
            with suppress(subprocess.CalledProcessError):
                for pid in made.pids():
                    with suppress(ProcessLookupError):
                        os.kill(pid, kill)
            time.sleep(2 if kill == signal.SIGTERM else 0)
        if sshd is not None:
            sshd.wait()
        for name in (made.name, made.neighbour):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        for path in (get_state_path(made.name), get_lock_path(made.name)):  # the launcher's notes on this cluster
            Path(path).unlink(missing_ok=True)


def _make_network(made: Machine) -> None:
    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    for name in (made.name, made.neighbour):
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
    ip("link", "add", "eth0", "netns", made.name, "type", "veth", "peer", "name", "eth0", "netns", made.neighbour)
    for name, address in ((made.name, ADDRESS), (made.neighbour, NEIGHBOUR)):
        ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")
    # Ray asks the routing table which address is its own. The other end forwards nothing.
    ip("-n", made.name, "route", "add", "default", "via", NEIGHBOUR)


def _make_environment(made: Machine) -> None:
    """What `python3 -m venv` and two gigabytes of packages would give: this Python's packages, seen from a new one."""
    venv = made.home / "simla_ray" / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    here, there = Path(yaml.__file__).parents[1], next(venv.glob("lib/python*/site-packages"))
    (there / "packages.pth").write_text(f"{here}\n")
    for name, module in (("pip", "pip._internal.cli.main"), ("ray", "ray.scripts.scripts")):
        script = venv / "bin" / name
        script.write_text(f"#!{venv}/bin/python\nimport sys\nfrom {module} import main\nsys.exit(main())\n")
        script.chmod(0o755)


def _start_sshd(made: Machine) -> subprocess.Popen:
    folder = made.folder / "ssh"
    folder.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    # Each session believes that it is at home in our folder; pip finds the build tool that is installed already.
    shell = folder / "shell"
    shell.write_text(
        f"#!/bin/bash\nexport HOME={made.home} PIP_NO_INDEX=1 PIP_NO_BUILD_ISOLATION=0\ncd\n"
        'exec bash -c "$SSH_ORIGINAL_COMMAND"\n'
    )
    shell.chmod(0o755)
    config = folder / "sshd_config"
    config.write_text(
        f"Port {SSH_PORT}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        f"ForceCommand {shell}\nPidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
        "PermitRootLogin prohibit-password\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it, and its service would make it
    path = shutil.which("sshd", path="/usr/sbin:" + os.environ["PATH"])
    log = (made.folder / "sshd.log").open("w")
    return subprocess.Popen(made.command(path, "-D", "-e", "-f", str(config)), stdout=log, stderr=log)


def cluster_file(made: Machine, cpus: int) -> Path:
    """local.yaml for this machine: its addresses, its port, more logical CPUs than it may have, and nothing else."""
    config = yaml.safe_load((ROOT / "clusters" / "local.yaml").read_text())
    proxy = made.folder / "proxy.py"
    proxy.write_text(PROXY)
    config["cluster_name"] = made.name
    config["provider"] |= {"head_ip": ADDRESS, "worker_ips": []}
    config["auth"] = {
        "ssh_user": "root",
        "ssh_private_key": str(made.folder / "ssh" / "user"),
        "ssh_proxy_command": f"{sys.executable} {proxy}",
    }
    (start,) = config["head_start_ray_commands"]
    config["head_start_ray_commands"] = [start + f" --num-cpus={cpus} --object-store-memory=500000000"]
    path = made.folder / "local.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


#: Between the SSH client and the port on loopback.
PROXY = f"""
import os, socket, threading
link = socket.create_connection(("127.0.0.1", {SSH_PORT}))
def up():
    while data := os.read(0, 65536):
        link.sendall(data)
    link.shutdown(socket.SHUT_WR)
threading.Thread(target=up, daemon=True).start()
while data := link.recv(65536):
    os.write(1, data)
"""

#: Looks at ports of an address without a token: by HTTP, and by some calls of Ray's services.
PROBE = """
import json, re, socket, sys, urllib.error, urllib.request
import grpc

address, ports = sys.argv[1], json.loads(sys.argv[2])
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
CALLS = ("NodeInfoGcsService/GetAllNodeInfo", "InternalKVGcsService/InternalKVKeys",
         "JobInfoGcsService/GetAllJobInfo", "NodeManagerService/GetNodeStats",
         "NodeManagerService/GetSystemConfig", "CoreWorkerService/GetCoreWorkerStats",
         "ReporterService/ReportOCMetrics", "LogService/ListLogs", "RayletDriver/ClusterInfo", "RayletDriver/Init",
         "ObjectManagerService/Pull", "RuntimeEnvService/GetRuntimeEnvsInfo")

def http(port, path):
    try:
        with opener.open(f"http://{address}:{port}{path}", timeout=3) as answer:
            bodies.append(answer.read().decode(errors="replace"))
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except Exception:
        return None

def call(channel, name):
    try:
        channel.unary_unary(name)(b"", timeout=3)
        return "OK"
    except grpc.RpcError as error:
        return error.code().name

found = {}
for port in ports:
    try:
        socket.create_connection((address, port), 3).close()
    except OSError:
        found[port] = "closed"
        continue
    bodies = []
    web = {path: http(port, path) for path in ("/", "/metrics", "/api/version", "/api/jobs/", "/nodes")}
    with grpc.insecure_channel(f"{address}:{port}") as channel:
        calls = {name: call(channel, "/ray.rpc." + name) for name in CALLS}
        calls["health"] = call(channel, "/grpc.health.v1.Health/Check")
    # A metrics port gives its metrics for any path: comments, and names with labels and a number.
    lines = [line for body in bodies for line in body.splitlines() if line and not line.startswith("#")]
    metrics_only = all(re.fullmatch(r"[a-zA-Z_:][\\w:]*({.*})? [-+.\\w]+", line) for line in lines)
    found[port] = {"http": web, "grpc": calls, "metrics_only": metrics_only}
print(json.dumps(found))
"""


def listening(made: Machine) -> dict[int, tuple[str, str]]:
    """Port -> (address it is bound to, program), for every TCP port of the machine."""
    found = {}
    for line in subprocess.check_output(made.command("ss", "-Hltnp"), text=True).splitlines():
        address, _, port = line.split()[3].rpartition(":")
        program = line.split('(("')[1].split('"')[0] if '(("' in line else "?"
        found[int(port)] = (address, program)
    return found


def probe(made: Machine, ports: list[int]) -> dict[int, dict]:
    """What the ports say to a neighbour that has no token."""
    done = made.run(sys.executable, "-c", PROBE, ADDRESS, json.dumps(ports), neighbour=True)
    assert done.returncode == 0, done.stderr
    return {int(port): found for port, found in json.loads(done.stdout).items()}
