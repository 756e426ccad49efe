"""The command line: parse, call one function, print."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

from simla_ray.config.schema import Data
from simla_ray.data.adapt.adaptation import Gather, adapt
from simla_ray.data.adapt.entities import flickr30k_entities
from simla_ray.data.adapt.karpathy import karpathy
from simla_ray.data.adapt.refer import refcoco
from simla_ray.data.adapt.statements import entailment, nlvr, nlvr2, snli_ve
from simla_ray.data.adapt.vqa import vqav2
from simla_ray.data.convert.progress import aligned, clock, in_bytes
from simla_ray.errors import UserError, guarded

MAX_PIXELS = Data.model_fields["max_pixels"].default
FORMATS: dict[str, Gather] = {
    "vqav2": vqav2,
    "snli-ve": snli_ve,
    "nlvr2": nlvr2,
    "nlvr": nlvr,
    "refcoco": refcoco,
    "flickr30k-entities": flickr30k_entities,
    "karpathy": functools.partial(karpathy, restval="train"),
    "entailment": entailment,
}
RESTVAL = ("train", "keep")

DESCRIPTION = """\
Write a public data set as sharded Parquet: one row per image, or pair of images, with all that is said of it.

  python -m simla_ray.data.adapt vqav2 --annotations questions.json annotations.json --images train2014 --out vqa

format              annotations                                               columns
vqav2               questions and annotations (.json)                         qas
snli-ve             snli_ve_*.jsonl                                           statements
nlvr2               train.json, dev.json, ... (JSON lines)                    images, statements
nlvr                train.json, dev.json, ... (JSON lines)                    statements
refcoco             refs as JSON and instances.json, or ALBEF's list and      captions, phrases, boxes
                    dets.json or cocos.json; both together
flickr30k-entities  the folder with Sentences and Annotations                 captions, phrases
karpathy            dataset_coco.json, dataset_flickr30k.json, ...            captions, split
entailment          Parquet, CSV, TSV or JSON with id, hypothesis, label      statements"""

EPILOG = """\
What cannot be used is named in dropped.jsonl with the reason, and counted in manifest.json. Boxes become shares of the
picture, clipped to it. The folder appears when it is complete; what was interrupted begins anew."""


def main(argv: Sequence[str]) -> int:
    """``python -m simla_ray.data.adapt``; exit code 0, 2 for mistakes of the user."""
    arguments = _parser().parse_args(argv)
    return guarded(lambda: _adapt(arguments))


def _adapt(arguments: argparse.Namespace) -> int:
    gather = FORMATS[arguments.format]
    asked = {"format": arguments.format, "split": arguments.split}
    if arguments.restval is not None:
        if arguments.format != "karpathy":
            raise UserError("--restval: only with karpathy")
        gather = functools.partial(karpathy, restval=arguments.restval)
        asked["restval"] = arguments.restval
    manifest = adapt(gather, asked, arguments.annotations, arguments.images, arguments.out, MAX_PIXELS, _say)
    dropped = [[f"  {reason}", f"{n:,}"] for reason, n in manifest["dropped"].items()]
    rows = [
        ["rows", f"{manifest['rows']:,} of {manifest['rows_in']:,}"],
        *([name, f"{n:,}"] for name, n in manifest["entries"].items()),
        ["dropped", f"{sum(manifest['dropped'].values()):,}"],
        *dropped,
        ["boxes clipped", f"{manifest['boxes_clipped']:,}"],
        ["shards", f"{len(manifest['shards']):,}"],
        ["bytes", in_bytes(manifest["bytes"])],
        ["time", clock(manifest["seconds"])],
    ]
    print("\n" + aligned(rows, right=(1,)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simla_ray.data.adapt",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("format", choices=FORMATS, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--annotations", nargs="+", required=True, metavar="FILE", help="the files of the format")
    parser.add_argument(
        "--images",
        required=True,
        metavar="FOLDER|PARQUET",
        help="where the pictures are: a folder, by name, or a data set, by uid or image_id",
    )
    parser.add_argument(
        "--split",
        metavar="NAME",
        help="keep this split only, where the annotations tell splits; it is written into the split column",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new or empty folder on disk")
    parser.add_argument(
        "--restval", choices=RESTVAL, help="karpathy: COCO's restval joins train (default), or keeps its name"
    )
    return parser


def _say(line: str) -> None:
    print(line, flush=True)
