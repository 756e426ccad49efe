"""Names of a data set's files: what their rows that bring no uid are called after.

Draws and the ledger go by the uid, so it may not depend on where a data set lies, only on how it is laid out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from simla_ray.data.sources.files import pure


def told_apart(names: Mapping[str, str]) -> dict[str, str]:
    """Names of files, different ones for different files.

    Args:
        names: file -> the name it has where no other file of the set has the same.

    Returns:
        file -> name. Files of one name are called by the shortest end of their paths that tells them apart, with the
        file's ending, below the folder that holds them all.
    """
    alike: dict[str, list[str]] = {}
    for file, name in names.items():
        alike.setdefault(name, []).append(file)
    found = dict(names)
    for of_name in alike.values():
        if len(of_name) > 1:
            found |= zip(of_name, _ends(of_name), strict=True)
    return found


def _ends(files: Sequence[str]) -> list[str]:
    paths = [pure(file).parts for file in files]
    folders = zip(*(path[:-1] for path in paths), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda level: len(set(level)) == 1, folders))
    below = [path[shared:] for path in paths]
    ends: list[str] = []
    for depth in range(1, max(map(len, below)) + 1):
        ends = ["/".join(path[-depth:]) for path in below]
        if len(set(ends)) == len(ends):
            break
    return ends  # alike only where nothing but the options of a store differs
