"""Command lines for a person with pictures of their own: where one shows a phrase, what one shows, which fit words."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from simla_ray.errors import UserError, guarded

if TYPE_CHECKING:
    from simla_ray.release.pretrained import Grounded, Pretrained
    from simla_ray.release.search import Hit, ImageIndex

#: Names of dropped pictures that are printed for each reason.
NAMED = 5
PHRASE_WIDTH = 48


def ground_main(argv: Sequence[str]) -> int:
    """``experiments/ground.py``"""
    parser = argparse.ArgumentParser(
        prog="ground.py", description="Where a picture shows what a phrase says: boxes, scores, and a heat map."
    )
    _model_arguments(parser)
    parser.add_argument("image", type=Path, help="a picture")
    parser.add_argument("phrases", nargs="+", metavar="PHRASE", help='such as "a red bicycle"')
    parser.add_argument("--out", type=Path, help="picture to write (default: IMAGE-ground.png in the current folder)")
    parser.add_argument("--layers", default="all", metavar="all|5,8", help="cross-attention layers of the heat map")
    arguments = parser.parse_args(argv)

    def main() -> int:
        from simla_ray.data.decode import DropRow, decode
        from simla_ray.orchestration.layers import numbers_of

        layers, out = numbers_of(arguments.layers, "all"), _picture_out(arguments.image, arguments.out)
        model = _loaded(arguments)
        try:
            image = decode(arguments.image, model.run.data.max_pixels)
        except DropRow as drop:
            raise UserError(f"{arguments.image}: {drop.reason}") from None
        found = [model.ground_boxes(image, phrase, layers) for phrase in arguments.phrases]
        _write_grounded(image, found, out)
        print(_ground_table(found, image.size))
        print(f"picture    {out}")
        return 0

    return guarded(main)


def ask_main(argv: Sequence[str]) -> int:
    """``experiments/ask.py``"""
    parser = argparse.ArgumentParser(prog="ask.py", description="Ask a run that was fine-tuned for it about a picture.")
    _model_arguments(parser)
    parser.add_argument("image", type=Path, help="a picture")
    parser.add_argument("questions", nargs="+", metavar="QUESTION", help='such as "what color is the circle?"')
    parser.add_argument("--top", type=int, default=3, metavar="N", help="answers of each question (default: 3)")
    arguments = parser.parse_args(argv)

    def main() -> int:
        from simla_ray.report.results import percent
        from simla_ray.report.terminal import aligned

        if arguments.top < 1:
            raise UserError(f"--top: {arguments.top}; at least 1")
        model = _loaded(arguments)
        found = model.answer([arguments.image] * len(arguments.questions), arguments.questions, arguments.top)
        rows = [["question", "answer", "probability"]]
        for question, answers in zip(arguments.questions, found, strict=True):
            shown = shorten(question, PHRASE_WIDTH, placeholder=" ...")
            rows += [[shown if i == 0 else "", said, percent(p)] for i, (said, p) in enumerate(answers)]
        print(aligned(rows))
        return 0

    return guarded(main)


def search_main(argv: Sequence[str]) -> int:
    """``experiments/search.py``"""
    parser = argparse.ArgumentParser(
        prog="search.py", description="Find pictures of your own by words, or by another picture."
    )
    _model_arguments(parser)
    parser.add_argument("source", metavar="FOLDER", help="all pictures below it; or a Parquet file or tar")
    parser.add_argument("query", help="words, or the path of a picture")
    parser.add_argument("--top", type=int, default=12, metavar="N", help="how many pictures (default: 12)")
    parser.add_argument(
        "--rerank", type=int, metavar="K", help="how many ITM ranks again (default: eval.rerank_top_k; 0: none)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="page to write (default: search.html)")
    parser.add_argument("--index", type=Path, metavar="DIR", help="folder of indexes (default: beside the run's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    arguments = parser.parse_args(argv)

    def main() -> int:
        if arguments.top < 1:
            raise UserError(f"--top: {arguments.top}; at least 1")
        if arguments.rerank is not None and arguments.rerank < 0:
            raise UserError(f"--rerank: {arguments.rerank}; at least 0")
        query = _query(arguments.query)
        model = _loaded(arguments)
        index = model.index(arguments.source, arguments.index, lambda line: print(line, file=sys.stderr, flush=True))
        hits = index.search(query, arguments.top, arguments.rerank)
        facts = [_facts(hit) for hit in hits]
        out = arguments.out if arguments.out is not None or arguments.json else Path("search.html")
        if out is not None:
            _write_page(out, _page(model, index, query, arguments.source, hits, out))
        if arguments.json:
            known = {"pictures": len(index), "encoded": index.encoded, "dropped": index.dropped}
            print(json.dumps({"query": arguments.query, **known, "hits": facts}))
            return 0
        for line in _index_lines(index):
            print(line)
        print(_hit_table(facts))
        print(f"page       {out}")
        return 0

    return guarded(main, "interrupted; the same command goes on after the pictures read so far")


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="folder of a run, its name under --storage, or an exported folder")
    parser.add_argument("--storage", type=Path, default=Path("runs"), help="folder that holds runs (default: runs)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")


def _loaded(arguments: argparse.Namespace) -> Pretrained:
    import simla_ray
    from simla_ray.orchestration.runs import find_run

    return simla_ray.load(find_run(arguments.run, arguments.storage), arguments.device)


def _picture_out(image: Path, out: Path | None) -> Path:
    if out is None:
        return Path(f"{image.stem}-ground.png")
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"--out: {out}; give a name that ends in .png or .jpg")
    if out.resolve() == image.resolve():
        raise UserError(f"--out: {out} is the picture itself; give another name")
    return out


def _ground_table(found: Sequence[Grounded], size: tuple[int, int]) -> str:
    """A line for each box, in pixels of the upright picture."""
    from simla_ray.report.results import percent
    from simla_ray.report.terminal import aligned, number

    rows = [["phrase", "match", "left", "upper", "right", "lower", "score"]]
    for grounded in found:
        head = [shorten(grounded.phrase, PHRASE_WIDTH, placeholder=" ..."), percent(grounded.match)]
        if not len(grounded.boxes):
            rows.append([*head, "-", "-", "-", "-", "-"])
        for box, score in zip(grounded.boxes, grounded.scores, strict=True):
            corners = [f"{v * size[i % 2]:.0f}" for i, v in enumerate(box)]
            rows.append([*head, *corners, number(float(score), 3)])
            head = ["", ""]
    return aligned(rows)


def _write_grounded(image: Any, found: Sequence[Grounded], out: Path) -> None:
    from simla_ray.report.grounded import Shown, grounded_picture
    from simla_ray.report.results import percent

    shown = [
        Shown(g.phrase, g.heat, g.boxes[0].tolist() if len(g.boxes) else None, f"match {percent(g.match)}")
        for g in found
    ]
    try:
        grounded_picture(image, shown).save(out)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror or error})") from None


def _query(text: str) -> str | Path:
    """A path where there is such a file; what looks like a picture's name and is none is a mistake."""
    from simla_ray.data.sources.described import IMAGES

    try:
        if Path(text).is_file():
            return Path(text)
    except (OSError, ValueError):  # too long, or with a character that no name has
        return text
    if Path(text).suffix[1:].lower() in IMAGES and len(text.split()) == 1:
        raise UserError(f"{text}: no such picture")
    return text


def _index_lines(index: ImageIndex) -> list[str]:
    lines = [f"index      {len(index):,} pictures, {index.encoded:,} of them read just now"]
    for reason, names in _by_reason(index).items():
        more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
        lines.append(f"dropped    {reason} {len(names):,}: {', '.join(names[:NAMED])}{more}")
    return lines


def _by_reason(index: ImageIndex) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in index.dropped.items():
        found.setdefault(str(reason), []).append(name)
    return dict(sorted(found.items()))


def _facts(hit: Hit) -> dict[str, Any]:
    path = str(hit.path) if hit.path is not None else None
    return {"name": hit.name, "path": path, "similarity": hit.similarity, "match": hit.match}


def _hit_table(facts: Sequence[dict[str, Any]]) -> str:
    from simla_ray.data.convert.progress import aligned
    from simla_ray.report.results import percent

    with_match = any(fact["match"] is not None for fact in facts)
    rows = [["", *(["match"] if with_match else []), "similarity", "picture"]]
    for rank, fact in enumerate(facts, 1):
        match = [percent(fact["match"])] if with_match else []
        rows.append([str(rank), *match, f"{fact['similarity']:.3f}", fact["name"]])
    return aligned(rows, right=range(len(rows[0]) - 1))


def _page(model: Pretrained, index: ImageIndex, query: str | Path, source: str, hits: list[Hit], out: Path) -> str:
    from simla_ray.data.decode import decode
    from simla_ray.report.search import Found, search_page, thumbnail

    thumbnails = index.pictures(hits, thumbnail)
    found = [
        Found(
            hit.name,
            hit.similarity,
            hit.match,
            _link(hit.path, out) if hit.path is not None else None,
            thumbnails.get(hit.place),
        )
        for hit in hits
    ]
    about = f"The {len(found):,} best of {len(index):,} pictures in {source}."
    asked = thumbnail(decode(query, model.run.data.max_pixels)) if isinstance(query, Path) else None
    words = query.name if isinstance(query, Path) else query
    return search_page(words, model.run.name or model.run.label, about, found, _by_reason(index), asked)


def _link(path: Path, page: Path) -> str:
    """Relative to the page, so that both can be moved together; a URL's special signs are quoted."""
    relative = os.path.relpath(path, page.absolute().parent)
    return quote(Path(relative).as_posix(), errors="surrogateescape")


def _write_page(out: Path, text: str) -> None:
    try:
        out.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written ({error.strerror or error})") from None
