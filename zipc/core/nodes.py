"""What torch keeps about a node of a traced graph."""

from __future__ import annotations

from typing import Any


def module_of(node: Any) -> tuple[str, str]:
    """Path and qualified class name of the innermost module that calls it; "" is the model."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    path, kind = list(stack.values())[-1]
    return str(path), str(kind)
