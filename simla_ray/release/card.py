"""The model card of an exported folder: what it is, what it was trained on, what it is good for and what not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from simla_ray.config.enums import Fusion, TagSource
from simla_ray.config.schema import Run

METHODS = {
    "simla": "SIMLA ([arXiv 2203.14395](https://arxiv.org/abs/2203.14395), ECCV 2022): one stack that encodes text "
    "and fuses it with images, aligned globally, from patch to token, and by keywords",
    "albef": "ALBEF ([arXiv 2107.07651](https://arxiv.org/abs/2107.07651), NeurIPS 2021): the text stack's lower half "
    "encodes text, its upper half fuses it with images",
    "clip": "CLIP ([arXiv 2103.00020](https://arxiv.org/abs/2103.00020), ICML 2021): two towers and a contrastive loss",
    "siglip": "SigLIP ([arXiv 2303.15343](https://arxiv.org/abs/2303.15343), ICCV 2023): two towers and a sigmoid per "
    "pair",
    "vilt": "ViLT ([arXiv 2102.03334](https://arxiv.org/abs/2102.03334), ICML 2021): words and patches side by side in "
    "one Vision Transformer, without towers",
    "uniter": "UNITER ([arXiv 1909.11740](https://arxiv.org/abs/1909.11740), ECCV 2020): words and regions of the "
    "image side by side in one BERT, without towers",
    "mvptr": "MVPTR ([arXiv 2201.12596](https://arxiv.org/abs/2201.12596), ACM MM 2022): words and phrase concepts in "
    "one tower, tags and regions in another, and a stack over what both give",
}


def card(run: Run, manifest: Mapping[str, Any], summary: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    """README.md of an exported folder.

    Args:
        manifest, summary: those of the run, as far as they are there.
        facts: lines of "What it is" that only the export knows, such as the checksum of the weights.
    """
    sections = (
        f"# {_text(run.name or run.label)}",
        _what(run, manifest, summary, facts),
        _use(run),
        "## Data\n\n" + _data(manifest),
        "## Results\n\n" + _results(summary),
        "## Intended use and limits\n\n" + _limits(run, manifest),
    )
    return "\n\n".join(sections) + "\n"


def _what(run: Run, manifest: Mapping[str, Any], summary: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    rows = {
        "label": run.label,
        "method": METHODS.get(str(run.method), str(run.method)),
        "objectives": ", ".join(run.objectives.active()),
        **_parts(run),
    }
    if summary:
        rows["trained"] = (
            f"{summary.get('steps', '?')} steps, {summary.get('samples_seen', '?')} pairs, seed {run.seed}"
        )
        rows["best step"] = str(summary.get("best_step", "?"))
    packages = manifest.get("packages", {})
    rows["made with"] = ", ".join(
        f"{name} {packages[name]}" for name in ("simla_ray", "torch", "ray") if name in packages
    )
    rows["code"] = f"commit {manifest['git_sha']}" if manifest.get("git_sha") else ""
    rows |= facts
    return "## What it is\n\n" + _table(("", ""), ((name, value) for name, value in rows.items() if value))


def _parts(run: Run) -> dict[str, str]:
    """What the model is made of: the towers that it has, the layers over what both give, the space of its vectors."""
    vision, text = run.vision, run.text
    pixels = f"images of {vision.image_px} px in patches of {vision.patch_px}"
    side = "" if run.regions is None else f"regions of the image ({run.regions.source})"
    tokens = f"at most {text.max_tokens} tokens"

    def layers(n: int) -> str:
        return f"{n} layer{'s' * (n != 1)} of width {text.width}"

    if text.fusion is Fusion.merged:
        stack = f"{layers(text.depth)} over words and {side}" if side else f"{vision.timm} over words and {pixels}"
        return {"one stack": f"{stack}, {tokens}"}
    if text.fusion is Fusion.two_stage:
        half = text.depth // 2
        tags = "tags and " if run.tags is not None and run.tags.source is not TagSource.none else ""
        rows = {
            "image tower": f"{layers(half)} over {tags}{side}",
            "text": f"{layers(half)}, {tokens}",
            "fusion": f"{layers(text.depth - half)} over what both give",
        }
    else:
        rows = {"image tower": f"{vision.timm}, {pixels}", "text": f"{layers(text.depth)}, {tokens}"}
    if {"itc", "itm", "psl"} & set(run.objectives.active()):
        rows["joint space"] = f"{run.joint_width} dimensions"
    return rows


def _use(run: Run) -> str:
    on = run.objectives.active()
    lines = ["import simla_ray", "", 'model = simla_ray.load("FOLDER")  # device="cpu" or "cuda"']
    if "itc" in on or ("itm" in on and run.text.fusion is not Fusion.merged):
        lines.append('model.encode_image(["photo.jpg"]) @ model.encode_text(["a red circle"]).T  # cosines')
    if "itm" in on:
        lines.append('model.match(["photo.jpg"], ["a red circle"])    # probability that they belong together')
        if run.regions is None:
            lines.append('model.ground(["photo.jpg"], ["a red circle"])   # heat map over the patches')
    if "psl" in on:
        lines.append('model.keywords(["photo.jpg"])                   # likely words')
    return "## Use\n\n```python\n" + "\n".join(lines) + "\n```"


def _data(manifest: Mapping[str, Any]) -> str:
    sets = manifest.get("data", {})
    if not sets:
        return "Not known here: the weights come from outside. Their authors say what they were trained on."
    rows = (
        (name, ", ".join(about.get("uris", [])), about.get("split") or "", about.get("rows", ""),
         str(about.get("fingerprint", ""))[:12])
        for name, about in sets.items()
    )  # fmt: skip
    parts = [_table(("set", "sources", "split", "rows", "fingerprint"), rows), _licences(manifest)]
    start = manifest.get("start")
    if start:
        parts.append(f"It started from the weights of {_text(start['name'])}. Of what those were trained on:")
        parts.append(_data(start.get("manifest", {})))
    return "\n\n".join(parts)


def _licences(manifest: Mapping[str, Any]) -> str:
    found = manifest.get("licenses", [])
    if not found:
        return "Licences: the training rows name none. Whoever passes these weights on has to find out."
    return f"Licences that the training rows name: {', '.join(map(_text, found))}."


def _results(summary: Mapping[str, Any]) -> str:
    if not summary.get("eval"):
        return "None are recorded here."
    rows = (
        (task, name, f"{value:.4g}" if isinstance(value, float) else value)
        for task, metrics in summary["eval"].items()
        for name, value in metrics.items()
        if isinstance(value, int | float)
    )
    text = "On the run's test set, by its best checkpoint; shares are of 1."
    return text + "\n\n" + _table(("task", "metric", "value"), rows)


def _limits(run: Run, manifest: Mapping[str, Any]) -> str:
    lines = [
        "For research on image-text models: search, matching, grounding, further training.",
        "Not for decisions about people, and not for use where a wrong match does harm: nothing was done about the "
        "biases of the data, or to keep harmful content out.",
        "Probabilities and heat maps are the heads' own; nothing has calibrated them.",
        "Texts are lower-cased, stripped of punctuation and cut; only the captions' language is understood.",
    ]
    if any(uri.startswith("world:") for uri in run.data.train):
        lines.append("It has seen nothing but the rendered shapes of simla_ray's built-in world, and knows no photos.")
    lines += [f"Not as published: {difference}." for difference in manifest.get("fallbacks", [])]
    return "\n".join(f"- {_text(line)}" for line in lines)


def _table(head: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_text(cell) for cell in line) + " |" for line in lines)


def _text(value: Any) -> str:
    """One line that no table is broken by: names and licences come from the data."""
    return " ".join(str(value).replace("|", "\\|").replace("<", "&lt;").split())
