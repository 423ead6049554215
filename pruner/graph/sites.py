"""Find every site of a traced module, and say what was left alone and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from zipc.core.types import Consumer, LeftAlone, Site, Slice
from zipc.pruner.graph.axes import Atom, Axes, Dim, flatten, product
from zipc.pruner.graph.trace import LinearCall, Program


@dataclass(frozen=True, slots=True)
class Structure:
    """What discovery found: sites in execution order, the rest, and the named dimensions."""

    sites: list[Site]
    left_alone: list[LeftAlone]
    shapes: dict[str, list[tuple[tuple[str | None, int | None], ...]]]
    # node name -> per output dimension its factors, each (site name | None, size | None=dynamic)


def find_sites(
    program: Program, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Structure:
    """Derive sites by dependency closure over the traced graph.

    A site is a class of dimensions that nothing pins, produced by linear maps and contracted by
    linear maps. `include`/`exclude` are globs over site names.
    """
    axes = Axes(program)
    members: dict[int, tuple[Atom, list[tuple[str, int, Dim, int]]]] = {}
    for name, dims in axes.parameters.items():
        for d, dim in enumerate(dims):
            atoms = flatten(dim)
            for i, atom in enumerate(atoms):
                members.setdefault(id(atom), (atom, []))[1].append((name, d, atoms, i))
    position = {node.name: i for i, node in enumerate(program.nodes)}
    weights = {call.weight: call for call in reversed(program.linears)}
    sites: list[tuple[int, Site, Atom]] = []
    pinned: dict[str, str] = {}
    live = _live(program)
    for atom, uses in members.values():
        produced = [weights[n] for n, d, _, _ in uses if d == 0 and n in weights]
        contracted = [weights[n] for n, d, _, _ in uses if d == 1 and n in weights]
        if atom.pins:
            for call in produced:
                pinned.setdefault(call.module, atom.pins[0])
        if atom.pins or not produced or not contracted:
            continue
        if not all(c.node in live for c in contracted):
            for call in produced:
                pinned.setdefault(call.module, "it does not reach the outputs asked for")
            continue
        site = _site(atom, uses, produced, contracted, program)
        sites.append((min(position[c.node] for c in produced), site, atom))
    sites.sort(key=lambda s: s[0])
    left: list[LeftAlone] = []
    kept: list[tuple[Site, Atom]] = []
    owner: dict[str, str] = {}  # tensor -> the site that cuts it
    for _, site, atom in sites:
        name = site.name if all(s.name != site.name for s, _ in kept) else "+".join(site.producers)
        site = replace(site, name=name)
        reason = _conflict(site, owner)
        if not _wanted(name, include, exclude):
            left.append(LeftAlone(name, "excluded by --include/--exclude"))
        elif reason:
            left.append(LeftAlone(name, reason))
        else:
            kept.append((site, atom))
            owner |= {s.parameter: name for s in site.slices}
    in_sites = {m for _, s, _ in sites for m in (*s.producers, *(c.module for c in s.consumers))}
    for call in program.linears:
        if call.module not in in_sites:
            reason = pinned.get(call.module, "nothing that consumes its output is a linear map")
            entry = LeftAlone(call.module, f"its output width is fixed: {reason}")
            if entry not in left:
                left.append(entry)
    names = {id(a): s.name for s, a in kept}
    shapes = {
        node: [tuple(_factor(a, names) for a in flatten(dim)) for dim in dims]
        for node, dims in axes.of.items()
    }
    return Structure([s for s, _ in kept], left, shapes)


def _conflict(site: Site, owner: dict[str, str]) -> str | None:
    """Why a site cannot be decided on its own: every tensor is cut by one site, along one axis."""
    for piece in site.slices:
        if piece.parameter in owner:
            return f"{piece.parameter} is cut by site {owner[piece.parameter]} already"
        if sum(p.parameter == piece.parameter for p in site.slices) > 1:
            return f"{piece.parameter} carries its units twice"
    return None


def _live(program: Program) -> set[str]:
    """Names of the nodes that the outputs are computed from."""
    found: set[str] = set()
    stack = list(program.outputs)
    while stack:
        node = stack.pop()
        if node.name not in found:
            found.add(node.name)
            stack += node.all_input_nodes
    return found


def _factor(atom: Atom, names: dict[int, str]) -> tuple[str | None, int | None]:
    return names.get(id(atom)), atom.size if isinstance(atom.size, int) else None


def _wanted(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    if include and not any(fnmatchcase(name, g) for g in include):
        return False
    return not any(fnmatchcase(name, g) for g in exclude)


def _site(
    atom: Atom,
    uses: list[tuple[str, int, Dim, int]],
    produced: list[LinearCall],
    contracted: list[LinearCall],
    program: Program,
) -> Site:
    slices = tuple(
        Slice(name, d, product(atoms[:i]), product(atoms[i + 1 :])) for name, d, atoms, i in uses
    )
    consumed = {c.weight for c in contracted}
    consumers = tuple(
        Consumer(weight_module, s.outer, s.inner)
        for s in slices
        if s.dim == 1 and s.parameter in consumed
        for weight_module in [s.parameter.rpartition(".")[0]]
    )
    producers = tuple(dict.fromkeys(c.module for c in produced))
    heads = "heads" in atom.roles
    units = int(atom.size)
    calls = sum(1 for c in program.linears if c.weight == contracted[0].weight)
    shapes = sorted(
        (s.dim, *map(int, next(t for n, t in program.tensors.values() if n == s.parameter).shape))
        for s in slices
    )
    return Site(
        name=_common(producers),
        kind="heads" if heads else "ffn",
        units=units,
        slices=slices,
        consumers=consumers,
        producers=producers,
        signature=f"{'heads' if heads else 'ffn'}-{units}-{shapes}-x{calls}",
        calls=calls,
    )


def _common(paths: Sequence[str]) -> str:
    """The name of a site: the producing module, or the module that holds all of them."""
    if len(paths) == 1:
        return paths[0]
    split = [p.split(".") for p in paths]
    common = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common) or "+".join(paths)
