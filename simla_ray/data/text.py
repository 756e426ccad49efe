"""Captions -> token ids: cleaning, vocabulary, what may become a keyword."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from tokenizers import BertWordPieceTokenizer, Tokenizer

from simla_ray.config.schema import KeywordSelect, Psl, Text
from simla_ray.data.concepts import CONCEPTS, Concepts
from simla_ray.errors import UserError

#: Longer words are cut: what has none of the spaces of a caption is none, and a vocabulary knows no such word.
MAX_LETTERS = 1000
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_DELETED = re.compile(r"[,.'!?\"()*#:;~]")
_SPACED = re.compile(r"[-/\s]+")
#: Words that name a side: such a caption is not mirrored with ``data.hflip: caption_safe``.
SIDES = frozenset({"left", "right", "leftmost", "rightmost", "lefthand", "righthand", "clockwise", "counterclockwise"})


#: File of the known answers, beside those of the vocabulary.
ANSWERS = "answers.json"


def clean(caption: str, max_words: int) -> str:
    """Official ``pre_caption``: lower case, punctuation deleted, - and / to spaces, <person> to person,
    first words only; ours: words of more than ``MAX_LETTERS`` are cut.
    """
    caption = caption.lower().replace("<person>", "person")
    words = _SPACED.sub(" ", _DELETED.sub("", caption)).split()
    return " ".join(word[:MAX_LETTERS] for word in words[:max_words])


def names_a_side(caption: str) -> bool:
    """Whether a cleaned caption says left or right."""
    return not SIDES.isdisjoint(caption.split())


@dataclass(frozen=True)
class Encoded:
    """A caption as one sequence, [CLS] tokens, no [SEP] (official ``tokenization_bert.py``)."""

    ids: np.ndarray  # (n,) int64
    word_start: np.ndarray  # (n,) position of the first piece of the piece's word
    words: list[str]  # (n,) whole word of each piece; "" for [CLS]
    number: np.ndarray  # (n,) number of that word in the caption; -1 for [CLS]
    truncated: bool


class Vocabulary:
    """A WordPiece vocabulary and how often its words occur in the training captions.

    ``frequency`` maps a whole word to the fraction of training captions that contain it; ``answers`` are those that
    questions have in training, the most frequent first, where a run learns to answer; ``concepts`` those of its
    phrases, where it reads them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        frequency: dict[str, float],
        answers: Sequence[str] = (),
        concepts: Concepts | None = None,
    ):
        self.tokenizer = tokenizer
        self.frequency = frequency
        self.answers = tuple(answers)
        self.concepts = concepts
        ids = [tokenizer.token_to_id(token) for token in SPECIALS]
        if any(i is None for i in ids):
            raise UserError(f"text.vocab: lacks {[t for t, i in zip(SPECIALS, ids, strict=True) if i is None]}")
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids
        if self.pad_id != 0:
            raise UserError(f"text.vocab: [PAD] has id {self.pad_id}, must have id 0")
        self.special_ids = frozenset(ids)

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def encode(self, cleaned: str, max_tokens: int) -> Encoded:
        """Encode a cleaned caption; everything after ``max_tokens`` is cut."""
        encoding = self.tokenizer.encode(cleaned, add_special_tokens=False)
        kept = max_tokens - 1  # one word may have a million pieces
        ids = np.array([self.cls_id, *encoding.ids[:kept]], dtype=np.int64)
        starts: list[int] = []
        first: dict[int | None, int] = {}
        for position, word in enumerate([-1, *encoding.word_ids[:kept]]):
            starts.append(first.setdefault(word, position))
        words = ["", *(_word_at(cleaned, start) for start, _ in encoding.offsets[:kept])]
        number = np.array([-1, *(cleaned.count(" ", 0, start) for start, _ in encoding.offsets[:kept])])
        return Encoded(ids, np.array(starts), words, number, len(encoding.ids) > kept)

    def word_ids(self, word: str) -> list[int]:
        """Pieces of a single word."""
        return self.tokenizer.encode(word, add_special_tokens=False).ids

    def token(self, token_id: int) -> str:
        return self.tokenizer.id_to_token(int(token_id)) or "?"

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "word_frequency.json").write_text(json.dumps(self.frequency))
        if self.answers:
            (folder / ANSWERS).write_text(json.dumps(self.answers))
        if self.concepts is not None:
            self.concepts.save(folder / CONCEPTS)

    @classmethod
    def load(cls, folder: Path) -> Vocabulary:
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            frequency = json.loads((folder / "word_frequency.json").read_text())
            answers = json.loads((folder / ANSWERS).read_text()) if (folder / ANSWERS).exists() else ()
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UserError(f"{folder}: holds no vocabulary ({error})") from None
        concepts = Concepts.load(folder / CONCEPTS) if (folder / CONCEPTS).exists() else None
        return cls(tokenizer, frequency, answers, concepts)


def build_vocabulary(captions: Iterable[str], text: Text, given: Tokenizer | None = None) -> Vocabulary:
    """Train a WordPiece vocabulary on cleaned captions, or load the named one, and count words.

    Args:
        given: the tokenizer of the run whose weights this one starts from; its ids must stay.

    Raises:
        UserError: text.vocab names a file or hub vocabulary that cannot be read.
    """
    counts: Counter[str] = Counter()
    lines: Counter[str] = Counter()
    n = 0
    for caption in captions:
        counts.update(set(caption.split()))
        if text.vocab == "train":
            lines[caption] += 1
        n += 1
    if given is not None:
        tokenizer = given
    elif text.vocab == "train":
        tokenizer = _train_wordpiece(lines, text.vocab_size)
    elif Path(text.vocab).is_file():
        try:
            tokenizer = BertWordPieceTokenizer(text.vocab, lowercase=True)._tokenizer
        except Exception as error:  # the tokenizers library raises bare Exception, and TypeError for missing specials
            raise UserError(f"text.vocab: {text.vocab} is no WordPiece vocabulary ({error})") from None
    else:
        tokenizer = _hub_tokenizer(text.vocab)
    return Vocabulary(tokenizer, {word: count / max(n, 1) for word, count in sorted(counts.items())})


def _train_wordpiece(lines: Counter[str], vocab_size: int) -> Tokenizer:
    """WordPiece over lines with their counts; the same ids in every process.

    The trainer numbers the continuing pieces of single letters in the order of a hash map that differs from process to
    process, and breaks ties between merges by these numbers. Naming them first pins both; the final ids are the sorted
    pieces.
    """
    letters = sorted({f"##{letter}" for line in lines for word in line.split() for letter in word[1:]})
    trained = BertWordPieceTokenizer(clean_text=True, lowercase=True)
    trained.train_from_iterator(
        (line for line in sorted(lines) for _ in range(lines[line])),
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIALS, *letters],
        show_progress=False,
    )
    pieces = sorted(set(trained.get_vocab()) - set(SPECIALS))
    return BertWordPieceTokenizer({p: i for i, p in enumerate((*SPECIALS, *pieces))}, lowercase=True)._tokenizer


def _hub_tokenizer(name: str) -> Tokenizer:
    from transformers import BertTokenizerFast

    import simla_ray.models  # noqa: F401  (makes transformers importable beside a CPU-only torch)

    try:
        return BertTokenizerFast.from_pretrained(name).backend_tokenizer
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"text.vocab: {name} is no file and cannot be fetched ({reason}); or use text.vocab=train"
        ) from None


def _word_at(cleaned: str, offset: int) -> str:
    start = cleaned.rfind(" ", 0, offset + 1) + 1
    end = cleaned.find(" ", offset)
    return cleaned[start : end if end >= 0 else None]


def load_stop_words(source: str | None) -> frozenset[str]:
    """``en`` (the list in this package), a file with one word a line, or none."""
    if source is None:
        return frozenset()
    if source == "en":
        return frozenset(resources.files("simla_ray.data").joinpath("stop_words.txt").read_text().split())
    try:
        return frozenset(Path(source).read_text().lower().split())
    except OSError as error:
        raise UserError(f"objectives.psl.stop_words: {source} cannot be read ({error.strerror})") from None


def keyword_candidates(
    encoded: Encoded, psl: Psl, stop_words: frozenset[str], special_ids: frozenset[int]
) -> np.ndarray:
    """(n,) bool: may become a keyword. Padding, which follows, may only without ``exclude_special`` (official)."""
    closed = special_ids if psl.exclude_special else frozenset()
    pairs = zip(encoded.words, encoded.ids.tolist(), strict=True)
    return np.array([word not in stop_words and i not in closed for word, i in pairs])


def keyword_prior(encoded: Encoded, psl: Psl, frequency: dict[str, float], rng: np.random.Generator) -> np.ndarray:
    """(n,) float32 score of the controls of ``psl.select``: content words in order, tf-idf, or at random."""
    n = len(encoded.ids)
    if psl.select is KeywordSelect.random:
        return rng.random(n, dtype=np.float32)
    if psl.select is KeywordSelect.tfidf:
        tf = Counter(w for w, start, i in zip(encoded.words, encoded.word_start, range(n), strict=True) if start == i)
        floor = 1e-6
        return np.array([tf[w] * -np.log(max(frequency.get(w, 0.0), floor)) for w in encoded.words], dtype=np.float32)
    return np.zeros(n, dtype=np.float32)
