"""An index of a user's pictures: the right ones first, and nothing encoded twice."""

import os
import weakref

import numpy as np
import pytest
import torch

import simla_ray
from simla_ray.errors import UserError
from simla_ray.release import search
from simla_ray.release.search import BATCH, CACHE, ImageIndex, fingerprint, progress_line

from .conftest import make_run_folder

QUERY = "a red circle"


@pytest.fixture(scope="module")
def model(exported):
    return simla_ray.load(exported)


@pytest.fixture
def folder(tmp_path, world_rows):
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for i, row in enumerate(world_rows["test"][:40]):
        (folder / ("below" if i % 2 else ".") / f"{i:02d}.jpg").write_bytes(row["image"])
    (folder / "99.png").write_bytes(b"<html>")
    return folder


def names(index):
    return sorted(index.names)


def test_the_best_come_first(model, folder, tmp_path):
    index = model.index(folder, tmp_path / "cache")
    assert len(index) == 40 and index.dropped == {"99.png": "image_unreadable"} and index.encoded == 41
    files = [folder / name for name in index.names]
    cosines = (model.encode_image(files) @ model.encode_text(QUERY)[0]).numpy()
    np.testing.assert_allclose(index.vectors, model.encode_image(files).numpy(), atol=1e-6)
    # ITM ranks the eight most similar ones again, the others stay behind them in the order of their cosines
    hits = index.search(QUERY, top=12, rerank=8)
    order = np.argsort(-cosines, kind="stable")
    match = model.match([files[i] for i in order[:8]], [QUERY] * 8).numpy()
    assert [h.name for h in hits[:8]] == [index.names[order[i]] for i in np.argsort(-match, kind="stable")]
    assert [h.name for h in hits[8:]] == [index.names[i] for i in order[8:12]]
    np.testing.assert_allclose([h.match for h in hits[:8]], -np.sort(-match), rtol=1e-4)
    assert all(h.match is None for h in hits[8:]) and all(h.path == folder / h.name for h in hits)
    np.testing.assert_allclose([h.similarity for h in hits[8:]], cosines[order[8:12]], atol=1e-6)
    assert [h.name for h in index.search(QUERY, 5, rerank=0)] == [index.names[i] for i in order[:5]]
    assert len(index.search(QUERY, top=1000)) == 40


def test_by_default_every_hit_is_ranked_by_itm(model, folder, tmp_path):
    hits = model.index(folder, tmp_path / "cache").search(QUERY, top=36)
    assert len(hits) == 36 > model.run.eval.rerank_top_k and all(h.match is not None for h in hits)


def test_candidates_are_matched_in_parts(model, folder, tmp_path, monkeypatch):
    index = model.index(folder, tmp_path / "cache")
    whole = index.search(QUERY, top=30)
    seen = []
    encode = model.scorer.encode_images
    monkeypatch.setattr(model.scorer, "encode_images", lambda views: seen.append(len(views)) or encode(views))
    monkeypatch.setattr(search, "MATCHED", 8)
    parts = index.search(QUERY, top=30)
    assert seen == [8, 8, 8, 6] and [h.name for h in parts] == [h.name for h in whole]
    np.testing.assert_allclose([h.match for h in parts], [h.match for h in whole], rtol=1e-5)


def test_one_picture_of_the_hits_is_in_memory_at_a_time(model, folder, tmp_path, monkeypatch):
    index = model.index(folder, tmp_path / "cache")
    hits, alive, most = index.search(QUERY, top=20), set(), []
    decode = search.decode

    def counted(*arguments):
        image = decode(*arguments)
        alive.add(id(image))
        weakref.finalize(image, alive.discard, id(image))
        most.append(len(alive))
        return image

    monkeypatch.setattr(search, "decode", counted)
    found = index.pictures(hits, lambda image: image.size)
    assert found == {hit.place: (48, 48) for hit in hits} and len(most) == 20 and max(most) == 1


def test_a_picture_finds_itself_first(model, folder, tmp_path):
    index = model.index(folder, tmp_path / "cache")
    hits = index.search(folder / "below" / "07.jpg", top=3)
    assert hits[0].name == "below/07.jpg" and hits[0].similarity == pytest.approx(1, abs=1e-5)
    assert all(h.match is None for h in hits)
    assert [h.name for h in index.search((folder / "below" / "07.jpg").read_bytes(), top=3)] == [h.name for h in hits]


def test_only_what_changed_is_encoded_again(model, folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    before = model.index(folder, cache)
    seen = []
    encode = model.scorer.encode_images
    monkeypatch.setattr(model.scorer, "encode_images", lambda views: seen.append(len(views)) or encode(views))
    again = model.index(folder, cache)
    assert again.encoded == 0 and not seen and names(again) == names(before)
    np.testing.assert_array_equal(again.vectors, before.vectors)
    assert again.dropped == before.dropped  # what cannot be read is not tried again either

    (folder / "00.jpg").write_bytes((folder / "02.jpg").read_bytes())
    os.utime(folder / "04.jpg", ns=(1, 1))
    (folder / "06.jpg").unlink()
    (folder / "new.jpg").write_bytes((folder / "08.jpg").read_bytes())
    changed = model.index(folder, cache)
    assert changed.encoded == 3 and sum(seen) == 3
    assert set(changed.names) == set(before.names) - {"06.jpg"} | {"new.jpg"}
    fresh = model.index(folder, tmp_path / "other")
    assert changed.names == fresh.names
    np.testing.assert_allclose(changed.vectors, fresh.vectors, atol=1e-6)
    (folder / "new.jpg").unlink()
    assert model.index(folder, cache).encoded == 0
    assert "new.jpg" not in next(cache.glob("*/index.json")).read_text()


def test_an_interrupted_index_goes_on(model, folder, tmp_path, monkeypatch):
    encode, calls = model.scorer.encode_images, []

    def once(views):
        calls.append(len(views))
        if len(calls) > 1:
            raise KeyboardInterrupt
        return encode(views)

    monkeypatch.setattr(model.scorer, "encode_images", once)
    with pytest.raises(KeyboardInterrupt):
        model.index(folder, tmp_path / "cache")
    monkeypatch.undo()
    index = model.index(folder, tmp_path / "cache")
    assert index.encoded == 41 - BATCH and len(index) == 40


def test_another_model_has_another_index(model, folder, tmp_path, vocabulary):
    run, _ = make_run_folder(tmp_path / "runs" / "other", vocabulary, seed=3)
    with torch.no_grad():
        other = simla_ray.load(run)
        next(iter(other.model.student.vision_proj.parameters())).mul_(1.5)
    assert fingerprint(other) != fingerprint(model)
    cache = tmp_path / "cache"
    ours = model.index(folder, cache)
    assert other.index(folder, cache).encoded == 41
    assert model.index(folder, cache).encoded == 0
    np.testing.assert_array_equal(model.index(folder, cache).vectors, ours.vectors)


def test_a_run_and_its_export_share_their_index(model, run_folder, folder, tmp_path):
    """The vectors are the same, so the index is."""
    model.index(folder, tmp_path / "cache")
    assert simla_ray.load(run_folder, "cpu").index(folder, tmp_path / "cache").encoded == 0


def test_the_index_lies_beside_the_models_folder(model, exported, folder):
    model.index(folder)
    assert list((exported.parent / CACHE).glob("pictures-*/index.json"))
    nowhere = simla_ray.load(exported)
    nowhere.folder = None
    with pytest.raises(UserError, match="cache: give a folder"):
        nowhere.index(folder)


def test_rows_are_searched_by_uid(model, world_files, world_rows, tmp_path, monkeypatch):
    index = model.index(world_files / "test.parquet", tmp_path / "cache")
    hits = index.search(QUERY, top=4)
    uids = {row["uid"] for row in world_rows["test"]}
    assert len(index) == 48 and all(h.name in uids and h.path is None for h in hits)
    shown = index.pictures(hits)
    assert sorted(shown) == sorted(h.place for h in hits) and shown[hits[0].place].size == (48, 48)
    monkeypatch.chdir(world_files)  # the index goes by where the file is, not by what it was called
    assert model.index("test.parquet", tmp_path / "cache").encoded == 0


def test_pictures_that_vanish_meanwhile_are_not_ranked(model, folder, tmp_path):
    index = model.index(folder, tmp_path / "cache")
    first = index.search(QUERY, top=3)
    first[0].path.unlink()
    again = index.search(QUERY, top=40)
    gone = next(h for h in again if h.name == first[0].name)
    assert gone.match is None and gone is again[-1]
    assert gone.place not in index.pictures([gone])


def test_mistakes_are_one_line(model, folder, tmp_path, vocabulary):
    index = model.index(folder, tmp_path / "cache")
    with pytest.raises(UserError, match="a query without a word"):
        index.search("?!")
    with pytest.raises(UserError, match="image_missing"):
        index.search(folder / "gone.jpg")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"bad: none of its pictures can be read \(image_empty 1\)"):
        model.index(tmp_path / "bad", tmp_path / "cache")


def test_a_run_without_itm_searches_by_vectors(folder, tmp_path, vocabulary):
    run, _ = make_run_folder(tmp_path / "clip", vocabulary, method="clip", queue=0)
    index = simla_ray.load(run).index(folder, tmp_path / "cache")
    assert isinstance(index, ImageIndex)
    assert all(h.match is None for h in index.search(QUERY, top=5))


def test_progress():
    assert progress_line(50, 1200, 2.0) == "pictures      50/1,200    4 %  25 pictures/s  ETA 0:46"
    assert progress_line(7, 7, 2.0) == "pictures   7/7  100 %  4 pictures/s  in 2.0 s"
