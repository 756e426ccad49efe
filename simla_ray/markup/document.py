"""A page that needs nothing but itself: head, menu and sections around what a floor above wants to show."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from simla_ray.markup import Markup, tag

# Nothing is fetched and nothing runs, whatever a caption says.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

#: Name in links, title, content.
Section = tuple[str, str, Markup]


def document(title: str, header: Markup, sections: Sequence[Section]) -> str:
    """The page as text, with a menu of its sections."""
    style = resources.files("simla_ray.markup").joinpath("style.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    links = [tag("a", name, href=f"#{link}") for link, name, _ in sections]
    menu = tag("nav", *links, aria_label="Sections")
    parts = [tag("section", tag("h2", name), content, id=link) for link, name, content in sections]
    body = tag("body", header, menu, tag("main", *parts))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"
