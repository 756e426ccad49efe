"""Random draws of the data side: every one derives from (seed, epoch, uid, how often the epoch had it before)."""

from __future__ import annotations

import hashlib

import numpy as np


def rng_for(seed: int, epoch: int, uid: str, time: int = 0) -> np.random.Generator:
    """The generator of one sample in one epoch: crop, flip, ops, caption and masks are drawn from it, in this order.

    Args:
        time: how often the epoch has had the sample before, in a mixture that repeats it.
    """
    return np.random.default_rng([seed, epoch, stable_hash(uid), *([time] if time else [])])


def stable_hash(text: str) -> int:
    """Non-negative 63-bit hash, the same in every process (Python's own differs)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
