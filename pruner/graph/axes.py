"""Name every dimension of a traced graph by unification.

A dimension is an ordered list of *atoms* (outer to inner). Operations equate dimensions: a residual
add says that two widths are the same, a view that splits 384 into 12 x 32 says that 384 was
two atoms all along, a concatenation that it is several dimensions end to end. What is left at the
end are classes of dimensions that must change together, which is exactly the dependency closure of
structured pruning. An atom that an operation does not treat index by index (a mean, an unknown
op) is *pinned*, with the reason. What keeps the units of an atom from being silenced by zeros, but
not the experts of a mixture from being left out of a choice (softmax, top-k), is a *tie*.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import sympy

Size = int | str  # a symbolic size is its expression
Index = np.ndarray[tuple[int], np.dtype[np.int64]]


class Atom:
    """One factor of a dimension; a union-find node that may be split later.

    `segments` makes it a concatenation: dimensions laid end to end.
    """

    __slots__ = ("parts", "pins", "roles", "segments", "size", "ties")

    def __init__(self, size: Size, segments: list[Dim] | None = None) -> None:
        self.size = size
        self.segments = segments
        self.parts: list[Atom] | None = None  # a split, or a single-element link to another atom
        self.pins: list[str] = []
        self.ties: list[str] = []
        self.roles: set[str] = set()


Dim = list[Atom]


def flatten(dim: Sequence[Atom]) -> Dim:
    """Resolve links and splits to root atoms; size-one atoms vanish."""
    roots: Dim = []
    for atom in dim:
        if atom.parts is not None:
            roots += flatten(atom.parts)
        elif atom.size != 1:
            roots.append(atom)
    return roots


def leaves(dim: Sequence[Atom]) -> list[Atom]:
    """The atoms that hold indices: those of all segments in place of a concatenation."""
    found: list[Atom] = []
    for atom in flatten(dim):
        if atom.segments is None:
            found.append(atom)
        else:
            found += [leaf for segment in atom.segments for leaf in leaves(segment)]
    return found


def pin(dims: Sequence[Dim], reason: str) -> None:
    for dim in dims:
        for atom in leaves(dim):
            atom.pins.append(reason)


def tie(dims: Sequence[Dim], reason: str) -> None:
    """Let nothing but experts stand in `dims`: see `mixtures`."""
    for dim in dims:
        for atom in leaves(dim):
            atom.ties.append(reason)


def mark(dims: Sequence[Dim], role: str) -> None:
    """Remember on every atom of `dims` how it is used."""
    for dim in dims:
        for atom in leaves(dim):
            atom.roles.add(role)


def size_of(dim: Sequence[Atom]) -> sympy.Expr:
    """Number of indices of a dimension, symbolic where an atom is."""
    return sympy.Mul(*[sympy.sympify(a.size) for a in dim])


def unify(left: Dim, right: Dim, *, where: str) -> None:
    """Make two dimensions the same, splitting atoms to their common refinement."""
    if not _unify(left, right, where):
        pin([left, right], f"its sizes do not line up at {where}")


def concatenated(dims: Sequence[Dim]) -> Dim:
    """The dimension that holds `dims` end to end; all sizes must be concrete."""
    if len(dims) == 1:
        return dims[0]
    return [Atom(sum(product(flatten(d)) for d in dims), segments=list(dims))]


def carve(dim: Dim, sizes: Sequence[int]) -> list[Dim] | None:
    """Cut a dimension into consecutive pieces of the given sizes; None where it has no such cuts.

    A piece is a dimension of its own from here on, and the whole is their concatenation.
    """
    left = segments_of(dim)
    pieces: list[Dim] = []
    for size in sizes:
        taken: list[Dim] = []
        missing = size
        while missing > 0:
            if not left or not is_concrete(left[0]):
                return None
            head = left.pop(0)
            have = product(flatten(head))
            if have > missing:
                cut = _cut(head, missing)
                if cut is None:
                    return None
                head, rest = cut
                left.insert(0, rest)
                have = missing
            taken.append(head)
            missing -= have
        pieces.append(concatenated(taken))
    return None if left else pieces


def regroup(dim: Dim, outer: int) -> bool:
    """Read a concatenation as (outer, inner); its segments are then the same `inner` indices.

    The outer part is pinned: what a group is cannot be told from the segments.
    """
    atoms = flatten(dim)
    if len(atoms) != 1 or atoms[0].segments is None or not isinstance(atoms[0].size, int):
        return False
    whole = atoms[0]
    inner, rest = divmod(int(whole.size), outer)
    segments = segments_of(dim)
    counts = [product(flatten(s)) for s in segments]
    if rest or any(count % inner for count in counts):
        return False
    shared, groups = Atom(inner), Atom(outer)
    for segment, count in zip(segments, counts, strict=True):
        part = Atom(count // inner)
        if not _unify(segment, [part, shared], "a regrouping"):
            return False
        pin([[part]], "it is a group of channels that are laid out anew")
    whole.parts = [groups, shared]
    pin([[groups]], "it is a group of channels that are laid out anew")
    return True


def segments_of(dim: Sequence[Atom]) -> list[Dim]:
    """The dimension as a list of dimensions end to end; itself, if it is no concatenation."""
    atoms = flatten(dim)
    if not atoms or atoms[0].segments is None:
        return [atoms]
    rest = atoms[1:]
    return [
        piece for segment in atoms[0].segments for piece in segments_of([*flatten(segment), *rest])
    ]


def owners(dim: Sequence[Atom]) -> dict[int, Index]:
    """For every atom, by id, which of its indices each position of `dim` belongs to; -1: none.

    An atom that stands in `dim` twice as a factor owns positions doubly and is given as pinned
    by its caller; here the outer one counts.
    """
    atoms = flatten(dim)
    found: dict[int, Index] = {}
    positions = np.arange(product(atoms))
    inner = product(atoms)
    for atom in atoms:
        inner //= int(atom.size)
        own = positions // inner % int(atom.size)
        if atom.segments is None:
            found.setdefault(id(atom), own)
            continue
        start = 0
        for segment in atom.segments:
            length = product(flatten(segment))
            for key, index in owners(segment).items():
                held = np.full(int(atom.size), -1)
                held[start : start + length] = index
                local = held[own]
                if key in found:
                    local = np.where(found[key] >= 0, found[key], local)
                found[key] = local
            start += length
    return found


def repeats(dim: Sequence[Atom]) -> bool:
    """Whether some atom stands in a dimension twice as a factor, as in an outer product."""
    for segment in segments_of(dim):
        ids = [id(leaf) for atom in segment for leaf in {id(x): x for x in leaves([atom])}.values()]
        if len(ids) != len(set(ids)):
            return True
    return any(repeats(part) for atom in flatten(dim) for part in atom.segments or ())


def product(dim: Sequence[Atom]) -> int:
    """Number of indices of a dimension whose atoms are all concrete."""
    return math.prod(int(a.size) for a in dim)


def is_concrete(dim: Sequence[Atom]) -> bool:
    return all(isinstance(a.size, int) for a in flatten(dim))


def take(pool: Dim, size: Size) -> Dim | None:
    """Take atoms off the front of `pool` (in place) until they make up `size`; None if none do."""
    if isinstance(size, str):
        wanted, taken = sympy.sympify(size), Dim()
        while pool and size_of(taken) != wanted:
            taken.append(pool.pop(0))
        return taken if size_of(taken) == wanted else None
    found: Dim = []
    left = size
    while left > 1:
        if not pool or not isinstance(pool[0].size, int):
            return None
        head = pool[0].size
        if left % head == 0:
            found.append(pool.pop(0))
            left //= head
        elif head % left == 0 and (split(pool[0], left) or regroup([pool[0]], left)):
            pool[:] = flatten(pool)
        else:
            return None
    return found


def split(atom: Atom, outer: int) -> bool:
    """Split a plain atom into (outer, rest); pins and roles are inherited."""
    if atom.segments is not None or not isinstance(atom.size, int):
        return False
    if outer <= 1 or atom.size % outer:
        return False
    atom.parts = _heirs(atom, [outer, atom.size // outer])
    return True


def _heirs(atom: Atom, sizes: Sequence[int]) -> list[Atom]:
    parts = [Atom(size) for size in sizes]
    for part in parts:
        part.pins = list(atom.pins)
        part.ties = list(atom.ties)
        part.roles = set(atom.roles)
    return parts


def _unify(left: Dim, right: Dim, where: str) -> bool:
    a, b = flatten(left), flatten(right)
    while a and b:
        x, y = a[0], b[0]
        if x is y:
            a, b = a[1:], b[1:]
        elif x.size == y.size and (x.segments is None or y.segments is None):
            _link(x, y)
            a, b = flatten(a[1:]), flatten(b[1:])
        elif not isinstance(x.size, int) or not isinstance(y.size, int):
            return _is_product(a, b) or _is_product(b, a)
        elif x.size != y.size and split(*_big_and_small(x, y)):
            a, b = flatten(a), flatten(b)
        elif x.segments is not None or y.segments is not None:
            return _align(a, b, where)
        else:
            return False
    return not a and not b


def _big_and_small(x: Atom, y: Atom) -> tuple[Atom, int]:
    """The larger atom, and the size of the smaller one."""
    big, small = (y, x) if int(x.size) < int(y.size) else (x, y)
    return big, int(small.size)


def _link(x: Atom, y: Atom) -> None:
    """Make the two one; a concatenation stays, a plain atom becomes a name for it."""
    kept, gone = (y, x) if x.segments is None and y.segments is not None else (x, y)
    gone.parts = [kept]
    for leaf in leaves([kept]):
        leaf.pins += gone.pins
        leaf.ties += gone.ties
        leaf.roles |= gone.roles


def _is_product(one: Dim, factors: Dim) -> bool:
    """Whether a single symbolic atom is as large as several together, which it stands for then: a
    batch times its heads."""
    (atom, *rest) = one
    if rest or isinstance(atom.size, int) or atom in factors:
        return False
    if sympy.sympify(atom.size) != size_of(factors):
        return False
    atom.parts = list(factors)
    for leaf in leaves(factors):
        leaf.pins += atom.pins
        leaf.ties += atom.ties
        leaf.roles |= atom.roles
    return True


def _align(a: Dim, b: Dim, where: str) -> bool:
    """Unify two dimensions segment by segment, cutting plain ones where the other has a border."""
    if not is_concrete(a) or not is_concrete(b):
        return False
    left, right = segments_of(a), segments_of(b)
    while left and right:
        x, y = left[0], right[0]
        m, n = product(flatten(x)), product(flatten(y))
        if m == n:
            if not _unify(x, y, where):
                return False
            left, right = left[1:], right[1:]
            continue
        shorter, longer = (left, right) if m < n else (right, left)
        cut = _cut(longer[0], min(m, n))
        if cut is None:
            return False
        head, rest = cut
        if not _unify(shorter[0], head, where):
            return False
        shorter.pop(0)
        longer[0] = rest
    return not left and not right


def _cut(dim: Dim, at: int) -> tuple[Dim, Dim] | None:
    """Cut a dimension that is no concatenation in two, after `at` indices."""
    atoms = flatten(dim)
    if not atoms or atoms[0].segments is not None or not is_concrete(atoms):
        return None
    outer, inner = atoms[0], atoms[1:]
    count, rest = divmod(at, product(inner))
    if rest or not 0 < count < int(outer.size):
        return None
    head, tail = _heirs(outer, [count, int(outer.size) - count])
    outer.parts = [Atom(outer.size, segments=[[head], [tail]])]
    return [head, *inner], [tail, *inner]


def kept_size(dim: Sequence[Atom], removed: Mapping[int, int]) -> int:
    """Size of a concrete dimension after `removed[id(atom)]` indices of its atoms are gone."""
    total = 1
    for atom in flatten(dim):
        if atom.segments is None:
            total *= int(atom.size) - removed.get(id(atom), 0)
        else:
            total *= sum(kept_size(segment, removed) for segment in atom.segments)
    return total
