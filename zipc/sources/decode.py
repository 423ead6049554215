"""A causal language model with its past in a cache: one graph for the prompt and for every token.

The inputs are `input_ids` (b, s), `attention_mask` (b, past + s), and for layer i
`past_key_values_i_key` and `past_key_values_i_value` (b, kv_heads, past, d); the outputs are
`logits` (b, s, vocabulary) and `present.i.key`, `present.i.value` (b, kv_heads, past + s, d). With
an empty past it reads a prompt, with s = 1 it makes one step. Padding is on the left, so that the
newest token is the last.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import types
from typing import Any

import torch
from torch import Tensor, nn

from zipc.core.errors import UnsupportedModel, first_line
from zipc.core.types import InputSpec
from zipc.sources.common import (
    BATCH,
    IN_PYTHON,
    PAST,
    SEQUENCE,
    TOTAL,
    Cache,
    SourceModel,
)

MASK = "attention_mask"


def with_cache(source: SourceModel) -> SourceModel:
    """A causal language model that takes and gives its cache; it shares its parameters.

    Raises:
        UnsupportedModel: it is none, or its cache is not keys and values of every past token.
    """
    shapes = _cache_shapes(source)
    caches = tuple(
        InputSpec(f"{IN_PYTHON}{i}_{part}", "float32", (BATCH, heads, PAST, size))
        for i, sizes in enumerate(shapes)
        for part, (heads, size) in zip(("key", "value"), sizes, strict=True)
    )
    specs = (
        dataclasses.replace(source.specs[0], shape=(BATCH, SEQUENCE)),
        InputSpec(MASK, "int64", (BATCH, TOTAL), high=2),
    )
    presents = [f"present.{i}.{p}" for i in range(len(shapes)) for p in ("key", "value")]
    blank, names = source.blank, [spec.name for spec in caches]
    return dataclasses.replace(
        source,
        module=_cached(source.module, names),
        specs=specs,
        outputs=[(0, "logits")],
        blank=lambda: _cached(blank(), names),
        notes=list(source.notes),
        cache=Cache(caches, tuple(enumerate(presents, 1)), source.specs),
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


def _cached(module: nn.Module, names: list[str]) -> nn.Module:
    """The same module under another forward; a cache that is not given is empty."""
    whole = type(module).forward

    def forward(self: nn.Module, **given: Tensor) -> dict[str, Tensor]:
        states = [given[name] for name in names if name in given]
        for state in states[1:]:  # one past, which the trace cannot know
            torch._check(state.shape[2] == states[0].shape[2])  # type: ignore[no-untyped-call]
        cache = _cache_of(states)
        ids, mask = given["input_ids"], given[MASK]
        past = mask.shape[1] - ids.shape[1]
        rest = {name: given[name][:, past:] for name in ("position_ids",) if name in given}
        result = whole(
            self,
            input_ids=ids,
            attention_mask=mask,
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
    parameters += [inspect.Parameter(name, kind) for name in ("input_ids", MASK)]
    parameters += [inspect.Parameter(name, kind, default=None) for name in names]
    forward.__setattr__("__signature__", inspect.Signature(parameters))
    made = copy.copy(module)
    made.__dict__["forward"] = types.MethodType(forward, made)
    return made


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
