"""A module that runs its traced graph, for code that does not follow when its sites shrink."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from zipc.core.nodes import module_of
from zipc.pruner.graph.interpret import Executor, Variant
from zipc.pruner.graph.rules.maps import not_its_own, other_readers
from zipc.pruner.graph.sites import Structure
from zipc.pruner.graph.trace import Program


class AsTraced(nn.Module):
    """The submodules and tensors of a module under their own names, and its graph instead of its
    code: `x.reshape(batch, length, channels)` after attention fails where heads are gone, the graph
    knows what becomes of `channels`.

    Maps are called as modules, so that others can take their place. How many units a site has left
    is an attribute, as a head count is of modules whose code does follow.
    """

    def __init__(self, module: nn.Module, program: Program, structure: Structure) -> None:
        super().__init__()
        for name, child in module.named_children():
            self.add_module(name, child)
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        state = module.state_dict(keep_vars=True)
        for name, buffer in module.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name in state)
        self._traced = _Traced(program, structure)
        for site in structure.sites:
            setattr(self, units_of(site.name), site.units)
        self.train(module.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gave, in the same containers. Inputs as it took them.

        Raises:
            TypeError: one is missing.
        """
        feeds = dict(zip(self._traced.inputs, args, strict=False)) | kwargs
        optional = self._traced.executor.program.caches
        missing = [n for n in self._traced.inputs if n not in feeds and n not in optional]
        if missing:
            raise TypeError(f"forward() is missing {', '.join(missing)}")
        return self._traced.run(self, feeds)


def units_of(site: str) -> str:
    """The attribute with the units that a site has."""
    return f"units of {site}"


class _Traced:
    """What copies of a module share: its graph."""

    def __init__(self, program: Program, structure: Structure) -> None:
        signature = program.exported.graph_signature
        by_name = {node.name: node for node in program.nodes}
        self.given = [by_name.get(str(name), name) for name in signature.user_outputs]
        nodes = [node for node in self.given if isinstance(node, fx.Node)]
        self.containers = program.exported.call_spec.out_spec
        self.executor = Executor(replace(program, outputs=nodes), structure)
        self.inputs = program.inputs
        plain = [c for c in program.maps if not_its_own(program, by_name[c.node], c) is None]
        self.maps = list(dict.fromkeys(call.module for call in plain))
        self.tables = {  # a tensor that embeddings read -> its name there: a map may be untied
            call.weight: f"{module_of(reader)[0]}.weight"
            for call in plain
            for reader in other_readers(by_name[call.node], call)
        }

    def __deepcopy__(self, memo: Any) -> _Traced:
        return self

    def run(self, module: nn.Module, feeds: Mapping[str, Tensor]) -> Any:
        sites = self.executor.structure.sites
        units = {site.name: getattr(module, units_of(site.name)) for site in sites}
        tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        tensors |= dict(module.named_buffers(remove_duplicate=False))
        tensors |= {name: tensors[own] for name, own in self.tables.items() if own in tensors}
        variant = Variant(
            widths={s.name: units[s.name] for s in sites if units[s.name] < s.units},
            tensors=tensors,
            modules={path: module.get_submodule(path) for path in self.maps},
        )
        found, _ = self.executor.run(feeds, variant)
        values = iter(found)
        leaves = [next(values) if isinstance(g, fx.Node) else g for g in self.given]
        return pytree.tree_unflatten(leaves, self.containers)
