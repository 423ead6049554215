"""Shapes that say the same at other widths, and what is left of numbers to rewrite."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from zipc.core.errors import ExportMismatch
from zipc.core.types import Share
from zipc.exporters.graph import Array, OnnxGraph, attribute, live
from zipc.exporters.graph import node as new_node

Entry = int | str  # of a target shape: a number, or the value (one element) that holds it
# (traced node, axis) -> its new size, or the share of a symbolic one; None: as it was
SizeOf = Callable[[str, int], int | Share | None]


def resize_(graph: OnnxGraph, size_of: SizeOf) -> None:
    """Rewrite every number in the graph that is the size of an axis of a traced node's result.

    Those are target shapes of Reshape, Expand and ConstantOfShape, parts of Split, and groups of
    convolutions and of normalisations, whose groups keep their channels; weights must have been
    replaced before. Numbers that are 0, 1 or -1 in a target shape stay: they say "as before",
    "repeat" and "the rest".
    """
    names: dict[str, str] = {}
    for name, value in graph.results.items():
        names.setdefault(value, name)

    def new_size(value: str, axis: int, old: int) -> int:
        size = size_of(names[value], axis) if value in names else None
        return size if isinstance(size, int) else old

    def new_entry(value: str, axis: int, old: Entry) -> Entry:
        if isinstance(old, int):
            return new_size(value, axis, old) if old > 1 else old
        share = size_of(names[value], axis) if value in names else None
        return _share_of_(graph, old, share) if isinstance(share, tuple) else old

    _resize_ends_(graph, new_size)
    spread = {n.output[0]: (n.input[0], read_target(graph, n)) for n in spread_indices(graph)}
    for node in list(graph.nodes):
        if node.op_type in ("Reshape", "Expand", "ConstantOfShape"):
            target = read_target(graph, node)
            if target is None:
                continue
            lead = len(graph.shapes.get(node.output[0], target)) - len(target)
            new = [new_entry(node.output[0], lead + i, t) for i, t in enumerate(target)]
            if new != target:
                write_target_(graph, node, new)
        elif node.op_type == "Split" and len(node.input) > 1 and node.input[1] in graph.arrays:
            axis = attribute(node, "axis", 0)
            parts = [int(v) for v in graph.arrays[node.input[1]]]
            axis += len(graph.shapes.get(node.input[0], [])) if axis < 0 else 0
            new_parts = [new_size(o, axis, p) for o, p in zip(node.output, parts, strict=True)]
            if new_parts != parts:
                node.input[1] = constant_(graph, new_parts)
        elif node.op_type in ("Conv", "ConvTranspose") and attribute(node, "group", 1) > 1:
            _regroup_(graph, node, new_size)
        elif node.op_type == "InstanceNormalization":
            _regroup_norm_(graph, node, new_size)
        elif node.op_type == "BatchNormalization" and node.input[3] in graph.arrays:
            _shorten_(graph, node, len(graph.arrays[node.input[3]]))
        elif node.op_type == "GatherElements" and node.input[1] in spread:
            _respread_(graph, node, *spread[node.input[1]], new_entry)


def spread_indices(graph: OnnxGraph) -> list[NodeProto]:
    """The nodes that spread indices as far as the values they are for."""
    indices = {n.input[1] for n in graph.nodes if n.op_type == "GatherElements"}
    return [n for n in graph.nodes if n.op_type == "Expand" and n.output[0] in indices]


def _share_of_(graph: OnnxGraph, size: str, share: Share) -> str:
    """A value that is a share of a computed size."""
    left, before = share
    name = f"{size}_{left}_of_{before}"
    if all(name not in n.output for n in graph.nodes):
        scaled = f"{name}_times"
        graph.nodes += [
            new_node("Mul", [size, constant_(graph, [left])], [scaled]),
            new_node("Div", [scaled, constant_(graph, [before])], [name]),
        ]
        for made in (scaled, name):
            graph.shapes[made], graph.types[made] = [1], TensorProto.INT64
    return name


def _respread_(
    graph: OnnxGraph,
    node: NodeProto,
    source: str,
    target: list[Entry] | None,
    new_entry: Callable[[str, int, Entry], Entry],
) -> None:
    """Indices of `source` spread as far as the values they are for: those of all layers may be the
    same ones, and the layers of different sizes from now on."""
    if target is None:
        return
    axis = attribute(node, "axis", 0)
    new = [
        t if i == axis % len(target) else new_entry(node.input[0], i, t)
        for i, t in enumerate(target)
    ]
    name = f"{node.input[1]}_at_{'_'.join(map(str, new))}"
    if all(name not in n.output for n in graph.nodes):
        made = new_node("Expand", [source, ""], [name])
        graph.nodes.append(made)
        graph.types[name] = graph.types[node.input[1]]
        write_target_(graph, made, new)
    node.input[1] = name


def _resize_ends_(graph: OnnxGraph, new_size: Callable[[str, int, int], int]) -> None:
    """Inputs and outputs at their new sizes; an output of which nothing is left goes."""
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    for ends in (proto.graph.input, proto.graph.output):
        for value in ends:
            dims = value.type.tensor_type.shape.dim
            for axis, dim in enumerate(dims):
                if dim.HasField("dim_value"):
                    dim.dim_value = new_size(value.name, axis, dim.dim_value)
    for value in [v for v in proto.graph.output if _is_empty(v)]:
        proto.graph.output.remove(value)
    graph.proto = proto


def drop_empty_inputs_(graph: OnnxGraph) -> None:
    """Drop inputs of which nothing is left; no output may need them any more."""
    gone = [value for value in graph.proto.graph.input if _is_empty(value)]
    if not gone:
        return
    for value in gone:
        graph.proto.graph.input.remove(value)
    graph.nodes = live(graph.nodes, graph.outputs())
    names = {value.name for value in gone}
    asked = [n for n in graph.nodes if n.op_type == "Shape" and n.input[0] in names]
    graph.nodes = [n for n in graph.nodes if not any(n is shape for shape in asked)]
    sizes = Sizes(graph)
    for shape in asked:  # another input tells the sizes, or the sum it is a part of
        whole = graph.shapes[shape.input[0]]
        part = whole[attribute(shape, "start", 0) : attribute(shape, "end", len(whole))]
        held = [name for size in part if isinstance(name := sizes.of(size), str)]
        if len(held) < len(part):
            raise ExportMismatch(f"nothing is left that tells the size of {shape.input[0]}")
        if held != list(shape.output):
            graph.nodes.append(new_node("Concat", held, [shape.output[0]], axis=0))


def _is_empty(value: onnx.ValueInfoProto) -> bool:
    dims = value.type.tensor_type.shape.dim
    return any(dim.HasField("dim_value") and dim.dim_value == 0 for dim in dims)


def _regroup_norm_(
    graph: OnnxGraph, node: NodeProto, new_size: Callable[[str, int, int], int]
) -> None:
    """As many groups as the channels that come in make up, at the channels each has.

    Where every channel is a group, and has one axis, nothing stands between them.
    """
    split = next((n for n in graph.nodes if node.input[0] in n.output), None)
    target = read_target(graph, split) if split is not None and split.op_type == "Reshape" else None
    source = node.input[0] if split is None or target is None else split.input[0]
    channels = graph.shapes[source][1]
    groups = (target[1] if target is not None else 0) or channels  # 0: every channel is a group
    if not isinstance(groups, int) or not isinstance(channels, int):
        return
    left = groups * new_size(source, 1, channels) // channels
    if left != groups:
        if split is not None and target is not None:
            write_target_(graph, split, [target[0], target[1] and left, *target[2:]])
        _shorten_(graph, node, left)


def _shorten_(graph: OnnxGraph, node: NodeProto, left: int) -> None:
    """As many scales and shifts of a norm as are `left`: constants, one like the other."""
    for place in (1, 2):
        held = graph.arrays.get(node.input[place])
        if held is not None and len(held) > left:
            name = f"{node.input[place]}_{left}"
            graph.arrays[name] = held[:left]
            node.input[place] = name


def _regroup_(graph: OnnxGraph, node: NodeProto, new_size: Callable[[str, int, int], int]) -> None:
    """Groups follow from the channels that come in or go out and those of one group."""
    weight = graph.arrays.get(node.input[1])
    value = node.input[0] if node.op_type == "Conv" else node.output[0]
    old = graph.shapes.get(value, [0, 0])[1]
    if weight is None or not isinstance(old, int) or not weight.shape[1]:
        return
    for held in node.attribute:
        if held.name == "group":
            held.i = new_size(value, 1, old) // weight.shape[1]


def relative_reshapes_(graph: OnnxGraph) -> None:
    """Write target shapes with 0 for what stays, -1 for what pruning changes first.

    A split or merge of heads becomes [0, 0, -1, d] and [0, 0, -1], a flattening [0, -1]: the graph
    then says the same for any number of heads and channels, and the shape arithmetic that computed
    batch and sequence at run time becomes dead.
    """
    sizes = Sizes(graph)
    for node in list(graph.nodes):
        if node.op_type != "Reshape":
            continue
        before, after = graph.shapes.get(node.input[0]), graph.shapes.get(node.output[0])
        given = read_target(graph, node)
        if not before or not after or before == after:
            continue
        same = 0
        while same < min(len(before), len(after)) and before[same] == after[same] and before[same]:
            same += 1
        tail = 0
        while tail < min(len(before), len(after)) - same and before[-1 - tail] == after[-1 - tail]:
            tail += 1
        old, new = before[same : len(before) - tail], after[same : len(after) - tail]
        entries = [sizes.of(size) for size in after[same:]]
        unknown = [i for i, entry in enumerate(entries) if entry is None]
        if len(unknown) > 1:
            continue
        rest = unknown[0] if unknown else _rest(old, new, given[same:] if given else [])
        target: list[Entry] = [0] * same
        target += [-1 if e is None or i == rest else e for i, e in enumerate(entries)]
        write_target_(graph, node, target)


def _rest(old: list[int | str], new: list[int | str], given: list[Entry]) -> int | None:
    """Which of the new sizes is left to be computed: one that pruning changes, as far as one can
    tell from the sizes."""
    if len(new) == 1:
        return 0
    if len(old) == 1 and len(new) == 2 and isinstance(new[1], int):
        return 0
    if -1 in given[: len(new)]:
        return given.index(-1)
    return next((i for i, size in enumerate(new) if isinstance(size, int)), None)


def relative_expands_(graph: OnnxGraph) -> None:
    """Write 1, which is "as it is", for every axis that an Expand does not change."""
    sizes = Sizes(graph)
    for node in list(graph.nodes):
        if node.op_type != "Expand":
            continue
        before, after = graph.shapes.get(node.input[0]), graph.shapes.get(node.output[0])
        if before is None or not after:
            continue
        padded: list[int | str] = [*[1] * (len(after) - len(before)), *before]
        target: list[Entry] = []
        for old, new in zip(padded, after, strict=True):
            entry = 1 if old == new else sizes.of(new)
            if entry is not None:
                target.append(entry)
        if len(target) == len(after):
            write_target_(graph, node, target)


def flat_linears_(graph: OnnxGraph) -> None:
    """Write Reshape, Gemm, Reshape back as MatMul and Add on the value as it is."""
    producers, consumers = graph.producers(), graph.consumers()
    outputs = set(graph.outputs())
    for gemm in [n for n in graph.nodes if n.op_type == "Gemm" and _is_plain(n)]:
        flat, after = producers.get(gemm.input[0]), consumers.get(gemm.output[0], [])
        if flat is None or flat.op_type != "Reshape" or gemm.output[0] in outputs:
            continue
        if len(after) != 1 or after[0].op_type != "Reshape":
            continue
        source, result = flat.input[0], after[0].output[0]
        before, end = graph.shapes.get(source, []), graph.shapes.get(result, [])
        lead, width = end[:-1], graph.shapes.get(flat.output[0], [])[1:]
        if len(lead) < 2 or not all(before) or before[: len(lead)] != lead:
            continue
        name = graph.origin.get(gemm.output[0])
        graph.nodes = [n for n in graph.nodes if n is not gemm and n is not after[0]]
        if before != [*lead, *width]:
            apart = f"{result}_source"
            target = constant_(graph, [0] * len(lead) + [-1])
            graph.nodes.append(new_node("Reshape", [source, target], [apart]))
            graph.shapes[apart], graph.types[apart] = [*lead, *width], graph.types[result]
            source = apart
        product = f"{result}_product" if len(gemm.input) > 2 else result
        graph.nodes.append(new_node("MatMul", [source, gemm.input[1]], [product]))
        graph.shapes[product], graph.types[product] = end, graph.types[result]
        if name is not None:
            graph.origin[product] = name
        if product != result:
            graph.nodes.append(new_node("Add", [product, gemm.input[2]], [result]))


def _is_plain(gemm: NodeProto) -> bool:
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    return all(attribute(gemm, name, value) == value for name, value in plain.items())


def sizes_from_inputs_(graph: OnnxGraph) -> None:
    """Read symbolic sizes from the inputs of the graph, not from values inside it.

    What depends on nothing but sizes, a causal mask say, is then computed once for all layers.
    """
    sizes = Sizes(graph)
    inputs = {i.name for i in graph.proto.graph.input}
    for node in list(graph.nodes):
        if node.op_type != "Shape" or node.input[0] in inputs:
            continue
        shape = graph.shapes.get(node.input[0])
        if not shape:
            continue
        part = shape[slice(attribute(node, "start", 0), attribute(node, "end", len(shape)))]
        held = [name for s in part if isinstance(name := sizes.of(s), str)]
        if part and len(held) == len(part):
            graph.nodes.remove(node)
            graph.nodes.append(new_node("Concat", held, [node.output[0]], axis=0))


class Sizes:
    """Values (of one element) that hold the symbolic sizes of a graph's inputs."""

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph
        self.values: set[str] = set()
        self._places: dict[str, tuple[str, int]] = {}
        for given in graph.proto.graph.input:
            for axis, size in enumerate(graph.shapes[given.name]):
                if isinstance(size, str):
                    self._places.setdefault(size, (given.name, axis))

    def of(self, size: Entry) -> Entry | None:
        """A known number, or the value that holds a symbolic size; None if neither is known."""
        if isinstance(size, int):
            return size or None
        name = f"size_of_{size}"
        if name in self.values:
            return name
        if all(name not in n.output for n in self.graph.nodes):
            made = self._read(size, name)
            if made is None:
                return None
            self.graph.nodes.append(made)
            self.graph.shapes[name], self.graph.types[name] = [1], TensorProto.INT64
        self.values.add(name)
        return name

    def _read(self, size: str, name: str) -> NodeProto | None:
        """A node that makes a symbolic size, from an input that has it or a sum it is part of."""
        if size in self._places:
            source, axis = self._places[size]
            return new_node("Shape", [source], [name], start=axis, end=axis + 1)
        for whole in self._places:
            first, _, second = whole.partition("+")
            if size == first and second in self._places:
                return new_node("Sub", [str(self.of(whole)), str(self.of(second))], [name])
        return None


def read_target(graph: OnnxGraph, node: NodeProto) -> list[Entry] | None:
    """The target shape of a node; None where it is computed in a way not understood."""
    name = node.input[0] if node.op_type == "ConstantOfShape" else node.input[1]
    if name in graph.arrays:
        return [int(v) for v in np.ravel(graph.arrays[name])]
    maker = next((n for n in graph.nodes if name in n.output), None)
    if maker is None or maker.op_type != "Concat":
        return None
    target: list[Entry] = []
    for source in maker.input:
        if source in graph.arrays:
            target += [int(v) for v in np.ravel(graph.arrays[source])]
        elif graph.shapes.get(source) == [1]:
            target.append(source)
        else:
            return None
    return target


def write_target_(graph: OnnxGraph, node: NodeProto, target: list[Entry]) -> None:
    """Give a node a target shape."""
    place = 0 if node.op_type == "ConstantOfShape" else 1
    numbers = [t for t in target if isinstance(t, int)]
    if len(numbers) == len(target):
        node.input[place] = constant_(graph, numbers)
    else:
        name = "shape_" + "_".join(str(t) for t in target)
        if all(name not in n.output for n in graph.nodes):
            parts = [constant_(graph, [t]) if isinstance(t, int) else t for t in target]
            graph.nodes.append(new_node("Concat", parts, [name], axis=0))
            graph.shapes[name], graph.types[name] = [len(parts)], TensorProto.INT64
        node.input[place] = name
    if node.op_type == "Reshape":
        del node.attribute[:]  # allowzero: 0 means "as before" here


def constant_(graph: OnnxGraph, numbers: Iterable[int]) -> str:
    """The name of an initialiser with these numbers, made if need be."""
    held: Array = np.array(list(numbers), dtype=np.int64)
    name = "shape_" + "_".join(str(t) for t in held)
    graph.arrays[name] = held
    return name
