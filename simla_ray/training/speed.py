"""The cost of a step: ours against an unfused one and other methods', and against itself with single savings undone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from simla_ray.config.schema import Device, Method
from simla_ray.errors import UserError
from simla_ray.training import measure
from simla_ray.training.contenders import QUEUE, SHAPES, Contender, Reference, Workshop
from simla_ray.training.measure import Spread

OURS, UNFUSED, COMPILED = "simla_ray", "unfused", "with compile"
PARTS = ("reference", "methods", "savings")


@dataclass(frozen=True)
class Plan:
    """What to measure; None leaves a choice to the device.

    Args:
        steps: rounds that count, after those that warm up.
        only: parts of ``PARTS``.

    Raises:
        UserError: a value that cannot be; names the option.
    """

    shape: str | None = None
    batch: int | None = None
    image_px: int | None = None
    steps: int | None = None
    device: Device = Device.auto
    compile: bool = False
    only: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        for name, least, most in (("batch", 2, QUEUE), ("steps", 1, 10_000), ("image_px", 16, 4096)):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise UserError(f"--{name.replace('_', '-')}: {value} is not in {least}..{most}")
        if self.shape is not None and self.shape not in SHAPES:
            raise UserError(f"--shape: {self.shape} is not one of {', '.join(SHAPES)}")
        for name in self.only:
            if name not in PARTS:
                raise UserError(f"--only: {name} is not one of {', '.join(PARTS)}")
        if self.device is Device.gpu and not torch.cuda.is_available():
            raise UserError("--device: gpu, but this machine has no usable GPU; use cpu")

    def workshop(self) -> tuple[str, Workshop]:
        """Name of the shape, and what builds contenders of it."""
        gpu = self.device is not Device.cpu and torch.cuda.is_available()
        name = self.shape or ("base" if gpu else "cpu")
        device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        rows = self.batch or SHAPES[name].batch[gpu]
        return name, Workshop(SHAPES[name], device, rows, self.image_px, self.compile)


def measure_steps(
    plan: Plan, load_reference: Callable[[], Reference], say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Time, count and profile what the plan asks for, and say how it goes.

    Returns:
        what ``--json`` prints: our step's figures, its seconds over the unfused step's, the conditions, and a row for
        each contender under ``others`` (reference and methods) and ``savings``.

    Raises:
        UserError: no such size, too little memory, or no reference where one is needed.
    """
    name, workshop = plan.workshop()
    reference = load_reference() if {"reference", "savings"} & set(plan.only) else None
    if not workshop.gpu:
        torch.set_num_threads(1)
    setting = _setting(name, workshop)
    say(f"measure    {setting_line(setting)}")
    others = {"reference", "methods"} & set(plan.only)
    tables = {
        "others": _against_others(plan, workshop, reference, say) if others else [],
        "savings": _against_itself(plan, workshop, reference, say) if "savings" in plan.only else [],
    }
    return _result(tables, setting)


def _setting(name: str, workshop: Workshop) -> dict[str, Any]:
    run = workshop.run()
    return {
        "shape": name,
        "what": workshop.shape.what,
        "device": torch.cuda.get_device_name(workshop.device) if workshop.gpu else "cpu",
        "precision": "bf16" if workshop.gpu and torch.cuda.is_bf16_supported() else "fp32",
        "compile": workshop.compile,
        "batch": workshop.rows,
        "image_px": run.vision.image_px,
        "tokens": run.text.max_tokens,
        "queue": run.queue,
        "torch": torch.__version__,
    }


def setting_line(setting: Mapping[str, Any]) -> str:
    """The conditions in one line."""
    device = "one CPU thread" if setting["device"] == "cpu" else setting["device"]
    return (
        f"{setting['what']}, {setting['image_px']} px, {setting['tokens']} tokens, batch {setting['batch']}, "
        f"queue {setting['queue']}; {device}, {setting['precision']}{', compiled' if setting['compile'] else ''}, "
        f"torch {setting['torch']}"
    )


def _against_others(
    plan: Plan, workshop: Workshop, reference: Reference | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    say("build      models, and their FLOPs on the meta device")
    run = workshop.run()
    batch = workshop.batch(run)
    contenders = {OURS: workshop.ours(run, batch)}
    if "reference" in plan.only:
        assert reference is not None
        contenders |= workshop.unfused(reference, run, batch)
    for method in Method if "methods" in plan.only else ():
        if method is not Method.simla:
            run = workshop.run(method)
            contenders[str(method)] = workshop.ours(run, workshop.batch(run))
    return _measured(contenders, plan.steps or (20 if workshop.gpu else 9), workshop, say, inside=True)


def _against_itself(
    plan: Plan, workshop: Workshop, reference: Reference | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Each saving undone, alone, all on one model, with captions of mixed lengths so that padding shows.

    On a CPU there are too many of them for the whole batch and for a profile of each. Compiled layers would not notice
    what is undone in them: here they are not compiled, and compiling is a row of its own.
    """
    assert reference is not None
    rows = workshop.rows if workshop.gpu else max(2, workshop.rows // 2)
    say(f"build      a model for batches of {rows} with captions of mixed lengths, and what its savings are in FLOPs")
    run = workshop.run(rows=rows, compiled=False)
    eager = workshop.ours(run, workshop.batch(run, mixed=True))
    contenders = {OURS: eager}
    if plan.compile:
        contenders[COMPILED] = workshop.ours(workshop.run(rows=rows), eager.batch)
    for saving in reference.savings:
        if saving.device in (None, workshop.device.type):
            contenders[f"without {saving.name}"] = workshop.undone(saving, run, eager)
    return _measured(contenders, plan.steps or (20 if workshop.gpu else 2), workshop, say, inside=workshop.gpu)


def _measured(
    contenders: Mapping[str, Contender], rounds: int, workshop: Workshop, say: Callable[[str], None], *, inside: bool
) -> list[dict[str, Any]]:
    """Rows of ``--json``; ``inside``: profile each contender, too."""
    # With several models in one process our step was a fifth slower in the second round than in later ones.
    times = measure.interleaved(contenders, rounds, workshop.device, say, warm_up=2 if inside else 1)
    rows = []
    for name, contender in contenders.items():
        seconds, ratio = Spread.of(times[name]), Spread.of_ratio(times[name], times[OURS])
        pairs, peak = len(contender.batch), measure.peak_flops(workshop.device, contender.dtype)
        row = {
            "name": name,
            "seconds_per_step": seconds.median,
            "seconds_range": [seconds.low, seconds.high],
            "over_ours": ratio.median,
            "over_ours_range": [ratio.low, ratio.high],
            "pairs_per_s": pairs / seconds.median,
            "flops_per_pair": contender.flops / pairs,
            "mfu": contender.flops / seconds.median / peak if peak is not None else None,
            "matmul_share": None,
            "peak_memory_bytes": None,
            "rounds": rounds,
        }
        if inside:
            say(f"profile    {name}")
            found = measure.look_inside(contender, workshop.device)
            held = measure.held_bytes(contender.step.model, contender.step.optimizer)
            row |= {"matmul_share": found.matmul_share, "peak_memory_bytes": held + found.peak_bytes}
        rows.append(row)
    return rows


def _result(tables: dict[str, list[dict[str, Any]]], setting: dict[str, Any]) -> dict[str, Any]:
    rows = {row["name"]: row for row in tables["others"] or tables["savings"]}
    ours = rows[COMPILED if COMPILED in rows else OURS]
    ratios = {row["name"]: 1 / row["over_ours"] for row in tables["others"] if row["name"].startswith(UNFUSED)}
    on_cpu = setting["device"] == "cpu"
    return {
        "cpu_seconds_ratio": ratios.get(UNFUSED) if on_cpu else None,
        "gpu_seconds_ratio": None if on_cpu else ratios,
        **{n: ours[n] for n in ("pairs_per_s", "flops_per_pair", "matmul_share", "mfu", "peak_memory_bytes")},
        "setting": setting,
        **tables,
    }
