"""The cluster files as data: Ray's schema, keys it does not check, and what the files have in common."""

import copy
import re
import subprocess

import botocore.loaders
import botocore.model
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.clusters.aws_double import CLUSTERS, ROOT

AWS = ("aws.yaml", "aws-spot.yaml")
FILES = (*AWS, "local.yaml")
#: What Ray's providers read; its schema takes any key there.
PROVIDER_KEYS = {
    "aws": {"type", "region", "cache_stopped_nodes", "availability_zone", "use_internal_ips"},
    "local": {"type", "head_ip", "worker_ips", "external_head_ip"},
}
#: Ray turns this one into SubnetId.
RAYS_OWN_NODE_KEYS = {"SubnetIds"}


def load(name) -> dict:
    return yaml.safe_load((CLUSTERS / name).read_text())


def filled(name) -> dict:
    config = load(name)
    if name in AWS:
        config["metadata"] = {}
    return config


@pytest.mark.parametrize("name", FILES)
def test_rays_schema(name):
    validate_config(prepare_config(filled(name)))


@pytest.mark.parametrize("name", FILES)
def test_provider_keys(name):
    provider = load(name)["provider"]
    assert set(provider) <= PROVIDER_KEYS[provider["type"]]


def run_instances_shape() -> botocore.model.Shape:
    model = botocore.model.ServiceModel(botocore.loaders.Loader().load_service_model("ec2", "service-2"))
    return model.operation_model("RunInstances").input_shape


def unknown_keys(value, shape, path="") -> list[str]:
    """Keys and values of a node_config that EC2's RunInstances does not know; Ray passes them on unchecked."""
    if shape.type_name == "structure":
        if not isinstance(value, dict):
            return [f"{path}: not a mapping"]
        found = [f"{path}.{key}" for key in value if key not in shape.members]
        for key in value.keys() & shape.members.keys():
            found += unknown_keys(value[key], shape.members[key], f"{path}.{key}")
        return found
    if shape.type_name == "list":
        if not isinstance(value, list):
            return [f"{path}: not a list"]
        return [text for i, item in enumerate(value) for text in unknown_keys(item, shape.member, f"{path}[{i}]")]
    types = {"string": str, "boolean": bool, "integer": int}
    if shape.type_name in types and not isinstance(value, types[shape.type_name]):
        return [f"{path}: {value!r} is no {shape.type_name}"]
    if getattr(shape, "enum", None) and value not in shape.enum and shape.name != "InstanceType":
        return [f"{path}: {value!r} is none of {shape.enum}"]
    return []


@pytest.mark.parametrize("name", AWS)
def test_node_configs_are_what_ec2_understands(name):
    for kind, node_type in load(name)["available_node_types"].items():
        node = {key: value for key, value in node_type["node_config"].items() if key not in RAYS_OWN_NODE_KEYS}
        assert unknown_keys(node, run_instances_shape(), kind) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda node: node.update(SecurityGroups_=["x"]), "head.SecurityGroups_"),
        (lambda node: node["MetadataOptions"].update(HttpToken="required"), "head.MetadataOptions.HttpToken"),
        (lambda node: node["MetadataOptions"].update(HttpTokens="yes"), "head.MetadataOptions.HttpTokens: 'yes'"),
        (lambda node: node["BlockDeviceMappings"][0]["Ebs"].update(Encrypt=True), "head.BlockDeviceMappings[0].Ebs"),
        (lambda node: node["BlockDeviceMappings"][0]["Ebs"].update(Encrypted="yes"), "is no boolean"),
        (lambda node: node.update(SecurityGroupIds="sg-1"), "head.SecurityGroupIds: not a list"),
    ],
)
def test_typos_in_node_configs_are_found(change, said):
    node = copy.deepcopy(load("aws.yaml")["available_node_types"]["head"]["node_config"])
    del node["SubnetIds"]
    change(node)
    (found,) = unknown_keys(node, run_instances_shape(), "head")
    assert said in found


@pytest.mark.parametrize("name", AWS)
def test_every_node_type_is_locked(name):
    types = load(name)["available_node_types"]
    assert set(types) == {"head", "gpu", "cpu"}
    for kind, node_type in types.items():
        node = node_type["node_config"]
        assert node["SecurityGroupIds"] == ["FILL_SecurityGroupId"] and node["SubnetIds"] == ["FILL_SubnetId"]
        role = "simla-ray-head" if kind == "head" else "simla-ray-worker"
        assert node["IamInstanceProfile"] == {"Name": role}
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert all(device["Ebs"]["Encrypted"] for device in node["BlockDeviceMappings"])
        assert {spec["ResourceType"] for spec in node["TagSpecifications"]} == {"instance", "volume"}


def test_spot_differs_only_in_name_and_gpu_workers():
    plain, spot = load("aws.yaml"), load("aws-spot.yaml")
    assert spot.pop("cluster_name") == plain.pop("cluster_name") + "-spot"
    market = spot["available_node_types"]["gpu"]["node_config"].pop("InstanceMarketOptions")
    assert market["MarketType"] == "spot"
    watch = spot["worker_start_ray_commands"].pop()
    assert "python -m simla_ray.orchestration.spot_watch" in watch and watch.endswith("2>&1 & sleep 1")
    assert '"$RAY_NODE_TYPE_NAME" != gpu ||' in watch
    assert spot == plain


def test_what_all_files_have_in_common():
    aws, local = load("aws.yaml"), load("local.yaml")
    for key in ("file_mounts", "rsync_exclude", "cluster_synced_files"):
        assert aws[key] == local[key]
    # local.yaml: no sudo, no `ray stop`, and its own shared folder; the rest is the same.
    assert aws["setup_commands"][-3:] == local["setup_commands"][-3:]
    assert aws["head_setup_commands"][-1:] == local["head_setup_commands"]
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert aws[key] == ["ray stop", *local[key]]


@pytest.mark.parametrize("name", FILES)
def test_only_what_the_package_needs_is_copied(name):
    mounts = load(name)["file_mounts"]
    assert all((ROOT / source).exists() for source in mounts.values())
    assert all(target == f"~/simla_ray/{source}" for target, source in mounts.items())


@pytest.mark.parametrize("name", FILES)
def test_commands_can_stand_in_parentheses(name):
    """Ray runs each as `(command)`: a parenthesis of its own makes it arithmetic, a comment swallows the end."""
    config = load(name)
    for key in [key for key in config if key.endswith("_commands")]:
        for command in config[key]:
            assert not command.startswith("(") and "\n" not in command
            checked = subprocess.run(["bash", "-n", "-c", f"true && ({command})"], capture_output=True, text=True)
            assert checked.returncode == 0, (command, checked.stderr)


@pytest.mark.parametrize("name", FILES)
def test_token_and_dashboard(name):
    config = load(name)
    (start,) = [text for text in config["head_start_ray_commands"] if "ray start" in text]
    assert "--dashboard-host=127.0.0.1" in start
    assert config["cluster_synced_files"] == ["~/.ray/auth_token"]
    assert any("get-auth-token --generate > /dev/null" in text for text in config["head_setup_commands"])
    assert any("clusters/node.sh" in text for text in config["setup_commands"])
    shell = (CLUSTERS / "node.sh").read_text()
    assert "export RAY_AUTH_MODE=token" in shell and "export RAY_ADDRESS=auto" in shell


def test_nothing_secret_and_no_ids_in_the_files():
    secret = re.compile(r"AKIA[0-9A-Z]{16}|BEGIN .*PRIVATE KEY|\b(sg|subnet|fs|ami|vpc)-[0-9a-f]{8,}|[0-9a-f]{64}")
    for path in CLUSTERS.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert not secret.search(path.read_text()), path
