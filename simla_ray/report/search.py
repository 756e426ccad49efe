"""The page of a search: the pictures found, with their scores, each a link to its file."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from simla_ray.markup import Markup, join, picture, table, tag
from simla_ray.markup.document import Section, document

THUMBNAIL_PX = 320
#: Names of pictures that could not be read, listed for each reason.
NAMED = 20


@dataclass(frozen=True)
class Found:
    """A hit as a page shows it: ``link`` leads to its file, where it has one; ``thumbnail`` is a base64 JPEG."""

    name: str
    similarity: float
    match: float | None
    link: str | None
    thumbnail: str | None


def search_page(
    query: str,
    model: str,
    about: str,
    hits: Sequence[Found],
    dropped: Mapping[str, Sequence[str]],
    asked: str | None = None,
) -> str:
    """The page as text.

    Args:
        query: the words, or the name of the picture.
        model: what ranked.
        about: a sentence on what was searched.
        dropped: reason -> names of pictures that could not be read.
        asked: thumbnail of the picture that was searched for.
    """
    shown = picture(asked, "the picture searched for")
    header = tag(
        "header",
        tag("h1", tag("q", query) if asked is None else query),
        tag("p", model, class_="label"),
        tag("p", about, class_="lead"),
        tag("div", tag("article", shown, class_="sample"), class_="cards") if shown is not None else None,
    )
    cards = [_card(i, hit) for i, hit in enumerate(hits, 1)]
    sections: list[Section] = [("found", "Found", join([_lead(hits), tag("div", *cards, class_="cards")]))]
    if dropped:
        rows = [(reason, f"{len(names):,}", _few(names)) for reason, names in sorted(dropped.items())]
        content = table(("reason", "pictures", "which"), rows, "Pictures that could not be read", (1,), shown=False)
        sections.append(("dropped", "Not read", content))
    return document(f"{query}: search", header, sections)


def thumbnail(image: Image.Image) -> str:
    """A picture's base64 JPEG, its longest side at most ``THUMBNAIL_PX``."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=84)
    return base64.b64encode(out.getvalue()).decode()


def _lead(hits: Sequence[Found]) -> Markup:
    text = "Similarity is the cosine of the vectors that ITC trains, from -1 to 1."
    if any(hit.match is not None for hit in hits):
        text = (
            "Match is the probability that picture and words belong together, by ITM's head, which ranks the most "
            "similar ones again. " + text
        )
    return tag("p", text, class_="lead")


def _card(rank: int, hit: Found) -> Markup:
    shown = picture(hit.thumbnail, hit.name)
    linked = tag("a", shown, href=hit.link) if hit.link is not None and shown is not None else shown
    scores = f"similarity {hit.similarity:.3f}"
    bar = None
    if hit.match is not None:
        scores = f"match {100 * hit.match:.0f} %, {scores}"
        bar = tag("span", tag("span", class_="value", style=f"width:{100 * hit.match:.1f}%"), class_="bar")
    name = tag("a", hit.name, href=hit.link) if hit.link is not None else hit.name
    head = tag("p", tag("b", f"{rank}"), " ", tag("span", scores, class_="later"), class_="caption")
    return tag("article", linked, head, bar, tag("p", name, class_="about"), class_="sample")


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED:,} more" if len(names) > NAMED else "")
