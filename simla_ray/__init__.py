"""simla_ray: vision-language pretraining with SIMLA on Ray."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simla_ray.release.pretrained import Pretrained

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(path: str | Path, device: str = "auto") -> Pretrained:
    """Open an exported folder, or a run's folder, for use: ``encode_image``, ``encode_text``, ``match``, ``ground``,
    ``ground_boxes``, ``keywords``, ``index``.

    Args:
        device: auto (a GPU where there is one), cpu, cuda, cuda:1, ...

    Raises:
        simla_ray.errors.UserError: no weights there, or weights that do not fit; one line that says which.
    """
    from simla_ray.release.pretrained import Pretrained  # here, so that importing simla_ray stays cheap

    return Pretrained.load(Path(path), device)
