"""A row -> a sample -> a batch."""

import math

import numpy as np
import pytest
import torch

from simla_ray.config.load import load_run
from simla_ray.data.collate import collate
from simla_ray.data.decode import DropRow
from simla_ray.data.sample import SampleMaker, code_image_px, joined, stacked


def test_a_sample_depends_on_seed_epoch_and_uid_only(world_rows, vocabulary):
    row = world_rows["train"][0]
    make = SampleMaker(load_run(), vocabulary, training=True)
    first = make(row, 0)
    make(world_rows["train"][1], 0)
    again = make(row, 0)
    assert all(np.array_equal(first[n], again[n]) for n in first)
    other = SampleMaker(load_run(overrides=["seed=1"]), vocabulary, training=True)(row, 0)
    assert any(not np.array_equal(first[n], make(row, 1)[n]) for n in first)
    assert any(not np.array_equal(first[n], other[n]) for n in first)


def test_validation_samples_are_fixed(world_rows, vocabulary):
    row = world_rows["train"][3]
    make = SampleMaker(load_run(), vocabulary, training=False)
    sample = make(row, 0)
    n = int(sample["n_tokens"])
    words = [vocabulary.token(i) for i in sample["token_ids"][1:n]]
    assert words == row["captions"][0].split()


def test_no_mirror_when_the_caption_names_a_side(world_rows, vocabulary):
    """With one caption the only random geometry left is the flip: the picture must be the same in every epoch."""
    run = load_run(overrides=["data.crop_scale_min=1.0"])
    make = SampleMaker(run, vocabulary, training=True)
    row = dict(world_rows["train"][0])

    def pictures(caption):
        return {make(row | {"captions": [caption]}, e)["image"].tobytes() for e in range(12)}

    square = len(pictures("a red circle left of a ring"))
    assert len(pictures("a red circle and a ring")) > square


def test_unusable_rows_are_dropped(world_rows, vocabulary):
    make = SampleMaker(load_run(), vocabulary, training=True)
    row = world_rows["train"][0]
    for broken, reason in (({"captions": []}, "caption_empty"), ({"captions": ["?!", ""]}, "caption_empty"),
                           ({"image": b"junk"}, "image_unreadable")):  # fmt: skip
        with pytest.raises(DropRow) as dropped:
            make(row | broken, 0)
        assert dropped.value.reason == reason
    assert make(row | {"captions": ["?!", "a red ring"]}, 0)["n_tokens"] == 4


@pytest.mark.parametrize(
    ("overrides", "px"),
    [
        ([], 0),
        (["data.augment=full"], 48),
        (["objectives.mim.crop=independent"], 48),
        (["codes.kind=dvae", "codes.n=8192", "codes.source=x"], 48),
        (["objectives.mim=null", "data.augment=full"], 0),
    ],
)
def test_a_second_picture_is_made_only_where_the_codes_need_it(overrides, px, world_rows, vocabulary):
    run = load_run(overrides=overrides)
    assert code_image_px(run) == px
    sample = SampleMaker(run, vocabulary, training=True)(world_rows["train"][0], 0)
    assert ("code_image" in sample) == bool(px)


def test_collate_shapes_and_index_lists(world_rows, vocabulary):
    run = load_run(overrides=["text.pad_multiple=4", "objectives.mim.batch_fraction=0.5"])
    make = SampleMaker(run, vocabulary, training=True)
    samples = [make(row, 0) for row in world_rows["train"][:8]]
    batch = collate(stacked(samples), run, [r["uid"] for r in world_rows["train"][:8]], [0] * 8)
    longest = max(int(s["n_tokens"]) for s in samples)
    L = min(-(-longest // 4) * 4, run.text.max_tokens)
    assert batch.token_ids.shape == batch.token_mask.shape == batch.masked_ids.shape == (8, L)
    assert batch.token_mask.sum(1).tolist() == [int(s["n_tokens"]) for s in samples]
    assert (batch.token_ids[~batch.token_mask] == 0).all()
    assert len(batch.patch_mask) == 4  # half of the batch
    for row, sample in enumerate(samples):
        chosen = batch.mlm_index[row][batch.mlm_weight[row] > 0]
        assert chosen.tolist() == np.flatnonzero(sample["mlm_chosen"]).tolist()
        assert torch.equal(batch.mlm_label[row][batch.mlm_weight[row] > 0], batch.token_ids[row][chosen])
    for row in range(4):
        chosen = batch.mim_index[row][batch.mim_weight[row] > 0]
        assert chosen.tolist() == batch.patch_mask[row].nonzero()[:, 0].tolist()
    assert (batch.masked_ids != batch.token_ids).any()
    assert not (batch.masked_ids[:, 0] != batch.token_ids[:, 0]).any()


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_a_batch_of_runs_of_blocks_is_the_batch_of_its_samples(world_rows, vocabulary, fraction):
    """Whatever blocks the rows come in; the codes' pictures too, which are kept only where they differ."""
    run = load_run(overrides=["data.augment=full", f"objectives.mim.batch_fraction={fraction}"])
    make = SampleMaker(run, vocabulary, training=True)
    samples = [make(row, 0) for row in world_rows["train"][:24]]
    blocks = [stacked(samples[:10]), stacked(samples[10:17]), stacked(samples[17:])]
    others = sum(s["code_image"] is not s["image"] for s in samples)
    assert 0 < sum(len(b["code_image"]) for b in blocks) == others < 24
    runs = [(blocks[0], 3, 10), (blocks[1], 0, 2), (blocks[1], 3, 7), (blocks[2], 0, 3)]
    chosen = [*samples[3:10], *samples[10:12], *samples[13:17], *samples[17:20]]
    ours, theirs = collate(joined(runs), run), collate(stacked(chosen), run)
    C = math.ceil(len(chosen) * fraction)
    assert torch.equal(ours.code_image, torch.from_numpy(np.stack([s["code_image"] for s in chosen[:C]])))
    for name, value in vars(theirs).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(ours, name), value), name
    alone = joined([(blocks[0], 0, 10)])
    assert np.shares_memory(alone["image"], blocks[0]["image"])
