"""Every key of a run, as frozen pydantic models.

Each key is marked with what it means for a resume:

- ``identity``: changes what is learned. Resuming a run with another value is refused, showing the difference.
- ``operational``: workers, logging, storage. May change between two legs of one run; the change is logged.

The defaults below are the method as we ship it (``variant: default``) at paper size; the presets under ``presets/`` set
what a method, a variant or a size changes. "[ours]" marks choices that neither the paper nor the official code makes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from simla_ray.config.enums import (
    AnswerHead,
    Augment,
    CodesKind,
    ConceptSource,
    ContrastLoss,
    ContrastScope,
    Device,
    Flip,
    Fusion,
    KeywordSelect,
    KeywordUnit,
    Method,
    MimCrop,
    MimTeacherText,
    Negatives,
    NoDecay,
    Pick,
    Precision,
    Recommend,
    Reduction,
    RegionFeatures,
    RegionSource,
    SameImage,
    ScheduleKind,
    Side,
    Size,
    SoftDim,
    Stem,
    TagSource,
    Task,
    TeacherMode,
    TemperatureKind,
    Variant,
    VisionSource,
)
from simla_ray.config.rules import problems_of


def identity(default: Any = ..., doc: str = "", **limits: Any) -> Any:
    return Field(default, description=doc, json_schema_extra={"kind": "identity"}, **limits)


def operational(default: Any = ..., doc: str = "", **limits: Any) -> Any:
    return Field(default, description=doc, json_schema_extra={"kind": "operational"}, **limits)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, values: Any) -> Any:
        """Python counts true as 1; a key that wants a number does not."""
        if isinstance(values, dict):
            for name, field in cls.model_fields.items():
                if field.annotation in (int, float, int | None, float | None) and isinstance(values.get(name), bool):
                    raise ValueError(f"{name}: input should be a number, found {str(values[name]).lower()}")
        return values


def _yaml_off(value: Any) -> Any:
    """YAML 1.1 reads a bare ``off`` as false."""
    return "off" if value is False else value


def _null_is_none(value: Any) -> Any:
    """What lies under a mapping cannot be taken away by another, but by null."""
    return {} if value is None else value


Beta = Annotated[float, Field(ge=0, lt=1)]
ObjectiveName = Literal[
    "itc", "itm", "mlm", "mim", "psl", "wpa", "mrfr", "mrc", "mrckl", "mcr", "wpg", "answers", "labels"
]


class World(Section):
    """The built-in world, generated once per value of these keys: ``data.train: [world:train]``."""

    n_train: int = identity(12000, "scenes in world:train", ge=1)
    n_val: int = identity(500, "scenes in world:val", ge=1)
    n_test: int = identity(500, "scenes in world:test", ge=1)
    image_px: int = identity(48, "side of a rendered scene, pixels", ge=32, le=512)
    seed: int = identity(0, "seed of the scenes; apart from the run's seed, so that seeds share one world", ge=0)
    questions: int = identity(0, "questions and statements per scene, for fine-tuning; 0: none", ge=0, le=20)


class Data(Section):
    train: list[str] = identity(
        ["world:train"],
        "URIs of the training sets: files, globs, folders, tar:URI and the like where no ending tells, world:train",
        min_length=1,
    )
    weights: list[Annotated[float, Field(gt=0)]] | None = identity(
        None, "how often an epoch passes the rows of each URI of data.train: 2 twice, 0.5 half of them; null: once"
    )
    fraction: float = identity(
        1.0, "train on this share of the rows of each URI, the same for every seed; larger shares hold smaller ones",
        gt=0, le=1,
    )  # fmt: skip
    val: list[str] = identity(["world:val"], "URIs of the validation set: it picks the best checkpoint", min_length=1)
    test: list[str] | None = identity(
        None, "URIs of the final evaluation; null: world:test with world:val, else data.val"
    )
    train_split: str | None = identity(None, "keep only rows whose `split` column has this value")
    val_split: str | None = identity(None, "the same for data.val")
    test_split: str | None = identity(None, "the same for data.test")
    image_roots: list[Path] = identity([], "folders that image paths of lists may point into; others are refused")
    max_pixels: int = identity(50_000_000, "larger images are dropped before they are decoded", ge=1024)
    max_drop_fraction: float = identity(0.05, "stop with an error when more rows than this cannot be used", ge=0, le=1)
    crop_scale_min: float = identity(0.2, "smallest area of the random crop, as a fraction of the image", gt=0, le=1)
    augment: Augment = identity(Augment.full, "RandAugment after crop and flip: all ops, geometric ops only, or none")
    augment_ops: int = identity(2, "RandAugment: ops drawn per image", ge=0)
    augment_magnitude: int = identity(7, "RandAugment: magnitude, 0..10", ge=0, le=10)
    augment_p: float = identity(0.5, "RandAugment: probability that a drawn op is applied", ge=0, le=1)
    hflip: Flip = identity(Flip.caption_safe, "mirror images: always, only where no caption word is left/right, never")
    shuffle_window: int = identity(4096, "rows within which the order is shuffled", ge=1)
    decode_cpus: int = operational(1, "Ray CPUs that decode, augment and tokenise beside the workers", ge=1)
    audit: bool = operational(False, "write consumed.jsonl: step, rank, epoch and uid of every sample")


class Vision(Section):
    source: VisionSource = identity(
        VisionSource.vit,
        "vit: tokens of the whole Vision Transformer; patches: embedded patches with positions, text.fusion=merged; "
        "regions: features of boxes with where they lie, see regions",
    )
    timm: str = identity("vit_base_patch16_224", "name of a timm Vision Transformer")
    pretrained: bool = identity(True, "start from timm's weights of that name (needs network once)")
    weights: Path | None = identity(
        None, "file (safetensors or .pth) with weights of that name, read in place of timm's own; positions are resized"
    )
    image_px: int = identity(256, "side of the image the tower sees, pixels", ge=16)
    patch_px: int = identity(16, "side of a patch, pixels", ge=2)
    width: int | None = identity(None, "embedding width; null: as named by timm", ge=8)
    depth: int | None = identity(None, "layers; null: as named by timm", ge=1)
    heads: int | None = identity(None, "attention heads; null: as named by timm", ge=1)
    mlp_ratio: float = identity(4.0, "hidden width of the MLP over width", gt=0)
    stem: Stem = identity(
        Stem.patch, "patch: one linear patch embedding; conv: two strided convolutions before it [ours]"
    )


class Regions(Section):
    """What the image is made of with ``vision.source=regions``: boxes, and a vector of fixed features for each."""

    source: RegionSource = identity(
        RegionSource.auto,
        "column: region_feats with boxes; boxes: those of all objects, and the whole image; grid: cells; "
        "auto: the first of them that the training rows have",
    )
    max: int = identity(100, "column: the first of an image at most; boxes: the largest, the whole image one", ge=1)
    grid: int = identity(6, "cells per side of the grid [ours]", ge=1)
    features: RegionFeatures = identity(
        RegionFeatures.pixels,
        "boxes and grid: the region's own pixels, 8 x 8, or the patches under it of a frozen tower [ours]",
    )
    weights: str | None = identity(
        None, "features=tower: the run or exported folder whose image tower it is, or a timm name, with its weights"
    )
    tower: Vision | None = identity(None, "what that tower is; null: read off it at the start")
    classes: list[str] | None = identity(
        None, "names in box_labels that mrc and mrckl predict, others are background; null: codes of features (codes.n)"
    )
    mask_p: float = identity(0.15, "probability that a region is hidden, for mrfr, mrc and mrckl", gt=0, lt=1)
    width: int | None = identity(None, "column: numbers of a feature; null: those of the first training row", ge=1)


class Text(Section):
    vocab: str = identity(
        "bert-base-uncased", "`train`: WordPiece trained on the captions; else a vocab file or a hub name"
    )
    vocab_size: int = identity(30522, "size of a trained vocabulary", ge=64)
    max_words: int = identity(30, "captions are cut to this many words", ge=1)
    max_tokens: int = identity(25, "and to this many tokens, [CLS] included; cut captions are counted", ge=4)
    pad_multiple: int = identity(5, "a micro-batch is padded to a multiple of this many tokens", ge=1)
    weights: str | None = identity("bert-base-uncased", "BERT weights to start from (path or hub name); null: random")
    fold_type0: bool = identity(True, "fold BERT's token-type vector 0 into the positions at import [ours]")
    width: int = identity(768, "width", ge=8)
    depth: int = identity(12, "layers; 0 with fusion=merged, whose layers are the Vision Transformer's", ge=0)
    heads: int = identity(12, "attention heads", ge=1)
    ffn: int = identity(3072, "hidden width of the FFN", ge=8)
    fusion: Fusion = identity(
        Fusion.every_layer,
        "layers that can read the image: all (SIMLA), or the upper half, over text-only states (ALBEF); "
        "merged: words and patches side by side in one Vision Transformer (ViLT); "
        "two_stage: the lower half reads text, as many layers of another stack tags and regions, and the upper half "
        "what both give, side by side (MVPTR)",
    )
    concepts: int = identity(
        0, "phrase concepts behind the words, at least so many where a caption has them (MVPTR: 5); 0: none", ge=0
    )
    max_positions: int = identity(512, "rows of the position table; image queries use them too", ge=8)
    dropout: float = identity(0.1, "dropout of hidden states and attention", ge=0, lt=1)

    @property
    def length(self) -> int:
        """Tokens of a text at most: its words', and with concepts these and [SEP]."""
        return self.max_tokens + (self.concepts + 1 if self.concepts else 0)


class Concepts(Section):
    """The vocabulary of phrase concepts, with ``text.concepts``."""

    source: ConceptSource = identity(
        ConceptSource.rules, "rules: read from the captions (data/phrases.py); column: phrases, as they stand there"
    )
    most: int = identity(55_000, "concepts beside those that are single word pieces: the most frequent", ge=1)
    min_count: int | None = identity(
        None, "captions that must say a concept; null: 50 of 8.85 million, in proportion, at least 3", ge=1
    )


class Tags(Section):
    """Words of the objects in an image, which its tower reads beside the regions. They know nothing of captions."""

    source: TagSource = identity(
        TagSource.auto,
        "column: tags; box_labels: those of all objects; none: no words; auto: the first that the training rows have",
    )
    max_tokens: int = identity(20, "tokens of the tags at most, [CLS] and [SEP] included", ge=2)


class Codes(Section):
    """The discrete image codes that MIM predicts; of regions, those that MRC and MRC-kl predict softly, by k-means."""

    kind: CodesKind = identity(
        CodesKind.kmeans,
        "kmeans: over pixels of patches; features: over a frozen run's patch features; dvae: DALL-E's encoder",
    )
    n: int = identity(8192, "number of codes (fixed to 8192 by dvae)", ge=2)
    fit_images: int = identity(20_000, "training images that k-means is fitted on", ge=1)
    iterations: int = identity(20, "iterations of k-means", ge=1)
    source: Path | None = identity(
        None, "features: the run whose vision tower is used; dvae: the encoder's weight file"
    )


class Teacher(Section):
    m: float = identity(0.995, "momentum of the EMA teacher", ge=0, le=1)
    mode: TeacherMode = identity(TeacherMode.eval, "train keeps the teacher's dropout on, as the official code does")


class Objective(Section):
    weight: float = identity(1.0, "weight in the total loss; 0 is the same as null: no pass, no head", ge=0)


class Distilled(Objective):
    soft_alpha: float = identity(0.4, "share of the teacher's soft target", ge=0, le=1)
    alpha_ramp: float = identity(1 / 30, "soft_alpha rises linearly from 0 over this fraction of the run", ge=0, le=1)


class Temperature(Section):
    """By what ITC divides cosines; ITM's negatives are drawn with it too."""

    kind: TemperatureKind = identity(
        TemperatureKind.divide, "what is learned: the temperature itself (SIMLA, ALBEF), or log of its inverse (CLIP)"
    )
    init: float = identity(0.07, "temperature at the start", gt=0)
    min: float = identity(0.001, "clamped to at least this at the start of every step", gt=0)
    max: float = identity(0.5, "and to at most this", gt=0)


class Itc(Distilled):
    loss: ContrastLoss = identity(
        ContrastLoss.softmax, "InfoNCE over a row's candidates, or a sigmoid per pair (SigLIP)"
    )
    scope: ContrastScope = identity(
        ContrastScope.micro, "pairs that see each other: those of a micro-batch, or of a whole step over all workers"
    )
    bias: float = identity(-10.0, "sigmoid only: the learned bias at the start")
    same_image: SameImage = identity(SameImage.negative, "captions of one image: negatives, or positives of each other")


class Itm(Objective):
    negatives: Negatives = identity(Negatives.sample, "sample by similarity, take the hardest, or uniformly at random")
    eps: float = identity(1e-4, "added to the sampling probabilities after the softmax [ours]", ge=0)
    eps_end: float | None = identity(
        None, "eps moves geometrically to this value over the run [ours]; null: constant", gt=0
    )
    exclude_same_image: bool = identity(True, "never take a caption of the same image as a negative")


class Mlm(Distilled):
    p: float = identity(
        0.15, "probability that a token is chosen; of these 80 % [MASK], 10 % random, 10 % kept", gt=0, lt=1
    )
    whole_word: bool = identity(False, "words are chosen, with all their pieces, in place of single pieces")
    soft_dim: SoftDim = identity(SoftDim.vocab, "axis of the soft targets' log-softmax; sequence is the official slip")


class Mim(Distilled):
    mask_ratio: float = identity(75 / 256, "share of the patches that is masked at most", gt=0, lt=1)
    batch_fraction: float = identity(1.0, "share of a micro-batch that gets a masked image pass [ours]", gt=0, le=1)
    crop: MimCrop = identity(MimCrop.aligned, "codes of the same crop, or (official) of an independent second crop")
    teacher_text: MimTeacherText = identity(MimTeacherText.student, "whose text embeddings the teacher's pass reads")


class Psl(Distilled):
    attention: Side = identity(Side.teacher, "whose text weights give the keyword attention")
    image_source: Side = identity(Side.student, "whose image tokens that pass reads (official: the student's)")
    heads_top_k: int = identity(4, "positions each head votes for", ge=1)
    max_keywords: int = identity(5, "keywords per caption", ge=1)
    min_attention: float = identity(0.0, "a vote counts only from this attention probability on", ge=0, lt=1)
    exclude_special: bool = identity(True, "special tokens and padding can never be keywords")
    zero_vote_fill: bool = identity(False, "fill up to max_keywords with positions nobody voted for (official)")
    stop_words: str | None = identity("en", "en, a file with one word a line, or null [ours]")
    unit: KeywordUnit = identity(KeywordUnit.word, "vote for word pieces (official) or whole words [ours]")
    start_step: int = identity(0, "no PSL before this step: its teacher is untrained", ge=0)
    select: KeywordSelect = identity(KeywordSelect.attention, "attention, or a control that needs no teacher pass")
    recommend: Annotated[Recommend, BeforeValidator(_yaml_off)] = identity(
        Recommend.soft, "the teacher's recommendations: probabilities, 0/1, or none"
    )
    recommend_threshold: float = identity(0.0, "recommendations below this probability become 0", ge=0, lt=1)
    recommend_top_k: int | None = identity(None, "only this many recommendations per image; null: all", ge=1)
    vocab: Path | None = identity(None, "file of words the loss is restricted to; null: the whole vocabulary")
    bias_log_prior: bool = identity(
        False, "start the concept head's bias at log(expected keywords / vocabulary) [ours]"
    )


class Wpa(Objective):
    beta: float = identity(0.5, "softness of the transport plan's kernel exp(-cost / beta)", gt=0)
    iterations: int = identity(50, "steps of IPOT", ge=1)
    exclude_special: bool = identity(True, "leave [CLS] out of the words; UNITER does not")


class Mrfr(Objective):
    """Features of hidden regions, by a tied decoder."""


class Mrc(Objective):
    """Classes of hidden regions, the likeliest one each."""


class Mrckl(Objective):
    reduction: Reduction = identity(Reduction.element, "mean over regions and classes (official), or over regions")


class Mcr(Objective):
    p: float = identity(0.15, "probability that a tag's token is chosen; of these 80 % [MASK], 10 % random", gt=0, lt=1)


class Wpg(Objective):
    top_k: int = identity(3, "regions most like a phrase of which one is taken", ge=1)
    pick: Pick = identity(Pick.random, "which of them: one at random, or the most alike")
    margin: float = identity(0.2, "by how much the own image must fit the phrases better than another", ge=0)


class Answers(Objective):
    head: AnswerHead = identity(
        AnswerHead.decoder,
        "decoder: writes an answer word by word (ALBEF, SIMLA); classifier: one of the known answers",
    )
    most: int = identity(3000, "answers to choose from: the most frequent of the training questions", ge=2)
    depth: int | None = identity(
        None, "layers of the decoder; null: half of text.depth, started from the upper ones", ge=1
    )
    max_tokens: int = identity(10, "tokens of an answer, its end included", ge=2)


class Labels(Objective):
    classes: list[str] = identity(..., "labels of the statements that are judged", min_length=2)
    pictures: int = identity(1, "pictures that a statement is about: 2 for NLVR2", ge=1, le=2)


class Objectives(Section):
    itc: Itc | None = identity(None, "image-text contrast (global)")
    itm: Itm | None = identity(None, "image-text matching (global)")
    mlm: Mlm | None = identity(None, "masked language modelling over the image (XMM, text side)")
    mim: Mim | None = identity(None, "masked image modelling over the text (XMM, image side)")
    psl: Psl | None = identity(None, "pseudo-supervised keyword learning (conceptual)")
    wpa: Wpa | None = identity(
        None, "words aligned to patches or regions by optimal transport, in ITM's pass (text.fusion=merged)"
    )
    mcr: Mcr | None = identity(None, "masked tags of the image from its regions (text.fusion=two_stage)")
    wpg: Wpg | None = identity(None, "phrases grounded in regions, in ITM's matched pass (text.fusion=two_stage)")
    mrfr: Mrfr | None = identity(None, "masked region feature regression (vision.source=regions)")
    mrc: Mrc | None = identity(None, "masked region classification (vision.source=regions)")
    mrckl: Mrckl | None = identity(None, "the same against soft classes, by KL divergence (vision.source=regions)")
    answers: Answers | None = identity(None, "fine-tuning: answers to questions about the image")
    labels: Labels | None = identity(None, "fine-tuning: a label for a statement about one image or two")

    def active(self) -> dict[str, Objective]:
        """The objectives that are switched on, by name, in the order of the losses everywhere."""
        found = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: o for name, o in found.items() if o is not None and o.weight > 0}


class Phase(Section):
    until: float = identity(..., "end of the phase, as a fraction of the run", gt=0, le=1)
    objectives: list[ObjectiveName] = identity(..., "objectives that are on in it", min_length=1)


class Schedule(Section):
    kind: ScheduleKind = identity(ScheduleKind.joint, "all every step, one drawn per step, or phases")
    phases: list[Phase] = identity([], "phases only: in order, the last until 1.0")
    mix: Annotated[dict[ObjectiveName, float], BeforeValidator(_null_is_none)] = identity(
        {}, "sampled only: relative frequency per objective, others count 1; null: all of them, over a preset's"
    )


class Batch(Section):
    micro: int = operational(64, "pairs that see each other in ITC and ITM: the unit of meaning", ge=1)
    global_: int = operational(512, "pairs per optimiser step, a multiple of micro", alias="global", ge=1)


class Optim(Section):
    lr: float = identity(1e-4, "peak learning rate", gt=0)
    min_lr: float = identity(1e-5, "learning rate at the end of the cosine and the start of the warm-up", ge=0)
    warmup_steps: int = identity(2000, "linear warm-up", ge=0)
    epochs: float = identity(30, "passes over the training set; max_steps wins", gt=0)
    max_steps: int | None = identity(None, "steps of the run; null: from epochs", ge=1)
    betas: tuple[Beta, Beta] = identity((0.9, 0.999), "AdamW betas")
    eps: float = identity(1e-8, "AdamW eps", gt=0)
    weight_decay: float = identity(0.02, "AdamW weight decay", ge=0)
    no_decay: NoDecay = identity(
        NoDecay.standard, "standard also exempts embeddings, class and mask tokens, temperature"
    )
    clip: float | None = identity(1.0, "largest gradient norm; null: no clipping (official)", gt=0)
    temperature_lr_factor: float = identity(1.0, "the temperature's learning rate over lr [ours]", ge=0)
    concept_lr_factor: float = identity(1.0, "the concept head's learning rate over lr [ours]", ge=0)


class RayCluster(Section):
    address: str | None = operational(None, "cluster to join; null: RAY_ADDRESS if set, else a Ray of its own")
    workers: int = operational(1, "data-parallel workers; at most batch.global / batch.micro", ge=1)
    min_workers: int | None = operational(
        None, "elastic: the run goes on with as few where nodes are gone, and takes more when they are back", ge=1
    )
    cpus_per_worker: float = operational(1.0, "Ray CPUs of a worker, and its torch threads", gt=0)
    device: Device = operational(
        Device.auto, "gpu refuses to run where none is; auto takes one per worker where there are"
    )
    max_failures: int = operational(
        3, "failures in a row, with no new checkpoint between them, after which a run gives up", ge=0
    )
    hang_timeout_s: float = operational(
        600.0, "a worker that stands still for so long in the training loop is named, and the group starts again", ge=5
    )


class Checkpoint(Section):
    every_steps: int = operational(1000, "steps between checkpoints", ge=1)
    keep: int = operational(3, "checkpoints kept, the best one among them", ge=1)
    rollback_after: int = operational(
        10,
        "steps in a row without a finite gradient, after which a run goes back to its checkpoint and past them",
        ge=1,
    )


class Eval(Section):
    every_steps: int = operational(1000, "steps between validations", ge=1)
    batches: int = operational(8, "fixed validation micro-batches", ge=1)
    best: str = operational(
        "retrieval_r10",
        "validation metric (higher is better) that picks the best checkpoint; keyword_ap is measured only then",
    )
    pairs: int = operational(1000, "rows at most in validation retrieval and in the final evaluation", ge=2)
    rerank_top_k: int = operational(32, "candidates that ITM re-ranks per query", ge=1)
    answers_top_k: int = operational(
        128, "answers whose whole likelihood a decoder computes: those whose first piece is the likeliest", ge=1
    )


class Log(Section):
    every_steps: int = operational(
        10, "steps between log lines (the only points where the step waits for the device)", ge=1
    )


class Report(Section):
    images: bool = operational(True, "embed pictures of the data into report.html")


class Run(Section):
    """One run: a pretraining, or the fine-tuning of what one has trained."""

    method: Method = identity(Method.simla, "what is trained")
    task: Task | None = identity(
        None, "what trained weights are fine-tuned for (experiments/finetune.py); null: pretraining"
    )
    size: Size = identity(Size.tiny, "how large, and the recipe that goes with it")
    variant: Variant = identity(Variant.default, "official: every quirk of the official code")
    name: str | None = operational(
        None,
        "folder under storage; null: a fresh numbered one",
        pattern=r"^[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)*$",
    )
    storage: Path = operational(Path("runs"), "folder that holds runs; shared between nodes on a cluster")
    init_from: str | None = identity(
        None, "where weights come from: a run, an exported folder, or an official SIMLA or ALBEF file"
    )
    seed: int = identity(0, "seed of weights, order, augmentation, masks, dropout and negatives", ge=0)
    precision: Precision = identity(Precision.auto, "auto: bf16 on GPUs that have it, else fp32")
    compile: bool = operational(False, "torch.compile the transformer layers (losses equal up to rounding)")
    activation_checkpointing: bool = operational(
        False, "recompute layers in the backward pass: less memory, about a third more arithmetic"
    )
    joint_width: int = identity(256, "width of the joint embedding space", ge=2)
    queue: int = identity(65536, "queued keys per modality; 0: none", ge=0)
    teacher: Teacher | None = identity(Teacher(), "EMA teacher; null: none")
    temperature: Temperature = identity(Temperature())
    world: World = identity(World())
    data: Data = identity(Data())
    vision: Vision = identity(Vision())
    tags: Tags | None = identity(None, "words of objects beside the regions (text.fusion=two_stage); null: none")
    regions: Regions | None = identity(None, "regions of the image, with vision.source=regions; null: none")
    text: Text = identity(Text())
    concepts: Concepts = identity(Concepts())
    codes: Codes = identity(Codes())
    objectives: Objectives = identity(Objectives())
    schedule: Schedule = identity(Schedule())
    batch: Batch = operational(Batch.model_validate({}))
    optim: Optim = identity(Optim())
    ray: RayCluster = operational(RayCluster())
    checkpoint: Checkpoint = operational(Checkpoint())
    eval: Eval = operational(Eval())
    log: Log = operational(Log())
    report: Report = operational(Report())

    @property
    def micro_batches(self) -> int:
        """Micro-batches per optimiser step."""
        return self.batch.global_ // self.batch.micro

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.vision.image_px // self.vision.patch_px

    @property
    def label(self) -> str:
        """Name of what is trained, with everything that is not the method as published."""
        parts = [str(self.method)]
        if self.regions is not None and self.regions.source in (RegionSource.boxes, RegionSource.grid):
            parts.append(str(self.regions.source))
        if self.tags is not None and "psl" in self.objectives.active():
            parts.append("psl")
        if self.variant is not Variant.default:
            parts.append(str(self.variant))
        parts.append(str(self.size))
        if self.task is not None:
            parts.append(str(self.task))
        if "mim" in self.objectives.active():
            parts.append(f"{self.codes.kind}{self.codes.n}")
        return "-".join(parts)

    @model_validator(mode="after")
    def _rules(self) -> Run:
        problems = list(problems_of(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self
