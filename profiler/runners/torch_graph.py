"""An ONNX graph run by torch, operator by operator.

What depends on the sizes of the inputs alone is worked out once for each of them; a run then does
the rest. On a GPU that rest is captured as a CUDA graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

from zipc.core.errors import ExportMismatch
from zipc.profiler.runners.torch_operators import (
    LISTS,
    ON_HOST,
    OPERATORS,
    OUTPUTS,
    SIZED_BY_VALUES,
    Attributes,
)

WARM_RUNS = 3  # before a capture: libraries make their workspaces in the first ones

Sizes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output of a graph; its type as ONNX Runtime spells it."""

    name: str
    type: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """One operator. `reads` are names, empty for an input that is left out.

    Those at the places `lists` are taken as lists of integers. `given` has the input of every place
    that never changes, `done` the values that nothing reads later.
    """

    kind: str
    run: Callable[..., Any]
    reads: Sequence[str]
    makes: Sequence[str]
    attributes: Attributes
    lists: Collection[int] = ()
    given: Sequence[Any] = ()
    done: Sequence[str] = ()

    def do(self, values: dict[str, Tensor]) -> None:
        """Read from `values` and write there."""
        inputs = list(self.given)
        for place, name in enumerate(self.reads):
            if name:
                inputs[place] = _list(values[name]) if place in self.lists else values[name]
        made = self.run(*inputs)
        values.update(zip(self.makes, made if isinstance(made, tuple) else (made,), strict=False))
        for name in self.done:
            del values[name]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does for inputs of certain sizes; `held` are outputs that no input changes."""

    steps: Sequence[Step]
    held: Mapping[str, Tensor]


class TorchGraph:
    """A graph in torch on a device, run as an ONNX Runtime session is.

    Raises:
        ExportMismatch: an operator is not one of standard ONNX that is known here.
    """

    def __init__(self, model: str | bytes, *, device: str, threads: int) -> None:
        proto = onnx.load_model_from_string(model) if isinstance(model, bytes) else onnx.load(model)
        graph = proto.graph
        folder = "" if isinstance(model, bytes) else str(Path(model).parent)
        self._device = torch.device(device)
        self._threads = threads
        if self._device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32
        self._weights = {t.name: _tensor(t, folder) for t in graph.initializer}
        self._inputs = [_value(v) for v in graph.input if v.name not in self._weights]
        self._outputs = [_value(v) for v in graph.output]
        self._steps = [_step(node) for node in graph.node]
        self._plans: dict[Sizes, Plan] = {}
        self._replays: dict[Sizes, Callable[[], None]] = {}

    def get_inputs(self) -> list[Value]:
        return self._inputs

    def get_outputs(self) -> list[Value]:
        return self._outputs

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Any]) -> Any:
        """Do one inference; its outputs by `names`, or nothing for None, which is what is timed."""
        given = [torch.from_numpy(np.ascontiguousarray(feeds[v.name])) for v in self._inputs]
        with torch.inference_mode():
            if names is None:
                self._timed(given)
                return None
            threads = torch.get_num_threads()
            found = self._computed([value.to(self._device) for value in given])
            torch.set_num_threads(threads)
        return [found[name].cpu().numpy() for name in names]

    def _timed(self, given: list[Tensor]) -> None:
        if self._device.type != "cuda":
            self._computed(given)
            return
        sizes = _sizes(given)
        if sizes not in self._replays:
            self._replays[sizes] = self._captured([value.to(self._device) for value in given])
        self._replays[sizes]()
        torch.cuda.synchronize()

    def _captured(self, given: list[Tensor]) -> Callable[[], None]:
        """A CUDA graph of one run on inputs that lie on the GPU."""
        side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_RUNS):
                self._computed(given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = given, self._computed(given)  # their memory is the graph's

        def replay() -> None:
            assert held
            graph.replay()

        return replay

    def _computed(self, given: Sequence[Tensor]) -> dict[str, Tensor]:
        if self._threads and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        sizes = _sizes(given)
        if sizes not in self._plans:
            self._plans[sizes] = self._planned([value.cpu() for value in given])
        plan = self._plans[sizes]
        values = dict(plan.held)
        values.update(zip((v.name for v in self._inputs), given, strict=True))
        for step in plan.steps:
            step.do(values)
        return values

    def _planned(self, given: Sequence[Tensor]) -> Plan:
        """Run once on the CPU, and keep the steps that depend on more than sizes."""
        names = [v.name for v in self._inputs]
        values = {**self._weights, **dict(zip(names, given, strict=True))}
        changing = set(names)
        unsized: set[str] = set()  # their sizes change as well
        kept: list[Step] = []
        for step in self._steps:
            step.do(values)
            if step.attributes.passed_over:
                raise ExportMismatch(
                    f"zipc does not run {step.kind} by {', '.join(step.attributes.passed_over)} in "
                    "torch. Use --runtime onnxruntime."
                )
            reads, sizing = set(step.reads), {step.reads[place] for place in step.lists}
            moves = not reads.isdisjoint(unsized if step.kind == "Shape" else changing)
            if not moves:
                continue
            kept.append(step)
            changing.update(step.makes)
            if reads & unsized or sizing & changing or step.kind in SIZED_BY_VALUES:
                unsized.update(step.makes)
        outputs = {v.name for v in self._outputs}
        kept = _with_biases(kept, values, changing, outputs)
        steps = [self._bound(step, values, changing) for step in kept]
        held = {name: values[name].to(self._device) for name in outputs - changing}
        return Plan(_forgetting(steps, {*outputs, *names}), held)

    def _bound(self, step: Step, values: Mapping[str, Tensor], changing: set[str]) -> Step:
        """The step with what never changes in its place, on the device of the graph."""
        given: list[Any] = [None] * len(step.reads)
        here = ON_HOST.get(step.kind, ())
        for place, name in enumerate(step.reads):
            if name and name not in changing:
                value = values[name] if place in here else values[name].to(self._device)
                given[place] = _list(value) if place in step.lists else value
        return replace(step, given=given, reads=[n if n in changing else "" for n in step.reads])


def _with_biases(
    steps: list[Step], values: Mapping[str, Tensor], changing: set[str], outputs: set[str]
) -> list[Step]:
    """One step for a product with a matrix and the vector that is added to it, where both stay."""
    readers = Counter(name for step in steps for name in step.reads)
    products = {
        step.makes[0]: step
        for step in steps
        if step.kind == "MatMul"
        and step.reads[1] not in changing
        and values[step.reads[1]].ndim == 2
        and readers[step.makes[0]] == 1
        and step.makes[0] not in outputs
    }
    joined: list[Step] = []
    for step in steps:
        first, second = step.reads if step.kind == "Add" else ("", "")
        if first not in products:
            first, second = second, first
        product = products.get(first)
        if product is None or second in changing or values[second].ndim != 1:
            joined.append(step)
            continue
        joined = [earlier for earlier in joined if earlier is not product]
        joined.append(replace(step, kind="Linear", run=_linear, reads=[*product.reads, second]))
    return joined


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight.t(), bias)


def _forgetting(steps: Sequence[Step], kept: set[str]) -> list[Step]:
    """Steps that drop what none of the later ones reads."""
    last = {name: at for at, step in enumerate(steps) for name in (*step.makes, *step.reads)}
    made = {name for step in steps for name in step.makes if name}
    done: dict[int, list[str]] = {}
    for name in made - kept:
        done.setdefault(last[name], []).append(name)
    return [replace(step, done=done.get(at, ())) for at, step in enumerate(steps)]


def _step(node: NodeProto) -> Step:
    if node.domain or node.op_type not in OPERATORS:
        raise ExportMismatch(
            f"zipc does not run {node.op_type} in torch. Use --runtime onnxruntime."
        )
    if len(node.output) > OUTPUTS.get(node.op_type, 1):
        raise ExportMismatch(
            f"zipc does not run {node.op_type} with {len(node.output)} outputs in torch. "
            "Use --runtime onnxruntime."
        )
    lists = [at for at in LISTS.get(node.op_type, ()) if at < len(node.input) and node.input[at]]
    given = Attributes(node)
    run = partial(OPERATORS[node.op_type], given)
    reads, makes = list(node.input), list(node.output)
    return Step(node.op_type, run, reads, makes, given, lists, [None] * len(reads))


def _list(value: Tensor) -> list[int]:
    return [int(v) for v in value.reshape(-1).tolist()]


def _sizes(given: Sequence[Tensor]) -> Sizes:
    return tuple(tuple(value.shape) for value in given)


def _tensor(proto: onnx.TensorProto, folder: str) -> Tensor:
    return torch.from_numpy(numpy_helper.to_array(proto, folder).copy())


def _value(proto: onnx.ValueInfoProto) -> Value:
    tensor = proto.type.tensor_type
    dims = [d.dim_value or d.dim_param or None for d in tensor.shape.dim]
    kind = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    kind = {"float32": "float", "float64": "double"}.get(kind, kind)
    return Value(proto.name, f"tensor({kind})", tuple(dims))
