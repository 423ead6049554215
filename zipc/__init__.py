"""zipc: a hardware-aware deployment compiler for neural networks."""

from __future__ import annotations

__version__ = "0.1.0"
