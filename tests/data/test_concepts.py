"""Concepts: ids, thresholds, the file, and masking that tells nothing of masked words."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simla_ray.config.load import load_run
from simla_ray.config.schema import Concepts as Config
from simla_ray.data.blocks import table_block
from simla_ray.data.concept_tokens import ConceptTokens, column_phrases, concept_columns, concepts_for
from simla_ray.data.concepts import Concepts, Said, build_concepts, mask_concepts, said_concepts
from simla_ray.data.map_functions import BlockMaker, ConceptReader, WindowReader
from simla_ray.data.order import Position
from simla_ray.data.phrases import Phrase, phrases_of
from simla_ray.data.pipeline import order_of
from simla_ray.data.region_source import with_regions
from simla_ray.data.regions import region_columns
from simla_ray.data.sample import SampleMaker
from simla_ray.data.tag_source import with_tags
from simla_ray.data.tags import tag_columns
from simla_ray.data.text import Vocabulary, clean
from simla_ray.errors import UserError

COUNTS = {("dog",): 9, ("dog", "red"): 5, ("cat",): 5, ("cat", "on", "mat"): 3, ("unicorn",): 4, ("mat",): 2}
PIECES = {"dog": [40], "cat": [41, 42], "unicorn": [1], "mat": [43]}


def build(counts=COUNTS, captions=100, **config):
    return build_concepts(counts, captions, Config(**config), PIECES.__getitem__, 50, 1)


def test_single_pieces_keep_their_id_and_others_follow_by_frequency():
    concepts = build()
    assert concepts.ids == {
        ("dog",): 40,
        ("cat",): 50,  # of two pieces
        ("dog", "red"): 51,
        ("unicorn",): 52,  # unknown to the vocabulary
        ("cat", "on", "mat"): 53,
    }
    assert concepts.new == 4 and concepts.min_count == 3 and concepts.captions == 100
    assert build(dict(reversed(COUNTS.items()))).digest == concepts.digest
    assert build(most=2).ids == {("dog",): 40, ("cat",): 50, ("dog", "red"): 51}
    assert ("mat",) in build(min_count=2).ids


@pytest.mark.parametrize(("captions", "least"), [(10, 3), (8_850_000, 50), (17_700_000, 100), (3_000_000, 17)])
def test_the_threshold_goes_with_the_corpus(captions, least):
    assert build(captions=captions).min_count == least


def test_the_file_brings_them_back_and_says_what_is_wrong(tmp_path):
    concepts, path = build(), tmp_path / "concepts.json"
    concepts.save(path)
    again = Concepts.load(path)
    assert again == concepts and again.digest == concepts.digest
    path.write_text('{"concepts": [["a"]], "ids": []}')
    with pytest.raises(UserError, match=r"concepts.json: holds no concepts"):
        Concepts.load(path)


def test_what_is_said_is_cut_to_the_budget_and_to_the_words_there_are():
    phrases = [
        Phrase(("dog",), (1,)),
        Phrase(("dog", "blue"), (0, 1)),
        Phrase(("dog", "red"), (1, 4)),
        Phrase(("cat",), (2, 5)),
    ]
    said = said_concepts(phrases, 5, build(), 9)
    assert said.ids.tolist() == [40, 51]
    assert said.words.tolist() == [[False, True, False, False, False], [False, True, False, False, True]]
    assert said_concepts(phrases, 6, build(), 1).ids.tolist() == [40]
    assert said_concepts([], 0, build(), 5).words.shape == (0, 0)


SAIDS = st.integers(0, 6).flatmap(
    lambda k: st.tuples(
        st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=k, max_size=k),
        st.lists(st.booleans(), min_size=8, max_size=8),
        st.integers(0, 10**6),
    )
)


@settings(max_examples=400, deadline=None)
@given(SAIDS)
def test_no_concept_with_a_masked_word_is_ever_visible(drawn):
    words, hidden, seed = drawn
    said = Said(np.arange(50, 50 + len(words)), np.array(words, dtype=bool).reshape(-1, 8))
    seen = mask_concepts(said, np.array(hidden), 0.15, 4, build(), np.random.default_rng(seed))
    for i, own in enumerate(words):
        if any(a and b for a, b in zip(own, hidden, strict=True)):
            assert seen[i] == 4
        else:
            assert seen[i] in (4, said.ids[i]) or 50 <= seen[i] < 54


def test_the_other_concepts_are_masked_as_words_are():
    n = 40_000
    said = Said(np.full(n, 7), np.zeros((n, 3), dtype=bool))
    seen = mask_concepts(said, np.ones(3, dtype=bool), 0.5, 4, build(), np.random.default_rng(0))
    shares = [(seen == 4).mean(), (seen >= 50).mean(), (seen == 7).mean()]
    assert shares == pytest.approx([0.4, 0.05, 0.55], abs=0.01)


@pytest.fixture(scope="module")
def reads_concepts(vocabulary, world_rows):
    """A run with concepts, and a vocabulary that has those of the world."""
    captions = [clean(c, 30) for row in world_rows["train"] for c in row["captions"]]
    counts = Counter(p.concept for c in captions for p in phrases_of(c.split()))
    run = load_run(overrides={"method": "mvptr", "concepts.most": 200})
    concepts = concepts_for(run, vocabulary, counts, len(captions))
    return run, Vocabulary(vocabulary.tokenizer, vocabulary.frequency, (), concepts)


def test_a_text_is_words_then_concepts_then_sep(reads_concepts):
    run, vocabulary = reads_concepts
    caption = "there is a large red ring to the left of a blue heart"
    encoded = vocabulary.encode(caption, run.text.max_tokens)
    ids = ConceptTokens(run, vocabulary).ids(encoded)
    n = len(encoded.ids)
    assert ids[:n].tolist() == encoded.ids.tolist() and ids[-1] == vocabulary.sep_id
    name = {i: concept for concept, i in vocabulary.concepts.ids.items()}
    said = [name[i] for i in ids[n:-1].tolist()]
    assert said[:3] == [("ring",), ("ring", "large"), ("ring", "red")] and ("heart", "blue") in said
    assert len(ids) <= run.text.length


def test_masked_samples_never_show_a_concept_of_a_masked_word(reads_concepts, world_rows):
    """The whole way, from captions: words are masked as MLM does it, and each sample is looked at."""
    run, vocabulary = reads_concepts
    tokens, p, masked = ConceptTokens(run, vocabulary), 0.3, 0
    name = {i: concept for concept, i in vocabulary.concepts.ids.items()}
    rng = np.random.default_rng(0)
    for row in world_rows["train"]:
        encoded = vocabulary.encode(clean(row["captions"][0], 30), run.text.max_tokens)
        n, length = len(encoded.ids), run.text.length
        chosen = np.zeros(length, dtype=bool)
        chosen[1:n] = rng.random(n - 1) < p
        ids = np.zeros(length, dtype=np.int64)
        ids[:n] = encoded.ids
        sample = {"token_ids": ids, "masked_ids": np.where(chosen, vocabulary.mask_id, ids), "mlm_chosen": chosen}
        tokens.extend(sample, encoded, {}, 0.0, rng)
        total = int(sample["n_tokens"])
        assert sample["is_concept"].nonzero()[0].tolist() == list(range(n, total - 1))
        assert sample["masked_ids"][total - 1] == vocabulary.sep_id and not sample["masked_ids"][total:].any()
        hidden = {encoded.words[i] for i in np.flatnonzero(chosen[:n])}
        at = {q.concept: q.at for q in phrases_of(clean(row["captions"][0], 30).split())}
        words, numbers = clean(row["captions"][0], 30).split(), set(encoded.number[:n][chosen[:n]].tolist())
        for i in range(n, total - 1):
            concept = name[int(sample["token_ids"][i])]
            if numbers & set(at[concept]):
                masked += 1
                assert sample["masked_ids"][i] == vocabulary.mask_id, (concept, hidden, words)
            else:
                assert sample["masked_ids"][i] == sample["token_ids"][i]
    assert masked > 100


def test_phrases_of_a_column_are_taken_as_they_stand(reads_concepts):
    run, vocabulary = reads_concepts
    run = run.model_copy(update={"concepts": Config(source="column")})
    counts = {("red", "ring"): 5, ("blue", "heart"): 5}
    concepts = concepts_for(run, vocabulary, counts, 9)
    vocabulary = Vocabulary(vocabulary.tokenizer, {}, (), concepts)
    encoded = vocabulary.encode("there is a red ring", run.text.max_tokens)
    row = {"phrases": [{"text": "Red ring.", "boxes": None}, {"text": "blue heart", "boxes": None}]}
    said = ConceptTokens(run, vocabulary).said(encoded, column_phrases(row))
    assert said.ids.tolist() == [concepts.ids["red", "ring"]]


def test_a_vocabulary_without_concepts_is_refused(vocabulary):
    with pytest.raises(ValueError, match="no concepts"):
        ConceptTokens(SimpleNamespace(), vocabulary)


def test_the_job_counts_captions_that_say_a_concept(reads_concepts, world_index, world_rows):
    """What the tasks of the Ray Data job do, unit by unit, against one pass over all captions."""
    run, _ = reads_concepts
    counts, captions = Counter(), 0
    for block in ConceptReader(run, world_index)({"unit": np.arange(len(world_index.units))}):
        captions += int(block["captions"][0])
        for concept, said in zip(block["concept"].tolist(), block["said"].tolist(), strict=True):
            counts[tuple(json.loads(concept))] += said
    every = [clean(c, run.text.max_words) for row in world_rows["train"] for c in row["captions"]]
    assert captions == len(every)
    assert counts == Counter(p.concept for caption in every for p in phrases_of(caption.split()))


def test_tags_and_concepts_come_through_the_stream(reads_concepts, world_index, world_rows):
    """Rows are read, handed on as tables and made into blocks, as the training stream does it."""
    run, vocabulary = reads_concepts
    run = with_tags(with_regions(run, {"train": world_index}), {"train": world_index})
    assert (run.regions.source, run.tags.source) == ("boxes", "box_labels")
    columns = (*region_columns(run), *concept_columns(run), *tag_columns(run))
    order = order_of(run, world_index)
    windows = [next(order.windows(0, Position(), {}))]
    tables = WindowReader(world_index, order, columns=columns).read(windows)
    maker, found = SampleMaker(run, vocabulary, training=True), {}
    rows = {row["uid"]: row for row in world_rows["train"]}
    for table in tables:
        for block in map(table_block, BlockMaker(run, vocabulary)(table)):
            assert not any(block["drop"])
            for i, uid in enumerate(block["uid"].tolist()):
                found[uid] = {name: values[i] for name, values in block.items()}
    assert len(found) > 30
    for uid, sample in found.items():
        alone = maker(rows[uid], int(sample["epoch"]))
        for name in ("token_ids", "masked_ids", "is_concept", "tag_ids", "masked_tag_ids", "region_boxes"):
            assert np.array_equal(sample[name], alone[name]), name
