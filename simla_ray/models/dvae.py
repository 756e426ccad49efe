"""DALL-E's discrete VAE encoder as a frozen visual tokenizer: 8192 codes, stride 8.

The released weight file is a pickled module. Its classes are read as inert stubs, nothing in the file is executed, and
the tensors are picked out of them. A safetensors file with the same parameter names works too. Not verified against the
released file, which cannot be fetched offline: names and layout follow its published definition.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simla_ray.errors import UserError
from simla_ray.models.checkpoint_io import load_strict, load_tensors
from simla_ray.models.pickles import Stub, is_tensor, opened

CODES = 8192


class Conv(nn.Module):
    """Convolution with "same" padding; its parameters are called ``w`` and ``b`` in the released file."""

    def __init__(self, n_in: int, n_out: int, kernel: int):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(n_out, n_in, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=(self.w.shape[-1] - 1) // 2)


class Block(nn.Module):
    def __init__(self, n_in: int, n_out: int, n_layers: int):
        super().__init__()
        hidden = n_out // 4
        self.gain = 1 / n_layers**2
        self.id_path = Conv(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        convs = [(n_in, hidden, 3), (hidden, hidden, 3), (hidden, hidden, 3), (hidden, n_out, 1)]
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, shape in enumerate(convs, 1):
            layers[f"relu_{i}"], layers[f"conv_{i}"] = nn.ReLU(), Conv(*shape)
        self.res_path = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


class DalleEncoder(nn.Module):
    """image (C, 3, 8 * grid, 8 * grid) uint8 -> codes (C, P) int64"""

    def __init__(self, width: int = 256, blocks_per_group: int = 2):
        super().__init__()
        groups: OrderedDict[str, nn.Module] = OrderedDict(input=Conv(3, width, 7))
        n_in = width
        for g, factor in enumerate((1, 2, 4, 8), 1):
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for b in range(1, blocks_per_group + 1):
                layers[f"block_{b}"] = Block(n_in, factor * width, 4 * blocks_per_group)
                n_in = factor * width
            if g < 4:
                layers["pool"] = nn.MaxPool2d(2)
            groups[f"group_{g}"] = nn.Sequential(layers)
        groups["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv(n_in, CODES, 1)))
        self.blocks = nn.Sequential(groups)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        pixels = 0.8 * image.float().div(255) + 0.1  # the released model's map_pixels
        return self.blocks(pixels).argmax(1).flatten(1)

    @classmethod
    def load(cls, path: Path) -> DalleEncoder:
        """Read the weight file.

        Raises:
            UserError: the file is missing, holds something else than tensors, or does not fit.
        """
        if not path.is_file():
            raise UserError(f"codes.source: {path} is not a file")
        state = load_tensors(path) if path.suffix == ".safetensors" else _read_pickled(path)
        encoder = cls()
        load_strict(encoder, {n: t.float() for n, t in state.items()}, path)
        return encoder.eval()


def _read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled module, or of a pickled state dict."""
    try:
        with opened(path) as archive:
            if isinstance(archive.root, Mapping):
                tensors, others = archive.state()
                if others:
                    raise UserError("it holds more than tensors")
                return tensors
            return {name: archive.tensor(record) for name, record in _records(archive.root, "")}
    except UserError as error:
        raise UserError(f"codes.source: {error}") from None


def _records(module: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """(name, record) of the tensors below the stub of a module: what ``state_dict`` would name."""
    state = module.state if isinstance(module, Stub) and isinstance(module.state, dict) else {}
    for kind in ("_parameters", "_buffers"):
        yield from ((prefix + name, record) for name, record in state.get(kind, {}).items() if is_tensor(record))
    for name, child in state.get("_modules", {}).items():
        yield from _records(child, f"{prefix}{name}.")
