import numpy as np
import pytest

from simla_ray.config.schema import Psl, Text
from simla_ray.data.text import (
    Vocabulary,
    build_vocabulary,
    clean,
    keyword_candidates,
    keyword_prior,
    load_stop_words,
    names_a_side,
)
from simla_ray.errors import UserError


def test_clean_is_the_official_pre_caption():
    caption = 'A <person>\'s RED-and/or blue cat, (really): #1 "hi"; ~end!'
    assert clean(caption, 30) == "a persons red and or blue cat really 1 hi end"
    assert clean("one two  three", 2) == "one two"
    assert clean(" .,! ", 30) == ""


def test_left_and_right_are_noticed():
    assert names_a_side("a cat left of a dog")
    assert not names_a_side("bright lights")


def test_a_trained_vocabulary_round_trips(tmp_path, vocabulary):
    vocabulary.save(tmp_path)
    again = Vocabulary.load(tmp_path)
    caption = "there is a large red circle"
    assert np.array_equal(again.encode(caption, 25).ids, vocabulary.encode(caption, 25).ids)
    assert again.frequency == vocabulary.frequency
    assert vocabulary.unk_id not in vocabulary.encode(caption, 25).ids
    assert vocabulary.encode(caption, 25).ids[0] == vocabulary.cls_id
    assert vocabulary.sep_id not in vocabulary.encode(caption, 25).ids
    with pytest.raises(UserError, match="holds no vocabulary"):
        Vocabulary.load(tmp_path / "nowhere")


def test_a_vocabulary_file_is_read_and_its_specials_checked(tmp_path):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "a", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    vocabulary = build_vocabulary(["a dog playing"], Text(vocab=str(tmp_path / "vocab.txt")))
    encoded = vocabulary.encode("a dog playing", 25)
    assert encoded.ids.tolist() == [2, 7, 8, 5, 6]
    assert encoded.word_start.tolist() == [0, 1, 2, 3, 3]
    assert encoded.words == ["", "a", "dog", "playing", "playing"]
    assert not encoded.truncated
    assert vocabulary.encode("a dog playing", 4).truncated
    (tmp_path / "bad.txt").write_text("\n".join(tokens[1:]))
    with pytest.raises(UserError, match=r"text\.vocab: lacks \['\[PAD\]'\]"):
        build_vocabulary(["a"], Text(vocab=str(tmp_path / "bad.txt")))


def test_keyword_candidates_leave_out_specials_and_stop_words(vocabulary):
    encoded = vocabulary.encode("there is a red circle", 25)
    stop = load_stop_words("en")
    ok = keyword_candidates(encoded, Psl(), stop, vocabulary.special_ids)
    assert {w for w, o in zip(encoded.words, ok, strict=True) if o} == {"red", "circle"}
    official = keyword_candidates(encoded, Psl(exclude_special=False), frozenset(), vocabulary.special_ids)
    assert official.all()


def test_controls_of_keyword_selection(vocabulary):
    encoded = vocabulary.encode("a red circle and a red ring", 25)
    rng = np.random.default_rng(0)
    frequency = {"a": 1.0, "red": 0.25, "circle": 0.5, "and": 0.9, "ring": 0.125}
    prior = keyword_prior(encoded, Psl(select="tfidf"), frequency, rng)
    by_word = dict(zip(encoded.words, prior, strict=True))
    assert by_word["red"] == pytest.approx(2 * np.log(4), rel=1e-6)
    assert by_word["ring"] == pytest.approx(np.log(8), rel=1e-6)
    assert by_word["a"] == pytest.approx(0, abs=1e-6)
    assert not keyword_prior(encoded, Psl(select="content"), frequency, rng).any()
    assert len(set(keyword_prior(encoded, Psl(select="random"), frequency, rng))) == len(encoded.ids)


def test_stop_words_from_a_file(tmp_path):
    (tmp_path / "s.txt").write_text("Foo\nbar\n")
    assert load_stop_words(str(tmp_path / "s.txt")) == {"foo", "bar"}
    assert load_stop_words(None) == frozenset()
    with pytest.raises(UserError, match="stop_words"):
        load_stop_words(str(tmp_path / "gone.txt"))
