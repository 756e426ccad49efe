"""A run's folder as a run leaves it, with random weights, and pictures to use it on."""

import json

import pytest
import torch

from simla_ray.config.load import load_run, to_yaml
from simla_ray.data.cursor import Cursor
from simla_ray.models.checkpoint_io import save_tensors
from simla_ray.models.model import Model
from simla_ray.training.optim import build_optimizer
from simla_ray.training.saver import Saver
from simla_ray.training.state import State

MANIFEST = {
    "label": "simla-tiny-kmeans128",
    "git_sha": "0123abc",
    "packages": {"simla_ray": "0.1.0", "torch": "2.13.0", "ray": "2.60.0"},
    "data": {
        "train": {"uris": ["/home/somebody/secret/train-*.parquet"], "split": None, "rows": 96, "fingerprint": "f"}
    },
    "world_size": 2,
    "cluster": {"nodes": 1},
    "fallbacks": ["visual codes: 128 kmeans codes in place of DALL-E's 8192"],
    "licenses": ["CC-BY-4.0", "CC0 | 1.0"],
}
SUMMARY = {
    "name": "mine",
    "steps": 20,
    "samples_seen": 1280,
    "best_step": 10,
    "eval": {"retrieval": {"t2i_r10": 0.25}, "data": {"n_rows": 48, "dropped": {}}},
}


def make_run_folder(folder, vocabulary, codes=None, **overrides):
    """Two checkpoints, of which step 10 is the best; returns the folder and the run."""
    run = load_run(
        overrides={"name": folder.name, "storage": str(folder.parent), "queue": 64}
        | {key.replace("__", "."): value for key, value in overrides.items()}
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(run))
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    vocabulary.save(folder / "prepared")
    if codes is not None:
        save_tensors({"centroids": codes}, folder / "prepared" / "codes.safetensors")
    for seed, step in enumerate((10, 20)):
        torch.manual_seed(seed)
        model = Model(run, len(vocabulary))
        with torch.no_grad():
            for parameter in model.student.parameters():  # so that the teacher is another model than the student
                parameter.add_(0.05 * torch.randn_like(parameter))
        state = State(step, Cursor.start(run.micro_batches), best_step=10)
        saver = Saver(folder / "checkpoints", run, model, build_optimizer(model, run.optim), folder / "prepared")
        saver(state)
        assert saver.finished(wait=True)[0].folder == f"step-{step:08d}"
    return folder, run


@pytest.fixture(scope="package")
def run_folder(tmp_path_factory, vocabulary):
    return make_run_folder(tmp_path_factory.mktemp("runs") / "mine", vocabulary, torch.rand(128, 192))[0]


@pytest.fixture(scope="package")
def exported(run_folder, tmp_path_factory):
    from simla_ray.release.export import export
    from simla_ray.release.source import find_source

    out = tmp_path_factory.mktemp("out") / "mine"
    export(find_source(run_folder), out)
    return out
