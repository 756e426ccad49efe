"""A trained model in one object: pictures and texts in, vectors, probabilities, heat maps and words out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from simla_ray.config.schema import RegionSource, Run
from simla_ray.data.augment import evaluation_view, to_array
from simla_ray.data.decode import DropRow, decode, to_rgb
from simla_ray.data.text import Vocabulary, clean, load_stop_words
from simla_ray.errors import UserError
from simla_ray.evaluation.boxes import propose
from simla_ray.evaluation.grad_cam import checked_layers, grad_cam
from simla_ray.evaluation.keywords import Candidates
from simla_ray.evaluation.questions import answer
from simla_ray.evaluation.scorer import Scorer
from simla_ray.models.model import Model
from simla_ray.models.precision import autocast
from simla_ray.release.search import CACHE, ImageIndex, Say, silent
from simla_ray.release.source import find_source, trained_model

#: A picture: PIL, path, encoded bytes, or a uint8 array (H, W, 3) or (H, W).
Picture = Image.Image | Path | str | bytes | np.ndarray
BATCH = 64


@dataclass(frozen=True)
class Grounded:
    """Where a picture shows what a phrase says.

    ``heat`` (grid, grid) float32, see ``Pretrained.ground``; ``boxes`` (k, 4) x1, y1, x2, y2 in 0..1, the likeliest
    first, then wider ones, none where the map is zero; ``scores`` (k,) the heat in a box over the root of its area,
    1 for the whole picture under an even map; ``match`` the probability that picture and phrase belong together.
    """

    phrase: str
    heat: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    match: float


class Pretrained:
    """What ``simla_ray.load`` gives. Methods take a list, or one picture or text, and work through it in batches.

    Pictures are resized to the side the tower knows, texts cleaned and cut, as in training's evaluation. Tensors come
    back on ``device``, in float32, without gradients. A run without the objective that trains what a method reads
    raises ``UserError``.

    A model over the boxes of all objects sees a picture given alone as the cells of a grid: the first one is warned of,
    and ``without_boxes`` counts them. Where it reads phrase concepts from a column, a text given alone has none.
    """

    def __init__(
        self, run: Run, model: Model, vocabulary: Vocabulary, device: torch.device, folder: Path | None = None
    ):
        self.run, self.vocabulary, self.device, self.folder = run, vocabulary, device, folder
        self.model = model.requires_grad_(False).to(device)
        self.scorer = Scorer(run, self.model, vocabulary, device)
        self.without_boxes = 0

    @classmethod
    def load(cls, path: Path, device: str | torch.device = "auto") -> Pretrained:
        """Open an exported folder, or a run's (its best checkpoint).

        Raises:
            UserError: neither of them, weights that do not fit their config, or a device that is not there.
        """
        device = _device(device)
        source = find_source(path)
        if source.run is None:
            raise UserError(
                f"{path}: a file without its config; make a folder of it first: "
                f"python experiments/export.py {path.name} FOLDER"
            )
        vocabulary = source.vocabulary()
        model = trained_model(source.run, vocabulary, source.read(), source.file)
        return cls(source.run, model, vocabulary, device, path.resolve())

    @property
    def wants_boxes(self) -> bool:
        """Whether the model knows images by the boxes of their objects, which a picture given alone does not have."""
        return self.run.regions is not None and self.run.regions.source is RegionSource.boxes

    @property
    def seen_as(self) -> str:
        """What a picture without boxes is to a model that wants them, for whoever is told of it."""
        assert self.run.regions is not None
        tags = ", without tags" if self.scorer.maker.tags is not None else ""
        return f"seen as the {self.run.regions.grid} x {self.run.regions.grid} cells of a grid{tags}"

    def encode_image(self, images: Sequence[Picture] | Picture, batch_size: int = BATCH) -> Tensor:
        """n pictures -> unit vectors (n, E)."""
        self._wants("vision_proj", "itc")
        vectors = [self.scorer.encode_images(views)[1] for views in self._views(_listed(images), batch_size)]
        return torch.cat(vectors) if vectors else self._empty(self.run.joint_width)

    def encode_text(self, texts: Sequence[str] | str, batch_size: int = 4 * BATCH) -> Tensor:
        """n texts -> unit vectors (n, E); their product with an image's is the cosine that ITC trains."""
        self._wants("text_proj", "itc")
        texts = _listed(texts)
        return self.scorer.encode_texts(texts, batch_size)[2] if texts else self._empty(self.run.joint_width)

    def match(self, images: Sequence[Picture] | Picture, texts: Sequence[str] | str, batch_size: int = BATCH) -> Tensor:
        """n pictures and n texts, pair by pair -> (n,) probability that they belong together, by ITM's head.

        Of a batch, a picture that is given several times is encoded once.
        """
        self._wants("itm_head", "itm")

        def score(tokens: Tensor, index: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            return self.scorer.match_logits(tokens, index, ids, mask).sigmoid()

        return self._over_pairs(images, texts, batch_size, score, ())

    def ground(
        self,
        images: Sequence[Picture] | Picture,
        phrases: Sequence[str] | str,
        batch_size: int = BATCH,
        layers: Sequence[int] | None = None,
    ) -> Tensor:
        """n pictures and n phrases, pair by pair -> (n, grid, grid) relevance of each patch, at least 0, by Grad-CAM.

        Rows from top to bottom; the scale differs from phrase to phrase.

        Args:
            layers: numbers of the text stack's layers, from 0; None for all that have cross-attention.
        """
        self._wants("itm_head", "itm")
        grid = self.run.grid
        chosen = checked_layers(self.scorer, layers)

        def score(tokens: Tensor, index: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
            return grad_cam(self.scorer, tokens, index, ids, mask, chosen).unflatten(1, (grid, grid))

        return self._over_pairs(images, phrases, batch_size, score, (grid, grid))

    def ground_boxes(self, image: Picture, phrase: str, layers: Sequence[int] | None = None) -> Grounded:
        """Where one picture shows what one phrase says, as boxes read off the heat map.

        Raises:
            UserError: the phrase has no word, beside what ``ground`` raises.
        """
        text = clean(phrase, self.run.text.max_words)
        if not text:
            raise UserError(f"{phrase!r}: a phrase without a word; give letters or digits")
        heat = self.ground(image, text, layers=layers)[0].cpu().numpy()
        return Grounded(phrase, heat, *propose(heat), float(self.match(image, text)[0]))

    @torch.no_grad()
    def answer(
        self,
        images: Sequence[Picture] | Picture,
        questions: Sequence[str] | str,
        top_k: int = 5,
        batch_size: int = BATCH,
    ) -> list[list[tuple[str, float]]]:
        """n pictures and n questions, pair by pair -> for each the ``top_k`` likeliest of the known answers, with their
        probabilities among them, by a run that was fine-tuned for ``task=vqa``.
        """
        if self.run.objectives.answers is None:
            raise UserError(
                f"{self.run.label} was not fine-tuned to answer questions (experiments/finetune.py task=vqa)"
            )
        pictures, texts = _listed(images), _listed(questions)
        _paired(pictures, texts)
        found = []
        names, k = self.vocabulary.answers, max(0, min(top_k, len(self.vocabulary.answers)))
        for start, views in zip(range(0, len(texts), batch_size), self._views(pictures, batch_size), strict=True):
            part = texts[start : start + batch_size]
            tokens = self.scorer.image_tokens(views)
            scores = answer(self.scorer, tokens, torch.arange(len(part), device=self.device), part)
            best = scores.softmax(1).topk(k)
            for values, places in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                found.append([(names[i], p) for i, p in zip(places, values, strict=True)])
        return found

    def index(self, source: Path | str, cache: Path | str | None = None, say: Say = silent) -> ImageIndex:
        """Index all pictures below a folder, or those of a Parquet file or tar, for ``search``.

        What was encoded before and has not changed is read from the cache.

        Args:
            cache: folder of such indexes; None for ``search-index`` beside the model's folder.
            say: gets lines about the progress.

        Raises:
            UserError: a run without ITC, no such pictures, or a cache that cannot be written.
        """
        self._wants("vision_proj", "itc")
        if cache is None:
            if self.folder is None:
                raise UserError("cache: give a folder; this model was not loaded from one")
            cache = self.folder.parent / CACHE
        return ImageIndex.of(self, source, Path(cache), say)

    @torch.no_grad()
    def keywords(
        self, images: Sequence[Picture] | Picture, top_k: int = 10, batch_size: int = BATCH
    ) -> list[list[tuple[str, float]]]:
        """n pictures -> for each the ``top_k`` likeliest words with their probabilities, by PSL's concept head.

        The words are those of the training captions that are no stop words; without captions, as of an official file,
        the whole words of the vocabulary. A word of several pieces gets the mean of their logits.
        """
        self._wants("concept_head", "psl")
        candidates, found = self._candidates, []
        k = max(0, min(top_k, len(candidates.words)))
        for views in self._views(_listed(images), batch_size):
            vectors = self.scorer.encode_images(views)[1]
            with autocast(self.run, self.device):
                logits = self.model.student.concept_head(vectors)
            best = candidates.scores(logits).sigmoid().topk(k)
            for values, places in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                found.append([(candidates.words[i], p) for i, p in zip(places, values, strict=True)])
        return found

    @cached_property
    def _candidates(self) -> Candidates:
        psl, vocabulary = self.run.objectives.psl, self.vocabulary
        if not vocabulary.frequency:
            pieces = vocabulary.tokenizer.get_vocab()
            vocabulary = Vocabulary(vocabulary.tokenizer, {piece: 0.0 for piece in sorted(pieces) if piece.isalpha()})
        return Candidates.of(vocabulary, load_stop_words((psl.stop_words if psl else None) or "en"))

    def _wants(self, part: str, objective: str) -> None:
        owner = self.model if part == "itm_head" else self.model.student
        if getattr(owner, part, None) is None:
            raise UserError(f"{self.run.label} was trained without {objective}, so it has no {part} to do this with")

    def _over_pairs(
        self,
        images: Sequence[Picture] | Picture,
        texts: Sequence[str] | str,
        batch_size: int,
        score: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        shape: tuple[int, ...],
    ) -> Tensor:
        """``score``(image tokens (m, N, D), row of them for each text (n,), ids, mask (n, L)), batch by batch."""
        pictures, sentences = _listed(images), _listed(texts)
        _paired(pictures, sentences)
        parts = []
        for start in range(0, len(sentences), batch_size):
            own = pictures[start : start + batch_size]
            row: dict[object, int] = {}
            views = []
            for number, image in enumerate(own, start):
                if _key(image) not in row:
                    row[_key(image)] = len(row)
                    views.append(self._view(image, number))
            tokens = self.scorer.image_tokens(np.stack(views))
            index = torch.tensor([row[_key(image)] for image in own], device=self.device)
            parts.append(score(tokens, index, *self.scorer.tokenize(sentences[start : start + batch_size])))
        return torch.cat(parts) if parts else self._empty(*shape)

    def _views(self, images: Sequence[Picture], batch_size: int) -> Iterator[np.ndarray]:
        """Batches (b, 3, px, px) uint8."""
        for start in range(0, len(images), batch_size):
            yield np.stack([self._view(image, i) for i, image in enumerate(images[start : start + batch_size], start)])

    def _view(self, image: Picture, number: int) -> np.ndarray:
        """(3, px, px) uint8; ``number`` is for the message."""
        if self.wants_boxes:
            self.without_boxes += 1
            if self.without_boxes == 1:
                note = f"{self.run.label}: a picture given alone has no boxes; it is {self.seen_as}"
                warnings.warn(note, stacklevel=2)
        try:
            upright = _rgb(image, self.run.data.max_pixels)
        except DropRow as drop:
            named = f" ({image})" if isinstance(image, str | Path) else ""
            raise UserError(f"picture {number}{named}: {drop.reason}") from None
        return to_array(evaluation_view(upright, self.run.vision.image_px))

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(0, *shape, device=self.device)


def _rgb(image: Picture, max_pixels: int) -> Image.Image:
    """Upright RGB, with the limits that data have too."""
    if isinstance(image, str | Path):
        return decode(Path(image), max_pixels)
    if isinstance(image, bytes | bytearray | memoryview):
        return decode(bytes(image), max_pixels)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or (image.ndim != 2 and (image.ndim != 3 or image.shape[2] != 3)):
            raise DropRow(f"a {image.dtype} array of shape {image.shape}; give uint8 (H, W, 3)")
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise DropRow(f"a {type(image).__name__}; give a PIL image, a path, bytes or a uint8 array")
    if image.width * image.height > max_pixels:
        raise DropRow("image_too_large")
    try:
        return to_rgb(image)
    except (OSError, ValueError, SyntaxError):  # a file that Pillow had opened, but not yet read
        raise DropRow("image_unreadable") from None


def _paired(pictures: Sequence[Any], texts: Sequence[str]) -> None:
    if len(pictures) != len(texts):
        raise UserError(f"{len(pictures)} pictures and {len(texts)} texts; they are paired one by one")


def _listed(given: Any) -> list[Any]:
    """A list of what may be one thing alone."""
    return [given] if isinstance(given, str | Path | bytes | bytearray | Image.Image | np.ndarray) else list(given)


def _key(image: Picture) -> object:
    """Equal for pictures that are certainly the same."""
    return image if isinstance(image, str | Path | bytes) else id(image)


def _device(name: str | torch.device) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: {name} is not one of auto, cpu, cuda, cuda:0, ...") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: {name}, but this machine has {torch.cuda.device_count()} usable GPUs")
    return device
