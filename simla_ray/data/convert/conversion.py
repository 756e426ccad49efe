"""Sources -> a folder of Parquet shards with a manifest; what was interrupted goes on, what is finished stays."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from simla_ray.data.convert.annotation import Annotation
from simla_ray.data.convert.jobs import join, run_job
from simla_ray.data.convert.plan import (
    STATE,
    Options,
    Plan,
    asked_for,
    check_folder,
    check_same,
    make_plan,
    store_plan,
    stored_plan,
)
from simla_ray.data.convert.progress import Progress, Say
from simla_ray.data.convert.shards import Report, WriteShards
from simla_ray.data.convert.survey import survey
from simla_ray.data.index import Index, build_index
from simla_ray.data.sources import MANIFEST
from simla_ray.data.sources.files import is_remote
from simla_ray.errors import UserError
from simla_ray.whole import write_whole

DROPPED = "dropped.jsonl"


def convert(
    uris: Sequence[str],
    to: str,
    options: Options,
    tasks: int | None,
    address: str | None,
    say: Say,
    annotation: Annotation | None = None,
) -> dict[str, Any]:
    """Write the rows behind ``uris`` as shards into the folder ``to``.

    The shards' bytes depend on the rows and the options alone. A shard appears under its name when it is whole, and
    the manifest when all of them are.

    Args:
        tasks: shards written at the same time; None: as many as there are CPUs.
        annotation: what is added to the rows.

    Returns:
        The manifest.

    Raises:
        UserError: a source cannot be read, or the folder holds something else.
    """
    if is_remote(to):
        raise UserError(f"--to: {to} is in a store; only folders on disk are written")
    folder = Path(to).absolute()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--to: {to} is a file; give a folder")
    index = build_index(uris, options.split, [Path(r) for r in options.image_roots], "source", "--split")
    asked = asked_for(options, index.fingerprint(), annotation.settings if annotation is not None else {})
    finished = _finished(folder, asked)
    if finished is not None:
        say(f"finished   {to}: {finished['rows']:,} rows in {len(finished['shards'])} shards are there already")
        return finished
    plan = stored_plan(folder)
    if plan is None:
        check_folder(folder, [unit.path for unit in index.units])
    else:
        check_same(plan.asked, asked, str(folder))
    try:
        with locked(folder, "--to"):
            for left in folder.glob(".*.tmp"):
                left.unlink(missing_ok=True)
            return _convert(index, plan, uris, folder, asked, options, tasks, address, say, annotation)
    except OSError as error:
        raise UserError(f"{error.filename or to}: cannot be written ({error.strerror or error})") from None


def _convert(
    index: Index,
    plan: Plan | None,
    uris: Sequence[str],
    folder: Path,
    asked: dict[str, Any],
    options: Options,
    tasks: int | None,
    address: str | None,
    say: Say,
    annotation: Annotation | None,
) -> dict[str, Any]:
    began = time.monotonic()
    say(f"source     {', '.join(uris)}: {len(index):,} rows")
    if plan is None:
        tasks = join(address, tasks)
        say("survey     uids, columns and sizes of all rows")
        found = survey(index, options.max_pixels, options.max_px, tasks)
        plan = make_plan(asked, uris, annotation.widened(found) if annotation is not None else found, options)
        store_plan(folder, plan)
    reports = {name: Report.read(folder, name) for name in plan.names}
    pending = [i for i, name in enumerate(plan.names) if reports[name] is None]
    before = sum(report.rows_in for report in reports.values() if report is not None)
    if len(pending) < len(plan.names):
        say(f"resumed    {len(plan.names) - len(pending):,} of {len(plan.names):,} shards are there already")
    for i in pending:
        (folder / STATE / f"{plan.names[i]}.at").unlink(missing_ok=True)
    if pending:
        tasks = join(address, tasks)
        say(f"write      {len(pending):,} shards to {folder}, {min(tasks, len(pending))} at a time")
        work = WriteShards(index, plan, options, folder, annotation)
        loads_model = annotation is not None and annotation.loads_model
        with Progress(plan.rows, before, lambda: _rows_done(folder, plan), say):
            for _ in run_job([{"shard": i} for i in pending], work, tasks, loads_model):
                pass
    manifest = _finish(folder, plan, annotation, time.monotonic() - began)
    if not manifest["rows"]:
        raise UserError(f"{folder}: not one row could be used; {DROPPED} there names the reasons")
    return manifest


def _finish(folder: Path, plan: Plan, annotation: Annotation | None, seconds: float) -> dict[str, Any]:
    """The shards' reports become the folder's manifest and its list of dropped rows."""
    reports = [_report(folder, name) for name in plan.names]
    dropped = [line for report in reports for line in report.dropped]
    write_whole(folder / DROPPED, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in dropped))
    licenses = sum((report.licenses for report in reports), Counter())
    rows = sum(report.rows for report in reports)
    added: Counter[str] = Counter()
    for report in reports:
        added.update(report.added)  # a sum would leave out what is zero
    manifest = {
        "rows": rows,
        "rows_in": plan.rows,
        "dropped": dict(Counter(line["reason"] for line in dropped).most_common()),
        "bytes": sum(report.bytes for report in reports),
        "columns": ["uid", "image", "captions", *plan.columns],
        "licenses": dict(licenses.most_common()),
        "fingerprint": build_index([str(folder)], None, [], "--to").fingerprint() if rows else None,
        "source": {"uris": list(plan.uris), "fingerprint": plan.asked["fingerprint"]},
        **({"annotation": {**annotation.about, "counts": dict(added)}} if annotation is not None else {}),
        "options": {k: v for k, v in plan.asked.items() if k not in ("fingerprint", "version")},
        "simla_ray": metadata.version("simla_ray"),
        "version": plan.asked["version"],
        "seconds": round(seconds, 1),
        "shards": [{"file": r.name, "rows": r.rows, "bytes": r.bytes, "sha256": r.sha256} for r in reports],
    }
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    shutil.rmtree(folder / STATE, ignore_errors=True)
    return manifest


def _report(folder: Path, name: str) -> Report:
    report = Report.read(folder, name)
    if report is None:
        raise UserError(f"{folder / name}: was written and is gone; the folder must be one that all nodes of Ray share")
    return report


def _finished(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished conversion with the same options.

    Raises:
        UserError: it had others, or its shards are not there any more.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        was = {**manifest["options"], "fingerprint": manifest["source"]["fingerprint"], "version": manifest["version"]}
        shards = {folder / shard["file"]: shard["bytes"] for shard in manifest["shards"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is no manifest of a conversion; give an empty or a new folder to --to") from None
    check_same(was, asked, str(folder))
    for shard, size in shards.items():
        if not shard.exists() or shard.stat().st_size != size:
            raise UserError(f"{shard}: is missing or was changed since; empty {folder} to convert again")
    shutil.rmtree(folder / STATE, ignore_errors=True)
    return manifest


def _rows_done(folder: Path, plan: Plan) -> int:
    """From what the tasks note as they go; what they are just writing counts as not done."""
    done = 0
    for name in plan.names:
        try:
            done += int((folder / STATE / f"{name}.at").read_text() or 0)
        except (OSError, ValueError):
            continue
    return done


@contextmanager
def locked(folder: Path, key: str) -> Iterator[None]:
    """One process at a time writes into a folder; ``key`` is what errors call it."""
    (folder / STATE).mkdir(parents=True, exist_ok=True)
    with (folder / STATE / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{key}: another process is writing into {folder}; wait for it") from None
        except OSError:  # a file system without locks
            pass
        yield
