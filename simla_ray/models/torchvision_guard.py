"""Let timm and transformers import beside a CPU-only torch.

torchvision comes from the package index as a CUDA build only. Beside a CPU build of torch its compiled extension cannot
be loaded, and ``import torchvision`` fails with "operator torchvision::nms does not exist"; timm and transformers
import it. Declaring the two operators (nobody calls them here) is enough. Images are decoded with Pillow, never with
torchvision.io.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_kept: list[torch.library.Library] = []  # the declarations live as long as their Library object


def apply() -> None:
    """Declare torchvision's operators when torch has no CUDA and the extension does not load. Safe to call twice."""
    if _kept or torch.version.cuda is not None:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    for extension in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))
            return
        except OSError:
            continue
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)
