"""check.html: findings, statistics and samples of a data set, on one page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from simla_ray.data.convert.check import Checked, Example, Finding, Result, rows_of
from simla_ray.data.convert.progress import in_bytes
from simla_ray.data.convert.rows import picture_of
from simla_ray.data.convert.statistics import BYTES_STEPS, RATIO_STEPS, Statistics, bins, mean, quantile
from simla_ray.data.decode import DropRow
from simla_ray.data.text import load_stop_words
from simla_ray.errors import UserError
from simla_ray.markup import Markup, join, picture, table, tag
from simla_ray.markup.charts import columns, ranking
from simla_ray.markup.document import Section, document
from simla_ray.whole import write_whole

NAMES = {"train": "Training set", "val": "Validation set"}
SAMPLES, PAIRS = 24, 12
SAMPLE_PX = 400
CAPTIONS_SHOWN = 5
EXAMPLES_SHOWN = 10
WORDS_SHOWN = 20

MEANING = {
    "image_missing": "there is no image, or its file is not there",
    "image_unreadable": "the image is damaged, cut short, or of a format that is not read",
    "image_too_large": "more pixels than --max-pixels; it was not decoded",
    "image_outside_roots": "the path leads out of the allowed folders (--image-root)",
    "caption_empty": "no caption has a word",
    "caption_not_utf8": "a caption is not UTF-8",
    "caption_unreadable": "the text or JSON beside the image cannot be read",
    "caption_outside_roots": "the text beside the image is a link that leads out of the folder",
    "tar_truncated": "the tar ends inside this row",
    "row_group_unreadable": "its row group of the Parquet file is damaged",
    "uid_duplicate": "an earlier row has the same uid; a conversion keeps the first",
}


def write_page(result: Result, path: Path) -> None:
    """Write the page.

    Raises:
        UserError: the file cannot be written.
    """
    text = render(result)
    try:
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"--page: {path} cannot be written ({error.strerror})") from None


def render(result: Result) -> str:
    """The page as text."""
    sections: list[Section] = [("findings", "Findings", _findings(result))]
    if "val" in result.sets:
        sections.append(("both", "In both sets", _both(result)))
    for name, checked in result.sets.items():
        if checked.statistics.usable:
            title = NAMES[name] if len(result.sets) > 1 else "Statistics"
            sections.append((f"{name}-statistics", title, _statistics(checked)))
            samples = f"Samples of the {NAMES[name].lower()}" if len(result.sets) > 1 else "Samples"
            sections.append((f"{name}-samples", samples, _samples(checked)))
    title = ", ".join(Path(uri.partition("?")[0]).name for uri in result.uris["train"])
    top = tag(
        "header", tag("h1", title), tag("p", "Data check", class_="label"), tag("p", _verdict(result), class_="lead"),
        tag("div", *_tiles(result), class_="tiles"),
    )  # fmt: skip
    return document(f"{title}: data check", top, sections)


def _verdict(result: Result) -> Markup:
    checked = [f"{c.statistics.rows:,} rows of the {NAMES[name].lower()}" for name, c in result.sets.items()]
    read = f"{' and '.join(checked)} were read, every picture was decoded. "
    if not result.found:
        good = "All can be used, no uid comes twice" + (
            ", no picture is in both sets." if "val" in result.sets else "."
        )
        return join([read, tag("span", good, class_="good")])
    n = sum(finding.n for c in result.sets.values() for finding in c.reasons.values())
    said = [f"{n:,} row{'s' * (n != 1)} would be left out"] if n else []
    if result.same.n:
        said.append(f"{_pictures(result.same.n)} of the validation set also in the training set")
    return join([read, tag("strong", f"{'; '.join(said)}.")])


def _pictures(n: int) -> str:
    return f"{n:,} picture{'s' * (n != 1)}"


def _tiles(result: Result) -> list[Markup]:
    tiles = []
    for name, checked in result.sets.items():
        statistics = checked.statistics
        of = f"{NAMES[name].lower()}: " if len(result.sets) > 1 else ""
        share = 100 * statistics.usable / max(1, statistics.rows)
        n = sum(statistics.lengths.values())
        per = f"{n / statistics.usable:.1f} a row, " if statistics.usable else ""
        tiles += [
            _tile(f"{of}rows", f"{statistics.rows:,}", f"{statistics.usable:,} usable ({_percent(share)})"),
            _tile(f"{of}pictures", f"{checked.pictures:,}", f"different ones; {in_bytes(statistics.bytes)}"),
            _tile(f"{of}captions", f"{n:,}", f"{per}{mean(statistics.lengths):.1f} words each"),
        ]
    return tiles


def _tile(name: str, big: str, below: str) -> Markup:
    return tag(
        "div", tag("span", name, class_="name"), tag("span", big, class_="big"), tag("span", below, class_="below"),
        class_="tile",
    )  # fmt: skip


def _percent(share: float) -> str:
    """Never 100 % of something that is not whole."""
    return "100 %" if share == 100 else f"{min(share, 99.9):.1f} %"


def _findings(result: Result) -> Markup:
    rows = [
        (reason, MEANING.get(reason, _of_column(reason)), name, f"{finding.n:,}", _examples(finding))
        for name, checked in result.sets.items()
        for reason, finding in sorted(checked.reasons.items(), key=lambda item: -item[1].n)
    ]
    if not rows:
        return tag("p", "Every row can be used: its picture decodes, it has a caption, and no other has its uid.")
    head = ("reason", "what it means", "set", "rows", "first of them: uid, file, row (from 0)")
    return table(head, rows, "Rows that a conversion would leave out", numbers=(3,))


def _of_column(reason: str) -> str:
    return f"a value of the column {reason.removesuffix('_unreadable')} is not of its type"


def _examples(finding: Finding) -> Markup:
    shown = [tag("div", _example(example)) for example in finding.examples[:EXAMPLES_SHOWN]]
    more = finding.n - len(shown)
    return join([*shown, tag("div", f"and {more:,} more") if more else None])


def _example(example: Example) -> Markup:
    place = example.place
    first = f", as {Path(example.other.place.file).name} {example.other.place.number}" if example.other else ""
    return join([tag("code", example.uid), f" {Path(place.file).name} {place.number}{first}"])


def _both(result: Result) -> Markup:
    parts: list[Markup | None] = []
    if result.same.n:
        lead = f"{_pictures(result.same.n)} of the validation set with the same pixels as one of the training set:"
        parts += [tag("p", tag("strong", lead)), _pairs(result, result.same)]
    else:
        parts.append(tag("p", "No picture of the validation set has the same pixels as one of the training set."))
    if result.alike.n:
        lead = (
            f"Pairs that look alike by a difference hash: {result.alike.n:,}. They are for you to judge, no findings."
        )
        parts += [tag("p", lead), _pairs(result, result.alike)]
    if result.uids.n:
        lead = (
            f"Rows of the validation set with the uid of one of the training set: {result.uids.n:,}. If uids are only "
            "numbers, that says nothing; else look whether these rows are the same, with another picture of theirs."
        )
        parts += [tag("p", lead), tag("p", _examples(result.uids))]
    return join(parts)


def _pairs(result: Result, finding: Finding) -> Markup:
    cards = []
    for example in finding.examples[:PAIRS]:
        assert example.other is not None
        sides = ((result.sets["train"], example, "train"), (result.sets["val"], example.other, "val"))
        figures = []
        for checked, side, name in sides:
            ((place, row),) = rows_of(checked.index, [side.place.ordinal])
            about = f"{name}: {row['uid']} ({Path(place.file).name} {place.number})"
            figures.append(tag("figure", _thumbnail(row), tag("figcaption", about)))
        cards.append(tag("article", tag("div", *figures, class_="pair"), class_="sample"))
    more = finding.n - len(cards)
    return join([tag("div", *cards, class_="cards"), tag("p", f"and {more:,} more", class_="note") if more else None])


def _statistics(checked: Checked) -> Markup:
    statistics = checked.statistics
    lengths, sides = statistics.lengths, (statistics.widths, statistics.heights)
    stop_words = load_stop_words("en")
    content = [(w, n) for w, n in statistics.words.most_common(WORDS_SHOWN + len(stop_words)) if w not in stop_words]
    captions = sum(lengths.values())
    charts = [
        *(
            columns(f"{name}, pixels", _values(side), _spread(side))
            for name, side in zip(("Width", "Height"), sides, strict=True)
        ),
        columns(
            "Aspect ratio, width / height",
            _ratios(statistics),
            f"{_ratio(min(statistics.ratios))} to {_ratio(max(statistics.ratios))}, "
            f"median {_ratio(quantile(statistics.ratios, 0.5))}",
        ),
        columns("Words of a caption", _values(lengths), f"{_spread(lengths)}, mean {mean(lengths):.1f}"),
        columns("Captions of a row", _values(statistics.captions), f"mean {mean(statistics.captions):.1f}"),
        columns(
            "Size of a picture, encoded",
            _sizes(statistics),
            f"mean {in_bytes(statistics.bytes / statistics.usable)}, {in_bytes(statistics.bytes)} in all",
        ),
    ]
    lists = [
        ranking(
            "Most frequent words",
            content[:WORDS_SHOWN],
            f"captions that say them, of {captions:,}; {len(statistics.words):,} different words, stop words left out",
        ),
        tag(
            "div",
            ranking("Formats", statistics.formats.most_common(), "rows"),
            ranking("Licences", statistics.licenses.most_common(WORDS_SHOWN), "rows"),
            class_="stacked",
        ),
    ]
    return join([tag("div", *charts, class_="charts"), tag("div", *lists, class_="charts lists")])


def _values(counts: dict[int, int]) -> list[tuple[str, str, int]]:
    found = bins(counts)
    width = found[0][1] - found[0][0] if len(found) > 1 else None
    labelled = []
    for a, b, n in found:
        wider = width is not None and b - a > width  # the last one, with all that lies beyond
        labelled.append((f"{a:,}+" if wider else f"{a:,}", f"{a:,}" if a == b else f"{a:,} to {b:,}", n))
    return labelled


def _spread(counts: dict[int, int]) -> str:
    low, middle, high = min(counts), quantile(counts, 0.5), max(counts)
    return f"{low:,} to {high:,}, median {middle:,}" if low < high else f"all {low:,}"


def _ratios(statistics: Statistics) -> list[tuple[str, str, int]]:
    return [
        (_ratio(a), _ratio(a) if a == b else f"{_ratio(a)} to {_ratio(b)}", n) for a, b, n in bins(statistics.ratios)
    ]


def _ratio(steps: int) -> str:
    return f"{2 ** (steps / RATIO_STEPS):.2f}"


def _sizes(statistics: Statistics) -> list[tuple[str, str, int]]:
    def size(step: int) -> str:
        return in_bytes(2 ** (step / BYTES_STEPS))

    return [(size(a), f"{size(a)} to {size(b + 1)}", n) for a, b, n in bins(statistics.sizes)]


def _samples(checked: Checked) -> Markup:
    """Usable rows, evenly spread over the set."""
    usable = np.flatnonzero(checked.pixels != b"")
    chosen = np.unique(np.linspace(0, len(usable) - 1, SAMPLES).astype(int))
    cards = []
    for place, row in rows_of(checked.index, usable[chosen].tolist()):
        captions = [str(c) for c in row["captions"] if c is not None]
        shown = [tag("li", caption) for caption in captions[:CAPTIONS_SHOWN]]
        more = len(captions) - len(shown)
        about = f"{row['uid']} ({Path(place.file).name} {place.number})" + (f"; {more} more captions" if more else "")
        cards.append(
            tag("article", _thumbnail(row), tag("ul", *shown), tag("p", about, class_="about"), class_="sample")
        )
    return tag("div", *cards, class_="cards")


def _thumbnail(row: dict[str, Any]) -> Markup | None:
    try:
        image = picture_of(row, max_pixels=2**31).image  # the check has decoded it within its limit
    except DropRow:
        return None
    image.thumbnail((SAMPLE_PX, SAMPLE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    alt = next((str(c) for c in row["captions"] if c), "")
    return picture(base64.b64encode(buffer.getvalue()).decode(), alt)
