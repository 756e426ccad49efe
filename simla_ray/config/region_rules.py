"""Rules of images that are made of regions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from simla_ray.config.enums import Augment, RegionFeatures, RegionSource, VisionSource

if TYPE_CHECKING:
    from simla_ray.config.schema import Run


def region_problems(run: Run) -> Iterator[str]:
    """Yield one line per combination that cannot work: the key to change, the value found, what is allowed."""
    regions, of_regions = run.regions, ("mrfr", "mrc", "mrckl")
    for name in of_regions if regions is None else ():
        if name in run.objectives.active():
            yield f"objectives.{name}: hides regions of the image; needs vision.source=regions"
    if (regions is not None) is not (run.vision.source is VisionSource.regions):
        found = "null" if regions is None else "given"
        yield f"regions: {found}, but vision.source={run.vision.source}; regions belong to vision.source=regions alone"
    if regions is None:
        return
    if regions.classes is not None and regions.source is RegionSource.grid:
        yield "regions.classes: cells of regions.source=grid have no box_labels; set it to null"
    tower = regions.features is RegionFeatures.tower
    if tower and regions.source is RegionSource.column:
        yield "regions.features: tower, but regions.source=column has its own features; use pixels"
    brought = run.task is not None and regions.tower is not None  # by the weights that are fine-tuned
    if tower is not (regions.weights is not None) and not (tower and brought):
        use = "name a run, an exported folder or a timm model" if tower else "set it to null"
        yield f"regions.weights: {regions.weights} with regions.features={regions.features}; {use}"
    if run.data.augment is not Augment.crop and regions.source is not RegionSource.grid:
        yield f"data.augment: {run.data.augment} turns the image away from its boxes; use crop, or regions.source=grid"
    if run.vision.weights is not None:
        yield f"vision.weights: {run.vision.weights} has no tower to go to with vision.source=regions; set it to null"
    labels = run.objectives.labels
    if labels is not None and labels.pictures == 2 and regions.source is not RegionSource.grid:
        yield "objectives.labels.pictures: 2, but rows have the regions of one; needs regions.source=grid"
