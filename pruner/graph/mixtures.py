"""Mixtures of experts: whose experts can go, and what goes with them.

A router scores the experts of a layer, the best of each token are chosen, and their shares are
scattered among zeros, one column an expert. An expert is gone when its score is minus infinity: no
token chooses it, its share is zero, and so is what it adds. All of that is read off the traced
graph; a mixture that does anything else with its scores or shares is left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from zipc.core.types import Expert, Level, Site
from zipc.pruner.graph.axes import Atom, leaves
from zipc.pruner.graph.cuts import Kept
from zipc.pruner.graph.rules.state import Axes, argument
from zipc.pruner.graph.trace import MapCall, op_name

_COPIES = frozenset(
    "to _to_copy float clone alias detach contiguous view reshape _unsafe_view slice".split()
)
_SCORES = _COPIES | {"softmax", "_softmax", "log_softmax", "sigmoid"}  # keep what is chosen last
_ZERO_BY_ALL = _COPIES | {"mul", "multiply", "neg", "permute", "transpose", "unsqueeze", "squeeze"}
_ZEROS = frozenset({"zeros", "new_zeros"})
_IDLE = ("_assert", "sym_")  # reads no values


@dataclass(frozen=True, slots=True)
class Rerouted:
    """What becomes of a model that loses experts."""

    ends: tuple[str, ...]  # maps that give zeros from now on
    modules: tuple[str, ...]  # paths that nothing reads any more
    picks: Mapping[str, int]  # traced node -> the column where its expert's share now stands

    def gone(self, path: str) -> bool:
        """Whether a module, or a tensor of one, belongs to an expert that is gone."""
        return within(path, self.modules)


def rerouted(sites: Iterable[Site], kept: Kept) -> Rerouted:
    """What goes, and what moves, when the mixtures among `sites` keep the experts `kept`."""
    ends: list[str] = []
    modules: list[str] = []
    picks: dict[str, int] = {}
    for site in sites:
        left = sorted(kept.get(site.name, range(site.units)))
        if len(left) == site.units:
            continue
        for unit, expert in enumerate(site.experts):
            if unit in left:
                picks |= dict.fromkeys(expert.picks, left.index(unit))
            else:
                ends += expert.ends
                modules += expert.modules
    return Rerouted(tuple(ends), tuple(modules), picks)


def nested(site: Site, sites: Iterable[Site]) -> tuple[tuple[str, ...], ...]:
    """Names of the sites inside each expert of a mixture, by unit."""
    inside = list(sites)
    return tuple(
        tuple(s.name for s in inside if all(within(m, expert.modules) for m in s.maps))
        for expert in site.experts
    )


def settled(sites: Mapping[str, Site], levels: Mapping[str, Level], kept: Kept) -> dict[str, Level]:
    """The levels with all that lies inside of experts that are gone dense: it saves nothing."""
    gone = rerouted((sites[n] for n in levels), kept)
    return {
        n: Level(sites[n].units) if sites[n].maps and all(map(gone.gone, sites[n].maps)) else lv
        for n, lv in levels.items()
    }


def experts(axes: Axes, atom: Atom, router: MapCall) -> tuple[tuple[Expert, ...], int] | str:
    """The experts that the outputs of a map choose from, and how many a token gets; or why not.

    `atom` counts those outputs.
    """
    scores, shares = _carriers(axes, atom, router)
    nodes = {n.name: n for n in axes.program.nodes}
    chosen = 0
    picks: dict[int, list[fx.Node]] = {}
    for name in sorted(scores | shares):
        for user in nodes[name].users:
            if op_name(user).startswith(_IDLE) or user.name in scores or user.name in shares:
                continue
            if name in scores and user.name in axes.choices:
                chosen = max(chosen, int(argument(user, 1, "k")))
            elif name in shares and user.name in axes.picks:
                picks.setdefault(axes.picks[user.name], []).append(user)
            else:
                return f"{op_name(user)} ({user.name}) reads the scores or shares of its experts"
    carrying = {n for n, dims in axes.of.items() if any(atom in leaves(dim) for dim in dims)}
    carrying -= {n.name for n in axes.program.nodes if n.op == "placeholder"}
    for name in sorted(carrying - scores - shares):
        if not (op_name(nodes[name]) in _ZEROS and set(nodes[name].users) <= _scatters(axes)):
            return f"op {op_name(nodes[name])} ({name}) keeps a value for each expert"
    if not chosen or sorted(picks) != list(range(int(atom.size))):
        return "it is no choice among experts whose shares are used one by one"
    if chosen == atom.size:
        return "every token is sent to all of its experts"
    tensors = Counter(path for name in axes.parameters for path in _ancestors(name))
    found = [_expert(axes, picks[unit], tensors) for unit in range(int(atom.size))]
    reasons = [e for e in found if isinstance(e, str)]
    return reasons[0] if reasons else (tuple(e for e in found if isinstance(e, Expert)), chosen)


def _carriers(axes: Axes, atom: Atom, router: MapCall) -> tuple[set[str], set[str]]:
    """Nodes that hold the scores of all experts, and those that hold their shares."""
    scores, shares = {router.node}, set()
    for node in axes.program.nodes:
        sources = {n.name for n in node.all_input_nodes}
        op = op_name(node)
        if not any(atom in leaves(dim) for dim in axes.of.get(node.name, [])):
            continue
        if sources & scores and op in _SCORES and _along(axes, node, atom):
            scores.add(node.name)
        elif op == "scatter":
            if op_name(node.args[0]) in _ZEROS:  # type: ignore[arg-type]
                shares.add(node.name)
        elif sources & shares and op in _COPIES:
            shares.add(node.name)
    return scores, shares


def _along(axes: Axes, node: fx.Node, atom: Atom) -> bool:
    """Whether a softmax, if it is one, runs over the experts and nothing else."""
    if "softmax" not in op_name(node):
        return True
    return leaves(axes.of[node.name][int(node.args[1])]) == [atom]  # type: ignore[arg-type]


def _scatters(axes: Axes) -> set[fx.Node]:
    return {n for n in axes.program.nodes if op_name(n) == "scatter"}


def _expert(axes: Axes, picks: list[fx.Node], tensors: Counter[str]) -> Expert | str:
    """Follow the share of an expert to where what it is multiplied with is added to the rest."""
    zeros: set[fx.Node] = set(picks)
    ends: set[fx.Node] = set()  # the first maps that are given zeros
    behind: set[fx.Node] = set()  # those, and what depends on nothing else that is zero
    stack = list(picks)
    while stack:
        node = stack.pop()
        past = node in behind
        if node in axes.program.outputs:
            return f"what an expert gives ({node.name}) is an output"
        for user in node.users:
            op, call = op_name(user), axes.calls.get(user.name)
            if op.startswith(_IDLE) or (op == "add" and past and not user.kwargs):
                continue  # of a sum the rest stays
            zero_map = call is not None and call.bias is None and call.source == node.name
            if not zero_map and op not in _ZERO_BY_ALL:
                return f"{op} ({user.name}) reads what an expert gives"
            if user in zeros and (past or user not in behind or user in ends):
                continue
            if user in zeros:
                return f"{op} ({user.name}) reads the share of an expert once more"
            if zero_map and not past:
                ends.add(user)
            if past or user in ends:
                behind.add(user)
            zeros.add(user)
            stack.append(user)
    modules = _alone(axes, ends, tensors)
    if not ends or not all(within(axes.calls[e.name].module, modules) for e in ends):
        return "its experts share weights"
    return Expert(
        modules,
        tuple(sorted(axes.calls[e.name].module for e in ends)),
        tuple(p.name for p in picks),
    )


def _alone(axes: Axes, ends: set[fx.Node], tensors: Counter[str]) -> tuple[str, ...]:
    """Paths of the largest modules that compute nothing but what `ends` are given."""
    gone = set(ends)
    stack = [source for end in ends for source in end.all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in gone and all(u in gone or op_name(u).startswith(_IDLE) for u in node.users):
            gone.add(node)
            stack += node.all_input_nodes
    held = [h[0] for n in gone if (h := axes.program.tensor_of(n)) is not None]
    own = Counter(path for name in held for path in _ancestors(name))
    found: set[str] = set()
    for name in held:
        whole = [p for p in _ancestors(name) if own[p] == tensors[p]]
        if whole:
            found.add(whole[0])
    return tuple(sorted(found))


def _ancestors(tensor: str) -> list[str]:
    """Paths of the modules that hold a tensor, the outermost first."""
    parts = tensor.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def within(path: str, modules: Iterable[str]) -> bool:
    return any(path == m or path.startswith(f"{m}.") for m in modules)
