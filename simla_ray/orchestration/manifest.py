"""manifest.json: where a run comes from and what it stands on."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from simla_ray.config.enums import Fusion, Method, VisionSource
from simla_ray.config.schema import CodesKind, Run, Stem
from simla_ray.data.concepts import CONCEPTS
from simla_ray.data.sources import read_column
from simla_ray.errors import UserError
from simla_ray.orchestration.cluster import Cluster
from simla_ray.orchestration.prepare import Prepared
from simla_ray.orchestration.region_fallbacks import uniter_fallbacks
from simla_ray.orchestration.two_stage_fallbacks import mvptr_fallbacks
from simla_ray.whole import write_whole

PACKAGES = (
    "simla_ray",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "tokenizers",
    "ray",
    "pyarrow",
    "pillow",
    "numpy",
)


def write_manifest(
    folder: Path, run: Run, prepared: Prepared, cluster: Cluster, start: dict[str, Any] | None = None
) -> None:
    """Write the manifest; a later leg overwrites it with what it found.

    Args:
        start: of the first leg, what its weights started from; later legs keep it.
    """
    stored = folder / "manifest.json"
    if start is None and stored.exists():
        start = json.loads(stored.read_text()).get("start")
    manifest = {
        "label": run.label,
        "git_sha": git_sha(),
        "packages": versions(PACKAGES),
        "data": prepared.describe(run),
        "world_size": run.ray.workers,
        "cluster": {"nodes": cluster.nodes, "cpus": cluster.cpus, "gpus": cluster.gpus},
        "fallbacks": fallbacks(run),
        "licenses": licenses(prepared),
    }
    concepts = prepared.vocabulary.concepts
    if concepts is not None:
        manifest["concepts"] = {
            "known": len(concepts),
            "new": concepts.new,
            "captions": concepts.captions,
            "min_count": concepts.min_count,
            "sha256": concepts.digest,
        }
    if start is not None:
        manifest["start"] = start
    write_whole(stored, json.dumps(manifest, indent=1))


def check_data(folder: Path, run: Run, prepared: Prepared) -> None:
    """Refuse to go on over other data than the run began with: its cursor counts rows of those files.

    Raises:
        UserError: the training files of the manifest were changed, added to or removed, or the concepts were: the
            weights know them by their ids.
    """
    stored = folder / "manifest.json"
    if not stored.exists():
        return
    manifest, concepts = json.loads(stored.read_text()), prepared.vocabulary.concepts
    if concepts is not None and manifest.get("concepts", {}).get("sha256") not in (None, concepts.digest):
        raise UserError(
            f"text.concepts: {prepared.folder / CONCEPTS} changed since {folder.name} began; restore it, or give "
            "the run another --name"
        )
    was, now = manifest["data"]["train"], prepared.describe(run)["train"]
    if was["fingerprint"] != now["fingerprint"]:
        raise UserError(
            f"data.train: the files of {folder.name} changed since it began: {was['rows']} rows then, "
            f"{now['rows']} now; restore them, or give the run another --name"
        )


def fallbacks(run: Run) -> list[str]:
    """What in this run is not the method as published."""
    found = []
    if run.method in (Method.clip, Method.siglip):
        found.append("towers: timm's ViT and the text model of the other methods, read at [CLS], in place of CLIP's")
        if run.text.vocab == "train":
            found.append("vocabulary: trained on the captions in place of CLIP's")
        return found
    if run.text.fusion is Fusion.two_stage:
        return mvptr_fallbacks(run)
    if run.vision.source is VisionSource.regions:
        return uniter_fallbacks(run)
    if run.text.fusion is Fusion.merged:
        return _fallbacks_of_merged(run)
    if "mim" in run.objectives.active() and run.codes.kind is not CodesKind.dvae:
        found.append(f"visual codes: {run.codes.n} {run.codes.kind} codes in place of DALL-E's 8192")
    if run.init_from is not None:
        found.append(f"towers: start from {Path(run.init_from).name} in place of DeiT-B and bert-base-uncased")
    elif run.vision.weights is not None:
        found.append(f"image tower: starts from {run.vision.weights.name} in place of DeiT-B")
    elif not run.vision.pretrained:
        found.append("image tower: random start in place of DeiT-B")
    if run.init_from is None and run.text.weights is None:
        found.append("text model: random start in place of bert-base-uncased")
    if run.text.vocab == "train":
        found.append("vocabulary: trained on the captions in place of bert-base-uncased's")
    return found


def _fallbacks_of_merged(run: Run) -> list[str]:
    """ViLT as published: ViT-B/32 weights to start from, patches of 32 px, pictures whose shorter side is 384 px."""
    found = []
    patches = f"towers: none; patches of {run.vision.patch_px} px of squares of {run.vision.image_px} px"
    found.append(f"{patches}, in place of 32 px of pictures in their own shape, 384 px at the shorter side")
    if run.init_from is not None:
        found.append(f"blocks: start from {Path(run.init_from).name} in place of ViT-B/32")
    elif run.vision.weights is not None:
        found.append(f"blocks: start from {run.vision.weights.name} in place of ViT-B/32")
    elif not run.vision.pretrained:
        found.append("blocks: random start in place of ViT-B/32")
    elif run.vision.timm != "vit_base_patch32_384":
        found.append(f"blocks: start from {run.vision.timm} in place of ViT-B/32")
    if run.vision.stem is Stem.conv:
        found.append("patches: two convolutions before the linear embedding")
    if run.text.vocab == "train":
        found.append("vocabulary: trained on the captions in place of bert-base-uncased's")
    found.append("ITM: images of swapped pairs come from the micro-batch in place of the whole data set")
    return found


def versions(packages: Sequence[str]) -> dict[str, str]:
    return {name: metadata.version(name) for name in packages}


def licenses(prepared: Prepared) -> list[str]:
    """Licences that the rows of the training set name."""
    return sorted({str(v) for unit in prepared.indexes["train"].units for v in read_column(unit, "license") if v})


def git_sha() -> str | None:
    """Commit of the code, with ``+`` when it was changed since; None outside a checkout."""
    here = Path(__file__).parent
    try:
        sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return sha.stdout.strip() + ("+" if dirty.stdout.strip() else "")
