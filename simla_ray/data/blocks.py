"""What goes from stage to stage of the training stream: one Arrow row for a block of samples.

Ray Data cuts and joins blocks by their bytes, down to single rows. A row that holds a whole block stays whole, so that
small pictures and large ones are handed on in the same numbers; arrays go into it and come out of it without a copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

#: A row of the data set on its way to where its sample is made; of image, path and reason at most one is there.
ENCODED = pa.struct(
    {
        **dict.fromkeys(("lane", "epoch", "offset", "time"), pa.int64()),
        **dict.fromkeys(("uid", "image_id", "path", "reason"), pa.string()),
        "captions": pa.list_(pa.string()),
        "image": pa.large_binary(),
        "asked": pa.string(),  # questions or statements, as JSON
        "images": pa.list_(pa.large_binary()),
        "boxes": pa.list_(pa.list_(pa.float32())),
        "box_labels": pa.list_(pa.string()),
        "region_feats": pa.list_(pa.list_(pa.float32())),
        "tags": pa.list_(pa.string()),
        "phrases": pa.list_(pa.struct({"text": pa.string()})),
    }
)
ROWS = pa.schema({"rows": pa.list_(ENCODED)})

Block = dict[str, np.ndarray]


def rows_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Encoded rows as one Arrow row."""
    return pa.table({"rows": [rows]}, schema=ROWS)


def table_rows(table: pa.Table) -> list[dict[str, Any]]:
    """What ``rows_table`` was given."""
    return [row for rows in table.column("rows").to_pylist() for row in rows]


def block_table(block: Mapping[str, np.ndarray]) -> pa.Table:
    """Arrays, and lists of text, by name as one Arrow row."""
    columns: dict[str, pa.Array] = {}
    about: dict[str, Any] = {}
    for name, values in block.items():
        if values.dtype.kind in "UO":
            about[name] = values.tolist()
            continue
        values = np.ascontiguousarray(values)
        about[name] = {"dtype": values.dtype.str, "shape": values.shape}
        offsets = pa.py_buffer(np.array([0, values.nbytes], dtype=np.int64))
        columns[name] = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), 1, [None, offsets, pa.py_buffer(values.reshape(-1).view(np.uint8))]
        )
    return pa.table({"about": [json.dumps(about)], **columns})


def table_block(table: pa.Table) -> Block:
    """What ``block_table`` was given; the arrays cannot be written to."""
    (about,) = table.column("about").to_pylist()
    block = {}
    for name, kind in json.loads(about).items():
        if isinstance(kind, list):
            block[name] = np.array(kind, dtype=object)
        else:
            block[name] = np.frombuffer(_bytes(table.column(name)), dtype=kind["dtype"]).reshape(kind["shape"])
    return block


def _bytes(column: pa.ChunkedArray) -> pa.Buffer:
    """Of a column of one row; asking for its value would copy it."""
    (array,) = (chunk for chunk in column.chunks if len(chunk))
    _, offsets, data = array.buffers()
    start, stop = np.frombuffer(offsets, dtype=np.int64)[array.offset : array.offset + 2].tolist()
    return data.slice(start, stop - start)
