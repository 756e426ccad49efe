import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import simla_ray.data.world as world
from simla_ray.data.scene import COLORS, RELATIONS, SHAPES, SIZES, satisfies
from simla_ray.data.world import SCHEMA, generate, make_row
from simla_ray.errors import UserError

PX = 48


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [make_row(3, "train", i, PX, 3) for i in range(300)]


def pixels(row: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB")).astype(float)


def in_pixels(box: list[float]) -> list[int]:
    return [round(v * PX) for v in box]


def digest(rows: list[dict]) -> str:
    state = hashlib.sha256()
    for row in rows:
        state.update(row["image"])
        state.update(json.dumps({k: v for k, v in row.items() if k != "image"}).encode())
    return state.hexdigest()


def test_rows_do_not_depend_on_the_process():
    code = (
        "from simla_ray.data.world import make_row; from test_world import digest;"
        "print(digest([make_row(3, 'test', i, 48, 2) for i in (9, 4)]))"
    )
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(here.parents[2]), str(here.parent)])
    found = set()
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        found.add(run.stdout.strip())
    assert found == {digest([make_row(3, "test", i, 48, 2) for i in (9, 4)])}


def test_every_argument_matters():
    base = make_row(3, "test", 5, PX, 2)
    assert make_row(4, "test", 5, PX, 2)["scene"] != base["scene"]
    assert make_row(3, "val", 5, PX, 2)["scene"] != base["scene"]
    assert make_row(3, "test", 6, PX, 2)["scene"] != base["scene"]
    assert pixels(make_row(3, "test", 5, 64, 2)).shape == (64, 64, 3)
    more = make_row(3, "test", 5, PX, 3)
    assert (more["image"], more["captions"][:2]) == (base["image"], base["captions"])


def test_out_of_range_arguments_are_refused():
    with pytest.raises(ValueError, match="image_px"):
        make_row(0, "train", 0, 31, 1)
    with pytest.raises(ValueError, match="n_captions"):
        make_row(0, "train", 0, PX, 0)
    assert len(set(make_row(0, "train", 0, 32, 16)["captions"])) == 16


def test_columns_match_the_schema(rows):
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    assert set(rows[0]) == set(SCHEMA.names)
    assert all(column.null_count == 0 for column in table.columns)
    assert rows[7]["uid"] == "world-train-000007"
    assert all(len(set(row["captions"])) == len(row["claims"]) == 3 for row in rows)


def test_claims_hold_on_the_own_scene(rows):
    assert all(satisfies(claim, row["scene"]) for row in rows for claim in row["claims"])


def test_captions_seldom_fit_another_of_500_images():
    others = [make_row(5, "test", i, PX, 1) for i in range(500)]
    fits_another = [
        any(satisfies(row["claims"][0], other["scene"]) for other in others if other is not row) for row in others
    ]
    assert np.mean(fits_another) <= 0.2


def test_boxes_lie_inside_and_apart(rows):
    extents = {"small": (0.23, 0.285), "large": (0.355, 0.425)}
    for row in rows:
        objects = json.loads(row["scene"])
        assert [obj["box"] for obj in objects] == row["boxes"]
        assert [f"{o['size']} {o['color']} {o['shape']}" for o in objects] == row["box_labels"]
        assert len({(obj["shape"], obj["color"]) for obj in objects}) == len(objects)
        for obj in objects:
            x1, y1, x2, y2 = obj["box"]
            assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
            low, high = extents[obj["size"]]
            assert low <= x2 - x1 <= high and low <= y2 - y1 <= high
        for a, b in itertools.combinations(row["boxes"], 2):
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def test_keywords_are_what_is_visible(rows):
    for row in rows:
        visible = {word for label in row["box_labels"] for word in label.split()}
        assert row["keywords"] == sorted(visible)
        assert visible <= {*SHAPES, *COLORS, *SIZES}


def test_words_of_captions_are_the_claims(rows):
    """Reads the captions as text: what they name and relate must be the recorded claims, no more and no less."""
    relation_of = {wording: name for name, wordings in RELATIONS.items() for wording in wordings}
    for row in rows:
        for caption, claim in zip(row["captions"], map(json.loads, row["claims"]), strict=True):
            named, between = [], []
            for word in caption.split():
                if word in SIZES or word in COLORS:
                    if not named or "shape" in named[-1]:
                        named.append({})
                    named[-1]["size" if word in SIZES else "color"] = word
                elif word in SHAPES:
                    named[-1]["shape"] = word
                    between.append("")
                elif between:
                    between[-1] += f"{word} "
            assert named == claim["objects"]
            related = [relation_of.get(text.strip().removesuffix(" a")) for text in between[:-1]]
            assert [[k, name, k + 1] for k, name in enumerate(related) if name] == claim["relations"]


def test_captions_name_only_some_objects(rows):
    seen = Counter()
    for row in rows:
        for claim in row["claims"]:
            seen[len(row["boxes"]), len(json.loads(claim)["objects"])] += 1
    assert set(seen) == {(2, 1), (2, 2), (3, 2), (4, 2), (4, 3)}
    assert seen[4, 3] > 3 * seen[4, 2]
    assert sum(count for (there, named), count in seen.items() if named < there) > 0.8 * seen.total()


def test_phrases_are_those_of_the_first_caption(rows):
    for row in rows:
        caption, named = row["captions"][0], json.loads(row["claims"][0])["objects"]
        assert len(row["phrases"]) == len(named)
        position = 0
        for phrase in row["phrases"]:
            position = caption.index(phrase["text"], position) + len(phrase["text"])
            words = set(phrase["text"].split()) - {"a"}
            fitting = [
                b for b, label in zip(row["boxes"], row["box_labels"], strict=True) if words <= set(label.split())
            ]
            assert phrase["boxes"] == fitting and fitting


def test_vocabulary_is_small_and_used():
    captions = [c for i in range(600) for c in make_row(1, "train", i, PX, 3)["captions"]]
    words = {word for caption in captions for word in caption.split()}
    assert 40 <= len(words) <= 60
    assert {*SHAPES, *COLORS, *SIZES} <= words
    assert all(word.isalpha() and word.islower() for word in words)
    assert len(set(captions)) > 0.98 * len(captions)
    assert sum(any(c.startswith(f"{opening} a") for c in captions) for opening in world._OPENINGS) >= 8


def test_statistics():
    rows = [make_row(2, "train", i, PX, 2) for i in range(1500)]
    claims = [json.loads(claim) for row in rows for claim in row["claims"]]
    assert np.mean(["size" in obj for claim in claims for obj in claim["objects"]]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([bool(claim["relations"]) for claim in claims]) == pytest.approx(0.5, abs=0.06)
    counts = Counter(len(row["boxes"]) for row in rows)
    for n, share in {2: 0.15, 3: 0.40, 4: 0.45}.items():
        assert counts[n] / len(rows) == pytest.approx(share, abs=0.05)
    labels = Counter(word for row in rows for label in row["box_labels"] for word in label.split())
    total = sum(labels[size] for size in SIZES)
    assert labels["large"] / total == pytest.approx(0.5, abs=0.05)
    assert all(labels[word] / total == pytest.approx(1 / 8, abs=0.03) for word in (*SHAPES, *COLORS))


def test_boxes_hold_pixels_of_their_colour_and_the_ground_none(rows):
    palette = np.array(list(COLORS.values()), dtype=float)
    for row in rows[:100]:
        image = pixels(row)
        distance = np.linalg.norm(image[:, :, None] - palette, axis=-1)
        nearest = np.where(distance.min(axis=-1) < 50, distance.argmin(axis=-1), -1)
        ground = np.ones((PX, PX), dtype=bool)
        for box, label in zip(row["boxes"], row["box_labels"], strict=True):
            x1, y1, x2, y2 = in_pixels(box)
            inside = nearest[y1:y2, x1:x2]
            own = list(COLORS).index(label.split()[1])
            assert np.mean(inside == own) > 0.2, label
            assert np.mean((inside != own) & (inside >= 0)) < 0.05, label
            ground[max(0, y1 - 1) : y2 + 1, max(0, x1 - 1) : x2 + 1] = False
        assert np.mean(nearest[ground] >= 0) < 0.005
        assert image[ground].std(axis=0).min() > 2


@pytest.mark.parametrize("side", [8, 12, 18])
def test_shapes_touch_their_box_and_differ(side):
    masks = {shape: world._mask(shape, side)[..., 0] for shape in SHAPES}
    for shape, mask in masks.items():
        edges = [mask[0].max(), mask[-1].max(), mask[:, 0].max(), mask[:, -1].max()]
        assert min(edges) > 0.1, shape
        assert mask.min() >= 0 and mask.max() <= 1
    for a, b in itertools.combinations(SHAPES, 2):
        assert np.abs(masks[a] - masks[b]).mean() > 0.1, (a, b)


def test_a_folder_with_other_arguments_is_refused(tmp_path):
    arguments = {"version": world.WORLD_VERSION, "counts": {"test": 4}, "image_px": 48, "seed": 0, "shard_rows": 2}
    (tmp_path / "world.json").write_text(json.dumps(arguments))
    generate(tmp_path, {"test": 4}, 48, 0, shard_rows=2)
    assert [path.name for path in tmp_path.iterdir()] == ["world.json"]
    with pytest.raises(UserError, match="seed = 0") as caught:
        generate(tmp_path, {"test": 4}, 48, 1, shard_rows=2)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match="counts"):
        generate(tmp_path, {"test": 5}, 48, 0, shard_rows=2)


def test_shards_of_an_earlier_other_run_are_refused(tmp_path):
    (tmp_path / "train-0001.parquet").touch()
    with pytest.raises(UserError, match="train-0001"):
        generate(tmp_path, {"train": 2}, 48, 0, shard_rows=2)


@pytest.mark.parametrize(
    ("counts", "px", "seed", "shard_rows"),
    [
        ({"train": -1}, 48, 0, 2),
        ({"a/b": 1}, 48, 0, 2),
        ({"a": 1}, 16, 0, 2),
        ({"a": 1}, 48, -1, 2),
        ({"a": 1}, 48, 0, 0),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, counts, px, seed, shard_rows):
    with pytest.raises(UserError):
        generate(tmp_path / "world", counts, px, seed, shard_rows)
    assert not (tmp_path / "world").exists()


@pytest.mark.ray
def test_generate(ray_session, tmp_path):
    folder = tmp_path / "world"
    generate(folder, {"train": 520, "test": 5}, PX, 9, shard_rows=260)
    names = ["test-0000.parquet", "train-0000.parquet", "train-0001.parquet", "world.json"]
    assert sorted(path.name for path in folder.iterdir()) == names

    files = {name: pq.ParquetFile(folder / name) for name in names[:-1]}
    assert all(file.schema_arrow.equals(SCHEMA) for file in files.values())
    train = files["train-0001.parquet"]
    assert [train.metadata.row_group(k).num_rows for k in range(train.metadata.num_row_groups)] == [250, 10]
    got = train.read().slice(255, 1)
    assert got.equals(pa.Table.from_pylist([make_row(9, "train", 515, PX, 3)], schema=SCHEMA))
    assert [len(c) for c in files["test-0000.parquet"].read()["captions"].to_pylist()] == [1] * 5

    # Written here in one process and in another order, the shards have the same bytes.
    alone = tmp_path / "alone"
    alone.mkdir()
    for split, k, start, stop in (("train", 1, 260, 520), ("test", 0, 0, 5), ("train", 0, 0, 260)):
        world._write_shard(alone, split, k, start, stop, PX, 9)
    for name in names[:-1]:
        assert (alone / name).read_bytes() == (folder / name).read_bytes()

    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    generate(folder, {"train": 520, "test": 5}, PX, 9, shard_rows=260)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
