"""The command line: parse, call one function, print."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simla_ray.config.schema import Data
from simla_ray.data.convert.plan import Options
from simla_ray.errors import UserError, guarded

MAX_PIXELS = Data.model_fields["max_pixels"].default
#: What only a conversion understands, and what only a check does.
OF_CONVERSION = ("shard_mb", "row_group_mb", "max_px")
OF_CHECK = ("val", "val_split", "page")

DESCRIPTION = """\
Convert any source to sharded Parquet, or check a data set.

  python -m simla_ray.data.convert pairs.csv --to converted
  python -m simla_ray.data.convert --check converted --val val.parquet

A URI is a file, a folder or a glob: Parquet, webdataset .tar, JSON, CSV, TSV, a folder of images; Parquet and tars
also from s3:// and gs://. Where endings do not tell, the format is named: tar:s3://bucket/shards, json:dump.txt;
parquet, tar, json, coco, csv, tsv, folder."""

EPILOG = """\
Columns of the row are kept (uid, image, captions, image_id, keywords, phrases, boxes, box_labels, qas, statements,
images, split, source, license, region_feats, tags), others are left behind. Rows that cannot be used are named in
dropped.jsonl with the reason, the file and the row's number (from 0). Of rows with one uid the first is kept. A
conversion that was interrupted goes on with the same command. --check ends with exit code 0 if every row can be used,
no uid comes twice and no picture is in both sets. What it names in parentheses is for you to judge: pictures that look
alike, and uids that are in both sets."""


def main(argv: Sequence[str]) -> int:
    """``python -m simla_ray.data.convert``; exit code 0, 1 if a check found something, 2 for mistakes of the user."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.check:
        return guarded(lambda: _check(arguments))
    return guarded(lambda: _convert(arguments), "interrupted; the same command goes on")


def _convert(arguments: argparse.Namespace) -> int:
    if arguments.to is None:
        raise UserError("--to: not given; name the folder to convert into, or use --check")
    _refuse(arguments, OF_CHECK, "only with --check")
    options = options_of(arguments, None if arguments.max_px is None else at_least(arguments, "max_px", 16, 16))
    tasks = tasks_of(arguments)
    from simla_ray.data.convert.conversion import convert

    print_outcome(convert(arguments.uris, arguments.to, options, tasks, arguments.address, say))
    return 0


def print_outcome(manifest: Mapping[str, Any]) -> None:
    """What became of the rows, from the manifest."""
    from simla_ray.data.convert.progress import aligned, clock, in_bytes

    dropped = [[f"  {reason}", f"{n:,}"] for reason, n in manifest["dropped"].items()]
    rows = [
        ["rows in", f"{manifest['rows_in']:,}"],
        ["rows out", f"{manifest['rows']:,}"],
        ["dropped", f"{manifest['rows_in'] - manifest['rows']:,}"],
        *dropped,
        *([name.replace("_", " "), f"{n:,}"] for name, n in manifest.get("annotation", {}).get("counts", {}).items()),
        ["shards", f"{len(manifest['shards']):,}"],
        ["bytes", in_bytes(manifest["bytes"])],
        ["time", clock(manifest["seconds"])],
    ]
    print("\n" + aligned(rows, right=(1,)))


def _check(arguments: argparse.Namespace) -> int:
    if arguments.to is not None:
        raise UserError("--check: writes no rows, so it takes no --to")
    _refuse(arguments, OF_CONVERSION, "only with --to")
    if arguments.val_split is not None and arguments.val is None:
        raise UserError(f"--val-split: {arguments.val_split}, but no --val is given")
    max_pixels, roots = at_least(arguments, "max_pixels", 1024, MAX_PIXELS), roots_of(arguments)
    tasks = tasks_of(arguments)
    from simla_ray.data.convert.check import check, findings_table
    from simla_ray.data.convert.page import write_page

    sets = {"train": (arguments.uris, arguments.split)}
    if arguments.val:
        sets["val"] = (arguments.val, arguments.val_split)
    page = Path(arguments.page or "check.html")
    if not page.absolute().parent.is_dir():
        raise UserError(f"--page: {page.parent} is no folder")
    result = check(sets, roots, max_pixels, tasks, arguments.address, say)
    print("\n" + findings_table(result))
    write_page(result, page)
    print(f"page       {page}")
    return 1 if result.found else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simla_ray.data.convert",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    reading_arguments(parser)
    add: Callable[..., Any] = parser.add_argument
    add("--to", metavar="FOLDER", help="convert into this folder on disk")
    add("--check", action="store_true", help="read and decode every row, write nothing but a page")
    convert = parser.add_argument_group("with --to")
    writing_arguments(convert)
    convert.add_argument(
        "--max-px",
        type=int,
        metavar="N",
        help="reduce larger images to this longer side: PNG, GIF and BMP become PNG, others JPEG of quality 90, "
        "transparency goes; images that are small enough keep their bytes",
    )
    check = parser.add_argument_group("with --check").add_argument
    check("--val", nargs="+", metavar="URI", help="validation set: no picture of it may be among the others")
    check("--val-split", metavar="NAME", help="--split of the validation set")
    check("--page", metavar="FILE", help="statistics, findings and samples (default: check.html)")
    return parser


def reading_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command understands that reads any source with Ray Data."""
    add: Callable[..., Any] = parser.add_argument
    add("uris", nargs="+", metavar="URI", help="what to read")
    add("--split", metavar="NAME", help="keep only rows whose split column has this value")
    add(
        "--image-root",
        action="append",
        default=[],
        metavar="DIR",
        help="folder that image paths of lists may point into (default: the list's own); may be given again",
    )
    add("--max-pixels", type=int, metavar="N", help=f"larger images are dropped undecoded (default: {MAX_PIXELS:,})")
    add("--tasks", type=int, metavar="N", help="tasks at the same time (default: as many as there are CPUs)")
    add("--address", help="Ray cluster (default: RAY_ADDRESS, else a Ray of its own)")


def writing_arguments(group: argparse._ActionsContainer) -> None:
    """What every command understands that writes shards."""
    add: Callable[..., Any] = group.add_argument
    add("--shard-mb", type=int, metavar="N", help="size of a shard to aim at (default: 256)")
    add("--row-group-mb", type=int, metavar="N", help="what a reader holds in memory (default: 8)")


def options_of(arguments: argparse.Namespace, max_px: int | None = None) -> Options:
    """What ``reading_arguments`` and ``writing_arguments`` were given."""
    return Options(
        shard_mb=at_least(arguments, "shard_mb", 1, 256),
        row_group_mb=at_least(arguments, "row_group_mb", 1, 8, 1024),
        max_px=max_px,
        max_pixels=at_least(arguments, "max_pixels", 1024, MAX_PIXELS),
        split=arguments.split,
        image_roots=roots_of(arguments),
    )


def at_least(arguments: argparse.Namespace, name: str, least: int, default: int, most: int | None = None) -> int:
    """The number that an option was given, or its default.

    Raises:
        UserError: it is below ``least`` or above ``most``.
    """
    value = getattr(arguments, name)
    if value is None:
        return default
    if value < least or (most is not None and value > most):
        allowed = f"at least {least:,}" if most is None else f"{least:,} to {most:,}"
        raise UserError(f"--{name.replace('_', '-')}: {value}, must be {allowed}")
    return int(value)


def tasks_of(arguments: argparse.Namespace) -> int | None:
    """``--tasks``; None where it is not given."""
    return None if arguments.tasks is None else at_least(arguments, "tasks", 1, 1)


def roots_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """``--image-root``, as often as it is given."""
    for root in arguments.image_root:
        if not Path(root).is_dir():
            raise UserError(f"--image-root: {root} is no folder")
    return tuple(arguments.image_root)


def _refuse(arguments: argparse.Namespace, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(arguments, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: {why}")


def say(line: str) -> None:
    """A line of progress, at once."""
    print(line, flush=True)
