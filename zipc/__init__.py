"""zipc: a hardware-aware deployment compiler for neural networks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__version__ = "0.1.0"


def load(out: str | Path) -> nn.Module:
    """Load the compiled module of an output folder; see `zipc.checkpoint.load`."""
    from zipc.checkpoint import load as load_checkpoint  # torch is not needed before

    return load_checkpoint(out)
