"""Tags: what they are made of, that they know nothing of captions, their masks, and where they come from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simla_ray.config.load import load_run
from simla_ray.config.schema import TagSource
from simla_ray.data.collate import collate
from simla_ray.data.index import build_index
from simla_ray.data.region_source import with_regions
from simla_ray.data.sample import SampleMaker, stacked
from simla_ray.data.tag_source import with_tags
from simla_ray.data.tags import TagMaker, tags_of
from simla_ray.data.text import Vocabulary
from simla_ray.errors import UserError
from tests.models.toy import with_concepts

KEYS = ["method=mvptr", "batch.global=32", "ray.workers=1"]


def decided(*overrides):
    return with_tags(with_regions(load_run(overrides=[*KEYS, *overrides]), None), None)


@pytest.fixture(scope="module")
def run():
    return decided()


@pytest.fixture(scope="module")
def words(vocabulary, world_rows, run):
    return with_concepts(vocabulary, world_rows["train"], run)


def test_each_tag_once_in_the_order_of_the_column_or_of_the_alphabet():
    row = {"tags": ["Dog.", "cat", "dog", "!"], "box_labels": ["red ring", "blue heart", "red ring"]}
    assert tags_of(row, TagSource.column) == ["dog", "cat"]
    assert tags_of(row, TagSource.box_labels) == ["blue heart", "red ring"]
    assert tags_of(row, TagSource.none) == [] and tags_of({}, TagSource.column) == []


def test_ids_are_cut_between_cls_and_sep(run, vocabulary):
    short = run.model_copy(update={"tags": run.tags.model_copy(update={"max_tokens": 5})})
    row = {"box_labels": ["blue heart", "red ring"]}
    ids = TagMaker(short, vocabulary).ids(row)
    assert [vocabulary.token(i) for i in ids] == ["[CLS]", "blue", "heart", "red", "[SEP]"]
    assert [vocabulary.token(i) for i in TagMaker(short, vocabulary).ids({})] == ["[CLS]", "[SEP]"]


def test_neither_cls_nor_sep_is_ever_chosen(run, vocabulary):
    maker, rng, chosen = TagMaker(run, vocabulary), np.random.default_rng(0), 0
    for _ in range(300):
        sample = maker({"box_labels": ["blue heart", "red ring"]}, rng)
        n = int(sample["n_tags"])
        assert n == 6 and not sample["mcr_chosen"][[0, n - 1]].any() and not sample["mcr_chosen"][n:].any()
        same = ~sample["mcr_chosen"]
        assert (sample["masked_tag_ids"][same] == sample["tag_ids"][same]).all()
        chosen += int(sample["mcr_chosen"].sum())
    assert chosen / (300 * 4) == pytest.approx(0.15, abs=0.03)


CAPTIONS = st.lists(st.text("abcdefgh redbluing heart", min_size=1, max_size=40), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(CAPTIONS, st.integers(0, 9))
def test_words_of_captions_never_enter_the_image_side(run, words, world_rows, captions, number):
    """Whatever the captions say, the image side has the same tags and regions; picture and boxes follow the flip."""
    row, plain = world_rows["train"][number], SampleMaker(run, words, training=False)
    true, other = plain(row, 0), plain(row | {"captions": ["a", *captions]}, 0)
    for name in ("image", "tag_ids", "n_tags", "region_boxes", "n_regions"):
        assert np.array_equal(true[name], other[name]), name
    without = SampleMaker(decided("tags.source=none", "objectives.mcr=null"), words, training=False)(row, 0)
    assert without["tag_ids"].tolist()[:2] == [words.cls_id, words.sep_id] and not without["tag_ids"][2:].any()


def test_a_batch_has_tags_cut_to_the_longest_and_their_masks(run, words, world_rows):
    maker = SampleMaker(run, words, training=True)
    samples = [maker(row, 0) for row in world_rows["train"][:8]]
    batch = collate(stacked(samples), run)
    assert batch.tag_ids.shape[1] == max(int(s["n_tags"]) for s in samples) <= run.tags.max_tokens
    chosen = batch.mcr_weight > 0
    assert int(chosen.sum()) == sum(int(s["mcr_chosen"].sum()) for s in samples)
    assert batch.is_concept.any(1).all() and (batch.token_mask | ~batch.is_concept).all()
    assert (batch.token_ids.gather(1, batch.mlm_index)[batch.mlm_weight > 0] < len(words)).all()


def test_a_sample_is_a_function_of_seed_epoch_and_uid(run, words, world_rows):
    row = world_rows["train"][3]
    a, b, c = (SampleMaker(run, words, training=True)(row, epoch) for epoch in (2, 2, 3))
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert any(not np.array_equal(a[name], c[name]) for name in ("masked_ids", "masked_tag_ids"))


def test_the_source_is_what_every_set_has(world_files, tmp_path, world_rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def index(rows, name):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        return build_index([str(tmp_path / f"{name}.parquet")], None, [], "data.train")

    bare = [{k: row[k] for k in ("uid", "image", "captions")} for row in world_rows["train"][:4]]
    labelled = build_index([str(world_files / "train.parquet")], None, [], "data.train")
    tagged = index([row | {"tags": ["ring"], "box_labels": ["a"]} for row in bare], "tagged")
    run = load_run(overrides=KEYS)
    assert with_tags(run, {"train": tagged, "val": tagged}).tags.source == "column"
    assert with_tags(run, {"train": tagged, "val": labelled}).tags.source == "box_labels"
    none = with_tags(run, {"train": tagged, "val": index(bare, "bare")})
    assert none.tags.source == "none" and none.objectives.mcr is None and "wpg" in none.objectives.active()
    with pytest.raises(UserError, match=r"data.train: no tags in the first rows, which tags.source=column reads"):
        with_tags(load_run(overrides=[*KEYS, "tags.source=column"]), {"train": labelled})
    alone = [*KEYS, *(f"objectives.{name}=null" for name in ("itc", "itm", "mlm", "wpg")), "eval.best=last"]
    with pytest.raises(UserError, match=r"objectives.mcr: is all that is on"):
        with_tags(load_run(overrides=alone), {"train": index(bare, "bare")})


def test_the_vocabulary_keeps_its_concepts(words, tmp_path):
    words.save(tmp_path)
    assert Vocabulary.load(tmp_path).concepts == words.concepts
