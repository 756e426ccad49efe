"""Phrase concepts of a caption, by rules: objects, objects with an attribute, and two objects with their relation.

What a scene-graph parser gives MVPTR (SPICE, ``tools/phrase_parse.sh``), without a model, a download or another
language: a caption is short and flat, so closed classes of words (``phrase_words.txt``) and two endings go a long way.
Where the parser knows grammar we guess: a word that no list knows is a noun; one in -ing or -ed describes a noun that
it stands before, after an article, and is a verb elsewhere; and a relation is what stands between neighbouring nouns.
It reads English; most words of other languages become nouns.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from importlib import resources
from itertools import pairwise

#: Verbs and prepositions at most between two nouns that stand in a relation.
REACH = 4


@dataclass(frozen=True)
class Phrase:
    """A concept and where the caption says it.

    ``concept``: (object), (object, attribute) or (subject, relation, object), lemmas. ``at``: numbers of all words of
    the caption that say it, rising; of every occurrence, where there are several.
    """

    concept: tuple[str, ...]
    at: tuple[int, ...]


class Kind(Enum):
    noun = auto()
    modifier = auto()  # adjectives and numbers
    verb = auto()
    preposition = auto()
    joint = auto()  # "and" between two modifiers of one noun
    opening = auto()  # an article or the like: a noun phrase begins
    auxiliary = auto()
    filler = auto()  # adverbs: nothing ends, nothing begins
    stop = auto()  # conjunctions, pronouns: no relation crosses them


@dataclass(frozen=True)
class _Chunk:
    """Words [first, head] that are one noun with what describes it."""

    first: int
    head: int


@dataclass(frozen=True)
class _Words:
    kinds: dict[str, Kind]
    verbs: frozenset[str]
    nounlike: frozenset[str]
    past: dict[str, str]
    plural: dict[str, str]
    compounds: frozenset[tuple[str, ...]]
    frame: frozenset[str]
    measure: frozenset[str]


def phrases_of(words: Sequence[str]) -> list[Phrase]:
    """The concepts of a cleaned caption's words, each once: noun by noun, then the relations."""
    found: dict[tuple[str, ...], set[int]] = {}
    for concept, at in _said(words):
        found.setdefault(concept, set()).update(at)
    return [Phrase(concept, tuple(sorted(at))) for concept, at in found.items()]


def phrase_texts(words: Sequence[str]) -> list[str]:
    """The concepts of a cleaned caption's words as it says them, each once: what ``given_phrases`` finds again.

    The words from the first to the last of a concept, with those between them, in place of lemmas.
    """
    return list(dict.fromkeys(" ".join(words[min(at) : max(at) + 1]) for _, at in _said(words)))


def is_noun(word: str) -> bool:
    """Whether the rules take a cleaned word by itself for the name of something that an image can show."""
    return bool(phrases_of([word]))


def _said(words: Sequence[str]) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Every concept where it is said, with the numbers of its words there."""
    kinds = _kinds(words)
    chunks = _chunks(words, kinds)
    for chunk in chunks:
        noun = noun_lemma(words[chunk.head])
        yield (noun,), (chunk.head,)
        for i in range(chunk.first, chunk.head):
            attribute = words[i] if kinds[i] is Kind.modifier else noun_lemma(words[i])
            if kinds[i] is not Kind.joint and attribute != noun:
                yield (noun, attribute), (i, chunk.head)
    subject = chunks[0] if chunks else None
    for left, right in pairwise(chunks):
        between = range(left.head + 1, right.first)
        said = _relation(kinds, between)
        if not said:
            subject = right
            continue
        assert subject is not None
        # "a woman in a hat is riding a horse": what stands before an auxiliary is said of the first noun.
        one = subject if any(kinds[i] is Kind.auxiliary for i in between) else left
        relation = " ".join(verb_lemma(words[i]) if kinds[i] is Kind.verb else words[i] for i in said)
        concept = (noun_lemma(words[one.head]), relation, noun_lemma(words[right.head]))
        yield concept, (one.head, *said, right.head)


def given_phrases(words: Sequence[str], texts: Iterable[str]) -> list[Phrase]:
    """Phrases that somebody else found, cleaned as captions are, as far as the caption's words say them in a row.

    Their words are the concept, as they stand.
    """
    found: dict[tuple[str, ...], set[int]] = {}
    for text in texts:
        concept = tuple(text.split())
        n = len(concept)
        for i in range(len(words) - n + 1) if n else ():
            if tuple(words[i : i + n]) == concept:
                found.setdefault(concept, set()).update(range(i, i + n))
    return [Phrase(concept, tuple(sorted(at))) for concept, at in found.items()]


def noun_lemma(word: str) -> str:
    """Singular of an English noun: a list of the irregular ones, and the endings."""
    plural = _words().plural
    if word in plural:
        return plural[word]
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("shes", "ches", "xes", "sses", "zzes")):
        return word[:-2]
    return word[:-1]


def verb_lemma(word: str) -> str:
    """Infinitive of an English verb: the listed one that the word may be a form of, or the word without its ending."""
    known = _words()
    if word in known.past:
        return known.past[word]
    forms = _stems(word)
    return next((form for form in forms if form in known.verbs), forms[0])


def _stems(word: str) -> list[str]:
    """What the word may be a form of, the likeliest first where no list knows any."""
    if word in _words().verbs:
        return [word]
    for ending in ("ing", "ed"):
        stem = word.removesuffix(ending)
        if stem != word and len(stem) > 2:
            doubled = stem[-1] == stem[-2] and stem[-1] not in "lsz"
            plain = [stem[:-1], stem] if doubled else [stem, stem + "e"]
            silent = stem.endswith(("v", "c", "z", "u", "at", "id"))  # "hove", not "hov"
            return [*(plain[::-1] if silent else plain), stem[:-1] + "y"]
    if word.endswith("ies") and len(word) > 4:
        return [word[:-3] + "y", word]
    if word.endswith("s") and not word.endswith("ss"):
        return [word[:-1], word[:-2], word]
    return [word]


def _kinds(words: Sequence[str]) -> list[Kind]:
    known = _words()
    kinds: list[Kind] = []
    for i, word in enumerate(words):
        before = kinds[-1] if kinds else Kind.stop
        kinds.append(_kind(known, word, before, words[i + 1] if i + 1 < len(words) else ""))
    for length in sorted({len(c) for c in known.compounds}, reverse=True):
        for i in range(len(words) - length + 1):
            if tuple(words[i : i + length]) in known.compounds:
                kinds[i : i + length] = [Kind.preposition] * length
    described, describing = (Kind.noun, Kind.modifier), (Kind.opening, Kind.modifier)
    for i in range(1, len(words) - 1):
        if words[i] == "and" and kinds[i - 1] is Kind.modifier and kinds[i + 1] is Kind.modifier:
            kinds[i] = Kind.joint
    for i in reversed(range(len(words))):
        after = kinds[i + 1] if i + 1 < len(words) else Kind.stop
        before = kinds[i - 1] if i else Kind.stop
        if kinds[i] is Kind.opening and after not in described:
            kinds[i] = Kind.stop  # "from one to another"
        elif kinds[i] is Kind.modifier and before in describing and after not in (*described, Kind.joint):
            kinds[i] = Kind.noun  # "a white square": an adjective that has no noun is one itself
    return kinds


def _kind(known: _Words, word: str, before: Kind, after: str) -> Kind:
    """What a word is by itself and its neighbours; ``after`` is empty for the last one."""
    if not any(letter.isalpha() for letter in word):
        return Kind.modifier if word.isdigit() else Kind.stop
    if word in known.kinds:
        return known.kinds[word]
    if word in known.nounlike or not _is_verb(known, word):
        return Kind.noun
    ended = word.endswith(("ing", "ed")) or word in known.past
    if before in (Kind.opening, Kind.modifier):
        noun_follows = bool(after) and after not in known.kinds and not _is_verb(known, after)
        return Kind.modifier if noun_follows and ended else Kind.noun
    if before in (Kind.preposition, Kind.verb) and not ended:
        return Kind.noun  # "on a walk", "riding waves"
    return Kind.verb


def _is_verb(known: _Words, word: str) -> bool:
    if word in known.nounlike or word in known.kinds:
        return False
    if word in known.past or any(form in known.verbs for form in _stems(word)):
        return True
    return len(word) > 5 and word.endswith(("ing", "ed"))


def _chunks(words: Sequence[str], kinds: Sequence[Kind]) -> list[_Chunk]:
    """Nouns with the modifiers and nouns right before them, in order.

    Left out are those that only frame what is shown, "a picture", "a group of".
    """
    known, chunks, i = _words(), [], 0
    while i < len(words):
        j = i
        while j < len(words) and kinds[j] in (Kind.noun, Kind.modifier, Kind.joint):
            j += 1
        heads = [k for k in range(i, j) if kinds[k] is Kind.noun]
        if heads:
            head = heads[-1]
            measures = words[head] in known.measure and words[head + 1 : head + 2] == ["of"]
            if words[head] not in known.frame and not measures:
                chunks.append(_Chunk(i, head))
        i = max(j, i + 1)
    return chunks


def _relation(kinds: Sequence[Kind], between: range) -> list[int]:
    """Which of the words between two nouns say how these stand to each other; none where they do not."""
    said = [i for i in between if kinds[i] in (Kind.verb, Kind.preposition)]
    crossed = any(kinds[i] in (Kind.stop, Kind.noun, Kind.modifier) for i in between)
    return [] if crossed or len(said) > REACH else said


@functools.cache
def _words() -> _Words:
    lines: dict[str, str] = {}
    text = resources.files("simla_ray.data").joinpath("phrase_words.txt").read_text()
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, rest = line.partition(": ")
            lines[name] = rest
    kinds: dict[str, Kind] = {}
    for name, kind in (
        ("determiner", Kind.opening),
        ("pronoun", Kind.stop),
        ("conjunction", Kind.stop),
        ("auxiliary", Kind.auxiliary),
        ("adverb", Kind.filler),
        ("preposition", Kind.preposition),
        ("number", Kind.modifier),
        ("adjective", Kind.modifier),
    ):
        for word in lines[name].split():
            kinds.setdefault(word, kind)
    return _Words(
        kinds=kinds,
        verbs=frozenset(lines["verb"].split()),
        nounlike=frozenset(lines["nounlike"].split()),
        past=dict(pair.split("=") for pair in lines["past"].split()),
        plural=dict(pair.split("=") for pair in lines["plural"].split()),
        compounds=frozenset(tuple(part.split()) for part in lines["compound"].split("|")),
        frame=frozenset(lines["frame"].split()),
        measure=frozenset(lines["measure"].split()),
    )
