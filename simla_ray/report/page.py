"""report.html: one page of a run that needs nothing but itself."""

from __future__ import annotations

from pathlib import Path

from simla_ray.markup import tag
from simla_ray.markup.document import Section, document
from simla_ray.report.examples import example_sections
from simla_ray.report.folder import RunFolder, read_folder, write_page
from simla_ray.report.overview import curve_section, notes, result_section, sentence, tiles
from simla_ray.report.provenance import config_section, data_section, manifest_section


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run's folder: the same bytes for the same folder.

    An interrupted run gets a partial page with a note; sections whose data are absent are left out.

    Raises:
        UserError: the folder is not that of a run.
    """
    folder = Path(folder)
    return write_page(folder, render(read_folder(folder)))


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
    top = tag(
        "header",
        tag("h1", run.name),
        tag("p", run.label, class_="label"),
        tag("p", sentence(run), class_="lead"),
        notes(run),
        tiles(run),
    )
    return document(f"{run.name}: report", top, sections)
