"""What in a run over tags, regions and phrase concepts is not as published, for its manifest."""

from __future__ import annotations

from pathlib import Path

from simla_ray.config.enums import ConceptSource, TagSource
from simla_ray.config.schema import Run
from simla_ray.orchestration.column_fallbacks import column_fallbacks
from simla_ray.orchestration.region_fallbacks import region_fallbacks


def mvptr_fallbacks(run: Run) -> list[str]:
    """MVPTR as published: VinVL's regions and tags, phrases of the SPICE parser, BERT weights to start from."""
    found = [*region_fallbacks(run), *column_fallbacks(run)]
    if run.tags is not None and run.tags.source is TagSource.none:
        lost = "" if "mcr" in run.objectives.active() else ", and so nothing for MCR to recover"
        found.append(f"tags: none in place of a detector's{lost}")
    elif run.tags is not None and run.tags.source is TagSource.box_labels:
        found.append("tags: annotated labels of all objects in place of a detector's")
    if run.text.concepts and run.concepts.source is ConceptSource.rules:
        found.append("phrase concepts: read from the captions by rules in place of the SPICE parser")
    if run.init_from is not None:
        found.append(f"layers: start from {Path(run.init_from).name} in place of bert-base-uncased")
    elif run.text.weights is None:
        found.append("layers: random start in place of bert-base-uncased")
    if run.text.vocab == "train":
        found.append("vocabulary: trained on the captions in place of bert-base-uncased's")
    return found
