"""The command line: parse, call one function, print."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from simla_ray.data.convert.command import (
    at_least,
    options_of,
    print_outcome,
    reading_arguments,
    say,
    tasks_of,
    writing_arguments,
)
from simla_ray.errors import UserError, guarded

NAMES = ("regions", "tags", "phrases")
GRID, TAGS, THRESHOLD = 7, 10, 0.1
#: Options that only one of the names understands.
OF = {"grid": "regions", "tags": "tags", "tag_threshold": "tags"}

DESCRIPTION = """\
Write a data set as sharded Parquet with what UNITER and MVPTR read beside pictures and captions.

  python -m simla_ray.orchestration.annotate pairs.csv --to annotated --with regions,tags,phrases --run RUN

regions   region_feats and boxes: patches of the run's image tower under the boxes of all objects and the whole
          image, the largest first, as regions.features=tower makes them in training; of a picture without boxes
          under the cells of a grid
tags      tags: nouns that the run's keyword head (psl) finds likelier in the picture than they are in a caption;
          captions are not read for them
phrases   phrases: objects, attributes and relations that the captions say, by rules; phrases with boxes stay

A URI is what python -m simla_ray.data.convert reads."""

EPILOG = """\
Train with regions.source=column, tags.source=column and concepts.source=column on the new folder. All other columns
are kept; region_feats and tags may not be there before. Rows that cannot be used are named in dropped.jsonl with the
reason, manifest.json names the run and counts what was added. What was interrupted goes on with the same command."""


def main(argv: Sequence[str]) -> int:
    """``python -m simla_ray.orchestration.annotate``; exit code 0, 2 for mistakes of the user."""
    arguments = _parser().parse_args(argv)
    return guarded(lambda: _annotate(arguments), "interrupted; the same command goes on")


def _annotate(arguments: argparse.Namespace) -> int:
    names = _names(arguments)
    options, tasks = options_of(arguments), tasks_of(arguments)
    from simla_ray.orchestration.annotate.annotation import Asked, annotate

    asked = Asked(
        names,
        arguments.run,
        grid=at_least(arguments, "grid", 1, GRID, 32),
        tags=at_least(arguments, "tags", 1, TAGS, 1000),
        threshold=_share(arguments.tag_threshold),
    )
    manifest = annotate(arguments.uris, arguments.to, asked, options, tasks, arguments.address, say, arguments.storage)
    print_outcome(manifest)
    return 0


def _names(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Of ``--with``, in our order.

    Raises:
        UserError: one of them is unknown, or an option is about another.
    """
    given = [name.strip() for name in arguments.names.split(",")]
    for name in given:
        if name not in NAMES:
            raise UserError(f"--with: {name or 'nothing'} is not one of {', '.join(NAMES)}")
    for option, name in OF.items():
        if name not in given and getattr(arguments, option) is not None:
            raise UserError(f"--{option.replace('_', '-')}: is about {name}; found --with {arguments.names}")
    if arguments.run is None and set(given) != {"phrases"}:
        raise UserError(f"--run: not given; --with {arguments.names} needs a trained run")
    if arguments.run is not None and set(given) == {"phrases"}:
        raise UserError(f"--run: {arguments.run}, but phrases are read by rules and need none")
    return tuple(name for name in NAMES if name in given)


def _share(value: float | None) -> float:
    if value is None:
        return THRESHOLD
    if not 0 <= value < 1:
        raise UserError(f"--tag-threshold: {value}, must be 0 or more and below 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simla_ray.orchestration.annotate",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    reading_arguments(parser)
    add: Callable[..., Any] = parser.add_argument
    add("--to", metavar="FOLDER", required=True, help="the new folder on disk")
    add("--with", dest="names", metavar="NAMES", required=True, help=f"some of {','.join(NAMES)}")
    add(
        "--run",
        type=Path,
        metavar="RUN",
        help="folder of a run, its name, or an exported folder; with a cluster one that all nodes share",
    )
    add("--storage", type=Path, default=Path("runs"), help="folder that holds runs (default: runs)")
    add("--grid", type=int, metavar="N", help=f"cells a side of a picture without boxes (default: {GRID})")
    add("--tags", type=int, metavar="N", help=f"tags of a picture at most (default: {TAGS})")
    add(
        "--tag-threshold",
        type=float,
        metavar="P",
        help=f"words that the keyword head gives a smaller probability are no tags (default: {THRESHOLD})",
    )
    writing_arguments(parser)
    return parser
