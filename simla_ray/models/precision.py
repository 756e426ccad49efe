"""The number format of the passes."""

from __future__ import annotations

import torch

from simla_ray.config.schema import Precision, Run


def autocast_dtype(run: Run, device: torch.device) -> torch.dtype | None:
    """bfloat16 or None for float32."""
    if run.precision is Precision.bf16:
        return torch.bfloat16
    if run.precision is Precision.auto and device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return None


def autocast(run: Run, device: torch.device) -> torch.autocast:
    """Context in which passes run in the run's precision."""
    dtype = autocast_dtype(run, device)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
