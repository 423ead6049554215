"""zipc: a hardware-aware deployment compiler for neural networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zipc.checkpoint import load
    from zipc.core.request import Request
    from zipc.inspect import inspect_model, inspect_onnx
    from zipc.pipeline import compile_model, plan_model
    from zipc.profiling import profile_boards, profile_model

__version__ = "0.1.0"
__all__ = [
    "Request",
    "compile_model",
    "inspect_model",
    "inspect_onnx",
    "load",
    "plan_model",
    "profile_boards",
    "profile_model",
]

_HOMES = {  # imported on first use: `import zipc` needs no torch
    "Request": "zipc.core.request",
    "compile_model": "zipc.pipeline",
    "inspect_model": "zipc.inspect",
    "inspect_onnx": "zipc.inspect",
    "load": "zipc.checkpoint",
    "plan_model": "zipc.pipeline",
    "profile_boards": "zipc.profiling",
    "profile_model": "zipc.profiling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'zipc' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
