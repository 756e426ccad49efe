"""Shares of a data set: exactly so many rows, the same everywhere, smaller ones inside larger ones."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simla_ray.data.draws import stable_hash
from simla_ray.data.index import build_index, share_of
from simla_ray.data.sources import read_rows


def write(path, n, row_group=16, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"image": [b""] * n, "text": [f"{path.stem} {i}" for i in range(n)], **columns}
    pq.write_table(pa.table(table), path, row_group_size=row_group)


def captions(index):
    parts = index.locate(np.arange(len(index)))
    return [r["captions"][0] for unit, places, _ in parts for r in read_rows(unit, places, None, ())]


@pytest.fixture
def files(tmp_path):
    """Two URIs of 100 and 37 rows, under a folder that may move."""
    write(tmp_path / "here" / "a.parquet", 100)
    write(tmp_path / "here" / "b.parquet", 37)
    return [str(tmp_path / "here" / f"{name}.parquet") for name in "ab"]


def test_so_many_rows_of_each_uri_and_smaller_shares_inside_larger_ones(files):
    whole = build_index(files, None, [], "data.train")
    larger: set[str] = set(captions(whole))
    for fraction in (0.9, 0.5, 0.25, 0.125):
        part = share_of(whole, fraction)
        found = captions(part)
        assert len(part) == len(found) == len(set(found)) == round(100 * fraction) + round(37 * fraction)
        assert Counter(text[0] for text in found) == {"a": round(100 * fraction), "b": round(37 * fraction)}
        assert part.left_out == 137 - len(part)
        assert sum(part.per_uri) == len(part.units) and all(len(unit) for unit in part.units)
        assert set(found) < larger
        assert found == [text for text in captions(whole) if text in set(found)], "in the order of the files"
        larger = set(found)


def test_the_rows_are_those_with_the_smallest_numbers(files):
    """A slow reference: every row's own number, sorted; and hand-counted rows spread over the whole file."""
    whole = build_index(files[:1], None, [], "data.train")
    numbers = {}
    for unit in whole.units:
        rng = np.random.default_rng(stable_hash(f"here/a#{unit.number}"))
        for place in range(unit.n):
            numbers[f"a {16 * unit.number + place}"] = rng.random()
    expected = set(sorted(numbers, key=numbers.__getitem__)[:25])
    assert set(captions(share_of(whole, 0.25))) == expected
    quarters = Counter(int(text.split()[1]) // 25 for text in expected)
    assert min(quarters[q] for q in range(4)) >= 2, "from all over the file, not from its beginning"


def test_the_share_does_not_depend_on_where_the_files_lie(files, tmp_path):
    before = captions(share_of(build_index(files, None, [], "data.train"), 0.3))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").rename(tmp_path / "elsewhere" / "here")
    moved = [str(tmp_path / "elsewhere" / "here" / f"{name}.parquet") for name in "ab"]
    assert captions(share_of(build_index(moved, None, [], "data.train"), 0.3)) == before


def test_a_share_of_what_the_split_keeps(tmp_path):
    write(tmp_path / "p.parquet", 80, split=["train", "val"] * 40)
    kept = build_index([str(tmp_path)], "train", [], "data.train")
    part = share_of(kept, 0.5)
    found = captions(part)
    assert len(found) == 20 and set(found) < set(captions(kept))


def test_a_uri_of_which_the_split_keeps_nothing(tmp_path):
    write(tmp_path / "a.parquet", 10, split=["train"] * 10)
    write(tmp_path / "b.parquet", 10, split=["val"] * 10)
    part = share_of(build_index([str(tmp_path / f"{n}.parquet") for n in "ab"], "train", [], "data.train"), 0.5)
    assert part.per_uri == (1, 0) and len(part) == 5


def test_another_share_is_another_data_set(files):
    whole = build_index(files, None, [], "data.train")
    prints = [whole.fingerprint(), share_of(whole, 0.5).fingerprint(), share_of(whole, 0.25).fingerprint()]
    assert len(set(prints)) == 3
    assert share_of(whole, 0.5).fingerprint() == share_of(build_index(files, None, [], "data.train"), 0.5).fingerprint()
