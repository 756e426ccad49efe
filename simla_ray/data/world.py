"""The built-in world: small rendered scenes of two to four objects, with captions whose every claim is checkable.

A scene is a noisy plain background with non-overlapping objects, each a (shape, colour, size). A caption names some of
the objects and may state how two of them lie to each other. The claims of a caption are kept beside its words, so an
evaluation can tell a wrong match from a caption that happens to be true of another image (`scene.satisfies`).
"""

import io
import json
import os
import re
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from simla_ray.data.scene import COLORS, RELATIONS, draw_scene, fits, holds
from simla_ray.data.world_questions import COLUMNS, questions_of
from simla_ray.errors import UserError

# Below this side the whole numbers of pixels for small and large objects run out.
MIN_IMAGE_PX = 32
TRAIN_CAPTIONS = 3
ROW_GROUP_ROWS = 250
# Part of world.json; raise it with every change that alters the rows.
WORLD_VERSION = 1

SCHEMA: pa.Schema = pa.schema(
    [
        ("uid", pa.string()),
        ("image", pa.binary()),
        ("captions", pa.list_(pa.string())),
        ("image_id", pa.string()),
        ("keywords", pa.list_(pa.string())),
        ("phrases", pa.list_(pa.struct([("text", pa.string()), ("boxes", pa.list_(pa.list_(pa.float32())))]))),
        ("boxes", pa.list_(pa.list_(pa.float32()))),
        ("box_labels", pa.list_(pa.string())),
        ("split", pa.string()),
        ("source", pa.string()),
        ("license", pa.string()),
        ("scene", pa.string()),
        ("claims", pa.list_(pa.string())),
    ]
)

_OPENINGS = (
    "there is",
    "here is",
    "we see",
    "you see",
    "a picture of",
    "a scene with",
    "this picture shows",
    "the image shows",
    "in this image we see",
    "in this picture there is",
)
# None of these claims more than that both objects are there.
_JOINS = ("and", "and also", "with", "plus")
# After a relation the third object gets a clause of its own; "a left of b and c" would relate it as well.
_CLAUSE_JOINS = ("and there is", "and there is also", "and we see", "and we also see")
# By number of named objects. Two names alone fit many scenes, so those captions say sizes and relations more often;
# over all captions each is said about half of the time.
_SIZE_SAID = {1: 0.5, 2: 0.6, 3: 0.4}
_RELATION_SAID = {1: 0.0, 2: 0.7, 3: 0.25}

_SUPERSAMPLE = 4
_BACKGROUND = (125, 180)
_TINT = 10
_NOISE_STD = 6.0
_COLOR_JITTER = 8


def make_row(seed: int, split: str, i: int, image_px: int, n_captions: int) -> dict[str, Any]:
    """Row `i` of a split, with the columns of `SCHEMA`; determined by the arguments alone.

    The image is a square JPEG of side `image_px`. Boxes are [x1, y1, x2, y2] as shares of the side, in 0..1. `scene`
    is a JSON list of {shape, color, size, box}. `claims` has for each caption a JSON {objects, relations}: the named
    objects with the attributes said, in order of naming, and [subject, relation, object] with positions in that list.
    `phrases` are those of the first caption, and the first captions do not change with `n_captions`. Raises ValueError
    for an image side below `MIN_IMAGE_PX` or a number of captions outside 1..16.
    """
    if image_px < MIN_IMAGE_PX:
        raise ValueError(f"image_px must be at least {MIN_IMAGE_PX}, found {image_px}")
    if not 1 <= n_captions <= 16:
        raise ValueError(f"n_captions must lie in 1..16, found {n_captions}")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(split.encode()), i])))
    objects, corners = draw_scene(rng, image_px)
    image = _render(rng, objects, corners, image_px)

    captions: list[str] = []
    claims: list[dict[str, Any]] = []
    phrases: list[str] = []
    while len(captions) < n_captions:
        text, claim, named = _caption(rng, objects)
        if text not in captions:
            captions.append(text)
            claims.append(claim)
            phrases = phrases or named

    uid = f"world-{split}-{i:06d}"
    return {
        "uid": uid,
        "image": image,
        "captions": captions,
        "image_id": uid,
        "keywords": sorted({obj[key] for obj in objects for key in ("color", "shape", "size")}),
        "phrases": [
            {"text": text, "boxes": [obj["box"] for obj in objects if fits(said, obj)]}
            for text, said in zip(phrases, claims[0]["objects"], strict=True)
        ],
        "boxes": [obj["box"] for obj in objects],
        "box_labels": [f"{obj['size']} {obj['color']} {obj['shape']}" for obj in objects],
        "split": split,
        "source": "world",
        "license": "CC0-1.0",
        "scene": json.dumps(objects),
        "claims": [json.dumps(claim) for claim in claims],
    }


def generate(
    folder: Path, counts: dict[str, int], image_px: int, seed: int, shard_rows: int = 2000, questions: int = 0
) -> None:
    """Write the rows of all splits as Parquet shards `{split}-{k:04d}.parquet`, with one Ray Data job.

    `counts` gives the rows of each split; rows of "train" have three captions, others one. With `questions` each row
    has that many `qas` and `statements` in addition (`world_questions`). Ray must be running, and the folder must be
    visible to all its nodes. The bytes of a shard depend on the arguments only. `world.json`, written last, holds
    the arguments: if it is there with equal ones nothing is done. Raises UserError if it holds other arguments, if the
    folder has shards that these arguments do not make, or for arguments out of range.
    """
    arguments = {"counts": dict(counts), "image_px": image_px, "seed": seed, "shard_rows": shard_rows}
    arguments["version"] = WORLD_VERSION
    if questions:
        arguments["questions"] = questions
    folder = Path(folder).resolve()
    record = folder / "world.json"
    if record.exists():
        _check_record(record, arguments)
        return
    _check_arguments(counts, image_px, seed, shard_rows)

    shards = [
        (split, k, start, min(start + shard_rows, count))
        for split, count in sorted(counts.items())
        for k, start in enumerate(range(0, count, shard_rows))
    ]
    # A run that stopped early with other arguments leaves shards that a reader of the folder would take for ours.
    made = {_shard_name(split, k) for split, k, _, _ in shards}
    strange = sorted(path.name for path in folder.glob("*.parquet") if path.name not in made)
    if strange:
        raise UserError(f"{folder}: {strange[0]} is not a shard of this world; empty the folder first")
    folder.mkdir(parents=True, exist_ok=True)

    if shards:
        import ray.data

        def write(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            for index in batch["id"]:
                _write_shard(folder, *shards[int(index)], image_px, seed, questions)
            return batch

        written = ray.data.range(len(shards), override_num_blocks=len(shards)).map_batches(write, batch_size=None)
        if len(written.take_all()) != len(shards):
            raise RuntimeError(f"{folder}: the job ended without writing all {len(shards)} shards")
    temporary = folder / f".world.json.{os.getpid()}"
    temporary.write_text(json.dumps(arguments, indent=2, sort_keys=True) + "\n")
    temporary.replace(record)


def _check_record(record: Path, arguments: dict[str, Any]) -> None:
    try:
        found = json.loads(record.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{record}: not readable as JSON ({error}); empty the folder first") from error
    for key in {**arguments, **found}:
        value = arguments.get(key)
        if found.get(key) != value:
            raise UserError(
                f"{record.parent}: holds a world with {key} = {found.get(key)!r}, but {value!r} is asked for;"
                " use another folder or empty this one"
            )


def _check_arguments(counts: dict[str, int], image_px: int, seed: int, shard_rows: int) -> None:
    for split, count in counts.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
            raise UserError(f"counts: split name {split!r} may hold letters, digits, '_' and '-' only")
        if count < 0:
            raise UserError(f"counts: {split} = {count}, must be at least 0")
    for key, value, least in (("image_px", image_px, MIN_IMAGE_PX), ("seed", seed, 0), ("shard_rows", shard_rows, 1)):
        if value < least:
            raise UserError(f"{key} = {value}, must be at least {least}")


def _shard_name(split: str, k: int) -> str:
    return f"{split}-{k:04d}.parquet"


def _write_shard(
    folder: Path, split: str, k: int, start: int, stop: int, image_px: int, seed: int, questions: int = 0
) -> None:
    schema = pa.schema([*SCHEMA, *COLUMNS]) if questions else SCHEMA
    n_captions = TRAIN_CAPTIONS if split == "train" else 1
    name = _shard_name(split, k)
    temporary = folder / f".{name}.{os.getpid()}"
    try:
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for first in range(start, stop, ROW_GROUP_ROWS):
                last = min(first + ROW_GROUP_ROWS, stop)
                rows = [make_row(seed, split, i, image_px, n_captions) for i in range(first, last)]
                if questions:
                    for i, row in zip(range(first, last), rows, strict=True):
                        row |= questions_of(seed, split, i, json.loads(row["scene"]), questions)
                writer.write_table(pa.Table.from_pylist(rows, schema=schema), row_group_size=ROW_GROUP_ROWS)
        temporary.replace(folder / name)
    finally:
        temporary.unlink(missing_ok=True)


def _render(
    rng: np.random.Generator, objects: list[dict[str, Any]], corners: list[tuple[int, int, int]], px: int
) -> bytes:
    ground = rng.integers(*_BACKGROUND) + rng.integers(-_TINT, _TINT, endpoint=True, size=3)
    # One noise value for the three channels: noise of brightness, which also keeps the JPEG small.
    canvas = _NOISE_STD * rng.standard_normal((px, px, 1), dtype=np.float32) + ground.astype(np.float32)
    for obj, (x, y, side) in zip(objects, corners, strict=True):
        jitter = rng.integers(-_COLOR_JITTER, _COLOR_JITTER, endpoint=True, size=3)
        color = (np.array(COLORS[obj["color"]]) + jitter).astype(np.float32)
        region = canvas[y : y + side, x : x + side]
        region += _mask(obj["shape"], side) * (color - region)
    pixels = np.clip(canvas, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    # Full-resolution colour: halving it would wash out objects of a dozen pixels.
    Image.fromarray(pixels).save(out, "JPEG", quality=92, subsampling=0)
    return out.getvalue()


@lru_cache(maxsize=1024)
def _mask(shape: str, side: int) -> np.ndarray:
    """Share of each pixel that the shape covers, float32 [side, side, 1] in 0..1."""
    end = side * _SUPERSAMPLE - 1
    big = Image.new("L", (end + 1, end + 1))
    draw = ImageDraw.Draw(big)
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, end, end), fill=255)
        if shape == "ring":
            draw.ellipse((0.26 * end, 0.26 * end, 0.74 * end, 0.74 * end), fill=0)
    else:
        draw.polygon([(float(x) * end, float(y) * end) for x, y in _outline(shape)], fill=255)
    small = big.resize((side, side), Image.Resampling.BOX)
    return (np.asarray(small, dtype=np.float32) / 255)[..., None]


def _outline(shape: str) -> np.ndarray:
    """Corner points [n, 2] of a shape, filling the unit square, y downwards."""
    if shape == "square":
        points = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
    elif shape == "triangle":
        points = np.array([(0.5, 0), (1, 1), (0, 1)])
    elif shape == "diamond":
        points = np.array([(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)])
    elif shape == "cross":
        a, b = 0.33, 0.67
        points = np.array(
            [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]
        )
    elif shape == "star":
        angle = np.arange(10) * np.pi / 5
        radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.4)
        points = np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)
    else:
        t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        points = np.stack([16 * np.sin(t) ** 3, -y], axis=1)
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - low) / (high - low)


def _caption(rng: np.random.Generator, objects: list[dict[str, Any]]) -> tuple[str, dict[str, Any], list[str]]:
    """One caption, what it claims, and the phrases that name its objects."""
    n_named = {2: 1 if rng.random() < 0.2 else 2, 3: 2, 4: 2 if rng.random() < 0.15 else 3}[len(objects)]
    named = [objects[k] for k in rng.permutation(len(objects))[:n_named].tolist()]
    said: list[dict[str, str]] = []
    phrases: list[str] = []
    for obj in named:
        keys = ("size", "color", "shape") if rng.random() < _SIZE_SAID[n_named] else ("color", "shape")
        said.append({key: obj[key] for key in keys})
        phrases.append(" ".join(["a", *said[-1].values()]))

    relations: list[tuple[int, str, int]] = []
    words = [_pick(rng, _OPENINGS), phrases[0]]
    joins = _JOINS
    rest = phrases[1:]
    if rng.random() < _RELATION_SAID[n_named]:
        relation = _pick(rng, tuple(name for name in RELATIONS if holds(name, named[0]["box"], named[1]["box"])))
        relations.append((0, relation, 1))
        words += [_pick(rng, RELATIONS[relation]), rest.pop(0)]
        joins = _CLAUSE_JOINS
    for phrase in rest:
        words += [_pick(rng, joins), phrase]
    return " ".join(words), {"objects": said, "relations": relations}, phrases


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]
