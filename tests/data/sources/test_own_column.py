"""A column that is none of the row's is read by its own name, whatever the format."""

import csv
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simla_ray.data.index import build_index
from simla_ray.data.sources import read_column

ROWS = [{"image": f"{i}.jpg", "caption": f"caption {i}", "kind": kind} for i, kind in enumerate(["a", None, "b"])]


def write_parquet(folder):
    pq.write_table(pa.Table.from_pylist([row | {"image": b"x"} for row in ROWS]), folder / "rows.parquet")
    return folder / "rows.parquet"


def write_json(folder):
    (folder / "rows.json").write_text(json.dumps(ROWS))
    return folder / "rows.json"


def write_tsv(folder):
    with (folder / "rows.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([list(ROWS[0]), *(list(row.values()) for row in ROWS)])
    return folder / "rows.tsv"


def write_tar(folder):
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for i, row in enumerate(ROWS):
            for ending, content in (("jpg", b"x"), ("json", json.dumps(row).encode())):
                member = tarfile.TarInfo(f"{i}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder / "rows.tar"


@pytest.mark.parametrize("write", [write_parquet, write_json, write_tsv, write_tar])
def test_values_by_row(tmp_path, write):
    (unit,) = build_index([str(write(tmp_path))], None, [], "data.train").units
    assert read_column(unit, "kind") == ["a", None, "b"]
    assert read_column(unit, "nothing") in ([], [None] * 3)
