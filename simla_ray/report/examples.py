"""The sections that show examples of the evaluation: one maker for each task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from simla_ray.markup import Markup, decode_picture, join, picture, table, tag
from simla_ray.report.figures import heat_picture
from simla_ray.report.questions import question_card, statement_card
from simla_ray.report.results import percent
from simla_ray.report.terminal import number

Example = dict[str, Any]
PICKED = "Half of the examples are successes where there are enough; how often the model succeeds, the results tell."
NO_VALUE = "–"


def example_sections(examples: dict[str, list[Example]]) -> list[tuple[str, str, Markup]]:
    """(id, title, content) of every task that has examples, in the order of the page."""
    makers: dict[str, tuple[str, Callable[[list[Example]], list[Markup]]]] = {
        "retrieval": ("Retrieval", _retrieval),
        "grounding": ("Where the model looks", _grounding),
        "keywords": ("Keywords", _keywords),
        "words": ("Masked words", _words),
        "match": ("Matching", _match),
        "classification": ("Zero-shot classes", _classification),
        "ratings": ("Human ratings", _ratings),
        "vqa": ("Questions", _questions),
        "statements": ("Statements", _statements),
    }
    there = {task: found for task in makers if (found := examples.get(task))}
    return [(task, makers[task][0], join(makers[task][1](found))) for task, found in there.items()]


def mark(right: bool, yes: str = "right", no: str = "wrong") -> Markup:
    """Right or wrong in sign, word and colour."""
    return tag("span", "✓ " + yes if right else "✗ " + no, class_="yes" if right else "no")


def _lead(*text: str) -> Markup:
    return tag("p", " ".join(text), class_="lead")


def _retrieval(examples: list[Example]) -> list[Markup]:
    text = "For each caption the rows that the model ranks highest, with their scores; a tick marks the caption's own."
    if any(decode_picture(example.get("image")) for example in examples):
        text = "For each caption its own picture, then the pictures that the model ranks highest, with their scores. "
        text += "A heavy frame and a tick mark the caption's own picture."
    if any(hit.get("satisfied") and not hit.get("right") for e in examples for hit in e.get("top", [])):
        text += ' "Fits" are others of which the caption is true as well.'
    return [_lead(text, PICKED), tag("div", *map(_query, examples), class_="cards wide")]


def _query(example: Example) -> Markup:
    top = example.get("top", [])
    rank = example.get("rank") or next((i for i, hit in enumerate(top, 1) if hit.get("right")), None)
    later = f"rank {rank:,}" if rank else f"not in the first {len(top)}"
    verdict = mark(True, "rank 1") if rank == 1 else tag("span", later, class_="later")
    head = tag("p", tag("q", example.get("caption", "")), " ", verdict, class_="caption")
    own = picture(example.get("image"), "the caption's own picture")
    thumbs = [tag("figure", own, tag("figcaption", "its own"), class_="own")] if own is not None else []
    thumbs += [_found(i, hit) for i, hit in enumerate(top, 1)]
    return tag("article", head, tag("div", *thumbs, class_="thumbs" if own is not None else "thumbs text"))


def _found(rank: int, hit: Example) -> Markup:
    right, fits = bool(hit.get("right")), bool(hit.get("satisfied"))
    word = "right" if right else "fits" if fits else ""
    shown = picture(hit.get("image"), f"rank {rank}" + (f", {word}" if word else ""))
    score = hit.get("score")
    parts = [f"{'✓ ' if right else ''}{rank}", *([] if score is None else [_signed(score)])]
    parts += ["fits"] if fits and not right else []
    name = None if shown is not None else tag("span", hit.get("uid", ""), class_="uid")
    return tag("figure", shown, tag("figcaption", " · ".join(parts), name), class_=word or None)


def _grounding(examples: list[Example]) -> list[Markup]:
    if not any(decode_picture(example.get("image")) for example in examples):
        rows = [(e.get("phrase", ""), e.get("uid", ""), mark(bool(e.get("hit")), "hit", "miss")) for e in examples]
        return [_lead(PICKED), table(("phrase", "row", "hottest place"), rows, "Pointing", shown=False)]
    text = (
        "Left the picture with the boxes of the phrase, right the model's heat map for it: brighter is hotter, "
        "the ring is the hottest patch. A hit is a hottest patch whose centre lies in a box."
    )
    if any(example.get("proposed") for example in examples):
        text += " The dashed box lies around the peak of the map once it is smoothed."
    lead = _lead(text, PICKED)
    return [lead, tag("div", *map(_pointing, examples), class_="cards")]


def _pointing(example: Example) -> Markup:
    hit = bool(example.get("hit"))
    head = tag("p", tag("q", example.get("phrase", "")), " ", mark(hit, "hit", "miss"), class_="caption")
    raw = decode_picture(example.get("image"))
    if raw is None:
        return tag("article", head)
    boxes, heat = example.get("boxes", []), example.get("heat")
    pair = [tag("figure", picture(example["image"], "the picture"), _overlay(boxes))]
    if heat:
        over = tag("img", src=heat_picture(raw, heat), alt=f"heat map: {'hit' if hit else 'miss'}")
        pair.append(tag("figure", over, _overlay(boxes, peak(heat), example.get("proposed"))))
    return tag("article", head, tag("div", *pair, class_="pair"))


def peak(heat: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """Centre of the hottest patch as (x, y) in 0..1, the first one of equals; None where all is zero."""
    value, row, column = max((v, -r, -c) for r, line in enumerate(heat) for c, v in enumerate(line))
    return ((0.5 - column) / len(heat[0]), (0.5 - row) / len(heat)) if value > 0 else None


def _overlay(
    boxes: Sequence[Sequence[float]],
    point: tuple[float, float] | None = None,
    proposed: Sequence[float] | None = None,
) -> Markup:
    """Boxes twice, light over dark, so that they show on any picture; a ring at the point, a dashed box."""
    shapes = []
    for class_ in ("under", "over"):
        shapes += [_rect(box, class_) for box in boxes]
        if proposed is not None:
            shapes.append(_rect(proposed, f"{class_} proposed"))
        if point is not None:
            shapes.append(tag("circle", cx=f"{100 * point[0]:.2f}", cy=f"{100 * point[1]:.2f}", r="4", class_=class_))
    return tag("svg", *shapes, viewBox="0 0 100 100", preserveAspectRatio="none", aria_hidden="true")


def _rect(box: Sequence[float], class_: str) -> Markup:
    x1, y1, x2, y2 = box
    place = {"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1}
    return tag("rect", **{k: f"{100 * v:.2f}" for k, v in place.items()}, class_=class_)


def _keywords(examples: list[Example]) -> list[Markup]:
    lead = _lead(
        "The words that the caption says, those of them that were selected as keywords, and the words that the model "
        "recommends from the picture alone, ticked where the picture shows them. Unsaid is what the picture shows and "
        "the caption does not say."
    )
    pictures = [picture(example.get("image"), "the picture") for example in examples]
    rows = []
    for example, shown in zip(examples, pictures, strict=True):
        true = [str(word) for word in example.get("true", [])]
        cells = [
            tag("q", example.get("caption", "")),
            _words_of(example, "said"),
            _words_of(example, "selected"),
            _ticked(example.get("recommended", []), true),
            _words_of(example, "true"),
        ]
        rows.append([shown or "", *cells] if any(pictures) else cells)
    head = ["caption", "said", "selected", "recommended", "unsaid"]
    head = ["", *head] if any(pictures) else head
    return [lead, table(head, rows, "Keywords", class_="words", shown=False)]


def _words_of(example: Example, key: str) -> str:
    return ", ".join(map(str, example.get(key, []))) or NO_VALUE


def _ticked(words: Sequence[Any], true: Sequence[str]) -> Markup:
    marked = [
        tag("span", f"✓ {word}", class_="yes") if str(word) in true else tag("span", word, class_="no")
        for word in words
    ]
    return join(marked, " ") if marked else Markup(NO_VALUE)


def _words(examples: list[Example]) -> list[Markup]:
    lead = _lead(
        "A colour word of the caption is hidden; the model fills it in over the caption's own picture, "
        "and over another one.",
        PICKED,
    )
    pictures = [picture(example.get("image"), "the picture") for example in examples]
    rows = []
    for e, shown in zip(examples, pictures, strict=True):
        cells = [tag("q", str(e.get("caption", "")).replace("[MASK]", "▢")), tag("b", e.get("word", ""))]
        cells += [_filled(e.get(key), e.get("word")) for key in ("right", "wrong")]
        rows.append([shown or "", *cells] if any(pictures) else cells)
    head = ["caption", "hidden word", "over its picture", "over another"]
    head = ["", *head] if any(pictures) else head
    return [lead, table(head, rows, "Masked words", class_="words", shown=False)]


def _filled(found: Any, word: Any) -> Any:
    return NO_VALUE if found is None else mark(found == word, str(found), str(found))


def _match(examples: list[Example]) -> list[Markup]:
    lead = _lead(
        "A caption with its own picture and with a wrong one, and the model's logit that they belong together.", PICKED
    )
    return [lead, tag("div", *map(_pair, examples), class_="cards")]


def _pair(example: Example) -> Markup:
    verdict = mark(bool(example.get("hit")))
    head = tag("p", tag("q", example.get("caption", "")), " ", verdict, class_="caption")
    sides = []
    for side, words in ((example, "its own"), (example.get("wrong", {}), "another")):
        text = f"{words}: {_signed(side.get('logit'))}"
        sides.append(tag("figure", picture(side.get("image"), f"{words} picture"), tag("figcaption", text)))
    return tag("article", head, tag("div", *sides, class_="pair"))


def _classification(examples: list[Example]) -> list[Markup]:
    lead = _lead("Pictures with their class, the class that the model names, and the cosines of the likeliest.", PICKED)
    pictures = [picture(example.get("image"), "the picture") for example in examples]
    rows = []
    for e, shown in zip(examples, pictures, strict=True):
        likeliest = [f"{one.get('label', '')} {_signed(one.get('score'))}" for one in e.get("top", [])]
        named = mark(bool(e.get("hit")), str(e.get("predicted", "")), str(e.get("predicted", "")))
        cells = [tag("b", e.get("label", "")), named, ", ".join(likeliest) or NO_VALUE]
        rows.append([shown or e.get("uid", ""), *cells])
    return [lead, table(("", "class", "named", "likeliest"), rows, "Classes", class_="words", shown=False)]


def _ratings(examples: list[Example]) -> list[Markup]:
    lead = _lead(
        "Pairs that people rated, and where the pair stands among all of them for the people and for the model: "
        "0 % is the worst pair, 100 % the best. Half of the examples are pairs on which they agree better than on most."
    )
    pictures = [picture(example.get("image"), "the picture") for example in examples]
    rows = []
    for e, shown in zip(examples, pictures, strict=True):
        cells = [tag("q", e.get("caption", "")), _signed(e.get("rating")), percent(e.get("human_place"))]
        cells.append(mark(bool(e.get("hit")), percent(e.get("place")), percent(e.get("place"))))
        rows.append([shown or e.get("uid", ""), *cells])
    head = ("", "caption", "rating", "place for people", "place for the model")
    return [lead, table(head, rows, "Ratings", class_="words", shown=False)]


def _questions(examples: list[Example]) -> list[Markup]:
    lead = _lead("A question, the likeliest of the known answers, and what annotators say.", PICKED)
    return [lead, tag("div", *(question_card(e, mark(bool(e.get("hit")))) for e in examples), class_="cards")]


def _statements(examples: list[Example]) -> list[Markup]:
    lead = _lead("A statement, its label, and the label that the model finds likeliest.", PICKED)
    return [lead, tag("div", *(statement_card(e, mark(bool(e.get("hit")))) for e in examples), class_="cards")]


def _signed(value: float | None) -> str:
    return NO_VALUE if value is None else number(float(value)).replace("-", "\N{MINUS SIGN}")
