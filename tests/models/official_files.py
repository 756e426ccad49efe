"""States of the official implementations, from the golden sets, as their own checkpoints hold them."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simla_ray.config.load import load_run

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
SHARED = Path(os.environ.get("SIMLA_GOLDEN_DIR", Path(__file__).parents[3] / "shared" / "golden"))
TASK_ONLY = ("mim_head", "concept_head")


def golden_set(name: str) -> Path:
    """The folder of a set; skips where it is not on this machine."""
    for folder in (GOLDEN / name, SHARED / name):
        if (folder / "meta.json").is_file():
            return folder
    pytest.skip(f"golden set {name} is neither in tests/golden/data nor under SIMLA_GOLDEN_DIR")


def meta_of(name: str) -> dict:
    return json.loads((golden_set(name) / "meta.json").read_text())


def official_state(name: str) -> dict[str, torch.Tensor]:
    """The whole state_dict, with the tied and derived tensors that the sets leave out, in float32."""
    state = load_file(golden_set(name) / "state_step0.safetensors")
    state = {n: t.float() if t.is_floating_point() else t for n, t in state.items()}
    for text in ("text_encoder", "text_encoder_m"):
        state[f"{text}.bert.embeddings.position_ids"] = torch.arange(16 if "tiny" in name else len_of(state, text))[
            None
        ]
        state[f"{text}.cls.predictions.decoder.weight"] = state[
            f"{text}.bert.embeddings.word_embeddings.weight"
        ].clone()
        state[f"{text}.cls.predictions.decoder.bias"] = state[f"{text}.cls.predictions.bias"].clone()
    return state


def len_of(state, text):
    return len(state[f"{text}.bert.embeddings.position_embeddings.weight"])


def fine_tuned(state: dict[str, torch.Tensor], *, heads: bool = False) -> dict[str, torch.Tensor]:
    """The retrieval layout of the same weights: a BertModel, no heads of pretraining, ids in the queue.

    Args:
        heads: with the decoder of VQA and the classifier of VE beside it.
    """
    out = {}
    for name, tensor in state.items():
        top = name.partition(".")[0].removesuffix("_m")
        if top not in TASK_ONLY and ".cls.predictions." not in name and not name.endswith("mask_token"):
            out[name.replace(".bert.", ".")] = tensor
    out["idx_queue"] = torch.arange(state["image_queue"].shape[1])[None] - 100
    if heads:
        for m in ("", "_m"):
            out[f"text_decoder{m}.bert.encoder.layer.0.output.dense.weight"] = torch.randn(4, 4)
            out[f"cls_head{m}.0.weight"] = torch.randn(4, 4)
    return out


def official_run(name: str, **changes):
    """The config that fits a set's weights."""
    meta = meta_of(name)
    text, vision = meta["text_config"], meta["vision_config"]
    shape = {
        "method": meta["model"],
        "variant": "official",
        "size": "base",
        "vision.pretrained": False,
        "vision.image_px": vision["image_px"],
        "vision.patch_px": vision["patch_px"],
        "vision.width": vision["embed_dim"],
        "vision.depth": vision["depth"],
        "vision.heads": vision["num_heads"],
        "vision.mlp_ratio": vision["mlp_ratio"],
        "text.width": text["hidden_size"],
        "text.depth": text["num_hidden_layers"],
        "text.heads": text["num_attention_heads"],
        "text.ffn": text["intermediate_size"],
        "text.max_positions": text["max_position_embeddings"],
        "text.max_tokens": 16,
        "text.dropout": 0.0,
        "text.weights": None,
        "joint_width": meta["joint_width"],
        "queue": meta["queue_size"],
        "batch.micro": meta["batch"],
        "batch.global": meta["batch"],
        "ray.workers": 1,
        "data.decode_cpus": 1,
        **({"codes.n": meta["visual_vocabulary"]} if "visual_vocabulary" in meta else {}),
    }
    return load_run(overrides=shape | {key.replace("__", "."): value for key, value in changes.items()})


def word_pieces(name: str, path: Path) -> Path:
    """A vocabulary file with as many pieces as a set's weights know, its special ones where the official ids are."""
    meta = meta_of(name)
    pieces = [f"w{i}" for i in range(meta["text_config"]["vocab_size"])]
    for token, i in {"[PAD]": 0, "[UNK]": 1, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}.items():
        pieces[i] = token
    for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz"):
        pieces[2 + i], pieces[110 + i] = letter, f"##{letter}"
    path.write_text("\n".join(pieces))
    return path
