"""Which forward a model's passes go through."""

from __future__ import annotations

from simla_ray.config.schema import Objectives
from simla_ray.models.forward import Record, forward_cross, forward_dual
from simla_ray.models.forward_merged import forward_merged
from simla_ray.models.forward_regions import forward_regions
from simla_ray.models.forward_two_stage import forward_two_stage
from simla_ray.models.model import Model
from simla_ray.models.needs import Needs
from simla_ray.models.question import forward_question
from simla_ray.models.region_merging import RegionMerging
from simla_ray.models.two_stage import TaggedRegionTower
from simla_ray.types import Batch


def forward(model: Model, batch: Batch, objectives: Objectives, needs: Needs, *, itm_eps: float = 0.0) -> Record:
    """All passes of one micro-batch, by the fusion family of the model; ``itm_eps``: see ``forward_cross``."""
    if needs.question:
        return forward_question(model, batch, objectives, needs)
    if isinstance(model.student.vision, TaggedRegionTower):
        return forward_two_stage(model, batch, objectives, needs, itm_eps=itm_eps)
    if isinstance(model.student.merging, RegionMerging):
        return forward_regions(model, batch, objectives, needs)
    if model.student.merging is not None:
        return forward_merged(model, batch, objectives, needs)
    if needs.towers_alone and model.teacher is None:
        return forward_dual(model, batch)
    return forward_cross(model, batch, objectives, needs, itm_eps=itm_eps)
