"""Checks of the nodes as places to run on: that they answer, are alike, and reach storage and data."""

from __future__ import annotations

from simla_ray.orchestration.preflight.checks import Case, Check, count, listed

#: Clocks that differ by more make logs of several nodes unreadable; stores refuse requests from 15 minutes on.
MOST_SKEW_S = 2.0
#: Ray stops spilling objects where a disk is fuller.
MOST_RAY_TEMP_USED = 0.95


def answering(case: Case) -> Check:
    silent = {node.name: node.silence for node in case.nodes if node.silence}
    miss = f"ray.address: {listed(silent)}; repair or remove the node" if silent else ""
    return Check("nodes", f"{len(case.heard)} answer", str(len(case.nodes)), miss)


def packages(case: Case) -> Check:
    expected = case.driver.packages
    differ: dict[str, list[str]] = {}
    for node, answers in case.heard:
        for name, version in answers.packages.items():
            if version != expected[name]:
                differ.setdefault(f"{name} {version} in place of {expected[name]}", []).append(node.name)
    found = "; ".join(f"{what} on {', '.join(names)}" for what, names in differ.items())
    miss = f"packages: {found}; install what the driver has on every node (constraints.txt)" if differ else ""
    return Check("packages", f"{len(expected)} of one version on every node", "the driver's", miss)


def clocks(case: Case) -> Check:
    wrong = {
        node.name: f"{abs(node.ahead_s):.0f} s {'ahead of' if node.ahead_s > 0 else 'behind'} the driver"
        for node, _ in case.heard
        if abs(node.ahead_s) > MOST_SKEW_S
    }
    most = max((abs(node.ahead_s) for node, _ in case.heard), default=0.0)
    miss = f"clock: {listed(wrong)}, at most {MOST_SKEW_S:g} s are allowed; synchronise it by NTP" if wrong else ""
    return Check("clocks", f"{most:.1f} s apart at least", f"at most {MOST_SKEW_S:g} s", miss)


def storage(case: Case) -> Check:
    run = case.run
    found = f"{run.storage} can be written" + ("" if case.own else " and is shared by every node")
    if case.driver.storage_problem:
        what = f"storage: {run.storage}: {case.driver.storage_problem}"
        return Check("storage", found, miss=f"{what}; name a folder in which this user may write")
    wrong = {node.name: answers.storage_problem for node, answers in case.heard if answers.storage_problem}
    miss = (
        f"storage: {run.storage} must be one folder that every node can write, but {listed(wrong)}; "
        "mount a shared file system there on every node"
    )
    return Check("storage", found, miss=miss if wrong else "")


def data(case: Case) -> Check:
    """Nodes without CPUs run no task that reads."""
    lacking, key = {}, ""
    for node, answers in case.heard:
        if not answers.unreadable or not node.cpus:
            continue
        (file, reason), *others = answers.unreadable
        lacking[node.name] = f"{file.path}: {reason}" + (f" (and {len(others)} more)" if others else "")
        key = key or file.key
    where = "this machine" if case.own else "every node with CPUs"
    found = f"{count(case.files, 'file')} read on {where}" if case.files else "none to be read yet"
    miss = f"{key}: {listed(lacking)}; put it where every node reads the same file under this path" if lacking else ""
    return Check("data", found, miss=miss)


def ray_folder(case: Case) -> Check:
    used = {node.name: answers.ray_temp_used for node, answers in case.heard}
    full = {name: f"{share:.0%} full" for name, share in used.items() if share >= MOST_RAY_TEMP_USED}
    remedy = "name a larger one by RAY_TMPDIR" if case.own else "start Ray there with a --temp-dir on a larger one"
    miss = (
        f"RAY_TMPDIR: the disk of Ray's folder is {listed(full)}, and from {MOST_RAY_TEMP_USED:.0%} on Ray spills no "
        f"object; free some, or {remedy}"
    )
    found = f"disk {max(used.values(), default=0):.0%} full"
    return Check("Ray's folder", found, f"below {MOST_RAY_TEMP_USED:.0%}", miss if full else "")
