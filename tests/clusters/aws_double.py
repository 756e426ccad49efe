"""A double of AWS on loopback, and stand-ins for the programs that would leave this machine."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import boto3

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"
REGION = "us-west-2"
SSH_FROM = "203.0.113.7/32"
STACK = "simla-ray"
IMAGE_PARAMETER = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
RAY = str(Path(sys.executable).with_name("ray"))

#: Writes its arguments down as one line of JSON and does nothing.
STUB = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["STUB_LOG"], "a") as file:
    file.write(json.dumps(sys.argv) + "\\n")
"""


def environment(folder: Path, url: str) -> dict[str, str]:
    """For a process that thinks it talks to AWS: its ssh and rsync do nothing, its home is ``folder``."""
    bin_folder = folder / "bin"
    if not bin_folder.exists():
        bin_folder.mkdir(parents=True)
        for name in ("ssh", "scp", "rsync", "sftp"):
            (bin_folder / name).write_text(STUB)
            (bin_folder / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    return kept | {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "STUB_LOG": str(folder / "remote.jsonl"),
        "HOME": str(folder),  # where the launcher puts the key pair it makes
        "TMPDIR": str(folder),
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def remote_commands(folder: Path) -> list[list[str]]:
    """What was handed to the stand-ins, in order."""
    log = folder / "remote.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@contextmanager
def moto_server(folder: Path):
    """The URL of a double of AWS on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    with (folder / "moto.log").open("w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"MOTO_IAM_LOAD_MANAGED_POLICIES": "true"}
        )
    try:
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, (folder / "moto.log").read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


class Account:
    """Clients of the double."""

    def __init__(self, url: str):
        self.url = url
        self.session = boto3.Session("testing", "testing", region_name=REGION)

    def client(self, service: str):
        return self.session.client(service, endpoint_url=self.url)

    def create_stack(self) -> dict[str, str]:
        """The stack of aws-setup.yaml; its outputs."""
        self.client("ssm").put_parameter(Name="/test/image", Value=self._image(), Type="String")
        template = (CLUSTERS / "aws-setup.yaml").read_text()
        assert IMAGE_PARAMETER in template
        cloudformation = self.client("cloudformation")
        cloudformation.create_stack(
            StackName=STACK,
            # The double has images, but not the parameter that names the newest of this kind.
            TemplateBody=template.replace(IMAGE_PARAMETER, "/test/image"),
            Parameters=[{"ParameterKey": "SshFrom", "ParameterValue": SSH_FROM}],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )
        (stack,) = cloudformation.describe_stacks(StackName=STACK)["Stacks"]
        assert stack["StackStatus"] == "CREATE_COMPLETE", stack
        return {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}

    def instances(self) -> list[dict]:
        """All that are not terminated."""
        pages = self.client("ec2").get_paginator("describe_instances").paginate()
        found = [i for page in pages for r in page["Reservations"] for i in r["Instances"]]
        return [i for i in found if i["State"]["Name"] not in ("terminated", "shutting-down")]

    def _image(self) -> str:
        return self.client("ec2").describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
