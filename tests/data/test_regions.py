"""Boxes follow the view, in shares of it; rows that have no regions are dropped with the reason."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simla_ray.config.load import load_run, to_dict
from simla_ray.data.blocks import table_block
from simla_ray.data.collate import collate
from simla_ray.data.decode import DropRow
from simla_ray.data.index import build_index
from simla_ray.data.map_functions import BlockMaker, WindowReader
from simla_ray.data.order import Order, Position
from simla_ray.data.region_source import with_regions
from simla_ray.data.regions import WHOLE, RegionMaker, follow, grid_boxes, in_view, region_columns
from simla_ray.data.sample import SampleMaker, stacked
from simla_ray.errors import UserError

REGIONS = {
    "vision.source": "regions",
    "data.augment": "crop",
    "text.fusion": "merged",
    "method": "vilt",
    "text.depth": 2,
}
BOXES = [[0.1, 0.2, 0.3, 0.6], [0.5, 0.5, 0.9, 0.7]]


def region_run(**keys):
    return load_run(overrides={**REGIONS, **{f"regions.{name}": value for name, value in keys.items()}})


def test_grid_cells_fill_the_image_row_by_row():
    cells = grid_boxes(2)
    np.testing.assert_allclose(cells, [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]])
    assert grid_boxes(7).max() == 1 and len(grid_boxes(7)) == 49


def test_boxes_follow_crop_and_flip():
    boxes = np.array([[0.2, 0.2, 0.4, 0.4], [0.0, 0.0, 0.3, 0.3], [0.6, 0.6, 0.9, 0.9]])
    cut, kept = follow(boxes, np.array([0.2, 0.2, 0.7, 0.7]), False)
    # The first starts at the view's corner and is 0.2 of its 0.5 wide; of the second a ninth is left, of the third too.
    np.testing.assert_allclose(cut, [[0, 0, 0.4, 0.4], [0, 0, 0.2, 0.2], [0.8, 0.8, 1, 1]])
    assert kept.tolist() == [True, False, False]
    flipped, _ = follow(boxes, np.array([0.2, 0.2, 0.7, 0.7]), True)
    np.testing.assert_allclose(flipped[0], [0.6, 0, 1, 0.4])


def test_regions_of_a_view_are_the_view_and_what_is_in_it_by_size():
    boxes = np.array([[0.1, 0.1, 0.2, 0.2], [0, 0, 0.5, 0.5], [0.8, 0.8, 0.9, 0.9]], np.float32)
    found, which = in_view(boxes, np.array(WHOLE), False)
    assert which.tolist() == [-1, 1, 0, 2]
    np.testing.assert_array_equal(found, [WHOLE, *boxes[[1, 0, 2]]])
    found, which = in_view(boxes, np.array([0, 0, 0.5, 0.5]), True)
    assert which.tolist() == [-1, 1, 0]  # the second fills the view
    np.testing.assert_allclose(found, [WHOLE, WHOLE, [0.6, 0.2, 0.8, 0.4]], atol=1e-6)


def test_a_view_shows_under_its_boxes_what_the_image_shows_under_its_own(world_rows, vocabulary):
    """The mean colour of an object, by its box, in the image and in cropped and mirrored views of it."""
    run = region_run(source="boxes")
    train, val = (SampleMaker(run, vocabulary, training=training) for training in (True, False))

    def colours(sample):
        found = []
        for x1, y1, x2, y2 in sample["region_boxes"][1 : int(sample["n_regions"])] * 48:
            part = sample["image"][:, round(y1) : round(y2), round(x1) : round(x2)]
            found.append(part.reshape(3, -1).mean(1))
        return sorted(found, key=lambda c: tuple(c.round(-1)))

    compared = 0
    for row in world_rows["train"][:20]:
        here, plain = train(row, 0), val(row, 0)
        if here["n_regions"] == plain["n_regions"]:
            compared += 1
            np.testing.assert_allclose(colours(here), colours(plain), atol=40)
        np.testing.assert_array_equal(plain["region_boxes"][0], WHOLE)
        assert plain["n_regions"] == 1 + len(row["boxes"])
    assert compared > 5


def test_a_column_is_read_whole_and_its_picture_is_not_cropped(world_rows, vocabulary):
    run = region_run(source="column", max=2, width=3)
    row = world_rows["train"][0]
    n = len(row["boxes"])
    row = row | {"region_feats": [[i, 0.5, -1.0] for i in range(n)]}
    sample = SampleMaker(run, vocabulary, training=True)(row, 0)
    assert sample["regions"].tolist() == [[0, 0.5, -1], [1, 0.5, -1]] and sample["n_regions"] == 2
    np.testing.assert_allclose(sample["region_boxes"], row["boxes"][:2], atol=1e-6)
    np.testing.assert_array_equal(sample["image"], SampleMaker(run, vocabulary, training=False)(row, 0)["image"])


@pytest.mark.parametrize(
    ("source", "row", "reason"),
    [
        ("boxes", {}, "boxes_missing"),
        ("boxes", {"boxes": [[0.5, 0.1, 0.4, 0.2]]}, "boxes_unreadable"),
        ("boxes", {"boxes": [[0.1, 0.1, float("nan"), 0.2]]}, "boxes_unreadable"),
        ("column", {"boxes": BOXES}, "region_feats_missing"),
        ("column", {"boxes": BOXES, "region_feats": [[1.0, 2.0]]}, "region_feats_unlike_boxes"),
        ("column", {"boxes": BOXES, "region_feats": [[1.0, 2.0], [1.0]]}, "region_feats_width"),
        ("column", {"boxes": BOXES, "region_feats": [[1.0, 2.0], [1.0, float("inf")]]}, "region_feats_unreadable"),
    ],
)
def test_rows_without_usable_regions_are_dropped_with_the_reason(source, row, reason):
    make = RegionMaker(region_run(source=source, width=2))
    with pytest.raises(DropRow) as drop:
        make(row, np.array(WHOLE), False)
    assert str(drop.value) == reason


def test_the_largest_boxes_are_kept_beside_the_whole_image():
    found = RegionMaker(region_run(source="boxes", max=2))(
        {"boxes": [[0, 0, 0.1, 0.1], *BOXES]}, np.array(WHOLE), False
    )
    np.testing.assert_allclose(found["region_boxes"], [WHOLE, BOXES[0]])
    empty = RegionMaker(region_run(source="boxes", max=2))({"boxes": []}, np.array(WHOLE), False)
    assert empty["n_regions"] == 1


def test_a_batch_has_masks_and_is_as_wide_as_its_fullest_image(world_rows, vocabulary):
    run = region_run(source="boxes")
    make = SampleMaker(run, vocabulary, training=False)
    rows = world_rows["train"][:6]
    batch = collate(stacked([make(row, 0) for row in rows]), run)
    counts = [1 + len(row["boxes"]) for row in rows]
    assert batch.region_boxes.shape == (6, max(counts), 4) and batch.regions is None
    assert batch.region_mask.sum(1).tolist() == counts
    grid = region_run(source="grid", grid=3)
    batch = collate(stacked([SampleMaker(grid, vocabulary, training=True)(row, 0) for row in rows]), grid)
    assert batch.region_boxes.shape == (6, 9, 4) and batch.region_mask.all()


def test_the_source_is_decided_by_the_columns_that_every_set_has(world_files, tmp_path):
    def index(columns):
        table = pq.read_table(world_files / "val.parquet").select(["uid", "image", "captions", *columns])
        file = tmp_path / f"{'-'.join(columns) or 'none'}.parquet"
        pq.write_table(table, file)
        return build_index([str(file)], None, [], "data.val")

    whole = build_index([str(world_files / "train.parquet")], None, [], "data.train")
    auto = region_run(max=36)
    assert with_regions(auto, {"train": whole, "val": index(["boxes"])}).regions.source == "boxes"
    assert with_regions(auto, {"train": whole, "val": index([])}).regions.source == "grid"
    assert with_regions(auto, None).regions.source == "boxes"
    with pytest.raises(UserError, match=r"data\.val: no boxes in the first rows, which regions.source=boxes reads"):
        with_regions(region_run(source="boxes"), {"train": whole, "val": index([])})
    with pytest.raises(UserError, match=r"data\.train: no boxes and region_feats"):
        with_regions(region_run(source="column"), {"train": whole})
    assert region_columns(region_run(source="boxes")) == ("boxes",) and region_columns(region_run(source="grid")) == ()


def test_what_was_decided_is_a_config_that_can_be_stored(world_rows, tmp_path):
    boxed, plain = (tmp_path / f"{name}.parquet" for name in ("boxed", "plain"))
    pq.write_table(pa.Table.from_pylist(world_rows["val"][:6]), boxed)
    bare = [{name: row[name] for name in ("uid", "image", "captions")} for row in world_rows["val"][6:12]]
    pq.write_table(pa.Table.from_pylist(bare), plain)
    for files, source in (([boxed], "boxes"), ([boxed, plain], "grid"), ([plain, boxed], "grid")):
        index = build_index([str(file) for file in files], None, (), "data.train")
        found = with_regions(load_run(overrides=["method=uniter"]), {"train": index})
        assert found.regions.source == source, "every URI has what the source reads"
        assert load_run(overrides=to_dict(found), presets=False) == found
    run = load_run(overrides=["method=uniter", "regions.classes=[dog]"])
    with pytest.raises(UserError, match=r"regions\.classes"):
        with_regions(run, {"train": build_index([str(plain)], None, (), "data.train")})


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"vision.source": "patches", "text.depth": 0, "regions.grid": 2}, "regions: given, but vision.source=patches"),
        ({}, "regions: null, but vision.source=regions"),
        ({"regions.source": "grid", "regions.classes": ["a"]}, "regions.classes: cells of regions.source=grid have no"),
        ({"regions.source": "boxes", "data.augment": "full"}, "data.augment: full turns the image away from its boxes"),
        ({"regions.source": "boxes", "text.depth": 0}, "text.depth: 0 does not go with vision.source=regions"),
    ],
)
def test_rules_name_the_key(keys, line):
    with pytest.raises(UserError) as error:
        load_run(overrides={**REGIONS, **keys})
    assert line in str(error.value)


@pytest.mark.parametrize("source", ["boxes", "column", "grid"])
def test_blocks_of_the_stream_hold_what_single_samples_are(source, world_rows, vocabulary, tmp_path):
    """Boxes and features on their way through the stream's tables; a row without them is dropped by its reason."""
    run = region_run(source=source, width=2, max=6, grid=2)
    rows = [row | {"region_feats": [[i, 0.5] for i in range(len(row["boxes"]))]} for row in world_rows["train"][:4]]
    rows[2] = rows[2] | {"boxes": None}
    kept = ("uid", "image", "captions", "boxes", "region_feats")
    pq.write_table(pa.Table.from_pylist([{k: row[k] for k in kept} for row in rows]), tmp_path / "rows.parquet")
    index = build_index([str(tmp_path / "rows.parquet")], None, [], "data.train")
    order = Order((4,), 1, 4, 0)
    reader = WindowReader(index, order, columns=region_columns(run))
    window = next(order.windows(0, Position(), {}))
    (block,) = [table_block(table) for rows in reader.read([window]) for table in BlockMaker(run, vocabulary)(rows)]
    make = SampleMaker(run, vocabulary, training=True)
    by_uid = {row["uid"]: row | {"image_id": row["uid"]} for row in rows}
    for i, uid in enumerate(block["uid"]):
        if block["drop"][i]:
            assert block["drop"][i] == "boxes_missing" and uid == rows[2]["uid"] and source != "grid"
            continue
        sample = make(by_uid[uid], 0)
        for name, values in sample.items():
            np.testing.assert_array_equal(block[name][i], values, err_msg=name)
    assert (source == "grid") is not any(block["drop"])


def test_classes_go_with_their_boxes(world_rows):
    """By size, the whole image first as background, cut off with the crop; names that are not asked for are 0."""
    run = region_run(source="boxes", max=3, classes=["star", "cross"])
    row = {"boxes": [[0, 0, 0.1, 0.1], *BOXES, [0.9, 0.9, 1, 1]], "box_labels": ["a", "star", "cross", "star"]}
    found = RegionMaker(run)(row, np.array(WHOLE), False)
    assert found["region_class"].tolist() == [0, 1, 2] and region_columns(run) == ("boxes", "box_labels")
    found = RegionMaker(run)(row, np.array([0.4, 0.4, 1, 1]), True)
    assert found["region_class"].tolist() == [0, 2, 1] and found["n_regions"] == 3
    with pytest.raises(DropRow, match="box_labels_unlike_boxes"):
        RegionMaker(run)(row | {"box_labels": ["a"]}, np.array(WHOLE), False)
