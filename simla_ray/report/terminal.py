"""What a run says on the terminal: a line per log point, a table at the end. Plain text, no colours."""

from __future__ import annotations

import math
from typing import Any

from simla_ray.config.schema import Objectives
from simla_ray.report.results import DIRECTIONS, RECALLS, other_measures, percent, retrieval_rows

WIDTH = 118


def event_line(event: dict[str, Any]) -> str | None:
    """What happened to a run, in a line; None for what goes without saying."""
    match event["event"]:
        case "failure":
            return f"failure    {event['reason']}; the group starts again from the last checkpoint"
        case "hung":
            return f"hung       {event['reason']}; the group starts again"
        case "notice":
            return f"notice     {event['reason']}; step {event['step']} is stored, the group starts again without them"
        case "rollback":
            return f"rollback   no finite gradient in steps {event['first']} to {event['last']}; back, and past them"
        case "resume":
            workers = f"{event['world_size']} worker{'s' * (event['world_size'] != 1)}"
            if event["before"] != event["world_size"]:
                workers += f" (before: {event['before']})"
            again = f", {event['lost_steps']} steps to do again" if event["lost_steps"] else ""
            return f"resume     from step {event['step']} with {workers}{again}"
        case "checkpoint_failed":
            return f"warning    the checkpoint of step {event['step']} cannot be written: {event['reason']}"
        case "checkpoint_damaged":
            return f"warning    checkpoint {event['name']} is damaged; an older one is taken"
        case "best_lost":
            return (
                f"warning    the best checkpoint, step {event['step']}, is damaged or gone; the last one is evaluated"
            )
        case "tensorboard_failed":
            return f"warning    TensorBoard's files cannot be written: {event['reason']}; metrics.jsonl has the figures"
    return None


def progress_line(line: dict[str, Any], total_steps: int) -> str:
    """One line of at most 118 columns: step, loss of each objective, pairs/s, share of the time spent waiting, ETA.

    Args:
        line: a train line of metrics.jsonl at a log point, that is, with ``seconds``.
        total_steps: of the run; the ETA is the mean time of a step so far, times what is left.
    """
    step = line["step"]
    left = line["seconds"] / max(1, step) * max(0, total_steps - step)
    tail = [f"{line['pairs_per_s']:,.0f} pairs/s", f"wait {100 * line['data_wait_fraction']:.0f} %"]
    tail.append(f"ETA {clock(left)}")
    if line.get("dropped"):
        tail.append(f"dropped {line['dropped']:,}")
    for digits in (3, 2):
        losses = [f"{name} {number(value, digits):<{digits + 2}}" for name, value in in_order(line["losses"])]
        text = f"step {step:>{len(str(total_steps))}}/{total_steps}  {' '.join(losses)}  {'  '.join(tail)}"
        if len(text) <= WIDTH:
            break
    return text[:WIDTH]


def summary_table(summary: dict[str, Any]) -> str:
    """The table printed at the end of a run, from its summary.json: results beside baselines, losses, speed."""
    blocks = [_head(summary)]
    results = summary.get("eval") or {}
    if results.get("retrieval"):
        blocks.append(_retrieval(results["retrieval"]))
    if measures := other_measures(results):
        rows = [
            [m.name, m.text, m.spread or "", f"{m.baseline_name} {m.baseline_text}" if m.baseline is not None else ""]
            for m in measures
        ]
        blocks.append(aligned([["result", "", "", "baseline"], *rows]))
    if losses := summary.get("losses"):
        rows = [[name, number(span["first"]), "->", number(span["last"])] for name, span in in_order(losses)]
        blocks.append(aligned([["loss", "first", "", "last"], *rows]))
    return "\n\n".join(blocks)


def in_order(losses: dict[str, Any]) -> list[tuple[str, Any]]:
    """The losses of the objectives, in the order of the config; the total is left out."""
    return [(name, losses[name]) for name in Objectives.model_fields if losses.get(name) is not None]


def number(value: float, digits: int = 3) -> str:
    """A number with that many significant digits, without an exponent where a reader needs none."""
    if not math.isfinite(value):
        return str(value)
    scientific = f"{value:.{digits - 1}e}"
    size = int(scientific.partition("e")[2])
    return scientific if size < -4 or size > 6 else f"{value:.{max(0, digits - 1 - size)}f}"


def clock(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def aligned(rows: list[list[str]]) -> str:
    """Columns two blanks apart: the first one and those of words to the left, numbers to the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    left = [i == 0 or not any(c[:1].isdigit() for c in column[1:]) for i, column in enumerate(columns)]
    lines = []
    for row in rows:
        cells = zip(row, widths, left, strict=True)
        lines.append("  ".join(cell.ljust(w) if to_left else cell.rjust(w) for cell, w, to_left in cells).rstrip())
    return "\n".join(lines)


def _head(summary: dict[str, Any]) -> str:
    name, label = summary.get("name", ""), summary.get("label", "")
    facts = [name if label in ("", name) else f"{name} ({label})"]
    if summary.get("steps") is not None:
        facts.append(f"{summary['steps']:,} steps")
    if summary.get("epochs") is not None:
        facts.append(f"{summary['epochs']:.2f} epochs")
    if summary.get("samples_seen") is not None:
        facts.append(f"{summary['samples_seen']:,} pairs")
    speed = []
    if summary.get("seconds") is not None:
        speed.append(f"{clock(summary['seconds'])} of training")
    if summary.get("pairs_per_s") is not None:
        speed.append(f"{summary['pairs_per_s']:,.0f} pairs/s")
    if summary.get("data_wait_fraction") is not None:
        speed.append(f"{percent(summary['data_wait_fraction'])} of it waiting for data")
    if summary.get("world_size") is not None:
        speed.append(f"{summary['world_size']} worker{'s' if summary['world_size'] != 1 else ''}")
    if summary.get("restarts"):
        speed.append(f"{summary['restarts']} restart{'s' if summary['restarts'] != 1 else ''}")
        if summary.get("goodput") is not None:
            speed.append(f"goodput {percent(summary['goodput'])}")
    if summary.get("best_step") is not None:
        speed.append(f"best step {summary['best_step']:,}")
    lines = [", ".join(facts), ", ".join(speed)]
    if dropped := summary.get("dropped"):
        lines.append("dropped rows: " + ", ".join(f"{reason} {n:,}" for reason, n in sorted(dropped.items())))
    return "\n".join(line for line in lines if line)


def _retrieval(metrics: dict[str, Any]) -> str:
    head = ["retrieval"] + [f"{direction} R@{k}" for direction in DIRECTIONS for k in RECALLS]
    rows = [[name, *(percent(value) for value in cells.values())] for name, cells, _ in retrieval_rows(metrics)]
    return aligned([head, *rows])
