"""Checks of what a run takes against what is there: CPUs, GPUs, memory, object store, disk, one batch.

Estimates are of the least that is needed: what misses it cannot work, or only at a crawl.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from simla_ray.config.schema import Run
from simla_ray.orchestration.preflight.checks import Case, Check, count, listed, size
from simla_ray.orchestration.preflight.nodes import Node

#: A worker without its tensors: interpreter, torch, Ray and the rest of the imports (0.47 GiB were resident).
PROCESS_BYTES = 2**29


def room(run: Run, nodes: Sequence[Node], gpu: bool, cores: int | None = None) -> Iterator[Check]:
    """CPUs and GPUs for the workers a run begins with, in the sum and on single nodes, and CPUs that make samples.

    Args:
        cores: of a machine with a Ray of its own, whose logical CPUs share them.
    """
    each, decoders = run.ray.cpus_per_worker, run.data.decode_cpus
    workers, key = run.ray.workers, "ray.workers"
    if run.ray.min_workers is not None:
        workers, key = run.ray.min_workers, "ray.min_workers"
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    needed = workers * each + decoders
    fit = sum(_places(run, node, gpu) for node in nodes)
    found = f"{cpus:g} on {count(len(nodes), 'node')}" + (f", sharing {count(cores, 'core')}" if cores else "")
    miss = ""
    if cpus < needed:
        miss = (
            f"{key}: {workers} workers of {each:g} CPUs and data.decode_cpus={decoders} need {needed:g} CPUs, "
            f"the cluster has {cpus:g}; use fewer of them, or add nodes"
        )
    elif fit < workers and (not gpu or gpus >= workers):
        largest = max((node for node in nodes if node.gpus or not gpu), key=lambda node: node.cpus)
        where = "nodes with GPUs" if gpu else "nodes"
        miss = (
            f"ray.cpus_per_worker: {each:g} CPUs fit {fit} times on single {where}, the largest of which has "
            f"{largest.cpus:g}, for {key}={workers}; use fewer CPUs a worker, or larger nodes"
        )
    yield Check("CPUs", found, f"{needed:g}: {workers} workers of {each:g}, {decoders} to decode", miss)
    if gpu:
        miss = ""
        if gpus < workers:
            miss = (
                f"ray.device: gpu, but the cluster has {gpus:g} GPUs for {key}={workers}; "
                "use fewer workers, add nodes, or use cpu"
            )
        yield Check("GPUs", f"{gpus:g}", f"{workers}, one a worker", miss)


def disk(case: Case) -> Check:
    one, keep = case.footprint.checkpoint, case.run.checkpoint.keep
    least, wanted = one * (1 if case.resumes else 2), one * (keep + 1)
    found = f"{size(case.storage)} free in {case.run.storage}"
    needed = f"{size(wanted)} for checkpoint.keep={keep} and one more of {size(one)} each"
    remedy = "free some, name another storage, or use a smaller checkpoint.keep"
    miss = warning = ""
    if case.driver.storage_problem:
        found = "not known"
    elif case.storage < least:
        what = f"{'a checkpoint takes' if case.resumes else 'two checkpoints take'} {size(least)}"
        miss = f"storage: {found}, but {what}; free some, or name another folder"
    elif case.storage < wanted and not case.resumes:
        warning = f"checkpoint.keep: {keep} and one more take {size(wanted)}, {found}; {remedy}"
    return Check("disk", found, needed, miss, warning)


def memory(case: Case) -> Check:
    """A process each, its tensors (on a GPU only weights pass through), and the object store's part of the memory."""
    takes = case.footprint
    worker = PROCESS_BYTES + takes.weights + takes.stream
    key, remedy = "ray.workers", "use fewer workers a node, or nodes with more memory"
    if not case.gpu:
        copies = 2 if case.run.ray.workers > 1 else 1
        worker += copies * takes.gradients + takes.moments + takes.batch
        key, remedy = "batch.micro", "use a smaller one, or fewer workers a node"
    free = {node.name: answers.memory for node, answers in case.heard}
    found, lacking = _shared(case, worker, free)
    miss = f"{key}: a worker takes at least {size(worker)} of memory, but there is {listed(lacking)}; {remedy}"
    return Check("memory", found, f"at least {size(worker)} a worker", miss if lacking else "")


def object_store(case: Case) -> Check:
    """With less than all that the stream may hold it waits more often; with less than its samples Ray spills them."""
    made, stream = case.footprint.made, case.footprint.stream
    remedy = "free memory or enlarge /dev/shm" if case.own else "start Ray there with a larger --object-store-memory"
    remedy += ", or use fewer decode CPUs"
    stores = {node.name: node.object_store for node in case.nodes}
    found, lacking = _shared(case, made, stores)
    miss = warning = ""
    if lacking:
        miss = f"a worker's samples take {size(made)} of the object store, but there is {listed(lacking)}"
        miss = f"data.decode_cpus: {miss}; {remedy}"
    elif narrow := _shared(case, stream, stores)[1]:
        warning = f"a worker's stream wants {size(stream)} of the object store, and there is {listed(narrow)}"
        warning = f"data.decode_cpus: {warning}; {remedy}"
    return Check("object store", found, f"{size(stream)} a worker", miss, warning)


def _shared(case: Case, worker: int, has: Mapping[str, int]) -> tuple[str, dict[str, str]]:
    """What the workers of a node share: all there is, and nodes with less than ``worker`` for each of them.

    Workers are taken to fill the largest nodes first.
    """
    left, lacking, found = case.run.ray.workers, {}, []
    for node in sorted(case.nodes, key=lambda node: -_places(case.run, node, case.gpu)):
        here = min(left, _places(case.run, node, case.gpu))
        left -= here
        if not here or node.name not in has:
            continue
        found.append(f"{size(has[node.name])} for {count(here, 'worker')}")
        if has[node.name] < here * worker:
            lacking[node.name] = found[-1]
    return ", ".join(sorted(set(found))) or "not known", lacking


def one_batch(case: Case) -> Iterator[Check]:
    """The trial of a step; on GPUs with DistributedDataParallel's copy of the gradients, which it had not."""
    run, micro = case.run, case.run.batch.micro
    copy = case.footprint.gradients if run.ray.workers > 1 else 0
    broken, large = {}, {}
    for name, trial in case.trials.items():
        peak, free = trial.peak_bytes + copy, trial.free_bytes
        if not trial.fits:
            large[name] = f"{trial.problem} with {size(free)} free"
        elif trial.problem:
            broken[name] = trial.problem
        elif free and peak > free:
            large[name] = f"{size(peak)} with {size(free)} free"
    if broken:
        remedy = "it needs a CUDA build of torch and a GPU that nobody uses; or use cpu"
        yield Check("one batch", "", miss=f"ray.device: {run.ray.device}, but {listed(broken)}; {remedy}")
    elif large:
        remedy = "use a smaller one, or activation_checkpointing=true"
        yield Check(
            "one batch", "", miss=f"batch.micro: a step of {micro} pairs does not fit: {listed(large)}; {remedy}"
        )
    elif case.trials:
        found = f"a step of {micro} pairs a micro-batch runs, {_slowest(case):.0f} pairs/s"
        if any(trial.free_bytes for trial in case.trials.values()):
            most = max(trial.peak_bytes for trial in case.trials.values())
            found += f", with {size(most + copy)} of a GPU's memory"
        yield Check("one batch", found)


def decoding(case: Case) -> Iterator[Check]:
    """Too few CPUs that decode make workers wait; the run would be slow, and not wrong."""
    if case.samples_per_s is None:
        return
    have, workers = case.run.data.decode_cpus, case.run.ray.workers
    found = f"one CPU here makes about {case.samples_per_s:.0f} samples/s, data.decode_cpus={have}"
    pairs = _slowest(case)
    wanted = math.ceil(workers * pairs / case.samples_per_s)
    needed = f"about {wanted} for {count(workers, 'worker')} of {pairs:.0f} pairs/s" if pairs else ""
    warning = f"data.decode_cpus: {have}, but workers will wait: {found}, they want {needed}" if wanted > have else ""
    yield Check("decoding", found, needed, warning=warning)


def _slowest(case: Case) -> float:
    return min((trial.pairs_per_s for trial in case.trials.values()), default=0.0)


def _places(run: Run, node: Node, gpu: bool) -> int:
    """Workers that a node has room for."""
    places = int(node.cpus / run.ray.cpus_per_worker + 1e-9)
    return min(places, int(node.gpus)) if gpu else places
