"""Which channels go from where they are made to a map's columns so that a factor goes with them.

A row of a map divided by a number, and the columns that read it multiplied by the same, leave a
network what it is wherever all on the way passes a positive factor on: products with anything else,
ReLU, sums over other dimensions as that of an attention over its values, views and copies. So do a
channel of a norm's weight and bias, and the columns of all that read the norm. The rows are
numbered, the numbers carried along the traced graph by its own operations, and a row whose number
comes to anything else keeps its scale.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from zipc.core.types import Site
from zipc.pruner.graph.trace import MapCall, Program, op_name

NONE = -1  # of a value that no row goes to

# What gives every value as it was, or at another place.
MOVES = frozenset(
    """
    view reshape _unsafe_view flatten unflatten unsqueeze squeeze expand transpose t permute
    slice select split chunk split_with_sizes getitem cat stack
    """.split()
)
# f(s x) = s f(x) for s > 0, value by value.
HOMOGENEOUS = frozenset(
    """
    relu leaky_relu abs neg dropout feature_dropout contiguous clone detach alias to _to_copy float
    """.split()
)
PRODUCTS = frozenset("mul multiply".split())
QUOTIENTS = frozenset("div divide true_divide".split())


@dataclass(frozen=True, slots=True)
class Passage:
    """Rows of a map, or channels of a norm, that reach columns of maps and nothing else.

    `tensors` are those of the producer, with the dimension that has the rows. `readers` has the
    row behind every column of a map that reads them, -1 where there is none.
    """

    site: str  # that all readers belong to
    producer: str  # module path
    tensors: Mapping[str, int]
    readers: Mapping[str, tuple[int, ...]]


def passages(program: Program, sites: Sequence[Site]) -> list[Passage]:
    """Passages inside sites of linear maps, and from norms to all maps that give a site's units.

    Columns are behind one producer at most: the first that reaches them.
    """
    calls: dict[str, list[MapCall]] = {}
    for call in program.maps:
        if not call.convolution:
            calls.setdefault(call.module, []).append(call)
    walk = _Walk(program)
    found: list[Passage] = []
    taken: set[str] = set()
    for site in sites:
        consumers = {c.module for c in site.consumers} & calls.keys()
        for producer in site.producers:
            own = calls.get(producer, [])
            reached = walk.reached([call.node for call in own], consumers - taken)
            if reached:
                first = own[0]
                tensors = {first.weight: first.out_dim} | ({first.bias: 0} if first.bias else {})
                found.append(Passage(site.name, producer, tensors, reached))
                taken |= set(reached)
    for names, nodes in _scaled(program):
        reached = walk.reached(nodes, set(calls) - taken)
        around = [s.name for s in sites if reached and reached.keys() <= set(s.producers or s.maps)]
        if around:
            producer = names[0].rpartition(".")[0]
            found.append(Passage(around[0], producer, dict.fromkeys(names, 0), reached))
            taken |= set(reached)
    return found


def _scaled(program: Program) -> Iterator[tuple[list[str], list[str]]]:
    """Vectors of parameters that scale (and shift) channels, and the nodes in which they do."""
    signature = program.exported.graph_signature
    free = set(signature.parameters) - program.fixed.keys()
    names = {n: held[0] for n in program.nodes if (held := program.tensor_of(n)) is not None}
    for vector in names:
        users = list(vector.users)
        if not users or not all(_scales(user, vector) for user in users):
            continue
        shifts: set[Any] = {u.args[3] for u in users if len(u.args) > 3}
        both = [vector, *(shifts - {None})]
        own = all(names.get(n) in free and list(n.users) == users for n in both)
        if own and len(both) < 3:
            yield [names[n] for n in both], [user.name for user in users]


def _scales(node: fx.Node, vector: fx.Node) -> bool:
    """Whether a node multiplies each index of a last dimension by its own number of a vector."""
    shape = vector.meta["val"].shape
    if len(shape) != 1 or node.args.count(vector) != 1:
        return False
    if op_name(node) == "layer_norm":
        return len(node.args) > 2 and node.args[2] is vector
    return op_name(node) in PRODUCTS and _sizes(node)[-1] == shape[0]


class _Walk:
    """Numbers of rows, carried from where the rows are made to all that they reach."""

    def __init__(self, program: Program) -> None:
        self._maps = {call.node: call for call in program.maps}
        self._index = {node: i for i, node in enumerate(program.nodes)}
        self._nodes = {node.name: node for node in program.nodes}
        self._calls: dict[str, set[str]] = {}
        for call in program.maps:
            self._calls.setdefault(call.module, set()).add(call.node)

    def reached(self, starts: Sequence[str], readers: set[str]) -> dict[str, tuple[int, ...]]:
        """Rows behind the columns of those maps that read what the nodes `starts` give in their
        last dimension; empty where no row may be scaled."""
        numbers: dict[fx.Node, Any] = {}
        stuck: set[int] = set()
        columns: dict[str, dict[str, Tensor]] = {}  # map -> its calls -> rows
        queue: list[int] = []
        nodes = list(self._index)

        def follow(node: fx.Node) -> None:
            for user in node.users:
                heapq.heappush(queue, self._index[user])

        for name in starts:
            node = self._nodes[name]
            shape = _sizes(node)
            numbers[node] = torch.arange(shape[-1]).expand(shape)
            follow(node)
        before = -1
        while queue:
            at = heapq.heappop(queue)
            if at == before:
                continue
            before, node = at, nodes[at]
            call = self._maps.get(node.name)
            if call is not None and call.module in readers and not call.convolution:
                rows, ended = _of_channels(numbers[self._nodes[call.source]])
                columns.setdefault(call.module, {})[call.node] = rows
            else:
                carried, ended = _carried(node, numbers)
                if carried is not None:
                    numbers[node] = carried
                    follow(node)
            stuck |= ended
        return self._whole(columns, stuck)

    def _whole(
        self, columns: Mapping[str, Mapping[str, Tensor]], stuck: set[int]
    ) -> dict[str, tuple[int, ...]]:
        """Rows that nothing else reads, of maps that read them in the same way in every call."""
        agreed: dict[str, list[int]] = {}
        for module, found in columns.items():
            first = next(iter(found.values()))
            if found.keys() == self._calls[module] and all(
                torch.equal(first, rows) for rows in found.values()
            ):
                agreed[module] = first.tolist()
            else:
                stuck |= {row for rows in found.values() for row in _all(rows)}
        free = {m: tuple(NONE if r in stuck else r for r in rows) for m, rows in agreed.items()}
        return {m: rows for m, rows in free.items() if max(rows) > NONE}


def _of_channels(numbers: Tensor) -> tuple[Tensor, set[int]]:
    """Rows behind the channels of what a map reads, and those that are not of one channel."""
    flat = numbers.reshape(-1, numbers.shape[-1])
    same = (flat == flat[:1]).all(0)
    return flat[0].masked_fill(~same, NONE), _all(flat[:, ~same])


def _carried(node: fx.Node, numbers: Mapping[fx.Node, Any]) -> tuple[Any, set[int]]:
    """Numbers of what a node gives, None where it passes none on; and rows that stop there."""
    op = op_name(node)
    if op.startswith(("sym_", "_assert")):  # they read sizes and types
        return None, set()
    if op in MOVES:
        return _moved(node, numbers), set()
    inputs = [source for source in node.all_input_nodes if source in numbers]
    places = [i for i, argument in enumerate(node.args) if argument in inputs]
    ended = {row for source in inputs for row in _all(numbers[source])}
    given: Any = None
    if op == "scaled_dot_product_attention" and node.args[2] in inputs:
        source: Any = node.args[2]
        if node.args.count(source) == 1:
            given = _attended(node, numbers[source])
            others = [numbers[other] for other in inputs if other is not source]
        return given, ended if given is None else _all(others)
    if len(places) != 1 or len(inputs) != 1:
        return None, ended
    carried = numbers[inputs[0]]
    if op in HOMOGENEOUS:
        given = carried
    elif op in PRODUCTS or (op in QUOTIENTS and places == [0] and not node.kwargs):
        given = torch.broadcast_to(carried, _sizes(node))
    elif op in ("matmul", "bmm") and carried.dim() > 1:
        given = _summed(carried, -1 if places == [0] else -2, _sizes(node))
    return given, (ended if given is None else set())


def _moved(node: fx.Node, numbers: Mapping[fx.Node, Any]) -> Any:
    """The same operation on the numbers; sizes are those of the example."""

    def argument(source: fx.Node) -> Any:
        if source in numbers:
            return numbers[source]
        value = source.meta["val"]
        return torch.full(_sizes(source), NONE) if isinstance(value, Tensor) else _size(value)

    if op_name(node) in ("view", "reshape", "_unsafe_view", "flatten", "unflatten"):
        return numbers[node.all_input_nodes[0]].reshape(_sizes(node))
    args: Any = fx.map_arg(node.args, argument)
    kwargs: Any = fx.map_arg(node.kwargs, argument)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _attended(node: fx.Node, values: Tensor) -> Tensor | None:
    """Of an attention, which sums its values with weights that do not depend on them."""
    shape = _sizes(node)
    share = shape[-3] // values.shape[-3]  # query heads that read one value head
    if not bool((values == values[..., :1, :]).all()):
        return None
    return values[..., :1, :].repeat_interleave(share, dim=-3).expand(shape)


def _summed(numbers: Tensor, dim: int, shape: Sequence[int]) -> Tensor | None:
    """Of a sum over a dimension in which all have the same rows."""
    first = numbers.narrow(dim, 0, 1)
    return torch.broadcast_to(first, shape) if bool((numbers == first).all()) else None


def _all(numbers: Any) -> set[int]:
    """The rows among numbers."""
    if numbers is None:
        return set()
    if not isinstance(numbers, Tensor):
        return {row for part in numbers for row in _all(part)}
    distinct = numbers[tuple(slice(None if step else 1) for step in numbers.stride())]
    return set(torch.unique(distinct).tolist()) - {NONE}


def _sizes(node: fx.Node) -> list[int]:
    return [_size(size) for size in node.meta["val"].shape]


def _size(size: Any) -> Any:
    """A size of the example the program was traced with; another argument as it is."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size
