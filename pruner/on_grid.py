"""Convolutions rounded with error feedback before the quantiser of the whole network rounds them.

It scales every output channel by its largest weight and rounds to the nearest. Weights that lie on
that very grid it leaves as they are, so that they can be chosen by what they do to the output.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from zipc.core.types import Allocation
from zipc.numerics.int8 import quantize_weight
from zipc.pruner.levels import Levels
from zipc.pruner.maps import matrices, own_layout
from zipc.pruner.states import States


def on_grid(levels: Levels, allocation: Allocation, states: States, *, limit: int) -> States:
    """The weights of an allocation, those of convolutions in whole steps of their output channel.

    Rounding errors are fed forward through the second moments of the dense model's inputs (GPTQ,
    arXiv:2210.17323). `limit` is the integer that the largest weight of a channel stands for.
    Convolutions in groups and transposed ones stay as they are.
    """
    maps = dict(states.maps)
    for module, state in states.maps.items():
        call = levels.calls[module]
        held = levels.stats.get(module)
        if held is None or not call.convolution or call.groups > 1 or call.transposed:
            continue
        columns = levels.columns(module, allocation)
        matrix = matrices(call, state.weight)[0]  # (out, in)
        gram = held.gram[0][columns][:, columns]
        made = quantize_weight(matrix, gram=gram, limit=limit)
        largest = matrix.abs().argmax(1, keepdim=True)
        values = made.values.float()
        values.scatter_(1, largest, limit * matrix.gather(1, largest).sign())
        weight = own_layout(call, (values * made.scale[:, None])[None], state.weight)
        maps[module] = replace(state, weight=weight.to(torch.float32))
    return replace(states, maps=maps)
