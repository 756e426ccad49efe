"""What in a run over regions is not as published, for its manifest."""

from __future__ import annotations

from pathlib import Path

from simla_ray.config.enums import RegionFeatures, RegionSource, ScheduleKind
from simla_ray.config.schema import Run
from simla_ray.orchestration.column_fallbacks import column_fallbacks


def region_fallbacks(run: Run) -> list[str]:
    """Where regions, their features and their classes come from, in place of a detector's."""
    regions, found = run.regions, []
    if regions is None:
        return found
    made = "their features are their own pixels, 8 x 8, in place of a detector's"
    if regions.features is RegionFeatures.tower:
        whose = f"{Path(regions.weights).name}'s" if regions.weights is not None else "a"
        made = f"their features are patches of {whose} frozen tower in place of a detector's"
    if regions.source is RegionSource.grid:
        found.append(f"regions: {regions.grid} x {regions.grid} cells of the image in place of a detector's; {made}")
    elif regions.source is not RegionSource.column:
        found.append(f"regions: annotated boxes of all objects and the whole image in place of a detector's; {made}")
    if {"mrc", "mrckl"} & set(run.objectives.active()):
        coded = f"{run.codes.n} codes of their features, softly"
        classes = coded if regions.classes is None else f"{len(regions.classes)} annotated ones"
        found.append(f"region classes: {classes}, in place of a detector's")
    return found


def uniter_fallbacks(run: Run) -> list[str]:
    """UNITER as published: a detector's regions, bert-base-cased to start from, images swapped with p = 0.5."""
    found = [*region_fallbacks(run), *column_fallbacks(run)]
    if run.init_from is not None:
        found.append(f"layers: start from {Path(run.init_from).name} in place of bert-base-cased")
    elif run.text.weights is None:
        found.append("layers: random start in place of bert-base-cased")
    elif run.text.weights != "bert-base-cased":
        found.append(f"layers: start from {run.text.weights} in place of bert-base-cased")
    if run.text.vocab == "train":
        found.append("vocabulary: trained on the captions in place of bert-base-cased's")
    elif run.text.vocab != "bert-base-cased":
        found.append(f"vocabulary: {run.text.vocab} in place of bert-base-cased")
    if run.schedule.kind is not ScheduleKind.sampled:
        found.append(f"schedule: {run.schedule.kind} in place of a task a step")
    found.append("words: without [SEP] at their end")
    found.append("ITM: half of a micro-batch, with images from it, in place of p = 0.5 and the whole data set")
    return found
