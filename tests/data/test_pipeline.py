"""The Ray datasets: the stream is the plan, in order, from any cursor; the preparing jobs see every row."""

import json
import socket
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data

from simla_ray.config.load import load_run
from simla_ray.data import pipeline
from simla_ray.data.codes import kmeans, pixel_patches
from simla_ray.data.cursor import Cursor
from simla_ray.data.index import build_index
from simla_ray.data.order import Position
from simla_ray.data.packing import pack
from simla_ray.data.text import clean

RUN = load_run(overrides=["batch.micro=8", "batch.global=16", "data.shuffle_window=24"])


OWN = """
import json, sys, ray
from simla_ray.data.pipeline import connect
connect(None, 1)

@ray.remote(num_cpus=0)
def known():
    from ray.util.state import list_nodes
    return [node.node_id for node in list_nodes()]

context = ray.get_runtime_context()
print(json.dumps([context.gcs_address, context.get_node_id(), ray.get(known.remote())]), flush=True)
sys.stdin.read()
"""


@pytest.mark.ray
def test_a_ray_of_our_own_keeps_to_itself(ray_session):
    """It answers on loopback only, and its processes know it from the other Ray of this machine."""
    with subprocess.Popen(
        [sys.executable, "-c", OWN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        gcs, node, known = json.loads(process.stdout.readline())
        host, port = gcs.split(":")
        assert host == "127.0.0.1" and known == [node] != [ray_session.get_runtime_context().get_node_id()]
        socket.create_connection((host, int(port)), 10).close()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outside:
            outside.connect(("192.0.2.1", 9))  # sends nothing
            address = outside.getsockname()[0]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, int(port)), 10)
        process.stdin.close()


@pytest.mark.ray
@pytest.mark.parametrize("start", [Position(), Position(0, 17), Position(1, 47)])
def test_training_stream_is_the_order_from_the_cursor_on(ray_session, world_index, vocabulary, start):
    order = pipeline.order_of(RUN, world_index)
    cursor = Cursor.start(2).moved([(1, start)])
    dataset = pipeline.training_stream(RUN, world_index, vocabulary, [1], cursor, 6, 2)
    packs = []
    for packed in pack(pipeline.blocks_of(dataset), [1], RUN, 96):
        packs.append(packed)
        if len(packs) == 6:
            break
    expected: list[str] = []
    for window in order.windows(1, start, {}):
        expected += [f"world-train-{o:06d}" for o in order.ordinals(window)]
        if len(expected) >= 48:
            break
    assert [u for p in packs for u in p.batch.uid] == expected[:48]
    assert packs[-1].position.epoch * 48 + packs[-1].position.offset == (start.epoch * 48 + start.offset + 48)


@pytest.mark.ray
def test_caption_stream_reads_every_caption_in_order(ray_session, world_index, world_rows):
    expected = [clean(c, 30) for row in world_rows["train"] for c in row["captions"]]
    captions = pipeline.CaptionPass(world_index, 30, 2)
    assert list(captions) == expected
    assert captions.repeated.tolist() == []


@pytest.mark.ray
def test_caption_pass_finds_uids_that_come_again(ray_session, tmp_path):
    """In another file too; what stands in for a uid differs between files of one name, and not if a file is twice."""
    for name, rows in (("a", [("x", "one"), ("y", "two"), ("x", "...")]), ("b", [("z", "four"), ("y", "five")])):
        table = {"uid": [uid for uid, _ in rows], "image": [b"png"] * len(rows), "caption": [c for _, c in rows]}
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet", row_group_size=2)
    for folder in ("1/same", "2/same"):
        (tmp_path / folder).mkdir(parents=True)
        pq.write_table(pa.table({"image": [b"png"], "caption": ["six"]}), tmp_path / folder / "name.parquet")
    uris = [str(tmp_path), *(str(tmp_path / f / "name.parquet") for f in ("1/same", "2/same"))]
    index = build_index(uris, None, [], "data.train")
    captions = pipeline.CaptionPass(index, 30, 2)
    assert list(captions) == ["one", "two", "four", "five", "six", "six"]
    assert captions.repeated.tolist() == [2, 4]
    again = pipeline.CaptionPass(build_index([*uris, uris[1]], None, [], "data.train"), 30, 2)
    assert len(list(again)) == 7
    assert again.repeated.tolist() == [2, 4, 7]


@pytest.mark.ray
def test_patch_features_come_from_training_images(ray_session, world_index):
    run = load_run(overrides=["codes.fit_images=10", "codes.n=4"])
    features = pipeline.patch_features(run, world_index, None, 2)
    assert features.shape == (10 * 36, 3 * 8 * 8)
    assert 0 <= features.min() < features.max() <= 1
    doubled = pipeline.patch_features(run, world_index, lambda x: pixel_patches(x, 8)[..., :5] * 2, 2)
    assert np.allclose(doubled, features[:, :5] * 2)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_iterate_rows_splits_without_losing_a_row(world_index, world):
    shards = [[r["uid"] for r in pipeline.iterate_rows(world_index, rank, world, 50)] for rank in range(world)]
    whole = [r["uid"] for r in pipeline.iterate_rows(world_index, limit=50)]
    assert len(whole) == 50
    assert [shards[i % world][i // world] for i in range(50)] == whole


def test_kmeans_lowers_its_error_and_repeats():
    rng = np.random.default_rng(0)
    points = (rng.integers(0, 3, (400, 1)) * 10 + rng.standard_normal((400, 2))).astype(np.float32)

    def error(centroids):
        return ((points[:, None] - centroids[None]) ** 2).sum(-1).min(1).mean()

    errors = [error(kmeans(points, 6, n, seed=0)) for n in (0, 1, 3, 20)]
    assert errors[0] > errors[1] > errors[2] >= errors[3]
    assert errors[3] < 2.5  # three clouds of variance 2; a centroid between two of them would give more
    assert np.array_equal(kmeans(points, 6, 20, seed=0), kmeans(points, 6, 20, seed=0))


def test_kmeans_gives_work_to_empty_centroids():
    points = np.repeat(np.array([[0.0], [1.0], [5.0]], dtype=np.float32), [50, 1, 1], axis=0)
    assert sorted(kmeans(points, 3, 10, seed=0).ravel().tolist()) == [0.0, 1.0, 5.0]


def test_pixel_patches_are_row_major():
    image = np.zeros((1, 3, 4, 4), dtype=np.uint8)
    image[0, :, 0:2, 2:4] = 255
    patches = pixel_patches(image, 2)
    assert patches.shape == (1, 4, 12)
    assert patches[0].mean(1).tolist() == [0, 1, 0, 0]


def test_rays_scheduler_pauses_once_a_round(ray_session):
    """However often ``quiet`` is called."""
    context = ray.data.DataContext.get_current()
    pipeline.quiet()
    pipeline.quiet()
    assert context.custom_execution_callback_classes.count(pipeline.Pause) == 1
    began = time.perf_counter()
    pipeline.Pause().on_execution_step(None)
    assert time.perf_counter() - began >= pipeline.PAUSE_S > 0


def test_what_waits_encoded_goes_by_the_size_of_pictures():
    """Small ones: two windows of about an eighth of their pixels; large ones: what a store can spare."""
    run = load_run()
    assert pipeline.encoded_bytes(run) == 2 * 4096 * (3 * 48**2 // 8)
    large = load_run(overrides=["vision.image_px=384", "vision.patch_px=96"])
    assert pipeline.encoded_bytes(large) == pipeline.ENCODED_BYTES
