"""Codes of regions, fitted before the workers start: their classes where no annotation names them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from simla_ray.config.schema import Run
from simla_ray.data import pipeline
from simla_ray.data.codes import kmeans, spread_of
from simla_ray.data.index import Index
from simla_ray.models.checkpoint_io import load_tensors, save_tensors
from simla_ray.models.model import Model
from simla_ray.orchestration.region_tower import load_region_tower

REGION_CODES = "region_codes.safetensors"


def wants_region_codes(run: Run) -> bool:
    """Whether regions have no classes but their codes."""
    coded = run.regions is not None and run.regions.classes is None
    return coded and bool({"mrc", "mrckl"} & set(run.objectives.active()))


def fit_region_codes(run: Run, train: Index, folder: Path, cpus: int) -> None:
    """Fit ``codes.n`` centroids on features of the training images' regions, into ``folder``; needs a running Ray."""
    with torch.random.fork_rng(devices=[]):
        model = Model(run, run.text.vocab_size)
    load_region_tower(model, run)
    make = model.student.vision.features

    def featurise(images: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        assert make is not None  # a column's are not asked for
        return make(torch.from_numpy(images), torch.from_numpy(boxes)).numpy()

    points = pipeline.region_features(run, train, featurise, cpus)
    centroids = kmeans(points, run.codes.n, run.codes.iterations, run.seed)
    spread = torch.tensor(spread_of(points, centroids))
    save_tensors({"centroids": torch.from_numpy(centroids), "spread": spread}, folder / REGION_CODES)


def load_region_codes(model: Model, prepared: Path) -> None:
    """Give a new model the codes of its data; a checkpoint, and weights to start from, have them themselves."""
    if model.region_codes is not None and not model.region_codes.centroids.any():
        model.region_codes.load_state_dict(load_tensors(prepared / REGION_CODES))
