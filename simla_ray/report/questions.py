"""Right and wrong examples of fine-tuned tasks: questions with answers, statements with labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from simla_ray.markup import Markup, picture, tag
from simla_ray.report.results import percent

Example = dict[str, Any]


def question_card(example: Example, verdict: Markup) -> Markup:
    """A picture with its question, the model's answer and the annotators'."""
    true = ", ".join(example.get("answers", []))
    said = [tag("q", example.get("question", "")), " ", example.get("found", ""), " ", verdict]
    body = picture(example.get("image"), "the picture asked about")
    below = tag("figcaption", f"annotators: {true}")
    return tag("article", tag("p", *said, class_="caption"), tag("figure", *_there(body), below))


def statement_card(example: Example, verdict: Markup) -> Markup:
    """One picture or two with a statement, its label and the model's."""
    said = [tag("q", example.get("statement", "")), " ", verdict]
    shown = [picture(example.get(name), "a picture that is spoken of") for name in ("image", "second_image")]
    confident = percent(example.get("probability"))
    text = f"label: {example.get('label', '')}; found: {example.get('found', '')} ({confident})"
    figures = [tag("figure", *_there(one)) for one in shown if one is not None]
    return tag(
        "article",
        tag("p", *said, class_="caption"),
        tag("div", *figures, class_="pair"),
        tag("p", text, class_="later"),
    )


def _there(markup: Markup | None) -> Sequence[Markup]:
    return [] if markup is None else [markup]
