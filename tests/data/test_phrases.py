"""The phrase extractor: README's example of MVPTR, rules one by one, and what holds for any caption."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simla_ray.data.phrases import given_phrases, is_noun, noun_lemma, phrase_texts, phrases_of, verb_lemma


def concepts(caption):
    return [p.concept for p in phrases_of(caption.split())]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (
            "narrow kitchen filled with appliances",  # README of MVPTR
            [("kitchen",), ("kitchen", "narrow"), ("appliance",), ("kitchen", "fill with", "appliance")],
        ),
        ("two boats", [("boat",), ("boat", "two")]),  # numerals are attributes
        ("3 dogs", [("dog",), ("dog", "3")]),
        ("a stone bridge", [("bridge",), ("bridge", "stone")]),
        ("a swimming pool", [("pool",), ("pool", "swimming")]),
        ("a brown and black dog", [("dog",), ("dog", "brown"), ("dog", "black")]),
        ("a picture of a heart", [("heart",)]),
        ("a group of people", [("person",)]),
        ("there is a white square", [("square",), ("square", "white")]),
        ("a red circle and a blue ring", [("circle",), ("circle", "red"), ("ring",), ("ring", "blue")]),
        (
            "a cyan cross to the left of a ring",
            [("cross",), ("cross", "cyan"), ("ring",), ("cross", "to the left of", "ring")],
        ),
        (
            "a woman wearing a hat is riding a horse",  # an auxiliary goes back to the first noun
            [("woman",), ("hat",), ("horse",), ("woman", "wear", "hat"), ("woman", "ride", "horse")],
        ),
        ("man riding waves", [("man",), ("wave",), ("man", "ride", "wave")]),
        ("", []),
        ("is on the and", []),
    ],
)
def test_concepts_of_a_caption(caption, expected):
    assert concepts(caption) == expected


def test_every_word_that_says_a_concept_is_named_and_occurrences_are_joined():
    words = ["a", "red", "ring", "is", "above", "a", "red", "ring", "and", "a", "dog", "sat", "on", "a", "mat"]
    at = {p.concept: p.at for p in phrases_of(words)}
    assert at["ring",] == (2, 7) and at["ring", "red"] == (1, 2, 6, 7)
    assert at["ring", "above", "ring"] == (2, 4, 7)
    assert at["dog", "sit on", "mat"] == (10, 11, 12, 14)


def test_texts_are_concepts_as_the_caption_says_them():
    """Every occurrence by itself, with the words between its own, so that a column of them is found again."""
    words = ["two", "dogs", "run", "in", "the", "park", "and", "a", "brown", "and", "white", "dog", "sees", "dogs"]
    texts = phrase_texts(words)
    assert texts == [
        "dogs", "two dogs", "park", "dog", "brown and white dog", "white dog", "dogs run in the park", "dog sees dogs",
    ]  # fmt: skip
    assert [phrase.concept for phrase in given_phrases(words, texts)] == [tuple(text.split()) for text in texts]


def test_a_word_by_itself_is_a_noun_or_not():
    assert [word for word in ("dog", "red", "3", "on", "the", "runs", "picture", "boats") if is_noun(word)] == [
        "dog",
        "boats",
    ]


@pytest.mark.parametrize(
    ("word", "lemma"),
    [("boats", "boat"), ("boxes", "box"), ("cherries", "cherry"), ("women", "woman"), ("dress", "dress"),
     ("bus", "bus"), ("horses", "horse"), ("gas", "gas"), ("children", "child"), ("dog", "dog")],
)  # fmt: skip
def test_singular(word, lemma):
    assert noun_lemma(word) == lemma


@pytest.mark.parametrize(
    ("word", "lemma"),
    [("sitting", "sit"), ("sat", "sit"), ("riding", "ride"), ("filled", "fill"), ("carries", "carry"),
     ("watches", "watch"), ("running", "run"), ("guiding", "guide"), ("hovering", "hover"), ("wears", "wear")],
)  # fmt: skip
def test_infinitive(word, lemma):
    assert verb_lemma(word) == lemma


SOME = (
    "a the two red brown square dog dogs kitchen man riding filled sits is and on in with left of to picture group "
    "quickly there 7 & café grüner"
)
WORDS = st.sampled_from(SOME.split())


@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS, max_size=14))
def test_any_words_give_concepts_of_one_two_or_three_parts_that_the_words_say(words):
    found = phrases_of(words)
    assert found == phrases_of(list(words))
    assert len({p.concept for p in found}) == len(found)
    for phrase in found:
        assert 1 <= len(phrase.concept) <= 3 and all(phrase.concept)
        assert list(phrase.at) == sorted(set(phrase.at)) and phrase.at[0] >= 0 and phrase.at[-1] < len(words)
        assert len(phrase.at) >= len(phrase.concept)
        heads = [phrase.concept[0], *phrase.concept[2:]]
        assert all(any(noun_lemma(words[i]) == head for i in phrase.at) for head in heads)


def test_given_phrases_are_taken_where_the_caption_says_them():
    words = ["a", "red", "dog", "and", "a", "red", "dog", "near", "a", "dogs", "home"]
    found = given_phrases(words, ["red dog", "a dogs home", "a blue cat", ""])
    assert [(p.concept, p.at) for p in found] == [(("red", "dog"), (1, 2, 5, 6)), (("a", "dogs", "home"), (8, 9, 10))]
