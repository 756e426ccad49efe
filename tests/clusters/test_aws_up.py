"""``ray up`` and ``ray down`` of the AWS files against a double of AWS, with stand-ins for ssh and rsync."""

import copy
import re
import shutil
import subprocess
from pathlib import Path

import boto3
import botocore.client
import pytest
import yaml

from tests.clusters.aws_double import CLUSTERS, RAY, REGION, ROOT, remote_commands

pytestmark = pytest.mark.slow
FILES = ("aws.yaml", "aws-spot.yaml")


def ray(aws, *words):
    # Relative paths of file_mounts count from the project's root, where the commands of the README are given.
    return subprocess.run([RAY, *words], env=aws.environment, cwd=ROOT, capture_output=True, text=True, timeout=120)


def tags(instance) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in instance["Tags"]}


def check_instance(aws, instance, profile):
    """What must hold for every node, whoever started it."""
    assert instance["IamInstanceProfile"]["Arn"].endswith(f":instance-profile/{profile}")
    assert [group["GroupId"] for group in instance["SecurityGroups"]] == [aws.stack["SecurityGroupId"]]
    assert instance["SubnetId"] == aws.stack["SubnetId"]
    assert instance["ImageId"] == aws.stack["ImageId"]
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    assert instance["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
    assert tags(instance)["project"] == "simla-ray" and tags(instance)["ray-cluster-name"].startswith("simla-ray")
    ec2 = aws.account.client("ec2")
    ids = [device["Ebs"]["VolumeId"] for device in instance["BlockDeviceMappings"]]
    volumes = ec2.describe_volumes(VolumeIds=ids)["Volumes"]
    assert volumes and all(v["Encrypted"] and v["VolumeType"] == "gp3" for v in volumes), volumes
    assert all(device["Ebs"]["DeleteOnTermination"] for device in instance["BlockDeviceMappings"])


@pytest.fixture(params=FILES)
def up(aws, request):
    """The file, its filled copy, and the remote commands of ``ray up``; the cluster is taken down afterwards."""
    path = aws.files / request.param
    assert aws.account.instances() == []
    before = len(remote_commands(aws.folder))
    done = ray(aws, "up", str(path), "-y", "--no-config-cache")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "up-to-date" in done.stdout
    yield request.param, path, remote_commands(aws.folder)[before:]
    done = ray(aws, "down", str(path), "-y")
    assert done.returncode == 0, done.stdout + done.stderr
    assert aws.account.instances() == []
    states = [v["State"] for v in aws.account.client("ec2").describe_volumes()["Volumes"]]
    assert states == [], "disks end with their nodes"


def test_up_then_down(aws, up):
    name, path, commands = up
    config = yaml.safe_load(path.read_text())
    (head,) = aws.account.instances()
    check_instance(aws, head, "simla-ray-head")
    assert tags(head)["ray-node-type"] == "head" and tags(head)["ray-node-status"] == "up-to-date"
    assert "InstanceLifecycle" not in head or head["InstanceLifecycle"] != "spot"

    # No group that an instance is in, and none that the launcher could have made, is open to the world.
    ec2 = aws.account.client("ec2")
    for group in ec2.describe_security_groups()["SecurityGroups"]:
        assert not group["GroupName"].startswith("ray-autoscaler"), "Ray made a group of its own"
        opened = [r["CidrIp"] for rule in group["IpPermissions"] for r in rule["IpRanges"]]
        opened += [r["CidrIpv6"] for rule in group["IpPermissions"] for r in rule["Ipv6Ranges"]]
        assert "0.0.0.0/0" not in opened and "::/0" not in opened, group
    roles = [role["RoleName"] for role in aws.account.client("iam").list_roles()["Roles"]]
    assert not [role for role in roles if role.startswith("ray-autoscaler")], "Ray made a role of its own"

    check_remote_commands(aws, commands, config)
    check_bootstrapped_workers(aws, path, name)


def check_remote_commands(aws, commands, config):
    shells = [words[-1] for words in commands if words[0].endswith("ssh")]
    copied = [words[-1].split(":", 1)[1] for words in commands if words[0].endswith("rsync")]
    wanted = {target + "/" * (ROOT / source).is_dir() for target, source in config["file_mounts"].items()}
    assert set(copied) == wanted | {"~/ray_bootstrap_config.yaml", "~/ray_bootstrap_key.pem"}
    assert not [target for target in copied if "token" in target], "the token is made on the head"
    in_order = [
        r"mount -t nfs4 .*" + re.escape(f"{aws.stack['FileSystemId']}.efs.{REGION}.amazonaws.com:/ /mnt/simla_ray"),
        r"chown \$USER /mnt/simla_ray/runs",
        r"ln -sfn /mnt/simla_ray/runs ~/simla_ray/runs",
        r"python3 -m venv ~/simla_ray/.venv",
        r"pip install --quiet --constraint constraints.txt --editable \.",
        r"clusters/node.sh.*~/\.bashrc",
        r"umask 077 && .*ray get-auth-token --generate > /dev/null",
        r"ray stop",
        r"ray start --head --port=6379 .*--dashboard-host=127\.0\.0\.1 --autoscaling-config=~/ray_bootstrap_config",
    ]
    at = 0
    for pattern in in_order:
        found = [i for i, text in enumerate(shells) if i >= at and re.search(pattern, text)]
        assert found, f"{pattern} does not come after {shells[at - 1] if at else 'the start'}"
        at = found[0] + 1
    start = shells[at - 1]
    assert """RAY_OVERRIDE_RESOURCES='"'"'{"CPU":0}'"'"'""" in start, "no tasks on the head"
    assert not [text for text in shells if "FILL_" in text]


def check_bootstrapped_workers(aws, path, name):
    """Ray starts the workers from the head; here, its provider is asked to, with the configuration the head gets."""
    from ray.autoscaler._private.commands import _bootstrap_config
    from ray.autoscaler._private.providers import _get_node_provider

    called = set()
    make_call = botocore.client.BaseClient._make_api_call

    def recorded(client, operation, arguments):
        called.add(operation)
        return make_call(client, operation, arguments)

    with pytest.MonkeyPatch.context() as patch:
        for key, value in aws.environment.items():
            patch.setenv(key, value)
        patch.setattr(boto3, "DEFAULT_SESSION", None)
        config = _bootstrap_config(yaml.safe_load(path.read_text()), no_config_cache=True)
        provider = _get_node_provider(config["provider"], config["cluster_name"])
        for kind in ("gpu", "cpu"):
            node = copy.deepcopy(config["available_node_types"][kind]["node_config"])
            known = {i["InstanceId"] for i in aws.account.instances()}
            with pytest.MonkeyPatch.context() as record:
                record.setattr(botocore.client.BaseClient, "_make_api_call", recorded)
                provider.create_node(node, {"ray-node-type": "worker", "ray-user-node-type": kind}, 1)
                (found,) = set(provider.non_terminated_nodes({"ray-user-node-type": kind}))
                provider.set_node_tags(found, {"ray-node-status": "up-to-date"})
            (instance,) = [i for i in aws.account.instances() if i["InstanceId"] not in known]
            assert instance["InstanceId"] == found
            check_instance(aws, instance, "simla-ray-worker")
            assert instance["InstanceType"] == node["InstanceType"]
            spot = kind == "gpu" and name == "aws-spot.yaml"
            assert (instance.get("InstanceLifecycle") == "spot") == spot
            check_worker_commands(aws, config, provider, found, kind, name)
            if kind == "gpu":  # the other one is left to `ray down`
                with pytest.MonkeyPatch.context() as record:
                    record.setattr(botocore.client.BaseClient, "_make_api_call", recorded)
                    provider.terminate_nodes([found])
        # What the head's role allows, see test_head_may_start_and_end_workers_and_nothing_else.
        assert called == {"RunInstances", "CreateTags", "DescribeInstances", "TerminateInstances"}
        assert config["available_node_types"]["gpu"]["resources"]["GPU"] == 1
        assert "GPU" not in config["available_node_types"]["cpu"]["resources"]
        assert "GPU" not in config["available_node_types"]["head"]["resources"]


def check_worker_commands(aws, config, provider, node_id, kind, name):
    """What the head's autoscaler does with a new worker, given the files that `ray up` puts on the head."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.instance_manager.ray_installer import RayInstaller
    from ray.core.generated.instance_manager_pb2 import Instance

    assert shutil.which("ssh").startswith(str(aws.folder)) and Path("~").expanduser() == aws.folder
    for target, source in config["file_mounts"].items():
        there = Path(target).expanduser()
        there.parent.mkdir(parents=True, exist_ok=True)
        if not there.exists():
            there.symlink_to(ROOT / source)
    token = aws.folder / ".ray" / "auth_token"
    token.parent.mkdir(exist_ok=True)
    token.write_text("made on the head")

    on_head = copy.deepcopy(config)
    on_head.pop("head_node")
    on_head["file_mounts"] = {target: target for target in config["file_mounts"]}
    before = len(remote_commands(aws.folder))
    installer = RayInstaller(provider, AutoscalingConfig(on_head))
    installer.install_ray(Instance(cloud_instance_id=node_id, instance_type=kind), "10.60.0.5")
    commands = remote_commands(aws.folder)[before:]
    copied = [words[-1].split(":", 1)[1] for words in commands if words[0].endswith("rsync")]
    assert str(token) in copied and "~/simla_ray/constraints.txt" in copied
    shells = [words[-1] for words in commands if words[0].endswith("ssh")]
    assert not [text for text in shells if "get-auth-token" in text], "one token, the head's"
    assert [text for text in shells if "pip install --quiet --constraint constraints.txt --editable ." in text]
    (start,) = [text for text in shells if "ray start" in text]
    assert "export RAY_HEAD_IP=10.60.0.5;" in start and "ray start --address=$RAY_HEAD_IP:6379" in start
    watchers = [text for text in shells if "spot_watch" in text]
    assert len(watchers) == (name == "aws-spot.yaml")
    if watchers:
        assert f"export RAY_NODE_TYPE_NAME={kind};" in watchers[0]
        # The shell's own choice, with the watcher's command in place of the real one.
        inner = re.search(r"(export RAY_HEAD_IP.*) setsid nohup", watchers[0]).group(1) + " echo watching"
        said = subprocess.run(["bash", "-c", inner.replace("'\"'\"'", "'")], capture_output=True, text=True)
        assert said.stdout.strip() == ("watching" if kind == "gpu" else ""), said


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_filled_starts_nothing(aws, name):
    before = len(remote_commands(aws.folder))
    pairs = aws.account.client("ec2").describe_key_pairs()["KeyPairs"]
    done = ray(aws, "up", str(CLUSTERS / name), "-y", "--no-config-cache")
    assert done.returncode != 0
    assert "not filled yet: run python clusters/fill.py STACK" in done.stdout + done.stderr
    assert aws.account.instances() == [] and len(remote_commands(aws.folder)) == before
    assert aws.account.client("ec2").describe_key_pairs()["KeyPairs"] == pairs


def test_an_unknown_security_group_starts_nothing(aws, tmp_path):
    """The same, had someone replaced only the line that Ray complains about."""
    path = tmp_path / "aws.yaml"
    text = (CLUSTERS / "aws.yaml").read_text().replace("FILL_Region", REGION)
    path.write_text(re.sub(r"^metadata:.*$", "metadata: {}", text, flags=re.MULTILINE))
    done = ray(aws, "up", str(path), "-y", "--no-config-cache")
    assert done.returncode != 0 and "Failed to detect a security group" in done.stdout + done.stderr
    assert aws.account.instances() == []
