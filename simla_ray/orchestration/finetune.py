"""Command line of ``experiments/finetune.py``: a trained run and a task -> a run like any other."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from simla_ray.config.load import load_finetuning
from simla_ray.config.schema import Run, Task
from simla_ray.errors import UserError, guarded
from simla_ray.orchestration.cli import INTERRUPTED, run_arguments, train


def finetune_main(argv: Sequence[str]) -> int:
    """``experiments/finetune.py``"""
    parser = argparse.ArgumentParser(
        prog="finetune.py",
        description="Fine-tune the best checkpoint of a run. Architecture, vocabulary and data are the run's, unless "
        "said otherwise.",
    )
    parser.add_argument(
        "words", nargs="+", metavar="RUN task=TASK key=value",
        help=f"folder of a run, its name, or an exported folder; a task ({', '.join(Task)}); any key of the config",
    )  # fmt: skip
    parser.add_argument("--storage", type=Path, default=Path("runs"), help="folder that holds runs (default: runs)")
    run_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    return guarded(lambda: train(finetuning_from(arguments), arguments), INTERRUPTED)


def finetuning_from(arguments: argparse.Namespace) -> Run:
    """The run that a command line describes.

    Raises:
        UserError: no such run or task; a key or value that cannot be.
    """
    from simla_ray.orchestration.start import find_start
    from simla_ray.release.source import find_source

    sources = [word for word in arguments.words if "=" not in word]
    overrides = [word for word in arguments.words if "=" in word]
    if len(sources) != 1:
        found = " ".join(sources) or "none"
        raise UserError(
            f"RUN: give one run to start from, found {found}; its name under {arguments.storage}, or a path"
        )
    where = find_start(Path(sources[0]), arguments.storage)
    start = find_source(where).run
    if start is None:
        raise UserError(f"{sources[0]}: an official file brings no config; export it first (experiments/export.py)")
    overrides += [f"init_from={json.dumps(str(where))}", f"storage={json.dumps(str(arguments.storage))}"]
    if arguments.name is not None:
        overrides.append(f"name={json.dumps(arguments.name)}")
    return load_finetuning(start, arguments.config or [], overrides)
