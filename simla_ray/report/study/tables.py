"""Tables for the terminal that keep to its width."""

from __future__ import annotations

from collections.abc import Sequence

from simla_ray.report.terminal import WIDTH, aligned


def cut(text: str, width: int) -> str:
    """The text, its end replaced by an ellipsis where it is longer."""
    return text if len(text) <= width else text[: width - 1] + "…"


def columns_that_fit(rows: list[list[str]], columns: Sequence[Sequence[str]]) -> list[list[str]]:
    """The rows with the first of the columns, as many as the terminal has room for.

    Args:
        rows: the head and the lines.
        columns: each with its head.
    """
    for column in columns:
        wider = [[*row, cell] for row, cell in zip(rows, column, strict=True)]
        if _width(wider) > WIDTH:
            break
        rows = wider
    return rows


def in_parts(names: list[str], columns: Sequence[Sequence[str]]) -> list[str]:
    """Tables one below the other that hold all columns, each beginning with the names."""
    blocks, left = [], [list(column) for column in columns]
    while left:
        rows = [[name, cell] for name, cell in zip(names, left[0], strict=True)]
        rows = columns_that_fit(rows, left[1:])
        left = left[len(rows[0]) - 1 :]
        blocks.append(aligned(rows))
    return blocks


def _width(rows: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) + 2 for column in zip(*rows, strict=True)) - 2
