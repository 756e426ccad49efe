"""Official UNITER weights (``model/pretrain.py``, ``UniterForPretraining``) under our names.

Three things differ in layout: token type 0, which every word gets, is part of our positions (exact, the sum is the
same); type 1, which every region gets, is a vector of its own; and of the two mask rows, of which the official code
keeps the first at zero, only the second is there.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from simla_ray.errors import UserError
from simla_ray.models.fit import listed

#: Official prefix -> ours; the first that fits counts.
PREFIXES = {
    "uniter.embeddings.": "student.text.embeddings.",
    "uniter.encoder.": "student.text.encoder.",
    "uniter.img_embeddings.": "student.vision.",
    "uniter.pooler.dense.": "student.merging.pooler.",
    "cls.predictions.": "student.text.cls.predictions.",
    "feat_regress.net.": "student.region_regression.transform.",
    "feat_regress.bias": "student.region_regression.bias",
    "region_classifier.net.": "student.region_classifier.",
    "itm_output.": "itm_head.",
}
_TYPES = "uniter.embeddings.token_type_embeddings.weight"
_POSITIONS = "uniter.embeddings.position_embeddings.weight"
_MASK = "uniter.img_embeddings.mask_embedding.weight"
#: Tied to other tensors.
_TIED = ("cls.predictions.decoder.weight", "feat_regress.weight")


def is_uniter(names: Mapping[str, object]) -> bool:
    """Whether a file of these names is official UNITER's."""
    return any(name.startswith("uniter.") for name in names)


def uniter_name(name: str) -> str | None:
    """Our name of an official tensor; None where it is tied to another.

    Raises:
        KeyError: no such tensor in an official file.
    """
    if name in _TIED:
        return None
    if name == _TYPES:
        return "student.vision.type_embedding"
    if name == _MASK:
        return "student.vision.mask_embedding"
    for official, ours in PREFIXES.items():
        if name.startswith(official):
            return ours + name.removeprefix(official)
    raise KeyError(name)


def from_official_uniter(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An official state dict under our names, in float32 at least where a sum is folded.

    Raises:
        UserError: names that no official file has; lists them.
    """
    found, unknown = {}, []
    for name, tensor in state.items():
        try:
            ours = uniter_name(name)
        except KeyError:
            unknown.append(name)
            continue
        if ours is not None:
            found[ours] = tensor[1] if name in (_TYPES, _MASK) else tensor
    if unknown:
        raise UserError(f"not of an official UNITER file: {listed(unknown)}")
    if _TYPES in state and _POSITIONS in state:
        wide = torch.promote_types(state[_POSITIONS].dtype, torch.float32)
        positions = state[_POSITIONS].to(wide) + state[_TYPES][0].to(wide)
        found["student.text.embeddings.position_embeddings.weight"] = positions
    return found
