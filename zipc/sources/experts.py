"""Mixtures of experts as zipc wants them traced: every expert has linear maps of its own.

Transformers keeps the matrices of all experts in one stack and calls a registered function with it.
Taken apart, an expert is a feed-forward network like any other, whose width is a site.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from zipc.sources.common import linear_of

EXPERTS = "zipc"
FIRST, LAST = ("gate_up_proj", "up_proj"), "down_proj"


class Expert(nn.Module):
    """The two maps of one expert; what lies between them belongs to the mixture."""

    def __init__(self, first: Tensor, last: Tensor) -> None:
        super().__init__()
        self.up = linear_of(first)  # (inner, d), or (2 inner, d) with the gate in front
        self.down = linear_of(last)  # (d, inner)


def register_experts() -> None:
    """Make `experts_implementation="zipc"` known."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, all_experts)


def part_experts_(model: nn.Module) -> None:
    """Put an `Expert` for each of its matrices in the place of every stack, where that is all.

    Stacks with biases or with a norm after every expert stay as they are.
    """
    for module in list(model.modules()):
        if not _is_stack(module):
            continue
        name = next(n for n in FIRST if n in module._parameters)
        stacks = [getattr(module, n).data for n in (name, LAST)]
        if module.is_transposed:
            stacks = [stack.transpose(1, 2) for stack in stacks]
        delattr(module, name)
        delattr(module, LAST)
        for number, (first, last) in enumerate(zip(*stacks, strict=True)):
            module.add_module(str(number), Expert(first, last))


def all_experts(
    module: Any,
    hidden: Tensor,  # (tokens, d)
    chosen: Tensor,  # (tokens, k) experts of each token
    weights: Tensor,  # (tokens, k)
) -> Tensor:
    """Every expert on every token, the weight of those not chosen being zero: (tokens, d).

    The same sum as running each expert on its own tokens, in a graph whose shapes do not depend
    on the data; it computes experts / k times as much.
    """
    apart = [part for part in module.children() if isinstance(part, Expert)]
    count = len(apart) or len(getattr(module, LAST))
    shares = hidden.new_zeros(hidden.shape[0], count).scatter(1, chosen, weights.to(hidden.dtype))
    if not apart:
        return _stacked(module, hidden, shares)
    between = module._apply_gate if module.has_gate else module.act_fn
    total: Tensor | None = None
    for number, expert in enumerate(apart):
        # before the last map, and not after it: tokens of other experts then are rows of zeros to
        # that map, in the evidence on it as well
        inner = between(expert.up(hidden)) * shares[:, number : number + 1]
        part = expert.down(inner)
        total = part if total is None else total + part
    assert total is not None
    return total


def _stacked(module: Any, hidden: Tensor, shares: Tensor) -> Tensor:
    """The sum over the experts of a stack; shares (tokens, experts)."""
    first = module.gate_up_proj if module.has_gate else module.up_proj
    last = module.down_proj
    if not module.is_transposed:  # to (experts, in, out)
        first, last = first.transpose(1, 2), last.transpose(1, 2)
    inner = hidden[None] @ first  # (experts, tokens, inner)
    if module.has_bias:
        bias = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
        inner = inner + bias[:, None]
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outer = inner @ last  # (experts, tokens, d)
    if module.has_bias:
        outer = outer + module.down_proj_bias[:, None]
    if getattr(module, "has_post_expert_norm", False):
        outer = module.post_expert_norm(outer)
    total: Tensor = (outer * shares.transpose(0, 1)[..., None]).sum(0)
    return total


def _is_stack(module: Any) -> bool:
    """Whether transformers would call `all_experts` with the module, and it holds matrices only."""
    if not hasattr(module, "has_gate") or not hasattr(module, "is_transposed"):
        return False
    if module.has_bias or getattr(module, "has_post_expert_norm", False):
        return False
    stacks = [p for p in module._parameters.values() if p is not None]
    return len(stacks) == 2 and LAST in module._parameters and all(p.dim() == 3 for p in stacks)
