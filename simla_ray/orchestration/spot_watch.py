"""Tells Ray that this node is about to be taken away: nothing in open Ray watches an instance's metadata for that.

    python -m simla_ray.orchestration.spot_watch                  # on a spot instance: poll, drain once, end
    python -m simla_ray.orchestration.spot_watch --drain-now 90   # from a hook that was told by other means

A drained node takes no new work, and a training run on it is asked to save and move. The only address contacted is the
metadata service; Ray is reached through its own command, ``ray drain-node``, so that importing this file needs neither
ray nor torch.
"""

from __future__ import annotations

import argparse
import http.client
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

METADATA = "http://169.254.169.254"
POLL_S = 2.0
TOKEN_S = 3600
#: The service is a hop away: one that does not answer at once is not there.
TIMEOUT_S = 2.0
#: A drain that hangs must not eat the whole notice, which is two minutes.
DRAIN_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Notice:
    """``action``: terminate, stop or hibernate. ``at``: when, as a Unix time."""

    action: str
    at: float


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


class Metadata:
    """The instance metadata service, version 2: a session token first, then values.

    Args:
        base: URL of the service.
    """

    def __init__(self, base: str = METADATA):
        self.base = base.rstrip("/")
        self.token, self.renew_at = "", 0.0
        # Neither a proxy from the environment nor a redirect may lead to another address.
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects())

    def notice(self) -> Notice | None:
        """What is announced for this instance; None while nothing is.

        Raises:
            OSError: the service does not answer, or with an error. The next call starts with a new token.
            ValueError: it answers something else than a notice.
        """
        try:
            if time.monotonic() >= self.renew_at:
                ttl = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)}
                self.token = self._request("PUT", "/latest/api/token", ttl)
                self.renew_at = time.monotonic() + TOKEN_S / 2
            text = self._value("/latest/meta-data/spot/instance-action")
        except urllib.error.HTTPError:
            self.renew_at = 0.0
            raise
        except http.client.HTTPException as error:  # half an answer, or another protocol
            raise ValueError(f"not an answer: {error!r}") from None
        if text is None:
            return None
        try:
            answer = json.loads(text)
            return Notice(str(answer["action"]), datetime.fromisoformat(answer["time"]).timestamp())
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"not a notice: {error!r}") from None

    def _value(self, path: str) -> str | None:
        """A value of the metadata; None where the service has none."""
        try:
            return self._request("GET", path, {"X-aws-ec2-metadata-token": self.token})
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def _request(self, method: str, path: str, headers: dict[str, str]) -> str:
        request = urllib.request.Request(self.base + path, method=method, headers=headers)
        with self.opener.open(request, timeout=TIMEOUT_S) as answer:
            return answer.read().decode()


def local_node_id(proc: Path = Path("/proc")) -> str:
    """Id of the Ray node on this machine, from its raylet's arguments.

    ``ray drain-node`` without an id would start a driver to ask for it, in the seconds that count.

    Raises:
        LookupError: no raylet here, or several.
    """
    found = set()
    for arguments in proc.glob("[0-9]*/cmdline"):
        try:
            words = arguments.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # ended meanwhile
            continue
        if Path(words[0]).name == "raylet":
            found |= {word.partition("=")[2] for word in words if word.startswith("--node_id=")}
    if len(found) != 1:
        raise LookupError(f"{len(found)} Ray nodes on this machine; --node-id says which")
    return found.pop()


def drain(command: str, node_id: str | None, address: str | None, message: str, seconds: int) -> None:
    """Have Ray take no new work here and tell the runs on it.

    Args:
        seconds: until the node goes, at least 0.

    Raises:
        LookupError: see ``local_node_id``.
        OSError, subprocess.SubprocessError: the command cannot be run, fails or hangs.
    """
    words = [command, "drain-node", "--node-id", node_id or local_node_id()]
    words += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", message]
    words += ["--deadline-remaining-seconds", str(seconds), *(["--address", address] if address else [])]
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=DRAIN_TIMEOUT_S)


def drain_until(at: float, drain: Callable[[int], None], say: Callable[[str], None], every_s: float = 1.0) -> bool:
    """Call ``drain`` with the true seconds left until it succeeds; True when it did before ``at``."""
    while (left := at - time.time()) > 0:
        try:
            drain(int(left))
        except (LookupError, OSError, subprocess.SubprocessError) as error:
            told = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [repr(error)]
            say(f"drain failed with {left:.0f} s left, again in {every_s:g} s: {told[-1]}")
            time.sleep(every_s)
        else:
            say(f"draining, {left:.0f} s left")
            return True
    say("the time is up and the node was not drained")
    return False


def watch(metadata: Metadata, say: Callable[[str], None], poll_s: float = POLL_S) -> Notice:
    """Wait for a notice, through whatever the metadata service does meanwhile. A trouble is said once, and its end."""
    trouble = None
    while True:
        try:
            notice = metadata.notice()
        except (OSError, ValueError) as error:
            if str(error) != trouble:
                say(f"no answer from the metadata service, trying on: {error}")
            trouble = str(error)
        else:
            if trouble is not None:
                say("the metadata service answers again")
            trouble = None
            if notice is not None:
                return notice
        time.sleep(poll_s)


def main(argv: Sequence[str]) -> int:
    """0: the node was drained. 1: a notice came, and it could not be."""
    parser = argparse.ArgumentParser(prog="spot_watch", description="Drain this Ray node when its spot notice comes.")
    parser.add_argument("--metadata", default=METADATA, metavar="URL", help=f"metadata service (default: {METADATA})")
    parser.add_argument("--poll-s", type=float, default=POLL_S, help=f"seconds between looks (default: {POLL_S:g})")
    parser.add_argument("--node-id", help="Ray's id of this node (default: that of the one raylet running here)")
    parser.add_argument("--address", help="GCS of the cluster (default: RAY_ADDRESS, or the one this node is in)")
    parser.add_argument("--ray", default="ray", metavar="COMMAND", help="Ray's command line tool (default: ray)")
    parser.add_argument("--drain-now", type=float, metavar="SECONDS", help="do not watch: the node goes in SECONDS")
    arguments = parser.parse_args(argv)
    command = shutil.which(arguments.ray)
    if command is None:
        parser.error(f"--ray: no command {arguments.ray}")

    if arguments.drain_now is not None:
        notice = Notice("stop", time.time() + arguments.drain_now)
    else:
        _say(f"watching {arguments.metadata} every {arguments.poll_s:g} s")
        notice = watch(Metadata(arguments.metadata), _say, arguments.poll_s)
    message = f"{notice.action} at {datetime.fromtimestamp(notice.at).astimezone().isoformat(timespec='seconds')}"
    _say(f"notice: {message}")
    drained = drain_until(
        notice.at, lambda seconds: drain(command, arguments.node_id, arguments.address, message, seconds), _say
    )
    return 0 if drained else 1


def _say(line: str) -> None:
    print(f"{datetime.now().astimezone().isoformat(timespec='seconds')} spot_watch: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
