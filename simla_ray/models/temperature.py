"""What ITC's cosines are divided by, and the sigmoid loss's bias."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from simla_ray.config.enums import TemperatureKind
from simla_ray.config.schema import Temperature


class Scale(nn.Module):
    """One learned scalar: the temperature itself (official ``SIMLA``: ``temp``), or log(1 / temperature) (CLIP's
    ``logit_scale``), whose gradient is another one. ``bias`` is the sigmoid loss's, None without it.
    """

    def __init__(self, config: Temperature, bias: float | None):
        super().__init__()
        self.kind, self.low, self.high = config.kind, config.min, config.max
        if self.kind is TemperatureKind.divide:
            self.temperature = nn.Parameter(torch.tensor(config.init))
        else:
            self.log_scale = nn.Parameter(torch.tensor(-math.log(config.init)))
        self.bias = nn.Parameter(torch.tensor(bias)) if bias is not None else None

    def forward(self) -> Tensor:
        """The temperature, a scalar in the graph."""
        return self.temperature if self.kind is TemperatureKind.divide else (-self.log_scale).exp()

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep the temperature within its bounds."""
        if self.kind is TemperatureKind.divide:
            self.temperature.clamp_(self.low, self.high)
        else:
            self.log_scale.clamp_(-math.log(self.high), -math.log(self.low))
