"""Search in a user's pictures, by words or by another picture: ITC's vectors find candidates, ITM ranks them again."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from simla_ray.data.augment import evaluation_view, to_array
from simla_ray.data.decode import DropRow, decode
from simla_ray.data.prefetch import Prefetched
from simla_ray.data.sources.files import absolute
from simla_ray.data.text import clean
from simla_ray.errors import UserError
from simla_ray.release.collection import Folder, Rows, open_collection
from simla_ray.release.vector_store import Record, VectorStore

if TYPE_CHECKING:
    from PIL.Image import Image

    from simla_ray.release.pretrained import Picture, Pretrained

#: Folder of indexes, beside the model's.
CACHE = "search-index"
BATCH = 32
#: Candidates that ITM ranks at a time: their views and tokens are in memory together.
MATCHED = 64
SECONDS_BETWEEN_LINES = 5.0
#: What was encoded is stored that often, so that little is lost with a machine.
SECONDS_BETWEEN_SAVES = 60.0

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Hit:
    """A picture found.

    ``name`` is its path below the folder, or its row's uid, ``path`` its file, where it has one. ``similarity`` is the
    cosine of its vector with the query's, -1..1, ``match`` ITM's probability that query and picture belong together;
    None where only the vectors were compared.
    """

    name: str
    similarity: float
    match: float | None
    path: Path | None
    place: int


class ImageIndex:
    """The vectors of a collection's pictures, in its order.

    Attributes:
        names: (n,) of the pictures that could be read.
        vectors: (n, E) float32 unit rows.
        dropped: name -> reason, of the others.
        encoded: how many were encoded just now, the others were known.
    """

    def __init__(self, model: Pretrained, collection: Folder | Rows, records: list[Record], vectors: np.ndarray):
        self.model, self.collection, self.vectors = model, collection, vectors
        there = {entry.name: place for place, entry in enumerate(collection.entries)}
        used = [record for record in records if record.reason is None]
        self.names = [record.label for record in used]
        self.places = [there[record.name] for record in used]
        self.files = [collection.file(record.name) for record in used]
        self.dropped = {record.label: record.reason for record in records if record.reason is not None}
        self.encoded = 0

    @classmethod
    def of(cls, model: Pretrained, source: Path | str, cache: Path, say: Say = silent) -> ImageIndex:
        """Index a collection, encoding what the cache does not know yet; see ``Pretrained.index``."""
        collection = open_collection(source)
        where = absolute(str(source)) if isinstance(collection, Rows) else str(collection.path)
        store = VectorStore(cache, where, fingerprint(model))
        known, vectors = store.load(say)
        found: dict[str, tuple[Record, np.ndarray | None]] = {}
        todo = []
        for place, entry in enumerate(collection.entries):
            record = known.get(entry.name)
            if record is not None and (record.size, record.mtime_ns) == (entry.size, entry.mtime_ns):
                found[entry.name] = (record, vectors[record.row] if record.row is not None else None)
            else:
                todo.append(place)

        def settle() -> tuple[list[Record], np.ndarray]:
            """What is known by now, in the order of the collection."""
            kept = [found[entry.name] for entry in collection.entries if entry.name in found]
            rows = [vector for _, vector in kept if vector is not None]
            none = np.zeros((0, model.run.joint_width), np.float32)
            return [record for record, _ in kept], np.stack(rows) if rows else none

        if todo or len(found) < len(known):
            store.prepare()
            try:
                saved = time.monotonic()
                for part in _encoded(model, collection, todo, say):
                    found |= part
                    if time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                        store.save(*settle())
                        saved = time.monotonic()
            finally:  # also of what was encoded before an interruption
                store.save(*settle())
        index = cls(model, collection, *settle())
        index.encoded = len(todo)
        if model.wants_boxes:
            say(f"regions    {len(index):,} pictures have no boxes here; each is {model.seen_as}")
        if not len(index):
            why = ", ".join(f"{reason} {n:,}" for reason, n in index.reasons.items())
            raise UserError(f"{source}: none of its pictures can be read ({why})")
        return index

    def __len__(self) -> int:
        return len(self.names)

    @property
    def reasons(self) -> dict[str, int]:
        """How many pictures were dropped for which reason."""
        return dict(sorted(Counter(self.dropped.values()).items()))

    def search(self, query: str | Picture, top: int = 10, rerank: int | None = None) -> list[Hit]:
        """The ``top`` pictures that fit a text, or are like a picture, best first.

        A text's most similar pictures are read again and ranked by ITM, where the model has it; those beyond them
        follow by similarity. Pictures of equal score stay in the order of the collection.

        Args:
            query: words, or a picture that is no ``str``: a ``Path``, a PIL image, bytes, an array.
            rerank: how many ITM ranks again; None for ``eval.rerank_top_k``, at least ``top``; 0 for none.

        Raises:
            UserError: words without a letter or digit, or a picture that cannot be read.
        """
        text = clean(query, self.model.run.text.max_words) if isinstance(query, str) else None
        if text == "":
            raise UserError(f"{query!r}: a query without a word; give letters or digits")
        vector = self.model.encode_text(text) if text is not None else self.model.encode_image(query)
        similarity = np.nan_to_num(self.vectors @ vector[0].cpu().numpy(), nan=-1.0)
        order = np.argsort(-similarity, kind="stable")
        if text is None or self.model.model.itm_head is None:
            rerank = 0
        elif rerank is None:
            rerank = max(top, self.model.run.eval.rerank_top_k)
        match = self._match(text or "", order[:rerank]) if rerank else {}
        first = sorted(match, key=lambda i: -match[i])
        chosen = [*first, *(i for i in order.tolist() if i not in match)][:top]
        return [Hit(self.names[i], float(similarity[i]), match.get(i), self.files[i], self.places[i]) for i in chosen]

    def pictures(self, hits: list[Hit], made: Callable[[Image], Any] = lambda image: image) -> dict[int, Any]:
        """Upright RGB pictures of hits by their ``place``; those that cannot be read any more are absent.

        Args:
            made: what to keep of a picture, such as a thumbnail: one picture is in memory at a time then.
        """
        found = {}
        for place, _, image in self.collection.read(sorted({hit.place for hit in hits})):
            try:
                found[place] = made(decode(image, self.model.run.data.max_pixels))
            except DropRow:
                continue
        return found

    def _match(self, text: str, candidates: np.ndarray) -> dict[int, float]:
        """ITM's probabilities of candidates, in their order; without those that cannot be read any more."""
        of_place = {self.places[i]: i for i in candidates.tolist()}
        read = self.collection.read(sorted(of_place))
        seen = ((of_place[place], _view(self.model, image)) for place, _, image in read)
        views = ((i, view) for i, view in seen if not isinstance(view, str))
        match: dict[int, float] = {}
        while part := dict(itertools.islice(views, MATCHED)):
            match |= zip(part, self._probabilities(text, np.stack(list(part.values()))), strict=True)
        return {i: match[i] for i in candidates.tolist() if i in match}

    def _probabilities(self, text: str, views: np.ndarray) -> list[float]:
        """ITM's of a text with each of views (n, 3, px, px) uint8."""
        scorer = self.model.scorer
        ids, mask = scorer.tokenize([text] * len(views))
        tokens, _ = scorer.encode_images(views)
        logits = scorer.match_logits(tokens, torch.arange(len(views), device=ids.device), ids, mask)
        found: list[float] = logits.sigmoid().nan_to_num().tolist()
        return found


def fingerprint(model: Pretrained) -> str:
    """Changes with what image vectors depend on: the tower's weights, its input, the precision."""
    digest = hashlib.sha256(repr((model.run.vision.image_px, str(model.run.precision))).encode())
    student = model.model.student
    for part in (student.vision, student.vision_proj):
        for name, tensor in part.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _encoded(
    model: Pretrained, collection: Folder | Rows, todo: list[int], say: Say
) -> Iterator[dict[str, tuple[Record, np.ndarray | None]]]:
    """Name -> record and vector, a batch at a time; pictures are decoded in a thread beside the model."""
    began = spoke = time.monotonic()
    done = 0
    with Prefetched(_batches(model, collection, todo), depth=2) as batches:
        for batch in batches:
            views = [view for _, _, view in batch if not isinstance(view, str)]
            vectors = iter(model.scorer.encode_images(np.stack(views))[1].cpu().numpy() if views else ())
            found = {}
            for place, label, view in batch:
                entry = collection.entries[place]
                reason = view if isinstance(view, str) else None
                record = Record(entry.name, entry.size, entry.mtime_ns, label, reason)
                found[entry.name] = (record, None if reason is not None else next(vectors))
            yield found
            done += len(batch)
            now = time.monotonic()
            if now - spoke > SECONDS_BETWEEN_LINES and done < len(todo):
                say(progress_line(done, len(todo), now - began))
                spoke = now
    if todo:
        say(progress_line(done, len(todo), time.monotonic() - began))


def _batches(
    model: Pretrained, collection: Folder | Rows, todo: list[int]
) -> Iterator[list[tuple[int, str, np.ndarray | str]]]:
    batch = []
    for place, label, image in collection.read(todo):
        batch.append((place, label, _view(model, image)))
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _view(model: Pretrained, image: Path | bytes | str | None) -> np.ndarray | str:
    """(3, px, px) uint8 as ``encode_image`` makes it, or why there is none."""
    try:
        return to_array(evaluation_view(decode(image, model.run.data.max_pixels), model.run.vision.image_px))
    except DropRow as drop:
        return drop.reason


def progress_line(done: int, total: int, seconds: float) -> str:
    """How far the encoding is, at which rate, and how long it will take."""
    rate = done / max(seconds, 1e-9)
    left = round((total - done) / max(rate, 1e-9))
    share = 100 * done / max(1, total)
    eta = f"  ETA {left // 60}:{left % 60:02d}" if done < total else f"  in {seconds:,.1f} s"
    return f"pictures   {done:>{len(f'{total:,}')},}/{total:,}  {share:3.0f} %  {rate:,.0f} pictures/s{eta}"
