"""Rules of two towers with fused layers over both, and of what only these read: phrase concepts and tags."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from simla_ray.config.enums import ContrastScope, Fusion, KeywordSelect, TagSource, VisionSource

if TYPE_CHECKING:
    from simla_ray.config.schema import Run

#: Objectives that only two stages have, and those that they do not.
OWN = ("mcr", "wpg")
FOREIGN = {
    "mim": "patches",
    "wpa": "patches",
    "answers": "questions over whole pictures",
    "labels": "statements over whole pictures",
}


def two_stage_problems(run: Run) -> Iterator[str]:
    """Yield one line per combination that cannot work: the key to change, the value found, what is allowed."""
    on, fusion = run.objectives.active(), run.text.fusion
    if fusion is not Fusion.two_stage:
        for name in OWN:
            if name in on:
                yield f"objectives.{name}: needs text.fusion=two_stage, found {fusion}"
        if run.text.concepts:
            yield f"text.concepts: {run.text.concepts}, which text.fusion={fusion} does not read; set it to 0"
        if run.tags is not None:
            yield f"tags: given, which text.fusion={fusion} does not read; set it to null"
        return
    if run.vision.source is not VisionSource.regions:
        yield f"vision.source: {run.vision.source} does not go with text.fusion=two_stage; use regions"
    if run.text.depth < 2:
        yield f"text.depth: {run.text.depth} has no halves for text.fusion=two_stage; use at least 2"
    if run.tags is None:
        yield "tags: null, but text.fusion=two_stage reads [CLS] before them; without words use tags.source=none"
    elif run.tags.source is TagSource.none and "mcr" in on:
        yield "objectives.mcr: tags.source=none leaves nothing to recover; set it to null"
    if run.tags is not None and run.tags.max_tokens > run.text.max_positions:
        found = run.tags.max_tokens
        yield f"tags.max_tokens: {found} is more than text.max_positions={run.text.max_positions}"
    if run.text.length > run.text.max_positions:
        yield (
            f"text.max_positions: {run.text.max_positions} is less than the {run.text.length} tokens of "
            f"text.max_tokens={run.text.max_tokens} and text.concepts={run.text.concepts}"
        )
    if "wpg" in on and not run.text.concepts:
        yield "text.concepts: 0 leaves wpg no phrases to ground; use 5, or set objectives.wpg to null"
    if "wpg" in on and run.batch.micro == 1:
        yield "batch.micro: 1 leaves wpg no other image; use at least 2"
    for name, reads in FOREIGN.items():
        if name in on:
            yield f"objectives.{name}: reads {reads}, which text.fusion=two_stage does not have; set it to null"
    psl = run.objectives.psl if "psl" in on else None
    if psl is not None and psl.select is KeywordSelect.attention:
        yield "objectives.psl.select: attention needs words that read the image; use content, tfidf or random"
    if run.teacher is not None:
        yield "teacher: text.fusion=two_stage has no use for one; set teacher=null"
    if run.text.weights is not None:
        yield f"text.weights: {run.text.weights} is one stack, text.fusion=two_stage has three; set it to null"
    if run.objectives.itc is not None and run.objectives.itc.scope is ContrastScope.step:
        yield "objectives.itc.scope: step does not go with text.fusion=two_stage; use micro"
