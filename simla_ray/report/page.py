"""report.html: one page of a run that needs nothing but itself."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from simla_ray.report.examples import example_sections
from simla_ray.report.folder import RunFolder, read_folder
from simla_ray.report.markup import Markup, tag
from simla_ray.report.overview import curve_section, notes, result_section, sentence, tiles
from simla_ray.report.provenance import config_section, data_section, manifest_section

# Nothing is fetched and nothing runs, whatever a caption says.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

Section = tuple[str, str, Markup]


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run's folder: the same bytes for the same folder.

    An interrupted run gets a partial page with a note; sections whose data are absent are left out.

    Raises:
        UserError: the folder is not that of a run.
    """
    folder = Path(folder)
    text = render(read_folder(folder))
    temporary = folder / "report.tmp"
    temporary.write_text(text, encoding="utf-8")
    report = folder / "report.html"
    temporary.replace(report)
    return report


def render(run: RunFolder) -> str:
    """The page as text."""
    candidates: list[Section | None] = [
        result_section(run),
        curve_section(run),
        *example_sections(run.examples),
        data_section(run),
        config_section(run),
        manifest_section(run),
    ]
    sections = [section for section in candidates if section is not None]
    style = resources.files("simla_ray.report").joinpath("style.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{run.name}: report"),
        tag("style", Markup(style)),
    )
    top = tag(
        "header",
        tag("h1", run.name),
        tag("p", run.label, class_="label"),
        tag("p", sentence(run), class_="lead"),
        notes(run),
        tiles(run),
    )
    links = [tag("a", title, href=f"#{name}") for name, title, _ in sections]
    menu = tag("nav", *links, aria_label="Sections")
    parts = [tag("section", tag("h2", title), content, id=name) for name, title, content in sections]
    body = tag("body", top, menu, tag("main", *parts))
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"
