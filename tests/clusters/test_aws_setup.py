"""The CloudFormation stack, made in a double of AWS: who may reach what."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from botocore.exceptions import ClientError

from tests.clusters.aws_double import CLUSTERS, SSH_FROM


def template() -> dict:
    """The template as data; its functions become their arguments."""

    class Loader(yaml.SafeLoader):
        pass

    def plain(loader, _, node):
        make = {yaml.ScalarNode: loader.construct_scalar, yaml.SequenceNode: loader.construct_sequence}
        return make[type(node)](node)

    Loader.add_multi_constructor("!", plain)
    return yaml.load((CLUSTERS / "aws-setup.yaml").read_text(), Loader)


def test_lint():
    lint = [str(Path(sys.executable).with_name("cfn-lint")), str(CLUSTERS / "aws-setup.yaml")]
    done = subprocess.run(lint, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_ssh_from_one_address_and_everything_among_members(aws):
    groups = aws.account.client("ec2").describe_security_groups(GroupIds=[aws.stack["SecurityGroupId"]])
    (group,) = groups["SecurityGroups"]
    ssh, among = sorted(group["IpPermissions"], key=lambda rule: rule["IpProtocol"], reverse=True)
    assert (ssh["IpProtocol"], ssh["FromPort"], ssh["ToPort"]) == ("tcp", 22, 22)
    assert [r["CidrIp"] for r in ssh["IpRanges"]] == [SSH_FROM]
    assert not ssh["Ipv6Ranges"] and not ssh["UserIdGroupPairs"]
    assert among["IpProtocol"] == "-1" and not among["IpRanges"] and not among["Ipv6Ranges"]
    assert [pair["GroupId"] for pair in among["UserIdGroupPairs"]] == [aws.stack["SecurityGroupId"]]


@pytest.mark.parametrize(
    ("address", "fits"),
    [("203.0.113.7/32", True), ("0.0.0.0/0", False), ("203.0.113.0/24", False), ("203.0.113.7", False),
     ("203.0.113.300/32", False)],
)  # fmt: skip
def test_ssh_takes_one_address_only(address, fits):
    assert bool(re.fullmatch(template()["Parameters"]["SshFrom"]["AllowedPattern"], address)) == fits


def test_bucket_is_private_and_encrypted(aws):
    s3, name = aws.account.client("s3"), {"Bucket": aws.stack["Bucket"]}
    # In the text, because the double passes over them.
    bucket = template()["Resources"]["Bucket"]["Properties"]
    assert list(bucket["PublicAccessBlockConfiguration"].values()) == [True] * 4
    assert bucket["OwnershipControls"]["Rules"] == [{"ObjectOwnership": "BucketOwnerEnforced"}]
    (rule,) = s3.get_bucket_encryption(**name)["ServerSideEncryptionConfiguration"]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
    (statement,) = template()["Resources"]["BucketPolicy"]["Properties"]["PolicyDocument"]["Statement"]
    assert statement["Effect"] == "Deny" and statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


def test_folder_of_runs_is_encrypted_and_inside(aws):
    efs = aws.account.client("efs")
    (system,) = efs.describe_file_systems(FileSystemId=aws.stack["FileSystemId"])["FileSystems"]
    assert system["Encrypted"]
    (target,) = efs.describe_mount_targets(FileSystemId=aws.stack["FileSystemId"])["MountTargets"]
    assert target["SubnetId"] == aws.stack["SubnetId"]
    groups = efs.describe_mount_target_security_groups(MountTargetId=target["MountTargetId"])["SecurityGroups"]
    assert groups == [aws.stack["SecurityGroupId"]]


def policies(aws, role) -> list[dict]:
    iam = aws.account.client("iam")
    found = [
        iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]
        for name in iam.list_role_policies(RoleName=role)["PolicyNames"]
    ]
    for attached in iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"]:
        version = iam.get_policy(PolicyArn=attached["PolicyArn"])["Policy"]["DefaultVersionId"]
        found.append(
            iam.get_policy_version(PolicyArn=attached["PolicyArn"], VersionId=version)["PolicyVersion"]["Document"]
        )
    # The double writes the inline one as Python would; YAML reads that, too.
    documents = [yaml.safe_load(document) if isinstance(document, str) else document for document in found]
    return [statement for document in documents for statement in document["Statement"]]


def listed(value) -> list[str]:
    return value if isinstance(value, list) else [value]


def test_workers_may_use_the_bucket_and_nothing_else(aws):
    statements = policies(aws, "simla-ray-worker")
    bucket = f"arn:aws:s3:::{aws.stack['Bucket']}"
    assert {action.split(":")[0] for s in statements for action in listed(s["Action"])} == {"s3"}
    assert {resource for s in statements for resource in listed(s["Resource"])} == {bucket, bucket + "/*"}
    assert not [action for s in statements for action in listed(s["Action"]) if "*" in action]


def test_head_may_start_and_end_workers_and_nothing_else(aws):
    by_sid = {s["Sid"]: s for s in policies(aws, "simla-ray-head") if "Sid" in s}
    actions = {action for s in by_sid.values() for action in listed(s["Action"])}
    assert actions == {
        "ec2:DescribeInstances", "ec2:DescribeInstanceTypes", "ec2:DescribeImages",
        "ec2:RunInstances", "ec2:CreateTags", "ec2:TerminateInstances", "iam:PassRole",
    }  # fmt: skip
    iam = aws.account.client("iam")
    worker_role = iam.get_role(RoleName="simla-ray-worker")["Role"]["Arn"]
    worker_profile = iam.get_instance_profile(InstanceProfileName="simla-ray-worker")["InstanceProfile"]["Arn"]
    assert by_sid["HandOutTheWorkersRole"]["Resource"] == worker_role
    start = by_sid["StartTaggedWorkers"]["Condition"]
    assert start["StringLike"] == {"aws:RequestTag/ray-cluster-name": "simla-ray*"}
    assert start["StringEquals"] == {"ec2:MetadataHttpTokens": "required"}
    assert start["ArnEquals"] == {"ec2:InstanceProfile": worker_profile}
    assert by_sid["TagAndEndTagged"]["Condition"] == {"StringLike": {"aws:ResourceTag/ray-cluster-name": "simla-ray*"}}
    # Whatever EC2 lets one narrow down is: only describing is not bound to resources, and that to the region.
    assert [sid for sid, s in by_sid.items() if "*" in listed(s["Resource"])] == ["Look"]
    places = {r for s in by_sid.values() for r in listed(s["Resource"]) if r.startswith("arn:aws:ec2:")}
    assert {place.split(":")[3] for place in places} == {aws.stack["Region"]}
    network = by_sid["InThisNetwork"]["Resource"]
    assert any(place.endswith(aws.stack["SubnetId"]) for place in network)
    assert any(place.endswith(aws.stack["SecurityGroupId"]) for place in network)


def test_cluster_names_are_those_the_head_may_use():
    for name in ("aws.yaml", "aws-spot.yaml"):
        assert yaml.safe_load((CLUSTERS / name).read_text())["cluster_name"].startswith("simla-ray")


def test_profiles_hold_one_role_each(aws):
    iam = aws.account.client("iam")
    for name in ("simla-ray-head", "simla-ray-worker"):
        roles = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]
        assert [role["RoleName"] for role in roles] == [name]


def test_deleting_the_stack_keeps_data():
    kept = {name for name, r in template()["Resources"].items() if r.get("DeletionPolicy") == "Retain"}
    assert kept == {"Bucket", "Runs"}
    assert kept == {name for name, r in template()["Resources"].items() if r.get("UpdateReplacePolicy") == "Retain"}


def test_fill_writes_every_id_and_can_be_repeated(aws, tmp_path):
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("fill", CLUSTERS / "fill.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("aws.yaml", "aws-spot.yaml"):
        raw = (CLUSTERS / name).read_text()
        filled = (aws.files / name).read_text()
        assert filled == module.fill(raw, aws.stack) == module.fill(filled, aws.stack)
        assert yaml.safe_load(filled)["metadata"] == aws.stack
        # Outside of metadata, only placeholders were replaced.
        other = {key: f"other-{key.lower()}" for key in aws.stack}
        moved = module.fill(filled, other)
        assert moved == module.fill(raw, other)
        assert aws.stack["SubnetId"] not in moved
        with pytest.raises(ValueError, match="no output SubnetId"):
            module.fill(raw, {key: value for key, value in aws.stack.items() if key != "SubnetId"})


def test_fill_says_what_is_wrong(aws, tmp_path):
    command = [sys.executable, str(CLUSTERS / "fill.py"), "no-such-stack", "--folder", str(aws.files)]
    done = subprocess.run(command, env=aws.environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: no-such-stack: ") and "Traceback" not in done.stderr


def test_an_id_that_does_not_exist_is_refused_by_the_api(aws):
    with pytest.raises(ClientError):
        aws.account.client("ec2").run_instances(
            ImageId="FILL_ImageId", SubnetId="FILL_SubnetId", MinCount=1, MaxCount=1, InstanceType="m7i.xlarge"
        )
