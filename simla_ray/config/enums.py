"""The values that keys choose from."""

from __future__ import annotations

from enum import StrEnum
from typing import Any


class Method(StrEnum):
    simla = "simla"
    albef = "albef"
    clip = "clip"
    siglip = "siglip"
    vilt = "vilt"
    mvptr = "mvptr"
    uniter = "uniter"


#: Other names of methods; what is stored is the method's own.
ALIASES = {"vil": Method.vilt}
#: Names of a method with keys that go with them, over its preset.
FORMS: dict[str, tuple[Method, dict[str, Any]]] = {
    "uniter-grid": (Method.uniter, {"regions": {"source": "grid"}}),
    # Without a detector there are no tags either, and nothing for MCR to recover; PSL is the same idea without tags.
    "mvptr-grid": (
        Method.mvptr,
        {"regions": {"source": "grid"}, "tags": {"source": "none"}, "objectives": {"mcr": None}},
    ),
    "mvptr-psl": (
        Method.mvptr,
        {
            "regions": {"source": "grid"},
            "tags": {"source": "none"},
            "objectives": {"mcr": None, "psl": {"select": "content", "recommend": "off", "soft_alpha": 0.0}},
        },
    ),
}


class Task(StrEnum):
    retrieval = "retrieval"
    grounding = "grounding"
    vqa = "vqa"
    entailment = "entailment"
    nlvr = "nlvr"
    nlvr2 = "nlvr2"


class AnswerHead(StrEnum):
    decoder = "decoder"
    classifier = "classifier"


class Size(StrEnum):
    tiny = "tiny"
    small = "small"
    base = "base"


class Variant(StrEnum):
    default = "default"
    official = "official"


class Flip(StrEnum):
    always = "always"
    caption_safe = "caption_safe"
    never = "never"


class Augment(StrEnum):
    full = "full"
    geometric = "geometric"
    crop = "crop"


class VisionSource(StrEnum):
    vit = "vit"
    patches = "patches"
    regions = "regions"


class RegionFeatures(StrEnum):
    pixels = "pixels"
    tower = "tower"


class RegionSource(StrEnum):
    auto = "auto"
    column = "column"
    boxes = "boxes"
    grid = "grid"


class Stem(StrEnum):
    patch = "patch"
    conv = "conv"


class Fusion(StrEnum):
    every_layer = "every_layer"
    upper_half = "upper_half"
    merged = "merged"
    two_stage = "two_stage"


class CodesKind(StrEnum):
    kmeans = "kmeans"
    features = "features"
    dvae = "dvae"


class TeacherMode(StrEnum):
    train = "train"
    eval = "eval"


class SameImage(StrEnum):
    negative = "negative"
    positive = "positive"


class ContrastLoss(StrEnum):
    softmax = "softmax"
    sigmoid = "sigmoid"


class ContrastScope(StrEnum):
    micro = "micro"
    step = "step"


class TemperatureKind(StrEnum):
    divide = "divide"
    log_scale = "log_scale"


class Negatives(StrEnum):
    sample = "sample"
    hard = "hard"
    random = "random"


class ConceptSource(StrEnum):
    rules = "rules"
    column = "column"


class TagSource(StrEnum):
    auto = "auto"
    column = "column"
    box_labels = "box_labels"
    none = "none"


class Pick(StrEnum):
    random = "random"
    max = "max"


class SoftDim(StrEnum):
    vocab = "vocab"
    sequence = "sequence"


class MimCrop(StrEnum):
    aligned = "aligned"
    independent = "independent"


class MimTeacherText(StrEnum):
    student = "student"
    student_redraw = "student_redraw"
    teacher = "teacher"


class Side(StrEnum):
    teacher = "teacher"
    student = "student"


class KeywordUnit(StrEnum):
    piece = "piece"
    word = "word"


class KeywordSelect(StrEnum):
    attention = "attention"
    content = "content"
    tfidf = "tfidf"
    random = "random"


class Recommend(StrEnum):
    soft = "soft"
    hard = "hard"
    off = "off"


class Reduction(StrEnum):
    element = "element"
    region = "region"


class ScheduleKind(StrEnum):
    joint = "joint"
    sampled = "sampled"
    phases = "phases"


class NoDecay(StrEnum):
    standard = "standard"
    official = "official"


class Precision(StrEnum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    gpu = "gpu"
