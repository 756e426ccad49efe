"""torch.compile, layer by layer: minutes become seconds, and all layers of a shape share one compiled program."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import nn

from simla_ray.models.stack import Layer

#: Passes (text alone, text over image, image over text, teacher's) x padded lengths that may each have a program.
PROGRAMS = 256


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Compile every transformer layer in place, with fixed shapes: texts come in few padded lengths."""
    torch._dynamo.config.recompile_limit = PROGRAMS
    torch._dynamo.config.accumulated_recompile_limit = 16 * PROGRAMS
    for module in model.modules():
        if isinstance(module, Layer | Block):
            module.compile(dynamic=False, backend=backend)


def eager() -> torch.compiler.set_stance:
    """Context in which compiled layers run as they are written: evaluation meets each shape only a few times."""
    return torch.compiler.set_stance("force_eager")
