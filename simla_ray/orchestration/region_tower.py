"""The frozen image tower whose patches are the features of regions: found, and loaded into a new model."""

from __future__ import annotations

from pathlib import Path

import timm
import torch

from simla_ray.config.enums import RegionFeatures, VisionSource
from simla_ray.config.schema import Run, Vision
from simla_ray.errors import UserError
from simla_ray.models.checkpoint_io import load_strict
from simla_ray.models.model import Model
from simla_ray.models.vision import VisionTower
from simla_ray.orchestration.runs import begun_run, find_run
from simla_ray.release.source import Source, find_source

TOWER = "student.vision."


def with_tower(run: Run) -> Run:
    """The run with the tower that ``regions.weights`` names described in ``regions.tower``.

    Of a run that goes on from a checkpoint it is the stored description: the tower is in the checkpoint, and what
    ``regions.weights`` names may be gone.

    Raises:
        UserError: it is neither a run, an exported folder nor a timm name, or sees images of another size.
    """
    regions = run.regions
    if regions is None or regions.features is not RegionFeatures.tower or regions.tower is not None:
        return run
    begun = begun_run(run)
    if begun is not None and begun.regions is not None and begun.regions.tower is not None:
        known = begun.regions
        if str(known.weights) in (regions.weights, str(Path(str(regions.weights)).absolute())):
            described = {"weights": known.weights, "tower": known.tower}
            return run.model_copy(update={"regions": regions.model_copy(update=described)})
    source = _source(run)
    if source is not None:
        assert source.run is not None
        tower = source.run.vision
        if tower.source is not VisionSource.vit:
            raise UserError(
                f"regions.weights: {regions.weights} has no tower of its own (vision.source={tower.source})"
            )
    else:
        assert regions.weights is not None
        with torch.device("meta"):
            patch_px = timm.create_model(regions.weights, num_classes=0).patch_embed.patch_size[0]
        tower = Vision(timm=regions.weights, image_px=run.vision.image_px, patch_px=patch_px)
    if tower.image_px != run.vision.image_px:
        found = f"{regions.weights} sees images of {tower.image_px} px, this run vision.image_px={run.vision.image_px}"
        raise UserError(f"regions.weights: {found}")
    described = tower.model_copy(update={"pretrained": False, "weights": None})
    return run.model_copy(update={"regions": regions.model_copy(update={"tower": described})})


def load_region_tower(model: Model, run: Run) -> None:
    """Give a new model the tower's weights; a checkpoint has them itself, and what is fine-tuned brings them."""
    if run.regions is None or run.regions.tower is None or run.task is not None:
        return
    tower, source = model.student.vision.features.tower, _source(run)
    if source is None:
        with torch.random.fork_rng(devices=[]):
            fetched = VisionTower(run.regions.tower.model_copy(update={"pretrained": True}), maskable=False)
        tower.load_state_dict(fetched.state_dict())
        return
    mine = {name: t for name, t in source.read().tensors.items() if name.startswith(TOWER)}
    given = {name.removeprefix(TOWER): tensor for name, tensor in mine.items()}
    given.pop("mask_token", None)
    load_strict(tower, given, source.file)


def _source(run: Run) -> Source | None:
    """The run or exported folder that ``regions.weights`` names; None for a timm name."""
    assert run.regions is not None and run.regions.weights is not None
    if run.regions.weights in timm.list_models():
        return None
    try:
        return find_source(find_run(Path(run.regions.weights), run.storage))
    except UserError as error:
        raise UserError(f"regions.weights: {error}; nor is it a timm model") from None
