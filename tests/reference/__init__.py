"""The training step written plainly: one call per pass, nothing shared, nothing left out."""

from tests.reference.step import UnfusedStep
from tests.reference.unfused import Unfused

__all__ = ["Unfused", "UnfusedStep"]
