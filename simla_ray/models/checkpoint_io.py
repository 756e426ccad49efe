"""Files of weights: safetensors in and out, BERT's and timm's in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from simla_ray.errors import UserError
from simla_ray.models.fit import adapted, misfit, other_shapes
from simla_ray.models.pickles import read_state

#: Where a run's names have the Vision Transformer, and what a file may have beside it.
VIT = "student.vision.vit."
CLASSIFIER = ("head.", "head_dist.", "fc_norm.", "pre_logits.")


def load_bert(text: nn.Module, source: str, *, fold_type0: bool) -> None:
    """Load Hugging Face BERT weights (a folder, or a hub name) into a ``TextModel``; names match as they are.

    Args:
        fold_type0: add BERT's token-type vector 0, which SIMLA's embeddings lack, to every position. Exact: the sum
        precedes
            the LayerNorm. The official code drops it.

    Cross-attention, which BERT does not have, keeps its random start, and so does the MLM head where the source has
    none.

    Raises:
        UserError: the source cannot be read, or has other layers, heads or shapes than this text model.
    """
    from transformers import BertForMaskedLM

    try:
        bert, info = BertForMaskedLM.from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"text.weights: {source} cannot be loaded ({reason}); give a folder, or null for random"
        ) from None
    absent = set(info["missing_keys"])  # filled with random numbers by the library
    state = {n.removeprefix("bert."): t for n, t in bert.state_dict().items() if n not in absent}
    layers, heads = len(text.encoder.layer), text.encoder.layer[0].attention.heads
    if (bert.config.num_hidden_layers, bert.config.num_attention_heads) != (layers, heads):
        raise UserError(
            f"text.weights: {source} has {bert.config.num_hidden_layers} layers of "
            f"{bert.config.num_attention_heads} heads, this run text.depth={layers} and text.heads={heads}"
        )
    types = state.pop("embeddings.token_type_embeddings.weight")
    if fold_type0:
        state["embeddings.position_embeddings.weight"] = state["embeddings.position_embeddings.weight"] + types[0]
    ours = text.state_dict()
    for name in ours.keys() & state.keys():
        if ours[name].shape != state[name].shape:
            raise UserError(
                f"text.weights: {source} has {name} of shape {tuple(state[name].shape)}, "
                f"the text model of this run {tuple(ours[name].shape)}; see text.width, text.ffn, text.vocab"
            )
    missing = [
        n for n in sorted(ours.keys() - state.keys()) if ".crossattention." not in n and not n.startswith("cls.")
    ]
    if missing:
        raise UserError(f"text.weights: {source} lacks {', '.join(missing[:3])}")
    text.load_state_dict({name: state[name] for name in ours.keys() & state.keys()}, strict=False)


def load_vit(tower: nn.Module, source: Path) -> None:
    """Load the weights of a Vision Transformer in timm's layout, which is DeiT's too, into a ``VisionTower``.

    A classifier is left out; position embeddings of another grid are resized.

    Raises:
        UserError: the file is no checkpoint, or does not fit; lists what is missing, unknown or of another shape.
    """
    state = load_tensors(source) if source.suffix == ".safetensors" else read_state(source)[0]
    given = {VIT + name: tensor for name, tensor in state.items() if not name.startswith(CLASSIFIER)}
    fitting, _ = adapted(
        {VIT + name: t for name, t in tower.vit.state_dict().items()}, given, f"vision.weights: {source}"
    )
    tower.vit.load_state_dict({name.removeprefix(VIT): tensor for name, tensor in fitting.items()})


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file; tensors come to the host first.

    Raises:
        OSError: it could not be written.
    """
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file to the host."""
    try:
        return load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None


def load_strict(module: nn.Module, state: Mapping[str, Tensor], origin: Path) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        UserError: one line that lists what is missing, what is too much and what has another shape.
    """
    ours = module.state_dict()
    missing, extra = sorted(ours.keys() - state.keys()), sorted(state.keys() - ours.keys())
    wrong = other_shapes(ours, state)
    if missing or extra or wrong:
        raise UserError(f"{origin}: does not fit this config; {misfit(missing, extra, wrong)}")
    with torch.no_grad():
        module.load_state_dict(dict(state))
