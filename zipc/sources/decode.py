"""One step of generation: a causal model on its newest token, with the past in a cache.

The inputs are `input_ids` (b, 1), `attention_mask` (b, past + 1), and for layer i
`past_key_values_i_key` and `past_key_values_i_value` (b, kv_heads, past, d); the outputs are
`logits` and `present.i.key`, `present.i.value` (b, kv_heads, past + 1, d). Padding is on the left,
so that the newest token is the last. Exports of Optimum write the inputs with dots.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn

from zipc.core.errors import UnsupportedModel
from zipc.core.types import InputSpec
from zipc.sources.common import BATCH, PAST, SourceModel, first_line

TOTAL = f"{PAST}+1"
MASK = "attention_mask"


def decode_step(source: SourceModel) -> SourceModel:
    """The decode step of a causal language model; it shares every parameter with `source`.

    Raises:
        UnsupportedModel: it is none, or its cache is not keys and values of every past token.
    """
    shapes = _cache_shapes(source)
    past = tuple(
        InputSpec(f"past_key_values_{i}_{part}", "float32", (BATCH, heads, PAST, size))
        for i, sizes in enumerate(shapes)
        for part, (heads, size) in zip(("key", "value"), sizes, strict=True)
    )
    newest = dataclasses.replace(source.specs[0], shape=(BATCH, 1))
    specs = (newest, InputSpec(MASK, "int64", (BATCH, TOTAL), high=2), *past)
    names = ["logits", *(f"present.{i}.{p}" for i in range(len(shapes)) for p in ("key", "value"))]
    return dataclasses.replace(
        source,
        module=_step_module(source.module, specs),
        max_length=source.max_length - 1,
        specs=specs,
        outputs=list(enumerate(names)),
        notes=list(source.notes),
    )


def _cache_shapes(source: SourceModel) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(heads, head size) of the keys and of the values of each layer."""
    name = type(source.module).__name__
    if source.task != "causal_lm" or source.inputs != ["input_ids", MASK]:
        raise UnsupportedModel(f"{name} is no causal language model: it has no decode step.")
    cache = _cache_of([])
    try:
        with torch.no_grad():
            source.module(**source.example(length=4), past_key_values=cache, use_cache=True)
            states = [(layer.keys, layer.values) for layer in cache.layers]
    except Exception as error:  # anything a model's own code raises
        raise UnsupportedModel(
            f"{name} gives no cache of keys and values: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not states or any(t.dim() != 4 or t.shape[2] != 4 for pair in states for t in pair):
        raise UnsupportedModel(f"The cache of {name} is not one key and value per token and layer.")
    return [((k.shape[1], k.shape[3]), (v.shape[1], v.shape[3])) for k, v in states]


def _step_module(module: nn.Module, specs: tuple[InputSpec, ...]) -> nn.Module:
    """The same module under another forward."""
    whole = type(module).forward
    names = [spec.name for spec in specs]

    def forward(self: nn.Module, **given: Tensor) -> dict[str, Tensor]:
        cache = _cache_of([given[name] for name in names[2:]])
        rest = {name: given[name][:, -1:] for name in ("position_ids",) if name in given}
        result = whole(
            self,
            input_ids=given["input_ids"],
            attention_mask=given[MASK],
            past_key_values=cache,
            use_cache=True,
            **rest,
        )
        present = {"logits": result.logits}
        for i, layer in enumerate(cache.layers):
            present |= {f"present.{i}.key": layer.keys, f"present.{i}.value": layer.values}
        return present

    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [inspect.Parameter(name, kind) for name in names]
    forward.__setattr__("__signature__", inspect.Signature(parameters))
    step = copy.copy(module)
    step.__dict__["forward"] = types.MethodType(forward, step)
    return step


def _cache_of(states: list[Tensor]) -> Any:
    """A cache that holds these keys and values, layer by layer."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for keys, values in zip(states[::2], states[1::2], strict=True):
        layer = DynamicLayer()  # type: ignore[no-untyped-call]
        layer.dtype, layer.device = keys.dtype, keys.device
        layer.keys, layer.values, layer.is_initialized = keys, values, True
        cache.layers.append(layer)
    return cache
