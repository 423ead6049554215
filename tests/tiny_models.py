"""Small random models of every encoder family, and what the proof tests do to them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from zipc.core.types import Site
from zipc.exporters.graph import OnnxGraph
from zipc.exporters.onnx_export import export_dense
from zipc.exporters.specialise import Edit, Int8Weights
from zipc.model_source import register_attention
from zipc.pruner.graph import surgery
from zipc.pruner.graph.as_traced import AsTraced
from zipc.pruner.graph.cuts import Cuts
from zipc.pruner.graph.interpret import Executor, Variant
from zipc.pruner.graph.mixtures import rerouted
from zipc.pruner.graph.sites import Structure, find_sites, sizes_at
from zipc.pruner.graph.trace import Dynamic, MapCall, Program, trace
from zipc.pruner.graph.verify import verify

Kept = Mapping[str, Sequence[int]]  # site -> units kept
LIMITS = {"sequence": 48}

_COMMON = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 12,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "pad_token_id": 1,
    "num_labels": 3,
}
_DISTIL = {
    "vocab_size": 60,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 12,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "num_labels": 3,
}
# family -> (model class, config class, settings, attention, does it read token types)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str, bool]] = {
    "bert": ("BertModel", "BertConfig", _COMMON, "zipc", True),
    "bert-stock-sdpa": ("BertModel", "BertConfig", _COMMON, "sdpa", True),
    "bert-eager": ("BertModel", "BertConfig", _COMMON, "eager", True),
    "bert-square": ("BertModel", "BertConfig", _COMMON | {"intermediate_size": 32}, "zipc", True),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", _COMMON, "zipc", True),
    "roberta-classifier": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _COMMON,
        "zipc",
        False,
    ),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", _COMMON, "zipc", False),
    "distilbert": ("DistilBertModel", "DistilBertConfig", _DISTIL, "zipc", False),
    "distilbert-classifier": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        _DISTIL,
        "eager",
        False,
    ),
    "electra": ("ElectraModel", "ElectraConfig", _COMMON | {"embedding_size": 16}, "zipc", True),
    "albert": ("AlbertModel", "AlbertConfig", _COMMON | {"embedding_size": 16}, "zipc", True),
    "mpnet": ("MPNetModel", "MPNetConfig", _COMMON, "eager", False),
}


@dataclass(slots=True)
class Case:
    """A tiny model, traced; `module` is in `dtype` and is never changed.

    `chosen` picks from what the module gives the tensors that the program gives.
    """

    module: nn.Module
    example: dict[str, Tensor]
    program: Program
    structure: Structure
    executor: Executor
    output: str
    chosen: Callable[[Any], list[Tensor]]
    written: nn.Module  # whose code the program was traced from

    @property
    def sites(self) -> list[Site]:
        return self.structure.sites

    @property
    def inner(self) -> list[Site]:
        """Sites without which the residual stream is still there."""
        return [s for s in self.sites if s.kind != "width"]

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(self.program.tensors.values())

    @property
    def calls(self) -> dict[str, MapCall]:
        return {c.module: c for c in self.program.maps}


def randomise_(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter, biases and norms too, values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator) * 0.3
            value.copy_(noise + 1.0 if "norm" in name.lower() and value.dim() == 1 else noise)


def build(family: str) -> nn.Module:
    model, config, settings, attention, _ = FAMILIES[family]
    register_attention()
    made = getattr(transformers, config)(**settings)
    module: nn.Module = getattr(transformers, model)._from_config(
        made, attn_implementation=attention
    )
    randomise_(module)
    return module.eval().requires_grad_(False)


def text(family: str, *, batch: int = 2, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Token inputs whose last row is padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 60, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length // 2 + 1 :] = 0
    ids[-1, length // 2 + 1 :] = 1
    feeds = {"input_ids": ids, "attention_mask": mask}
    if FAMILIES[family][4]:
        feeds["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=generator)
    return feeds


@functools.cache
def case(family: str, dtype: torch.dtype = torch.float32) -> Case:
    made = traced(build(family).to(dtype), text(family))
    assert made.sites, "with nothing to remove the tests of this family say nothing"
    return made


def traced(
    module: nn.Module,
    example: dict[str, Tensor],
    *,
    dynamic: Dynamic | None = None,
    limits: Mapping[str, int] = LIMITS,
    outputs: int | None = 1,
    as_traced: bool = False,
) -> Case:
    """Trace a module whose first `outputs` tensors are those that count; None: all.

    `as_traced` is for code that does not follow when sites shrink: its graph is the module then.
    """

    def chosen(result: Any) -> list[Tensor]:
        return [t for t in tree_leaves(result) if isinstance(t, Tensor)][:outputs]

    axes = axes_of(example) if dynamic is None else dynamic
    program = trace(module, example, dynamic=axes, limits=limits)
    program.outputs = program.outputs[:outputs]
    written, found = module, find_sites(program)
    if as_traced:
        assert len(verify(module, program, found, example).sites) < len(found.sites)
        module = AsTraced(module, program, found)
    structure = verify(module, program, found, example)
    name = "logits" if "Classification" in type(written).__name__ else "last_hidden_state"
    executor = Executor(program, structure)
    return Case(module, example, program, structure, executor, name, chosen, written)


@functools.cache
def dense_graph(family: str) -> OnnxGraph:
    made = case(family)
    return exported(made, made.output)


def exported(made: Case, output: str) -> OnnxGraph:
    """The dense ONNX graph of a case, its first output under the name `output`."""
    return export_dense(
        made.program.exported,
        made.example,
        outputs=[(0, output)],
        dynamic=axes_of(made.example),
    )


def axes_of(example: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    return {name: {0: "batch", 1: "sequence"} for name in example}


def first(result: Any) -> Tensor:
    """The output that counts, of a transformers model or of a plain module."""
    value: Tensor = result if isinstance(result, Tensor) else result[0]
    return value


def sliced(made: Case, kept: Kept) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Cut tensors by name, and the constant output of each removed consumer by module."""
    weights, calls = made.weights, made.calls
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    cuts = Cuts(s for s in made.sites if kept[s.name])
    for name in cuts.pieces:
        tensors[name] = cuts.cut(weights[name], name, kept)
    for site in made.sites:
        if not kept[site.name]:
            for consumer in site.consumers:
                call = calls[consumer.module]
                weight = tensors.get(call.weight, weights[call.weight])
                zeros = weight.new_zeros(weight.shape[call.out_dim])
                bias = call.bias and tensors.get(call.bias, weights[call.bias])
                constants[consumer.module] = zeros if bias is None else bias
    for module in rerouted(made.sites, kept).ends:
        weight = tensors.get(calls[module].weight, weights[calls[module].weight])
        constants[module] = weight.new_zeros(weight.shape[calls[module].out_dim])
    return tensors, constants


def variant_of(made: Case, kept: Kept) -> Variant:
    """The same cut for the executor."""
    tensors, constants = sliced(made, kept)
    widths = {name: len(units) for name, units in kept.items()}
    return Variant(
        tensors=tensors,
        constants=constants,
        widths=widths,
        picks=rerouted(made.sites, kept).picks,
    )


def edit_of(made: Case, kept: Kept, int8: Mapping[str, Int8Weights] | None = None) -> Edit:
    """The same cut as an edit of the ONNX graph."""
    tensors, constants = sliced(made, kept)
    routes = rerouted(made.sites, kept)
    return Edit(
        {n: t.numpy() for n, t in tensors.items()},
        {n: t.numpy() for n, t in constants.items()},
        int8 or {},
        sizes_at(made.structure, {n: len(k) for n, k in kept.items()}),
        routes.picks,
        routes.ends,
    )


def surgered(made: Case, kept: Kept, numerics: Mapping[str, str] | None = None) -> nn.Module:
    """The module with only `kept` units, rebuilt from its structure document."""
    widths = {name: len(units) for name, units in kept.items()}
    document = surgery.describe(
        made.module,
        made.program,
        made.structure,
        widths=widths,
        numerics=numerics or {},
        dropped=rerouted(made.sites, kept).modules,
    )
    module = copy.deepcopy(made.module)
    surgery.apply_structure_(module, document)
    tensors, constants = sliced(made, kept)
    module.to(next(iter(made.module.parameters())).dtype)
    state = {**made.module.state_dict(), **tensors}
    state |= {path + ".bias": value for path, value in constants.items()}
    module.load_state_dict({name: state[name] for name in module.state_dict()})
    return module.eval()


def zeroed(made: Case, kept: Kept, feeds: Mapping[str, Tensor]) -> Tensor:
    """The dense module's first output when consumers see zeros for every unit not kept."""
    return all_zeroed(made, kept, feeds)[0]


def all_zeroed(made: Case, kept: Kept, feeds: Mapping[str, Tensor]) -> list[Tensor]:
    """All outputs of the dense module when consumers see zeros for every unit not kept."""
    calls = made.calls
    handles = []
    unreachable: dict[str, list[int]] = {}
    for site in made.sites:
        gone = [u for u in range(site.units) if u not in set(kept[site.name])]
        if site.kind == "experts" and gone:
            unreachable[calls[site.producers[0]].weight] = gone
        for consumer in site.consumers:
            call = calls[consumer.module]
            channels = [c for u in gone for c in consumer.index[u]]
            per_group = made.weights[call.weight].shape[call.in_dim]
            if not call.transposed:  # its input holds the channels of all groups
                channels = [g * per_group + c for g in range(call.groups) for c in channels]
            index = torch.tensor(channels, dtype=torch.long)
            dim = 1 if call.convolution else -1

            def clear(
                _: nn.Module, args: tuple[Tensor, ...], index: Tensor = index, dim: int = dim
            ) -> Tensor:
                return args[0].index_fill(dim, index, 0.0)

            target = made.module.get_submodule(consumer.module)
            handles.append(target.register_forward_pre_hook(clear))
        for norm, index in _norms(made, site, gone):
            handles.append(norm.register_forward_hook(_normed_without(norm, index)))
    try:
        with _MinusInfinity({made.module.get_parameter(n): g for n, g in unreachable.items()}):
            return made.chosen(made.written(**feeds))
    finally:
        for handle in handles:
            handle.remove()


def _norms(made: Case, site: Site, gone: Sequence[int]) -> Iterator[tuple[nn.Module, list[int]]]:
    """The norms over the units of a site, and which of their values are gone."""
    for piece in site.slices if site.normed and gone else ():
        path, _, leaf = piece.parameter.rpartition(".")
        norm = made.module.get_submodule(path)
        if leaf == "weight" and "Norm" in type(norm).__name__:
            yield norm, [i for u in gone for i in piece.index[u]]


def _normed_without(norm: nn.Module, gone: Sequence[int]) -> Callable[..., Tensor]:
    """A hook under which a norm runs over what is left, and gives zeros for the rest."""
    kept = torch.tensor([i for i in range(len(norm.weight)) if i not in set(gone)])
    narrow = copy.deepcopy(norm)
    for name, value in norm.named_parameters():
        setattr(narrow, name, nn.Parameter(value[kept], requires_grad=False))
    if isinstance(norm, nn.LayerNorm):
        narrow.normalized_shape = (len(kept),)
    dim = 1 if getattr(norm, "data_format", "") == "channels_first" else -1

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        made = narrow(args[0].index_select(dim, kept))
        return torch.zeros_like(output).index_copy(dim, kept, made)

    return hook


class _MinusInfinity(TorchFunctionMode):
    """Experts that no token chooses: their logits, by the weight they are computed with."""

    def __init__(self, gone: Mapping[Tensor, Sequence[int]]) -> None:
        super().__init__()
        self.gone = {id(weight): torch.tensor(units) for weight, units in gone.items()}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and id(args[1]) in self.gone:
            return result.index_fill(-1, self.gone[id(args[1])], -torch.inf)
        return result


def everything(made: Case) -> dict[str, list[int]]:
    return {site.name: list(range(site.units)) for site in made.sites}


def random_kept(made: Case, seed: int, *, removed: bool = True) -> dict[str, list[int]]:
    """A random set of units at every site; some sites go altogether."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for i, site in enumerate(made.sites):
        low = 0 if removed and site.removable and (i + seed) % 3 == 0 else max(1, site.least)
        high = 1 if low == 0 else site.units + 1
        width = int(torch.randint(low, high, (), generator=generator))
        kept[site.name] = sorted(torch.randperm(site.units, generator=generator)[:width].tolist())
    return kept
