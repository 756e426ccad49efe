"""Benchmarks on the terminal: a table of contenders, and what its numbers mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from simla_ray.report.results import percent
from simla_ray.report.terminal import aligned, number

GIGA, GIB = 1e9, 2**30
#: What our stream is held against, in the order of the result.
CONTENDERS = ("dataloader", "dataloader_reduced", "pillow")


def speed_tables(result: Mapping[str, Any]) -> str:
    """The result of ``measure_steps``: a table for each group of contenders, under it one line that sums it up."""
    unit = "CPU" if result["setting"]["device"] == "cpu" else "GPU"
    blocks = []
    if result["others"]:
        blocks += [_table(result["others"], unit), "\n".join(_of_others(result, unit))]
    if result["savings"]:
        blocks += [_table(result["savings"], unit), _of_savings(result["savings"], unit)]
    return "\n\n".join(blocks)


def _table(rows: Sequence[Mapping[str, Any]], unit: str) -> str:
    """Columns in which no row has a number are left out."""
    head = ["step", f"{unit} s", "lowest .. highest", "over ours", "pairs/s", "GF/pair", "matmul", "MFU", "peak GiB"]
    table = [head, *(_cells(row) for row in rows)]
    kept = [i for i in range(len(head)) if any(cells[i] for cells in table[1:])]
    return aligned([[cells[i] for i in kept] for cells in table])


def _cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row["seconds_range"]
    return [
        row["name"],
        number(row["seconds_per_step"]),
        f"{number(low)} .. {number(high)}",
        f"{row['over_ours']:.2f}",
        number(row["pairs_per_s"]),
        number(row["flops_per_pair"] / GIGA, 4),
        percent(row["matmul_share"]) if row["matmul_share"] is not None else "",
        percent(row["mfu"]) if row["mfu"] is not None else "",
        number(row["peak_memory_bytes"] / GIB) if row["peak_memory_bytes"] is not None else "",
    ]


def _of_others(result: Mapping[str, Any], unit: str) -> list[str]:
    ours = result["others"][0]
    lines = []
    for row in result["others"]:
        if row["name"].startswith("unfused"):
            low, high = sorted(1 / x for x in row["over_ours_range"])
            share = ours["flops_per_pair"] / row["flops_per_pair"]
            lines.append(
                f"Our step takes {1 / row['over_ours']:.2f} ({low:.2f} .. {high:.2f}) of the {unit} seconds of the "
                f"{row['name']} one, for {share:.2f} of its FLOPs."
            )
    lines.append(
        f"{percent(ours['matmul_share'])} of our step's time is products, which run at "
        f"{number(ours['pairs_per_s'] * ours['flops_per_pair'] / ours['matmul_share'] / GIGA)} GF/s."
    )
    return lines


def _of_savings(rows: Sequence[Mapping[str, Any]], unit: str) -> str:
    gain, name = max((row["over_ours"] - 1, row["name"]) for row in rows[1:])
    first = f"A step {name} takes {100 * gain:.0f} % more {unit} seconds, the most of these."
    if rows[0]["rounds"] == 1:
        return f"{first}\nOne round does not tell what is chance; see --steps."
    spread = max(row["over_ours_range"][1] - row["over_ours_range"][0] for row in rows[1:])
    return f"{first}\nDifferences below the spread over rounds (up to {100 * spread:.0f} %) say nothing."


def overhead_lines(result: Mapping[str, Any]) -> str:
    """The result of ``measure_overhead``."""
    rows = [["loop", "ms per step", "lowest .. highest", "CPU ms"]]
    for name in ("bare", "ray_train"):
        low, high = result[name]["seconds_range"]
        rows.append(
            [
                name.replace("_", " "),
                f"{1000 * result[name]['seconds_per_step']:.1f}",
                f"{1000 * low:.1f} .. {1000 * high:.1f}",
                f"{1000 * result[name]['cpu_seconds_per_step']:.1f}",
            ]
        )
    low, high = result["overhead_range"]
    return (
        f"{aligned(rows)}\n\nRay Train adds {100 * result['overhead']:.1f} % to a step by the clock "
        f"({100 * low:.1f} .. {100 * high:.1f} % in half of the {result['rounds']} rounds), "
        f"{100 * result['cpu_overhead']:.1f} % in CPU seconds."
    )


def ingest_tables(result: Mapping[str, Any], wanted: int) -> str:
    """The result of ``measure_ingest``: a table for each size of the JPEGs, and what more decode CPUs bring.

    Args:
        wanted: pairs/s for which the cores are counted.
    """
    blocks = []
    for side, found in ((side, found) for side, found in result.items() if side.isdigit()):
        ratios = (None, *((found[f"ratio_to_{k}"], found[f"ratio_to_{k}_range"]) for k in CONTENDERS))
        rows = []
        for (name, rate), ratio in zip(found["pairs_per_s"].items(), ratios, strict=True):
            of_parts = f"{ratio[1][0]:.2f} .. {ratio[1][1]:.2f}" if ratio is not None else ""
            rows.append([name, f"{rate:,.0f}", f"{ratio[0]:.2f}" if ratio is not None else "", of_parts])
        blocks.append(
            aligned([[f"{found['rows']:,} JPEGs of {side} px", "pairs/s", "ours over it", "in parts"], *rows])
        )
        blocks.append(f"{found['tasks']} processes each; first batch of ours after {found['first_batch_s']:.1f} s.")
    rows = [
        [str(row["decode_cpus"]), f"{row['pairs_per_s']:,.0f}", f"{row['pairs_per_s'] / row['decode_cpus']:,.0f}"]
        for row in result["scaling"]
    ]
    blocks.append(aligned([["data.decode_cpus", "pairs/s", "each"], *rows]))
    most = max(result["scaling"], key=lambda row: row["decode_cpus"])
    cores = wanted / (most["pairs_per_s"] / most["decode_cpus"])
    memory = result["memory"]
    blocks.append(
        f"{wanted:,} pairs/s need about {cores:.1f} such cores for data beside those of the workers. Memory of all "
        f"processes and the object store, {number(memory['bytes'][0] / GIB)} GiB after a tenth of an epoch of "
        f"{memory['rows']:,}, grows by at most {memory['growth']:.1%} to its end."
    )
    return "\n\n".join(blocks)


def rerank_table(result: Mapping[str, Any]) -> str:
    """The result of ``measure_rerank``: a row for each side of the images."""
    rows = [["images", "tokens", "ms per candidate", "whole stack", "ours over it", "over the images"]]
    for side, found in ((side, found) for side, found in result.items() if side.isdigit()):
        ours, plain = found["seconds_per_candidate"].values()
        low, high = found["ratio_range"]
        ms = number(1000 * ours), number(1000 * plain)
        ratio = f"{found['ratio']:.2f}", f"{low:.2f} .. {high:.2f}"
        rows.append([f"{found['images']} of {side} px", str(found["image_tokens"]), *ms, *ratio])
    differences = [found["largest_difference"] for side, found in result.items() if side.isdigit()]
    setting = result["setting"]
    return (
        f"{aligned(rows)}\n\n{setting['candidates']:,} candidates, {setting['texts']} texts of {setting['tokens']} "
        f"tokens with each image; logits differ by at most {max(differences):.1g}."
    )
