"""Linear maps, convolutions, embeddings and products of activations."""

from __future__ import annotations

from torch import fx

from zipc.core.nodes import module_of
from zipc.pruner.graph.axes import Atom, Dim, flatten, is_concrete, mark, pin, product, tie, unify
from zipc.pruner.graph.rules.state import GROUPED, HEADS, Axes, argument, fresh, shape_of, unknown
from zipc.pruner.graph.trace import MAP_MODULES, MapCall, Program, op_name


def linear(axes: Axes, node: fx.Node) -> list[Dim]:
    call = axes.calls.get(node.name)
    if call is None:
        return unknown(axes, node, _parametrized(node))
    weight = axes.parameters[call.weight]
    out, contracted = weight[call.out_dim], weight[call.in_dim]
    source = next(n for n in node.all_input_nodes if n.name == call.source)
    x = axes.dims(source)
    unify(x[-1], contracted, where=node.name)
    if call.bias is not None:
        unify(out, axes.parameters[call.bias][0], where=node.name)
    _pin_foreign(axes, node, call, [out, contracted])
    return [*x[:-1], out]


def convolution(axes: Axes, node: fx.Node) -> list[Dim]:
    call = axes.calls.get(node.name)
    if call is None or (call.window is None and not call.transposed):
        return unknown(axes, node, _parametrized(node))
    weight = axes.parameters[call.weight]
    x = axes.dims(node.args[0])
    own, other = weight[call.out_dim], weight[call.in_dim]
    pin(weight[2:], "it is the kernel")
    if call.groups == 1:
        out, contracted = own, other
    else:
        groups: Dim = [Atom(call.groups)]
        mark([groups], GROUPED)
        axes.groups[node.name] = groups
        dim0 = other if call.transposed else own  # the dimension that holds all groups
        per_group = Atom(product(flatten(dim0)) // call.groups)
        unify(dim0, [*groups, per_group], where=node.name)
        if call.transposed:
            out, contracted = [*groups, *own], other
        else:
            out, contracted = own, [*groups, *other]
    unify(x[1], contracted, where=node.name)
    if call.bias is not None:
        unify(out, axes.parameters[call.bias][0], where=node.name)
    _pin_foreign(axes, node, call, [out, other if not call.transposed else contracted])
    positions = fresh(node)[2:]
    pin(positions, "it is a position")
    return [x[0], out, *positions]


def _pin_foreign(axes: Axes, node: fx.Node, call: MapCall, dims: list[Dim]) -> None:
    """Let `dims`, what a map gives and what it contracts, be where it must stay as it is.

    A convolution that its module does more around, as pad its input, is cut, but nothing takes its
    place: no constant, and none with a bias for the inputs that are gone.
    """
    foreign, whole = _foreign(axes.program, node, call)
    if foreign:
        pin(dims if whole else dims[1:], foreign)
        tie(dims if whole or not call.convolution else dims[1:], foreign)


def _foreign(program: Program, node: fx.Node, call: MapCall) -> tuple[str | None, bool]:
    """Why the weight is not that of a plain map module: nothing else can be put in its place.

    And whether its rows have to stay too: those of a router go with its experts.
    """
    if other_readers(node, call):
        return f"{call.weight} is used by other operations too", True
    reason = not_its_own(program, node, call)
    return reason, call.transposed or _kind(program, node) in MAP_MODULES


def other_readers(node: fx.Node, call: MapCall) -> list[fx.Node]:
    """The nodes that read the weight of a map, and not as its weight."""
    place = 1 if op_name(node) in ("linear", "mm", "matmul") or call.convolution else 2
    weight = node.args[place]
    assert isinstance(weight, fx.Node)
    return [u for u in weight.users if u.target is not node.target or u.args.index(weight) != place]


def not_its_own(program: Program, node: fx.Node, call: MapCall) -> str | None:
    """Why a map is not all that the module does which has its weight; None if it is."""
    path, kind = module_of(node)[0], _kind(program, node)
    names = [call.weight] + ([call.bias] if call.bias else [])
    if kind not in MAP_MODULES:
        return f"{call.weight} belongs to a {kind}, not to a plain linear map or convolution"
    if names != [f"{path}.weight", f"{path}.bias"][: len(names)]:
        return f"{path} computes with the weights of another module ({', '.join(names)})"
    return None


def _kind(program: Program, node: fx.Node) -> str:
    """The class whose code computes a node."""
    path, kind = module_of(node)
    return program.kinds.get(path, kind.rpartition(".")[2])


def _parametrized(node: fx.Node) -> str | None:
    """Of a map whose weight is computed from others: that it is, and what to do about it where
    torch does so, as in its weight_norm."""
    path, kind = module_of(node)
    how = None
    if kind.rpartition(".")[2].startswith("Parametrized"):
        how = f"torch.nn.utils.parametrize.remove_parametrizations({path}, 'weight')"
    elif any(op_name(source) == "_weight_norm" for source in node.all_input_nodes):
        how = f"torch.nn.utils.remove_weight_norm({path})"
    if how is not None:
        return f"the weight of {path} comes from a parametrization: remove it with {how}"
    if op_name(node) in ("mm", "addmm", "matmul") or not path:
        return None
    return f"the weight that {path} multiplies by is computed from others, or is no parameter"


def embedding(axes: Axes, node: fx.Node) -> list[Dim]:
    weight, index = axes.dims(node.args[0]), axes.dims(node.args[1])
    pin([weight[0]], "it is a vocabulary")
    return [*index, weight[1]]


def matmul(axes: Axes, node: fx.Node) -> list[Dim]:
    """Batched product of two activations (eager attention), or a map without a module."""
    if node.name in axes.calls:
        return linear(axes, node)
    a, b = (axes.dims(x) for x in node.args[:2])
    if len(a) < 3 or len(a) != len(b):
        return unknown(axes, node)
    for i in range(len(a) - 2):
        unify(a[i], b[i], where=node.name)
        mark([a[i]], HEADS)
    unify(a[-1], b[-2], where=node.name)
    pin([a[-1]], f"it is contracted between activations ({node.name})")
    pin([a[-2], b[-1]], f"it belongs to an attention product ({node.name})")
    return [*a[:-1], b[-1]]


def attention(axes: Axes, node: fx.Node) -> list[Dim]:
    """softmax(q k' + mask) v: batch-like dimensions are shared, the inner ones are contracted."""
    q, k, v = (axes.dims(a) for a in node.args[:3])
    grouped = bool(argument(node, 7, "enable_gqa", False))
    for i in range(len(q) - 2):
        keys = k[i]
        if grouped and i == len(q) - 3 and is_concrete(q[i]) and is_concrete(k[i]):
            share = product(flatten(q[i])) // max(product(flatten(k[i])), 1)
            each = Atom(share)
            if product(flatten(k[i])) > 1:
                pin([[each]], "query heads that share a key and a value go together")
            keys = [*k[i], each]
        unify(q[i], keys, where=node.name)
        unify(k[i], v[i], where=node.name)
        mark([q[i]], HEADS)
    unify(q[-1], k[-1], where=node.name)
    unify(k[-2], v[-2], where=node.name)
    pin([q[-1], v[-1]], "the size of a head is built into the scale of the attention")
    pin([q[-2], k[-2]], "it is the sequence")
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, fx.Node):
        dims, sizes = axes.dims(mask), shape_of(mask)
        for i in range(3, len(dims) + 1):
            if sizes[-i] != 1:
                unify(dims[-i], q[-i], where=node.name)
    return [*q[:-1], v[-1]]
