"""Command line of ``experiments/benchmark.py``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from simla_ray.config.schema import Device
from simla_ray.errors import UserError
from simla_ray.orchestration.cli import guarded


def benchmark_main(argv: Sequence[str], load_reference: Callable[[], Any]) -> int:
    """Measure and print.

    Args:
        load_reference: gives what ``step`` is measured against, see ``simla_ray.training.contenders.Reference``.
    """
    arguments = _parser().parse_args(argv)

    def main() -> int:
        try:
            print(_step(arguments, load_reference) if arguments.command == "step" else _overhead(arguments), flush=True)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
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


def _overhead(arguments: argparse.Namespace) -> str:
    from simla_ray.orchestration.overhead import measure_overhead
    from simla_ray.report.speed import overhead_lines

    rounds = _whole(arguments, "rounds")
    result = measure_overhead(_device(arguments.device), 20 if rounds is None else rounds, _say(arguments))
    return json.dumps(result) if arguments.json else f"\n{overhead_lines(result)}"


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmark.py", description="Measure what a step costs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="step | overhead")
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
        command.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    return parser
