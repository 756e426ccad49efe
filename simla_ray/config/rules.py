"""Rules over several keys. Each problem is one line: the key to change, the value found, what is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from simla_ray.config.enums import (
    CodesKind,
    ContrastLoss,
    ContrastScope,
    Fusion,
    KeywordSelect,
    MimTeacherText,
    Negatives,
    Recommend,
    ScheduleKind,
    Side,
    Stem,
    Task,
    VisionSource,
)
from simla_ray.config.region_rules import region_problems
from simla_ray.config.two_stage_rules import two_stage_problems

if TYPE_CHECKING:
    from simla_ray.config.schema import Run

#: Objectives of fine-tuning: their texts are questions and statements, not captions.
OF_TASKS = ("answers", "labels")
#: Task -> objectives of which it needs one.
TASKS = {
    Task.retrieval: ("itc", "itm"),
    Task.grounding: ("itm",),
    Task.vqa: ("answers",),
    Task.entailment: ("labels",),
    Task.nlvr: ("labels",),
    Task.nlvr2: ("labels",),
}
#: Metric that may pick the best checkpoint -> objective that gives it.
VALIDATION_METRICS = {
    "retrieval_r10": "itc",
    "itm_accuracy": "itm",
    "mlm_accuracy": "mlm",
    "mim_accuracy": "mim",
    "keyword_ap": "psl",
    "answers_accuracy": "answers",
    "labels_accuracy": "labels",
    "last": None,
}


def problems_of(run: Run) -> Iterator[str]:
    """Yield one line per combination that cannot work: the key to change, the value found, what is allowed."""
    on = run.objectives.active()
    micro, total = run.batch.micro, run.batch.global_
    if not on:
        names = "itc, itm, mlm, mim, psl, wpa, mrfr, mrc, mrckl, mcr, wpg"
        yield f"objectives: none is on; give at least one of {names} a weight above 0"
    if run.task is not None and not set(TASKS[run.task]) & set(on):
        wanted = " or ".join(f"objectives.{name}" for name in TASKS[run.task])
        yield f"task: {run.task} needs {wanted}; on are {', '.join(on) or 'none'}"
    for name in OF_TASKS:
        if name in on and len(on) > 1:
            yield f"objectives.{name}: reads other texts than {', '.join(o for o in on if o != name)}; switch one off"
    if "answers" in on and run.objectives.answers.max_tokens > run.text.max_positions:  # type: ignore[union-attr]
        found = run.objectives.answers.max_tokens  # type: ignore[union-attr]
        yield f"objectives.answers.max_tokens: {found} is more than text.max_positions={run.text.max_positions}"
    if total % micro:
        yield f"batch.global: {total} is not a multiple of batch.micro={micro}"
    elif run.micro_batches < run.ray.workers:
        yield (
            f"ray.workers: {run.ray.workers} is more than the {run.micro_batches} micro-batches of a step "
            f"(batch.global={total} / batch.micro={micro})"
        )
    if run.ray.min_workers is not None and run.ray.min_workers > run.ray.workers:
        yield f"ray.min_workers: {run.ray.min_workers} is more than ray.workers={run.ray.workers}"
    if run.data.weights is not None and len(run.data.weights) != len(run.data.train):
        yield f"data.weights: {len(run.data.weights)} values for the {len(run.data.train)} URIs of data.train"
    worlds = {name: any(u.startswith("world:") for u in getattr(run.data, name)) for name in ("train", "val")}
    if worlds["train"] != worlds["val"]:
        yield f"data.val: {run.data.val} and data.train: {run.data.train} must both be the built-in world, or neither"
    if worlds["train"] and run.world.n_train < total:
        yield f"world.n_train: {run.world.n_train} scenes are less than one step takes (batch.global={total})"
    elif worlds["train"] and round(run.data.fraction * run.world.n_train) < total:
        yield (
            f"data.fraction: {run.data.fraction} of world.n_train={run.world.n_train} scenes is less than one step "
            f"takes (batch.global={total})"
        )
    if worlds["val"] and run.world.n_val < micro:
        yield f"world.n_val: {run.world.n_val} scenes are less than one micro-batch (batch.micro={micro})"
    if micro == 1 and ("itm" in on or "wpa" in on or ("itc" in on and run.queue == 0)):
        yield "batch.micro: 1 leaves no negatives for itm, itc and wpa; use at least 2"
    if run.data.decode_cpus < run.ray.workers:
        yield f"data.decode_cpus: {run.data.decode_cpus} is less than one for each of ray.workers={run.ray.workers}"
    if run.objectives.itm is not None and run.objectives.itm.eps == 0 and run.objectives.itm.eps_end is not None:
        yield f"objectives.itm.eps_end: {run.objectives.itm.eps_end} is not reached from objectives.itm.eps=0"
    if run.queue % total:
        yield f"queue: {run.queue} is not a multiple of batch.global={total}"
    if run.queue and run.teacher is None:
        yield f"queue: {run.queue} keys need a teacher to make them; set teacher.m, or queue=0"
    if run.vision.image_px % run.vision.patch_px:
        yield f"vision.image_px: {run.vision.image_px} is not a multiple of vision.patch_px={run.vision.patch_px}"
    if run.vision.stem is Stem.conv and run.vision.patch_px % 4:
        yield f"vision.patch_px: {run.vision.patch_px} must be a multiple of 4 with vision.stem=conv"
    if run.text.width % run.text.heads:
        yield f"text.width: {run.text.width} is not a multiple of text.heads={run.text.heads}"
    if run.text.max_tokens > run.text.max_positions:
        yield f"text.max_tokens: {run.text.max_tokens} is more than text.max_positions={run.text.max_positions}"
    if run.teacher is None:
        for name, objective in on.items():
            if getattr(objective, "soft_alpha", 0) > 0:
                alpha = objective.soft_alpha  # type: ignore[attr-defined]
                yield f"objectives.{name}.soft_alpha: {alpha} needs a teacher; set teacher.m or soft_alpha=0"
    if "mim" in on:
        if run.grid**2 + 1 > run.text.max_positions:
            yield (
                f"text.max_positions: {run.text.max_positions} is less than the {run.grid**2 + 1} image tokens "
                "that mim sends through the text stack"
            )
        if run.codes.kind is CodesKind.dvae and run.codes.n != 8192:
            yield f"codes.n: {run.codes.n}, but the dVAE has 8192 codes"
        if run.codes.kind is not CodesKind.kmeans and run.codes.source is None:
            yield f"codes.source: missing; codes.kind={run.codes.kind} needs the file or run to read from"
        teacher_text = on["mim"].teacher_text  # type: ignore[attr-defined]
        if teacher_text is MimTeacherText.student_redraw and run.text.dropout and run.teacher is None:
            yield "objectives.mim.teacher_text: student_redraw needs a teacher"
    itc, temperature = run.objectives.itc, run.temperature
    if not temperature.min <= temperature.init <= temperature.max:
        yield (
            f"temperature.init: {temperature.init} is not between temperature.min={temperature.min} and "
            f"temperature.max={temperature.max}"
        )
    if itc is not None and "itc" in on:
        alone = set(on) == {"itc"} and run.teacher is None
        if itc.scope is ContrastScope.step and not alone:
            others = ", ".join(name for name in on if name != "itc") or "the teacher"
            yield f"objectives.itc.scope: step needs two towers alone, found {others}; use micro"
        if itc.loss is ContrastLoss.sigmoid and (run.queue or itc.soft_alpha > 0):
            yield "objectives.itc.loss: sigmoid knows no queue and no soft targets; set queue=0 and soft_alpha=0"
    yield from _merged_problems(run)
    yield from region_problems(run)
    yield from two_stage_problems(run)
    if run.text.fusion is Fusion.upper_half:
        if run.text.depth < 2:
            yield f"text.depth: {run.text.depth} has no halves for text.fusion=upper_half; use at least 2"
        if "mim" in on:
            yield "text.fusion: upper_half has no layers in which images could read words; mim needs every_layer"
    if "psl" in on:
        psl = run.objectives.psl
        assert psl is not None
        if psl.recommend is Recommend.hard and not psl.recommend_threshold and psl.recommend_top_k is None:
            yield "objectives.psl.recommend: hard needs recommend_threshold > 0 or recommend_top_k"
        if run.teacher is None and psl.select is KeywordSelect.attention and psl.attention is Side.teacher:
            yield "objectives.psl.attention: teacher, but teacher is null; use student"
        if run.teacher is None and psl.image_source is Side.teacher:
            yield "objectives.psl.image_source: teacher, but teacher is null; use student"
    phases = run.schedule.phases
    if (run.schedule.kind is ScheduleKind.phases) != bool(phases):
        yield "schedule.phases: must be given with schedule.kind=phases, and only then"
    if phases:
        ends = [p.until for p in phases]
        if ends != sorted(set(ends)) or ends[-1] != 1.0:
            yield f"schedule.phases: until must rise to 1.0, found {ends}"
        for i, phase in enumerate(phases):
            if set(phase.objectives) & set(on) == {"psl"} and run.objectives.psl and run.objectives.psl.start_step:
                yield f"schedule.phases.{i}.objectives: psl alone, but objectives.psl.start_step keeps it off at first"
            if not set(phase.objectives) & set(on):
                yield f"schedule.phases.{i}.objectives: {phase.objectives} names nothing that is on ({', '.join(on)})"
    mix = run.schedule.mix
    if mix and run.schedule.kind is not ScheduleKind.sampled:
        yield "schedule.mix: only read with schedule.kind=sampled"
    if set(mix) - set(on):
        yield f"schedule.mix: {', '.join(sorted(set(mix) - set(on)))} is not on; on are {', '.join(on)}"
    if "wpa" in mix and {"wpa", "itm"} <= set(on):
        yield f"schedule.mix: wpa={mix['wpa']:g} is not read; it comes with itm, whose pass it shares"
    if min(mix.values(), default=0) < 0 or (set(mix) >= set(on) and not sum(mix.values())):
        yield f"schedule.mix: {dict(mix)} must not be negative, and not all zero"
    if run.optim.min_lr > run.optim.lr:
        yield f"optim.min_lr: {run.optim.min_lr} is more than optim.lr={run.optim.lr}"
    if run.vision.width is not None and run.vision.heads is not None and run.vision.width % run.vision.heads:
        yield f"vision.width: {run.vision.width} is not a multiple of vision.heads={run.vision.heads}"
    if run.eval.best not in VALIDATION_METRICS:
        yield f"eval.best: {run.eval.best} is not one of {', '.join(VALIDATION_METRICS)}"
    elif VALIDATION_METRICS[run.eval.best] is not None and VALIDATION_METRICS[run.eval.best] not in on:
        yield f"eval.best: {run.eval.best} needs objectives.{VALIDATION_METRICS[run.eval.best]}"


def _merged_problems(run: Run) -> Iterator[str]:
    """One stack over words and patches: what it needs, and what stands on towers that it does not have."""
    on, merged = run.objectives.active(), run.text.fusion is Fusion.merged
    if run.text.fusion is Fusion.two_stage:
        return
    sources = (VisionSource.patches, VisionSource.regions) if merged else (VisionSource.vit,)
    if run.vision.source not in sources:
        wanted = " or ".join(sources)
        yield f"vision.source: {run.vision.source} does not go with text.fusion={run.text.fusion}; use {wanted}"
    elif (run.vision.source is VisionSource.patches) is not (run.text.depth == 0):
        of_regions = run.vision.source is VisionSource.regions
        found = f"vision.source={run.vision.source}" if of_regions else f"text.fusion={run.text.fusion}"
        wanted = "0: the layers are the Vision Transformer's (vision.depth)" if run.text.depth else "at least 1"
        yield f"text.depth: {run.text.depth} does not go with {found}; use {wanted}"
    if not merged:
        if "wpa" in on:
            yield f"objectives.wpa: needs text.fusion=merged, found {run.text.fusion}"
        return
    for name in ("itc", "mim", "psl"):
        if name in on:
            yield f"objectives.{name}: reads towers that text.fusion=merged does not have; set it to null"
    if run.teacher is not None:
        yield "teacher: text.fusion=merged has no use for one; set teacher=null"
    if run.text.weights is not None and run.vision.source is VisionSource.patches:
        yield f"text.weights: {run.text.weights} has no layers to go to with text.fusion=merged; set it to null"
    of_patches = run.vision.source is VisionSource.patches
    if of_patches and run.vision.width is not None and run.vision.width != run.text.width:
        yield f"text.width: {run.text.width} must equal vision.width={run.vision.width} with text.fusion=merged"
    if run.objectives.itm is not None and "itm" in on and run.objectives.itm.negatives is not Negatives.random:
        found = run.objectives.itm.negatives
        yield f"objectives.itm.negatives: {found} needs the similarities of itc; use random with text.fusion=merged"
