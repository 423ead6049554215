"""Find every site of a traced module, and say what was left alone and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import numpy as np

from zipc.core.types import Consumer, Expert, Index, Kind, LeftAlone, Share, Site, Slice
from zipc.pruner.graph.axes import Atom, Dim, flatten, leaves, owners, pin, repeats
from zipc.pruner.graph.mixtures import experts
from zipc.pruner.graph.rules import follow
from zipc.pruner.graph.rules.state import HEADS, NORMED, RESIDUAL, Axes
from zipc.pruner.graph.trace import MapCall, Program, op_name

EXCLUDED = "excluded by --include/--exclude"
UNREAD = "nothing that consumes its output is a linear map"


@dataclass(frozen=True, slots=True)
class Factor:
    """One factor of a dimension: a site's units, a fixed number, or extents laid end to end."""

    size: int | None  # None: symbolic
    site: str | None = None
    segments: tuple[Extent, ...] = ()


Extent = tuple[Factor, ...]


def extent_size(extent: Extent, widths: Mapping[str, int]) -> int | None:
    """Size of a dimension at the given widths (units kept by site); None if it is symbolic."""
    if any(factor.size is None and not factor.segments for factor in extent):
        return None
    return known_size(extent, widths)


def known_size(extent: Extent, widths: Mapping[str, int]) -> int:
    """Product of those factors of a dimension that are not symbolic."""
    total = 1
    for factor in extent:
        if factor.segments:
            parts = [extent_size(s, widths) for s in factor.segments]
            total *= sum(p for p in parts if p is not None)
        elif factor.size is not None:
            total *= factor.size if factor.site is None else widths.get(factor.site, factor.size)
    return total


@dataclass(frozen=True, slots=True)
class Rewrite:
    """An attribute of a module that is `factor` times the units kept at a site."""

    module: str
    attribute: str
    site: str
    factor: int


@dataclass(frozen=True, slots=True)
class Structure:
    """What discovery found: sites in execution order, the rest, and the named dimensions.

    `shapes` has the extents of every node's result in which a site takes part, `pieces` those of
    the results of a split along the dimension that is split, `groups` the count of groups that a
    convolution or normalisation is called with.
    """

    sites: list[Site]
    left_alone: list[LeftAlone]
    shapes: dict[str, tuple[Extent, ...]]
    pieces: dict[str, tuple[Extent, ...]] = field(default_factory=dict)
    groups: dict[str, Extent] = field(default_factory=dict)
    attributes: tuple[Rewrite, ...] = ()  # of modules, see `verify`


def sizes_at(
    structure: Structure, widths: Mapping[str, int]
) -> Callable[[str, int], int | Share | None]:
    """The size of any axis of a traced node's result at the given widths; None: as it was.

    Of a symbolic one, a batch times heads say, it is the share that is left.
    """

    def size_of(node: str, axis: int) -> int | Share | None:
        extents = structure.shapes.get(node)
        if extents is None:
            return None
        size = extent_size(extents[axis], widths)
        if size is not None:
            return size
        left, before = known_size(extents[axis], widths), known_size(extents[axis], {})
        return None if left == before else (left, before)

    return size_of


@dataclass(slots=True)
class _Use:
    """A tensor dimension that an atom takes part in."""

    parameter: str
    dim: int
    own: np.ndarray[tuple[int], np.dtype[np.int64]]  # unit of each position, -1: another's


def find_sites(
    program: Program, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> Structure:
    """Derive sites by dependency closure over the traced graph.

    A site is a class of dimensions that nothing pins, produced by maps and contracted by maps, or
    the experts that the outputs of a map choose from.
    `include`/`exclude` are globs over site names.
    """
    axes = follow(program)
    for dims in axes.of.values():
        for dim in dims:
            if repeats(dim):
                pin([dim], "its units meet each other in one dimension")
    members = _members(axes)
    position = {node.name: i for i, node in enumerate(program.nodes)}
    calls: dict[str, MapCall] = {call.weight: call for call in reversed(program.maps)}
    sites: list[tuple[int, Site, Atom]] = []
    pinned: dict[str, str] = {}
    live = live_nodes(program)
    chosen = {id(leaf) for dim in axes.choices.values() for leaf in leaves(dim)}
    for atom, uses in members:
        produced = [calls[u.parameter] for u in uses if _gives(u, calls, atom, axes)]
        contracted = [u for u in uses if _contracts(u, calls, atom, axes)]
        if not atom.pins and len(produced) == 1 and id(atom) in chosen and not contracted:
            mixture = experts(axes, atom, produced[0])
            if isinstance(mixture, str):
                atom.pins.append(mixture)
            else:
                site = _mixture(atom, uses, produced[0], mixture, program)
                sites.append((position[produced[0].node], site, atom))
                continue
        reasons = [*atom.pins, *atom.ties]
        if NORMED in atom.roles and RESIDUAL not in atom.roles:
            reasons.append("a normalisation runs over it")
        if reasons:
            for call in produced:
                pinned.setdefault(call.module, reasons[0])
        if reasons or not produced or not contracted:
            continue
        if not all(calls[u.parameter].node in live for u in contracted):
            for call in produced:
                pinned.setdefault(call.module, "it does not reach the outputs asked for")
            continue
        site = _site(atom, uses, produced, contracted, calls, program)
        sites.append((min(position[c.node] for c in produced), site, atom))
    sites.sort(key=lambda s: s[0])
    left: list[LeftAlone] = []
    kept: list[tuple[Site, Atom]] = []
    for _, site, atom in sites:
        name = _unique(site, [s.name for s, _ in kept])
        if wanted(name, include, exclude):
            kept.append((replace(site, name=name), atom))
        else:
            left.append(LeftAlone(name, EXCLUDED))
    left += _fixed(axes, [site for _, site, _ in sites], pinned)
    return _structure(axes, kept, left)


def _fixed(axes: Axes, sites: Sequence[Site], pinned: Mapping[str, str]) -> list[LeftAlone]:
    """Maps whose output no site cuts, and modules with other matrices that no site has a part of.

    What a depthwise convolution gives goes with the channels that run through it.
    """
    program = axes.program

    given = {module for site in sites for module in site.producers}
    cut = {(piece.parameter, piece.dim) for site in sites for piece in site.slices}
    found = {
        call.module: f"its output width is fixed: "
        f"{pinned.get(call.module) or _held([axes.parameters[call.weight][call.out_dim]])}"
        for call in program.maps
        if call.module not in given and (call.weight, call.out_dim) not in cut
    }
    carried = {piece.parameter for site in sites for piece in site.slices}
    carried |= {call.weight for call in program.maps}
    parameters = set(program.exported.graph_signature.parameters)
    for name, tensor in program.tensors.values():
        if name in carried or name not in parameters or tensor.dim() < 2:
            continue
        found.setdefault(name.rpartition(".")[0] or name, _held(axes.parameters.get(name, ())))
    return [LeftAlone(module, reason) for module, reason in found.items()]


def _held(dims: Sequence[Dim]) -> str:
    """Why none of the dimensions is cut."""
    atoms = [leaf for dim in dims for leaf in leaves(dim)]
    return next((pin for atom in atoms for pin in (*atom.pins, *atom.ties)), UNREAD)


def without(structure: Structure, reasons: Mapping[str, str]) -> Structure:
    """The structure less some sites, which are left alone for the reasons given."""
    gone = set(reasons)

    def fixed(extent: Extent) -> Extent:
        return tuple(
            Factor(
                f.size,
                None if f.site in gone else f.site,
                tuple(fixed(s) for s in f.segments),
            )
            for f in extent
        )

    kept = [s for s in structure.sites if s.name not in gone]
    left = {n: LeftAlone(n, r) for n, r in reasons.items()}
    inside = {module for site in kept for module in site.producers}
    for site in structure.sites:
        for module in site.producers if site.name in gone else ():
            named = module in site.name.split("+") or module.startswith(f"{site.name}.")
            if module not in inside and not named:
                left.setdefault(module, LeftAlone(module, reasons[site.name]))
    return Structure(
        kept,
        [*structure.left_alone, *left.values()],
        {n: tuple(map(fixed, dims)) for n, dims in structure.shapes.items()},
        {n: tuple(map(fixed, dims)) for n, dims in structure.pieces.items()},
        {n: fixed(extent) for n, extent in structure.groups.items()},
        tuple(a for a in structure.attributes if a.site not in gone),
    )


def _members(axes: Axes) -> list[tuple[Atom, list[_Use]]]:
    """Every atom that tensors carry, with the dimensions that carry it."""
    found: dict[int, tuple[Atom, list[_Use]]] = {}
    for name, dims in axes.parameters.items():
        for d, dim in enumerate(dims):
            atoms = {id(leaf): leaf for leaf in leaves(dim)}
            if not any(_may_be_site(atom) for atom in atoms.values()):
                for key, atom in atoms.items():
                    whole = np.zeros(0, dtype=np.int64)
                    found.setdefault(key, (atom, []))[1].append(_Use(name, d, whole))
                continue
            for key, own in owners(dim).items():
                found.setdefault(key, (atoms[key], []))[1].append(_Use(name, d, own))
    return list(found.values())


def _may_be_site(atom: Atom) -> bool:
    return not atom.pins and isinstance(atom.size, int)


def _in_groups(atom: Atom, call: MapCall, axes: Axes) -> bool:
    """Whether the atom counts the groups of a grouped map: such a map only passes it on."""
    return any(leaf is atom for leaf in leaves(axes.groups.get(call.node, [])))


def _gives(use: _Use, calls: Mapping[str, MapCall], atom: Atom, axes: Axes) -> bool:
    call = calls.get(use.parameter)
    return call is not None and use.dim == call.out_dim and not _in_groups(atom, call, axes)


def _contracts(use: _Use, calls: Mapping[str, MapCall], atom: Atom, axes: Axes) -> bool:
    call = calls.get(use.parameter)
    return call is not None and use.dim == call.in_dim and not _in_groups(atom, call, axes)


def _structure(axes: Axes, kept: list[tuple[Site, Atom]], left: list[LeftAlone]) -> Structure:
    names = {id(atom): site.name for site, atom in kept}

    def extent(dim: Dim) -> Extent:
        return tuple(
            Factor(
                a.size if isinstance(a.size, int) else None,
                names.get(id(a)),
                tuple(extent(s) for s in a.segments or ()),
            )
            for a in flatten(dim)
        )

    shapes = {
        node: tuple(map(extent, dims))
        for node, dims in axes.of.items()
        if any(id(leaf) in names for dim in dims for leaf in leaves(dim))
    }
    pieces: dict[str, tuple[Extent, ...]] = {}
    for node in axes.program.nodes:
        results = axes.many.get(node.name)
        if results and op_name(node) in ("split", "chunk", "split_with_sizes"):
            at = int(node.args[2]) if len(node.args) > 2 else int(node.kwargs.get("dim", 0))  # type: ignore[arg-type]
            pieces[node.name] = tuple(extent(dims[at]) for dims in results)
    return Structure(
        [s for s, _ in kept], left, shapes, pieces, {n: extent(g) for n, g in axes.groups.items()}
    )


def _unique(site: Site, taken: Sequence[str]) -> str:
    """A name no other site has: that of the producing modules, if need be all, or numbered."""
    if site.name not in taken:
        return site.name
    full = "+".join(site.producers)
    number = 2
    name = full
    while name in taken:
        name, number = f"{full}#{number}", number + 1
    return name


def live_nodes(program: Program) -> set[str]:
    """Names of the nodes that the outputs are computed from."""
    found: set[str] = set()
    stack = list(program.outputs)
    while stack:
        node = stack.pop()
        if node.name not in found:
            found.add(node.name)
            stack += node.all_input_nodes
    return found


def wanted(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    if include and not any(fnmatchcase(name, g) for g in include):
        return False
    return not any(fnmatchcase(name, g) for g in exclude)


def _site(
    atom: Atom,
    uses: Sequence[_Use],
    produced: Sequence[MapCall],
    contracted: Sequence[_Use],
    calls: Mapping[str, MapCall],
    program: Program,
) -> Site:
    units = int(atom.size)
    slices = tuple(Slice(u.parameter, u.dim, _index(u, units)) for u in uses)
    consumers = tuple(
        Consumer(calls[u.parameter].module, _index(u, units), calls[u.parameter].kernel)
        for u in contracted
    )
    producers = tuple(dict.fromkeys(c.module for c in produced))
    kind = _kind(atom, [*produced, *(calls[u.parameter] for u in contracted)])
    runs = sum(1 for c in program.maps if c.weight == contracted[0].parameter)
    tensors = dict(program.tensors.values())
    shapes = sorted((s.dim, *tensors[s.parameter].shape) for s in slices)
    return Site(
        name=_common(producers),
        kind=kind,
        units=units,
        slices=slices,
        consumers=consumers,
        producers=producers,
        signature=f"{kind}-{units}-{shapes}-x{runs}",
        calls=runs,
        normed=NORMED in atom.roles,
        removable=kind != "width"
        and all(bool((u.own >= 0).all()) for u in contracted)
        and all(calls[u.parameter].groups == 1 for u in contracted)
        and not {c.module for c in consumers} & set(producers)
        and not any(c.transposed for c in [*produced, *(calls[u.parameter] for u in contracted)]),
    )


def _mixture(
    atom: Atom,
    uses: Sequence[_Use],
    router: MapCall,
    mixture: tuple[tuple[Expert, ...], int],
    program: Program,
) -> Site:
    units, (found, count) = int(atom.size), mixture
    tensors = dict(program.tensors.values())
    inside = [
        n for e in found[:1] for n in tensors if any(n.startswith(f"{m}.") for m in e.modules)
    ]
    shapes = sorted(tuple(tensors[n].shape) for n in inside)
    return Site(
        name=router.module,
        kind="experts",
        units=units,
        slices=tuple(Slice(u.parameter, u.dim, _index(u, units)) for u in uses),
        consumers=(),
        producers=(router.module,),
        signature=f"experts-{count}-of-{units}-{tuple(tensors[router.weight].shape)}-{shapes}",
        calls=sum(1 for c in program.maps if c.weight == router.weight),
        removable=False,
        experts=found,
        chosen=count,
    )


def _kind(atom: Atom, calls: Sequence[MapCall]) -> Kind:
    if HEADS in atom.roles:
        return "heads"
    if RESIDUAL in atom.roles:
        return "width"
    return "channels" if any(c.convolution for c in calls) else "ffn"


def _index(use: _Use, units: int) -> Index:
    """Positions of each unit, ascending."""
    order = np.argsort(use.own, kind="stable")
    order = order[np.searchsorted(use.own[order], 0) :]
    return tuple(tuple(row) for row in order.reshape(units, -1).tolist())


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
