"""A model ready to be traced, whatever its source: module, inputs, outputs, and what to tell."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from zipc.core.errors import UnsupportedModel
from zipc.core.types import InputSpec, ModelTask

BATCH, SEQUENCE, DECODER, PAST = "batch", "sequence", "decoder_sequence", "past"
TOTAL = f"{PAST}+{SEQUENCE}"
CACHED, IN_PYTHON = "past_key_values.", "past_key_values_"  # how inputs with earlier tokens begin
LENGTH = 16  # tokens that a model is traced on
SAFE_ID = 8  # integers of unknown meaning stay below it: no vocabulary is smaller


@dataclass(frozen=True, slots=True)
class Cache:
    """The keys and values of earlier tokens, which a model takes and gives beside all else."""

    specs: tuple[InputSpec, ...]  # inputs that may be left out, and are empty then
    outputs: tuple[tuple[int, str], ...]  # index among the module's output tensors, public name
    without: tuple[InputSpec, ...]  # what the model takes where it has no cache

    @property
    def public(self) -> dict[str, str]:
        """Name of an input in Python -> its name in a graph, as the ecosystem writes it."""
        return {
            s.name: CACHED + s.name.removeprefix(IN_PYTHON).replace("_", ".") for s in self.specs
        }


@dataclass(frozen=True, slots=True)
class Written:
    """A module as its code is written, which follows at all sites but those in `stays`."""

    module: nn.Module
    blank: Callable[[], nn.Module]
    recipe: dict[str, Any]
    attributes: tuple[Any, ...]  # see `Structure`
    stays: frozenset[str]


@dataclass(slots=True)
class SourceModel:
    """A module ready to be traced, and what is known about where it came from."""

    module: nn.Module
    folder: Path | None  # of a Hugging Face model
    source: str
    sha256: str
    revision: str | None
    config: Any  # of a Hugging Face model
    tokenizer: Any
    max_length: int  # of a sequence; 0 where no input has a sequence axis
    specs: tuple[InputSpec, ...]
    outputs: list[tuple[int, str]]  # index among the module's output tensors, public name
    task: ModelTask
    blank: Callable[[], nn.Module]  # an untrained module of the same structure
    recipe: dict[str, Any]  # how `zipc.load` makes such a module; names no code that is run
    notes: list[str] = field(default_factory=list)
    cache: Cache | None = None
    written: Written | None = None  # where the module runs its traced graph
    min_length: int | None = None  # of a sequence, where shorter ones are treated otherwise

    @property
    def inputs(self) -> list[str]:
        return [spec.name for spec in self.specs]

    @property
    def all_specs(self) -> tuple[InputSpec, ...]:
        """Every input of the module, those of the cache included."""
        return (*self.specs, *(self.cache.specs if self.cache else ()))

    @property
    def axes(self) -> set[str]:
        """The names of the axes that stay open."""
        return {size for spec in self.all_specs for size in spec.shape if isinstance(size, str)}

    @property
    def dynamic(self) -> dict[str, dict[int, str]]:
        """The axes whose size is not fixed, by input."""
        return open_axes(self.all_specs)

    @property
    def limits(self) -> dict[str, int]:
        """The largest sizes of axes."""
        return limited(self.all_specs, self.max_length)

    @property
    def has_logits(self) -> bool:
        return any(name == "logits" for _, name in self.outputs)

    def example(
        self, *, batch: int = 2, length: int = LENGTH, cached: bool = True
    ) -> dict[str, Tensor]:
        """Inputs in the order the model takes them; of tokens, one row is padded: on the right,
        where there is a cache on the left. Half of `length` is in the cache, if any is `cached`.

        An axis that is not open keeps its size, whatever `batch` and `length` say.
        """
        length = min(length, self.max_length)
        past = length // 2 if self.cache and cached else 0
        sizes = example_sizes(batch=batch, length=length, past=past)
        pad = int(getattr(self.config, "pad_token_id", 0) or 0)
        return make_example(self.all_specs if past else self.specs, sizes, pad=pad)

    def chosen(self, result: Any) -> list[Tensor]:
        """Of what a forward pass gave, the tensors in `outputs`."""
        tensors = [tensor for _, tensor in named_outputs(result)]
        return [tensors[index] for index, _ in self.outputs]

    def fix_batch_(self, batch: int) -> None:
        """Close the batch axis at one size."""
        self.specs = _at_batch(self.specs, batch)
        if self.cache is not None:
            self.cache = replace(self.cache, specs=_at_batch(self.cache.specs, batch))


def open_axes(specs: Sequence[InputSpec]) -> dict[str, dict[int, str]]:
    """The axes whose size is not fixed, by input."""
    return {
        spec.name: {i: size for i, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in specs
    }


def limited(specs: Sequence[InputSpec], length: int) -> dict[str, int]:
    """The open axes of these inputs that are no batch, each with the largest size of one."""
    axes = {size for spec in specs for size in spec.shape if isinstance(size, str)}
    return {name: length for name in sorted(axes - {BATCH}) if "+" not in name}


def example_sizes(*, batch: int, length: int, past: int = 0) -> dict[str, int]:
    """Sizes of open axes for sequences of a length, `past` of which are in a cache."""
    sizes = {BATCH: batch, SEQUENCE: length - past, PAST: past, TOTAL: length}
    return sizes | {DECODER: max(1, 2 * length // 3)}


def _at_batch(specs: tuple[InputSpec, ...], batch: int) -> tuple[InputSpec, ...]:
    return tuple(
        replace(s, shape=tuple(batch if size == BATCH else size for size in s.shape)) for s in specs
    )


def make_example(
    specs: Sequence[InputSpec], sizes: Mapping[str, int], *, pad: int = 0
) -> dict[str, Tensor]:
    """Values for every input under the given sizes of its open axes, equal in every call."""
    generator = torch.Generator().manual_seed(0)
    shapes = {s.name: [sizes[n] if isinstance(n, str) else n for n in s.shape] for s in specs}
    left = sizes.get(PAST, 0) > 0
    values = {s.name: _values(s, shapes[s.name], generator, left=left) for s in specs}
    for name, ids in values.items():
        mask = values.get(f"{name.removesuffix('input_ids')}attention_mask")
        if name.endswith("input_ids") and mask is not None and mask.shape == ids.shape:
            values[name] = ids.masked_fill(mask == 0, pad)
    return values


def _values(spec: InputSpec, shape: list[int], generator: torch.Generator, *, left: bool) -> Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if spec.name.endswith("attention_mask") and len(shape) == 2:
        mask = torch.ones(shape, dtype=dtype)
        half = max(1, shape[1] // 2)
        padding = slice(0, half) if left else slice(half, None)
        mask[-1, padding] = 0
        return mask
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=dtype)
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    if spec.name == "token_type_ids":
        return torch.zeros(shape, dtype=dtype)
    high = min(spec.high or SAFE_ID, 1000)
    low = min(5, high - 1) if spec.name.endswith("input_ids") else 0
    return torch.randint(low, high, shape, generator=generator, dtype=dtype)


def named_outputs(result: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a forward pass with a public name each, in the order they are traced.

    A single tensor is `output`, those of a tuple `output_0`, `output_1`; entries of a mapping, a
    dataclass or a ModelOutput keep their names, nested ones joined by "_".
    """
    register_output(result)
    leaves, _ = pytree.tree_flatten_with_path(result)
    named = [("_".join(map(_key, path)), leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]
    return [(_public(name), tensor) for name, tensor in named]


def register_output(result: Any) -> None:
    """Make torch.export take a dataclass as output."""
    kind = type(result)
    if is_dataclass(kind) and pytree.tree_flatten(result)[1].is_leaf():
        torch.export.register_dataclass(kind)


def public_outputs(module: nn.Module, result: Any, inputs: Sequence[str]) -> list[tuple[int, str]]:
    """Index and name of every output tensor; a name that an input has gets `_output` after it.

    Raises:
        UnsupportedModel: there is none, or two have the same name.
    """
    named = [name for name, _ in named_outputs(result)]
    names = [f"{name}_output" if name in inputs else name for name in named]
    double = [name for name, count in Counter(names).items() if count > 1]
    if not names or double:
        what = (
            f"two outputs called {double[0]}" if double else f"no tensor ({type(result).__name__})"
        )
        raise UnsupportedModel(
            f"{type(module).__name__} gives {what}. It must give a tensor, or a tuple, a dict or a "
            "dataclass of tensors with different names."
        )
    return list(enumerate(names))


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear map with copies of a weight (out, in) and, if there is one, a bias."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return made


def forward_parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of the module's forward, by name, without `*args` and `**kwargs`."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(module.forward).parameters
    return {name: p for name, p in found.items() if p.kind not in kinds}


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _public(name: str) -> str:
    if not name:
        return "output"
    return f"output_{name}" if name[0].isdigit() else name
