"""What a set of rows is like, in counts that add up."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from simla_ray.data.convert.rows import Picture
from simla_ray.data.convert.shards import NO_LICENSE
from simla_ray.data.text import clean

#: Aspect ratios are counted in steps of a twelfth of a doubling.
RATIO_STEPS = 12
#: Sizes of encoded pictures are counted in steps of a quarter of a doubling.
BYTES_STEPS = 4


@dataclass
class Statistics:
    """Counts over the usable rows; words are cleaned as training cleans them."""

    rows: int = 0
    usable: int = 0
    bytes: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    licenses: Counter[str] = field(default_factory=Counter)
    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    ratios: Counter[int] = field(default_factory=Counter)  # steps of log2 of width over height
    sizes: Counter[int] = field(default_factory=Counter)  # steps of log2 of bytes
    captions: Counter[int] = field(default_factory=Counter)  # per row
    lengths: Counter[int] = field(default_factory=Counter)  # words of a caption
    words: Counter[str] = field(default_factory=Counter)  # captions that say the word

    def add(self, row: Mapping[str, Any], picture: Picture) -> None:
        """Count a usable row."""
        width, height = picture.image.size
        self.usable += 1
        self.bytes += len(picture.encoded)
        self.formats[picture.format] += 1
        self.licenses[str(row.get("license") or NO_LICENSE)] += 1
        self.widths[width] += 1
        self.heights[height] += 1
        self.ratios[round(RATIO_STEPS * math.log2(width / height))] += 1
        self.sizes[math.floor(BYTES_STEPS * math.log2(len(picture.encoded)))] += 1
        cleaned = [clean(str(c), 10**6).split() for c in row["captions"] if c is not None]
        self.captions[len(cleaned)] += 1
        for caption in cleaned:
            self.lengths[len(caption)] += 1
            self.words.update(set(caption))

    def merge(self, other: Statistics) -> None:
        for name in self.__dict__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            else:
                setattr(self, name, mine + theirs)

    def to_json(self) -> str:
        return json.dumps(self.__dict__)

    @classmethod
    def from_json(cls, text: str) -> Statistics:
        found = json.loads(text)
        for f in fields(cls):
            if f.type == "Counter[int]":
                found[f.name] = Counter({int(k): n for k, n in found[f.name].items()})
            elif f.type == "Counter[str]":
                found[f.name] = Counter(found[f.name])
        return cls(**found)


def quantile(counts: Mapping[int, int], share: float) -> int:
    """The smallest value that at least this share of the counted do not exceed; 0 of nothing."""
    left = share * sum(counts.values())
    value = 0
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            break
    return value


def mean(counts: Mapping[int, int]) -> float:
    """0 of nothing."""
    return sum(value * n for value, n in counts.items()) / max(1, sum(counts.values()))


def bins(counts: Mapping[int, int], most: int = 24) -> list[tuple[int, int, int]]:
    """(first value, last value, how many) of neighbouring bins, at most ``most``, of one round width.

    What lies beyond 99.5 % of the counted is in the last bin.
    """
    if not counts:
        return []
    low, high, top = min(counts), quantile(counts, 0.995), max(counts)
    width = next(w for w in (m * 10**e for e in range(10) for m in (1, 2, 5)) if high // w - low // w < most)
    first, last = low // width, high // width
    totals = [0] * (last - first + 1)
    for value, n in counts.items():
        totals[min(value // width, last) - first] += n
    ends = [(first + i + 1) * width - 1 for i in range(len(totals))]
    ends[-1] = max(ends[-1], top)
    return [((first + i) * width, end, n) for i, (end, n) in enumerate(zip(ends, totals, strict=True))]
