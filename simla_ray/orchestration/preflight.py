"""``--dry-run``: check config, data and resources, and say what would happen. Starts no worker and no Ray of its own."""

from __future__ import annotations

from simla_ray.config.schema import Run
from simla_ray.data import pipeline
from simla_ray.data.order import Order
from simla_ray.orchestration.cluster import check_local_devices, join, joins
from simla_ray.orchestration.manifest import fallbacks
from simla_ray.orchestration.plan import plan
from simla_ray.orchestration.prepare import build_indexes, uris_of, uses_world, world_folder
from simla_ray.orchestration.runs import fresh_name


def dry_run(run: Run) -> str:
    """The plan of a run and its arithmetic, a line each.

    Raises:
        UserError: whatever would stop the run before its first step.
    """
    if joins(run) is None:
        check_local_devices(run)
        lines = ["cluster    a Ray of its own would be started on this machine"]
    else:
        lines = [join(run).line()]
    lines.append(f"run        {run.label}, seed {run.seed} -> {run.storage.resolve() / (run.name or fresh_name(run))}")
    if uses_world(run) and not world_folder(run).exists():
        rows = run.world.n_train
        lines.append(f"data       the built-in world would be generated: {rows} train, {run.world.n_val} val, {run.world.n_test} test")
        steps = Order((rows,), run.micro_batches, run.data.shuffle_window, run.seed).steps
    else:
        indexes = build_indexes(run)
        rows = len(indexes["train"])
        steps = pipeline.order_of(run, indexes["train"]).steps
        for name, index in indexes.items():
            uris, split = uris_of(run, name)
            kept = f", split {split}" if split else ""
            lines.append(f"data       {name}: {len(index)} rows in {len(index.units)} row groups of {', '.join(uris)}{kept}")
    total = run.optim.max_steps or steps(run.optim.epochs, run.batch.micro)
    lines += plan(run, rows, total)
    lines += [f"not as published: {f}" for f in fallbacks(run)]
    lines.append("nothing was trained; the same command without --dry-run does it")
    return "\n".join(lines)
