"""Blocks of samples as single Arrow rows: what goes in comes out, and arrays are not copied."""

import numpy as np
import pyarrow as pa

from simla_ray.data.blocks import block_table, rows_table, table_block, table_rows


def test_a_block_comes_back_as_it_went():
    block = {
        "image": np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4),
        "turned": np.arange(6, dtype=np.int64).reshape(2, 3).T,
        "weight": np.array([0.5, np.nan], dtype=np.float32),
        "chosen": np.array([[True, False]]),
        "empty": np.empty((0, 3, 8), dtype=np.uint8),
        "uid": np.array(["a", "ü"]),
        "drop": np.array(["", "image_missing"]),
    }
    table = block_table(block)
    assert len(table) == 1
    back = table_block(table)
    assert back.keys() == block.keys()
    for name, values in block.items():
        assert back[name].shape == values.shape
        assert name == "weight" or back[name].tolist() == values.tolist()
        assert name in ("uid", "drop") or back[name].dtype == values.dtype
    assert back["weight"][0] == 0.5 and np.isnan(back["weight"][1])


def test_arrays_are_handed_on_without_a_copy():
    image = np.zeros((2, 3, 4), dtype=np.uint8)
    table = block_table({"image": image})
    back = table_block(table)["image"]
    assert np.shares_memory(image, back)
    assert not back.flags.writeable


def test_rows_of_several_blocks_come_back_in_order():
    row = {"lane": 1, "epoch": 0, "offset": 7, "time": 0, "uid": "u", "image_id": "i", "captions": ["a", ""]}
    row |= dict.fromkeys(("asked", "images", "boxes", "region_feats", "tags", "box_labels", "phrases"))
    encoded = [
        row | {"image": b"\x00jpeg", "path": None, "reason": None},
        row | {"image": None, "path": "/x.jpg", "reason": None, "asked": "[]", "images": [b"a", b"b"]},
        row | {"image": None, "path": None, "reason": "image_missing", "captions": []},
    ]
    tables = [rows_table(encoded[:2]), rows_table([{k: v for k, v in encoded[2].items() if v is not None}])]
    assert all(len(table) == 1 for table in tables)
    assert table_rows(pa.concat_tables(tables)) == encoded
