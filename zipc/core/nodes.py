"""What torch keeps about a node of a traced graph."""

from __future__ import annotations

from typing import Any


def editable(tensor: Any) -> bool:
    """Whether pruning may cut a tensor: floats, and truths of one axis, as of channels. Others are
    indices and masks, which runtimes fold."""
    return bool(
        tensor.is_floating_point()
        or (str(tensor.dtype) == "torch.bool" and tensor.numel() == max(tensor.shape, default=0))
    )


def module_of(node: Any) -> tuple[str, str]:
    """Path and qualified class name of the innermost module that calls it; "" is the model."""
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    path, kind = list(stack.values())[-1]
    return str(path), str(kind)
