"""All weights of a run: the towers that have an EMA copy, the heads that have none, the teacher, the queue."""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simla_ray.config.enums import AnswerHead, ContrastLoss, Fusion, VisionSource
from simla_ray.config.schema import Run
from simla_ray.errors import UserError
from simla_ray.models.decoder import AnswerDecoder, classifier
from simla_ray.models.merging import Merging
from simla_ray.models.needs import FUSED, Needs
from simla_ray.models.queue import Queue
from simla_ray.models.region_codes import RegionCodes
from simla_ray.models.region_merging import RegionMerging
from simla_ray.models.region_tower import RegionRegression, RegionTower, region_classifier
from simla_ray.models.stack import Attentions, Memory
from simla_ray.models.teacher import Teacher
from simla_ray.models.temperature import Scale
from simla_ray.models.text import TextModel
from simla_ray.models.two_stage import StageMerging, TaggedRegionTower
from simla_ray.models.vision import VisionTower


class Towers(nn.Module):
    """Everything the teacher copies (official ``copy_params``): both towers, projections, code and concept heads.

    With ``text.fusion: merged`` there are no towers and no projections: ``vision`` embeds patches and holds the blocks,
    ``text`` embeds words, and ``merging`` brings them together. With ``two_stage`` both are towers of BERT layers,
    and ``merging`` has those over the states of both.
    """

    def __init__(self, run: Run, vocab_size: int):
        super().__init__()
        on, needs = run.objectives.active(), needs_of(run)
        merged, staged = run.text.fusion is Fusion.merged, run.text.fusion is Fusion.two_stage
        of_regions = run.vision.source is VisionSource.regions
        if staged:
            self.vision: Any = TaggedRegionTower(run, vocab_size, tag_head="mcr" in on)
        elif of_regions:
            self.vision = RegionTower(run, maskable=needs.hides_regions)
        else:
            self.vision = VisionTower(run.vision, maskable="mim" in on)
        self.vision.saves_memory = run.activation_checkpointing
        width = self.vision.width
        memory_width = width if needs.fusion and not (merged or staged) else None
        concepts = run.concepts.most if run.text.concepts else 0
        self.text = TextModel(
            run.text, vocab_size, memory_width=memory_width, mlm_head="mlm" in on, concepts=concepts
        )  # fmt: skip
        self.text.encoder.saves_memory = run.activation_checkpointing
        pooled = needs.itm or needs.labels or _classifies(run)
        merging: Any = RegionMerging if of_regions else Merging
        self.merging = merging(width, pooled=pooled) if merged else None
        if staged:
            self.vision.embed_with(self.text.embeddings)
            self.merging = StageMerging(run, pooled=pooled)
        if needs.mrfr:
            self.region_regression = RegionRegression(width, self.vision.feature_width)
        if needs.mrc or needs.mrckl:
            self.region_classifier = region_classifier(width, region_classes(run))
        if (needs.text_only or needs.psl) and not merged:
            self.vision_proj = nn.Linear(width, run.joint_width, bias=not staged)
        if needs.text_only and not merged:
            self.text_proj = nn.Linear(run.text.width, run.joint_width, bias=not staged)
        if "mim" in on:
            self.mim_head = nn.Linear(run.text.width, run.codes.n)
        if run.objectives.psl is not None and "psl" in on:
            self.concept_head = nn.Linear(run.joint_width, vocab_size)
            if run.objectives.psl.bias_log_prior:
                nn.init.constant_(self.concept_head.bias, math.log(run.objectives.psl.max_keywords / vocab_size))

    def image_vector(self, image_tokens: Tensor) -> Tensor:
        """(B, N, D) -> unit rows (B, E), float32 at least."""
        return _unit(self.vision_proj(image_tokens[:, 0]))

    def text_vector(self, text_tokens: Tensor) -> Tensor:
        """(B, L, D) -> unit rows (B, E), float32 at least."""
        return _unit(self.text_proj(text_tokens[:, 0]))

    def fuse(
        self,
        image_tokens: Tensor,
        image_index: Tensor | None,
        ids: Tensor,
        mask: Tensor,
        keep: Attentions | None = None,
    ) -> Tensor:
        """Texts, ids and mask (n, L), with images -> the words' states (n, L, D).

        ``image_index`` (n,) names the row of image_tokens (m, N, D) that each text meets; None: they are in order.
        """
        if self.merging is None:
            return self.text.encode(ids, mask, Memory(image_tokens, index=image_index), keep)
        patches = image_tokens if image_index is None else image_tokens.index_select(0, image_index)
        words = self.text.encode(ids, mask) if self.text.split else self.text.embeddings(ids)
        return self.merging(self.layers, words, mask, patches, keep)[0]

    def pool(self, cls: Tensor) -> Tensor:
        """The state of a fused [CLS] (n, D) -> what heads read, (n, D)."""
        return cls if self.merging is None else self.merging.pool(cls)

    @property
    def layers(self) -> Any:
        """Merged, what words and image tokens pass through: the Vision Transformer, or over regions layers as the
        text's."""
        if isinstance(self.merging, StageMerging):
            return self.merging.encoder
        return self.text.encoder if isinstance(self.merging, RegionMerging) else self.vision

    @property
    def fusion_layers(self) -> range:
        """Numbers of the layers in which words read patches."""
        if isinstance(self.merging, RegionMerging):  # no patches
            return range(0)
        if self.merging is not None:
            return range(len(self.vision.vit.blocks))
        return range(self.text.fusion_layers.start, self.text.fusion_layers.stop)


class Model(nn.Module):
    """The student's towers, heads and temperature (``scale``), and where the run has them teacher, queue and decoder.

    ``low_precision`` is the dtype of the teacher's running copy.
    """

    def __init__(self, run: Run, vocab_size: int, low_precision: torch.dtype = torch.float32):
        super().__init__()
        on = run.objectives.active()
        merged = run.text.fusion is Fusion.merged
        if ("mim" in on or merged) and run.text.width != vision_width(run):
            raise _width_error(run, merged)
        self.student = Towers(run, vocab_size)
        self.itm_head = nn.Linear(run.text.width, 2) if "itm" in on else None
        answers = run.objectives.answers if "answers" in on else None
        labels = run.objectives.labels if "labels" in on else None
        width = run.text.width
        self.decoder = self.answer_head = self.label_head = None
        if answers is not None and answers.head is AnswerHead.decoder:
            self.decoder = AnswerDecoder(run.text, vocab_size, answers.depth or max(1, run.text.depth // 2))
            self.decoder.encoder.saves_memory = run.activation_checkpointing
        elif answers is not None:
            self.answer_head = classifier(width, answers.most)
        if labels is not None:
            self.label_head = classifier(labels.pictures * width, len(labels.classes))
        itc = run.objectives.itc if "itc" in on else None
        self.scale = None
        if not merged:
            self.scale = Scale(run.temperature, itc.bias if itc and itc.loss is ContrastLoss.sigmoid else None)
        self.teacher = None
        if run.teacher is not None and needs_of(run).teacher:
            self.teacher = Teacher(self.student, run.teacher.m, run.teacher.mode, low_precision)
        self.region_codes = None
        if {"mrc", "mrckl"} & set(on) and _regions_are_coded(run):
            self.region_codes = RegionCodes(run.codes.n, self.student.vision.feature_width)
        self.queue = Queue(run.queue, run.joint_width) if run.queue and "itc" in on else None

    @property
    def keys(self) -> Towers:
        """The towers that make ITC's keys: the teacher's, or without a teacher the student's."""
        return self.teacher.towers if self.teacher is not None else self.student  # type: ignore[return-value]

    @property
    def temperature(self) -> Tensor:
        """What cosines are divided by, a scalar in the graph."""
        assert self.scale is not None
        return self.scale()

    def match(self, cls: Tensor) -> Tensor:
        """The state of a fused [CLS] (n, D) -> ITM's logits (n, 2)."""
        assert self.itm_head is not None
        return self.itm_head(self.student.pool(cls))

    def trainable_in(self, objectives: set[str]) -> None:
        """Let exactly those parameters require gradients that these objectives reach."""
        for parameter in self.student.parameters():
            parameter.requires_grad_(True)
        contrast, fused = bool({"itc", "psl"} & objectives), bool(FUSED & objectives)
        student, text = self.student, self.student.text
        _require(getattr(student, "vision_proj", None), contrast)
        _require(getattr(student, "text_proj", None), "itc" in objectives)
        _require(getattr(student.vision, "features", None), False)  # frozen
        hides = {"mrfr", "mrc", "mrckl"} & objectives
        _require(getattr(student, "region_regression", None), "mrfr" in objectives)
        _require(getattr(student, "region_classifier", None), bool({"mrc", "mrckl"} & objectives))
        if getattr(student.vision, "mask_embedding", None) is not None:
            student.vision.mask_embedding.requires_grad_(bool(hides))
        if student.vision.mask_token is not None:
            student.vision.mask_token.requires_grad_("mim" in objectives)
        _require(text, "itc" in objectives or fused)
        if "mcr" in objectives:  # the image tower's tags are embedded as words are
            _require(text.embeddings, True)
            _require(text.embeddings.concept_embeddings, "itc" in objectives or fused)
        if student.merging is not None:
            pooled = "itm" in objectives or "labels" in objectives or self.answer_head is not None
            _require(student.merging.pooler, pooled)
        if not fused:
            for layer in text.encoder.layer:
                _require(getattr(layer, "crossattention", None), False)
            if text.split:
                _require(text.encoder.layer[text.fusion_layers], False)
        _require(getattr(student.merging, "encoder", None), fused)
        _require(getattr(student.vision, "tag_head", None), "mcr" in objectives)
        _require(text.cls, "mlm" in objectives)
        _require(getattr(student, "mim_head", None), "mim" in objectives)
        _require(getattr(student, "concept_head", None), "psl" in objectives)
        _require(self.itm_head, "itm" in objectives)
        for head in (self.decoder, self.answer_head):
            _require(head, "answers" in objectives)
        _require(self.label_head, "labels" in objectives)
        _require(self.scale, "itc" in objectives)


def needs_of(run: Run) -> Needs:
    """What the objectives of a whole run ask for, over all phases."""
    return Needs.of(run.objectives, set(run.objectives.active()), has_teacher=run.teacher is not None)


def region_classes(run: Run) -> int:
    """Classes of regions, background included."""
    classes = run.regions.classes if run.regions is not None else None
    return 1 + (run.codes.n if classes is None else len(classes))


def _regions_are_coded(run: Run) -> bool:
    return run.regions is not None and run.regions.classes is None


def vision_width(run: Run) -> int:
    """Width of the image tower's tokens."""
    if run.vision.source is VisionSource.regions:
        return run.text.width
    if run.vision.width is not None:
        return run.vision.width
    with torch.device("meta"):
        return timm.create_model(run.vision.timm, num_classes=0).embed_dim


def _classifies(run: Run) -> bool:
    answers = run.objectives.answers if "answers" in run.objectives.active() else None
    return answers is not None and answers.head is AnswerHead.classifier


def _width_error(run: Run, merged: bool) -> UserError:
    why = "words and patches pass through one stack" if merged else "mim sends image tokens through the text stack"
    return UserError(f"text.width: {run.text.width} must equal the image tower's width ({vision_width(run)}): {why}")


def _require(module: nn.Module | None, wanted: bool) -> None:
    if module is not None:
        module.requires_grad_(wanted)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
