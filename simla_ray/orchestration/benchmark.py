"""Command line of ``experiments/benchmark.py``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from simla_ray.config.schema import Device
from simla_ray.errors import UserError, guarded


def benchmark_main(argv: Sequence[str], load_reference: Callable[[], Any]) -> int:
    """Measure and print.

    Args:
        load_reference: gives what ``step`` is measured against, see ``simla_ray.training.contenders.Reference``.
    """
    arguments = _parser().parse_args(argv)

    def main() -> int:
        print(COMMANDS[arguments.command](arguments, load_reference), flush=True)
        return 0

    return guarded(main)


def _step(arguments: argparse.Namespace, load_reference: Callable[[], Any]) -> str:
    from simla_ray.report.speed import speed_tables
    from simla_ray.training.speed import PARTS, Plan, measure_steps

    plan = Plan(
        shape=arguments.shape,
        batch=_whole(arguments, "batch"),
        image_px=_whole(arguments, "image_px"),
        steps=_whole(arguments, "steps"),
        device=_device(arguments.device),
        compile=arguments.compile,
        only=tuple(arguments.only.split(",")) if arguments.only is not None else PARTS,
    )
    result = measure_steps(plan, load_reference, _say(arguments))
    return json.dumps(result) if arguments.json else f"\n{speed_tables(result)}"


def _data(arguments: argparse.Namespace, _: Callable[[], Any]) -> str:
    from simla_ray.orchestration.ingest import ROWS, Plan, measure_ingest
    from simla_ray.report.speed import ingest_tables

    try:
        sides = tuple(int(side) for side in arguments.px.split(",")) if arguments.px is not None else tuple(ROWS)
    except ValueError:
        raise UserError(f"--px: {arguments.px} is not a list of whole numbers") from None
    given = {name: _whole(arguments, name) for name in ("rows", "tasks")}
    wanted = _whole(arguments, "pairs_per_s")
    plan = Plan(px=sides, **{name: value for name, value in given.items() if value is not None})
    result = measure_ingest(plan, _say(arguments))
    return json.dumps(result) if arguments.json else f"\n{ingest_tables(result, wanted or 1000)}"


def _overhead(arguments: argparse.Namespace, _: Callable[[], Any]) -> str:
    from simla_ray.orchestration.overhead import measure_overhead
    from simla_ray.report.speed import overhead_lines

    rounds = _whole(arguments, "rounds")
    result = measure_overhead(_device(arguments.device), 20 if rounds is None else rounds, _say(arguments))
    return json.dumps(result) if arguments.json else f"\n{overhead_lines(result)}"


def _rerank(arguments: argparse.Namespace, _: Callable[[], Any]) -> str:
    from simla_ray.orchestration.rerank import Plan, measure_rerank
    from simla_ray.report.speed import rerank_table

    given: dict[str, Any] = {"shape": arguments.shape, "candidates": _whole(arguments, "candidates")}
    if arguments.px is not None:
        try:
            given["px"] = tuple(int(side) for text in arguments.px for side in text.split(","))
        except ValueError:
            raise UserError(f"--px: {' '.join(arguments.px)} is not a list of whole numbers") from None
    plan = Plan(**{name: value for name, value in given.items() if value is not None})
    result = measure_rerank(plan, _say(arguments))
    return json.dumps(result) if arguments.json else f"\n{rerank_table(result)}"


def _say(arguments: argparse.Namespace) -> Callable[[str], None]:
    """With --json stdout is for the one object."""
    return lambda line: print(line, file=sys.stderr if arguments.json else sys.stdout, flush=True)


def _whole(arguments: argparse.Namespace, name: str) -> int | None:
    text = getattr(arguments, name)
    try:
        return int(text) if text is not None else None
    except ValueError:
        raise UserError(f"--{name.replace('_', '-')}: {text} is not a whole number") from None


def _device(name: str) -> Device:
    if name not in list(Device):
        raise UserError(f"--device: {name} is not one of {', '.join(Device)}")
    return Device(name)


COMMANDS = {"step": _step, "overhead": _overhead, "data": _data, "rerank": _rerank}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description="Measure what a step, its data and re-ranking cost."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="step | overhead | data | rerank")
    step = commands.add_parser(
        "step",
        help="our step against an unfused one, against other methods, and with single savings undone",
        description="Time our step and others in turn, count their FLOPs, and look where the time goes. By default "
        "ViT-S/16 on a CPU, which takes about eight minutes, and ViT-B/16 on a GPU.",
    )
    step.add_argument("--shape", help="cpu (ViT-S/16 at 224 px), base (ViT-B/16 at 256 px) or tiny (seconds)")
    step.add_argument("--batch", metavar="N", help="pairs per step (default: 4 on a CPU, 64 on a GPU; tiny: 32)")
    step.add_argument("--image-px", metavar="N", help="side of an image in pixels")
    step.add_argument("--steps", metavar="N", help="rounds that count (default: 9, 2 with savings undone; on a GPU 20)")
    step.add_argument("--compile", action="store_true", help="torch.compile our layers")
    step.add_argument("--only", metavar="A,B", help="parts of reference,methods,savings")
    overhead = commands.add_parser(
        "overhead",
        help="what Ray Train and the training loop add to a step",
        description="Alternate bare steps and the loop of a real run inside one Ray Train worker, with the same steps.",
    )
    overhead.add_argument("--rounds", metavar="N", help="blocks of bare steps and of the loop's (default: 20)")
    for command in (step, overhead):
        command.add_argument("--device", default="auto", help="auto, cpu or gpu")
    data = commands.add_parser(
        "data",
        help="how fast samples come, against a torch DataLoader and a plain loop with as many processes",
        description="Make the same training samples from the same JPEGs in every way, in turn, and look at memory. By "
        "default 20,000 JPEGs of 256 px and 5,000 of 1024 px, which takes about ten minutes on two cores.",
    )
    data.add_argument("--px", metavar="A,B", help="sides of the JPEGs (default: 256,1024)")
    data.add_argument("--rows", metavar="N", help="JPEGs of an epoch (default: 20000 of 256 px, 5000 of 1024 px)")
    data.add_argument("--tasks", metavar="N", help="processes that make samples (default: 2)")
    data.add_argument("--pairs-per-s", metavar="N", help="say how many cores give so many pairs/s (default: 1000)")
    rerank = commands.add_parser(
        "rerank",
        help="what a candidate of re-ranking costs, against the whole stack for each",
        description="Score the same pairs of images and texts with what they share computed once, and with the whole "
        "stack run for every pair, in turn. By default ViT-B/16 and BERT-base with 4,000 candidates, which takes hours "
        "on one CPU thread; a few hundred give the same ratio.",
    )
    rerank.add_argument("--shape", help="cpu (ViT-S/16), base (ViT-B/16; default) or tiny (seconds)")
    rerank.add_argument("--px", nargs="+", metavar="N", help="sides of the images (default: 384 256)")
    rerank.add_argument("--candidates", metavar="N", help="pairs, 100 an image (default: 4000)")
    for command in (step, overhead, data, rerank):
        command.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    return parser
