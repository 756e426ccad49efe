"""kuberay.yaml against the keys of the operator's and of Kubernetes' own schema.

The operator's CustomResourceDefinition (github.com/ray-project/kuberay, Apache-2.0) is in no package registry that the
project uses, and too large to carry along. The keys below were written down from the reference of its API ray.io/v1
and, for pods, from the core API v1; only what the file may use is listed, so a typo or a misplaced key is an error.
"""

import re

import pytest
import yaml

from simla_ray.config.load import load_run
from tests.clusters.aws_double import CLUSTERS, ROOT

STRING, INTEGER, BOOLEAN, STRINGS = str, int, bool, {"*": str}
QUANTITIES = {"requests": STRINGS, "limits": STRINGS}
SECURITY = {"allowPrivilegeEscalation": BOOLEAN, "capabilities": {"drop": [STRING]}, "readOnlyRootFilesystem": BOOLEAN}
CONTAINER = {
    "name": STRING,
    "image": STRING,
    "imagePullPolicy": STRING,
    "env": [{"name": STRING, "value": STRING, "valueFrom": {"secretKeyRef": {"name": STRING, "key": STRING}}}],
    "ports": [{"name": STRING, "containerPort": INTEGER}],
    "resources": QUANTITIES,
    "securityContext": SECURITY,
    "lifecycle": {"preStop": {"exec": {"command": [STRING]}}},
    "volumeMounts": [{"name": STRING, "mountPath": STRING, "readOnly": BOOLEAN}],
}
POD = {
    "metadata": {"labels": STRINGS, "annotations": STRINGS},
    "spec": {
        "terminationGracePeriodSeconds": INTEGER,
        "nodeSelector": STRINGS,
        "tolerations": [{"key": STRING, "operator": STRING, "value": STRING, "effect": STRING}],
        "securityContext": {
            "runAsNonRoot": BOOLEAN,
            "runAsUser": INTEGER,
            "fsGroup": INTEGER,
            "seccompProfile": {"type": STRING},
        },
        "containers": [CONTAINER],
        "volumes": [
            {
                "name": STRING,
                "persistentVolumeClaim": {"claimName": STRING},
                "emptyDir": {"medium": STRING, "sizeLimit": STRING},
            }
        ],
    },
}
RAY_CLUSTER_SPEC = {
    "rayVersion": STRING,
    "authOptions": {"mode": STRING, "secretName": STRING},
    "enableInTreeAutoscaling": BOOLEAN,
    "headGroupSpec": {"rayStartParams": STRINGS, "serviceType": STRING, "template": POD},
    "workerGroupSpecs": [
        {
            "groupName": STRING,
            "replicas": INTEGER,
            "minReplicas": INTEGER,
            "maxReplicas": INTEGER,
            "rayStartParams": STRINGS,
            "template": POD,
        }
    ],
}
RAY_JOB = {
    "apiVersion": STRING,
    "kind": STRING,
    "metadata": {"name": STRING, "namespace": STRING, "labels": STRINGS},
    "spec": {
        "entrypoint": STRING,
        "runtimeEnvYAML": STRING,
        "backoffLimit": INTEGER,
        "activeDeadlineSeconds": INTEGER,
        "shutdownAfterJobFinishes": BOOLEAN,
        "ttlSecondsAfterFinished": INTEGER,
        "submissionMode": STRING,
        "suspend": BOOLEAN,
        "rayClusterSpec": RAY_CLUSTER_SPEC,
    },
}
CLAIM = {
    "apiVersion": STRING,
    "kind": STRING,
    "metadata": {"name": STRING},
    "spec": {"accessModes": [STRING], "storageClassName": STRING, "resources": {"requests": STRINGS}},
}


def faults(value, schema, path="") -> list[str]:
    """Where a value leaves the schema: an unknown key, or another type."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{path}: not a mapping"]
        return [
            text
            for key, part in value.items()
            for text in (
                faults(part, schema.get(key, schema.get("*")), f"{path}.{key}")
                if key in schema or "*" in schema
                else [f"{path}.{key}"]
            )
        ]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path}: not a list"]
        return [text for i, part in enumerate(value) for text in faults(part, schema[0], f"{path}[{i}]")]
    return [] if type(value) is schema else [f"{path}: {value!r} is no {schema.__name__}"]


@pytest.fixture
def documents() -> tuple[dict, dict]:
    claim, job = yaml.safe_load_all((CLUSTERS / "kuberay.yaml").read_text())
    return claim, job


def pods(job) -> dict[str, dict]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in ({"head": cluster["headGroupSpec"]} | groups).items()}


def test_keys_and_types(documents):
    claim, job = documents
    assert faults(claim, CLAIM) == []
    assert faults(job, RAY_JOB) == []
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["submissionMode"] in {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"}


def test_faults_are_found(documents):
    _, job = documents
    cluster = job["spec"]["rayClusterSpec"]
    cluster["workerGroupSpecs"][0]["minReplica"] = 1
    cluster["headGroupSpec"]["template"]["spec"]["terminationGracePeriodSeconds"] = "120"
    cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    assert len(faults(job, RAY_JOB)) == 3


def test_groups_and_grace(documents):
    _, job = documents
    assert set(pods(job)) == {"head", "gpu", "cpu"}
    for name, pod in pods(job).items():
        (container,) = pod["containers"]
        limits = container["resources"]["limits"]
        assert ("nvidia.com/gpu" in limits) == (name == "gpu")
        assert container["resources"]["requests"] == limits
        if name != "head":
            assert pod["terminationGracePeriodSeconds"] >= 60
            command = container["lifecycle"]["preStop"]["exec"]["command"][-1]
            (notice, sleep) = re.fullmatch(
                r"python -m simla_ray\.orchestration\.spot_watch --drain-now (\d+); sleep (\d+)", command
            ).groups()
            assert int(notice) == int(sleep) < pod["terminationGracePeriodSeconds"]


def test_runs_are_shared_and_the_user_is_nobody_special(documents):
    claim, job = documents
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(job).values():
        (container,) = pod["containers"]
        assert {"name": "runs", "mountPath": "/mnt/simla_ray/runs"} in container["volumeMounts"]
        (volume,) = [v for v in pod["volumes"] if v["name"] == "runs"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        assert pod["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]
        assert container["image"] == "REGISTRY/simla-ray:VERSION"


def test_token_comes_from_a_secret(documents):
    _, job = documents
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token", "secretName": "simla-ray-token"}
    assert "RAY_AUTH_TOKEN:" not in (CLUSTERS / "kuberay.yaml").read_text()


def test_the_entry_point_is_a_command_of_ours(documents):
    _, job = documents
    words = job["spec"]["entrypoint"].split()
    assert words[:2] == ["python", "/home/ray/simla_ray/experiments/pretrain.py"]
    assert words[words.index("--name") + 1], "a second try goes on with the run of the first"
    run = load_run([], [word for word in words if "=" in word])
    gpus = next(g for g in job["spec"]["rayClusterSpec"]["workerGroupSpecs"] if g["groupName"] == "gpu")
    assert run.ray.workers == gpus["minReplicas"]


def test_rays_version_is_the_tested_one(documents):
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert documents[1]["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]


def test_dockerfile():
    lines = (CLUSTERS / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER ray"]
    assert any("--constraint constraints.txt" in line for line in lines)
    for line in lines:
        if line.startswith("COPY"):
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line
