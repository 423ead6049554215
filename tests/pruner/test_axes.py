"""Dimensions that are cut, joined, regrouped and made equal, against lists of their positions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zipc.pruner.graph.axes import (
    Atom,
    Dim,
    carve,
    concatenated,
    flatten,
    kept_size,
    leaves,
    owners,
    pin,
    product,
    regroup,
    repeats,
    segments_of,
    split,
    take,
    unify,
)

Label = tuple[tuple[int, int], ...]  # (atom, index) of all that a position belongs to


def positions(dim: Sequence[Atom]) -> list[Label]:
    """What every position of a dimension belongs to, outermost factor first, by enumeration."""
    choices: list[list[Label]] = []
    for atom in flatten(dim):
        if atom.segments is None:
            choices.append([((id(atom), i),) for i in range(int(atom.size))])
        else:
            choices.append([label for segment in atom.segments for label in positions(segment)])
    return [tuple(itertools.chain(*parts)) for parts in itertools.product(*choices)]


def stays(dim: Sequence[Atom], gone: Mapping[int, set[int]]) -> list[bool]:
    """Which positions are left when some indices of some atoms are gone."""
    return [all(i not in gone.get(atom, ()) for atom, i in label) for label in positions(dim)]


def plain(*sizes: int) -> list[Dim]:
    return [[Atom(size)] for size in sizes]


def units(dim: Sequence[Atom], atom: Atom) -> list[int]:
    return owners(dim)[id(flatten([atom])[0])].tolist()


# --- by hand -------------------------------------------------------------------------------------


def test_equal_dimensions_are_one() -> None:
    a, b, c = plain(6, 6, 6)
    unify(a, b, where="x")
    unify(c, b, where="y")
    assert flatten(a) == flatten(b) == flatten(c)
    pin([a], "why")
    assert leaves(c)[0].pins == ["why"]


def test_what_is_known_of_either_is_known_of_both() -> None:
    a, b = plain(6, 6)
    pin([a], "left")
    pin([b], "right")
    unify(a, b, where="x")
    assert set(leaves(a)[0].pins) == {"left", "right"}


def test_other_groupings_are_split_to_their_common_refinement() -> None:
    """12 = 3 x 4 = 6 x 2 is 3 x 2 x 2."""
    whole, threes, sixes = [Atom(12)], [Atom(3), Atom(4)], [Atom(6), Atom(2)]
    unify(whole, threes, where="x")
    unify(whole, sixes, where="y")
    assert [a.size for a in flatten(whole)] == [3, 2, 2]
    assert flatten(whole) == flatten(threes) == flatten(sixes)


@pytest.mark.parametrize(("left", "right"), [([6], [5]), ([4, 3], [3, 4]), ([6], [4])])
def test_sizes_that_do_not_line_up_are_pinned_with_the_place(
    left: list[int], right: list[int]
) -> None:
    a, b = [Atom(n) for n in left], [Atom(n) for n in right]
    unify(a, b, where="there")
    assert all("there" in atom.pins[0] for atom in leaves([*a, *b]))


def test_symbolic_sizes_are_only_equal_to_themselves() -> None:
    a, b, c = [Atom("s0")], [Atom("s0")], [Atom("s1")]
    unify(a, b, where="x")
    assert flatten(a) == flatten(b)
    assert not leaves(a)[0].pins
    unify(a, c, where="y")
    assert leaves(a)[0].pins
    assert leaves(c)[0].pins


def test_a_concatenation_owns_what_its_parts_own() -> None:
    a, b = plain(2, 3)
    both = concatenated([a, b])
    assert units(both, a[0]) == [0, 1, -1, -1, -1]
    assert units(both, b[0]) == [-1, -1, 0, 1, 2]
    reader = [Atom(5)]
    unify(reader, both, where="x")
    assert units(reader, b[0]) == [-1, -1, 0, 1, 2]
    assert segments_of(reader) == [flatten(a), flatten(b)]


def test_a_flattened_concatenation_is_owned_position_by_position() -> None:
    """Two channels and one, each with three positions behind it."""
    a, b, place = plain(2, 1, 3)
    b = [Atom(1)]
    flat = [*concatenated([a, [Atom(2)]]), *place]
    assert units(flat, a[0]) == [0, 0, 0, 1, 1, 1, -1, -1, -1, -1, -1, -1]
    assert units(flat, place[0]) == [0, 1, 2] * 4
    assert b


def test_twice_the_same_means_both_go() -> None:
    a = [Atom(3)]
    twice = concatenated([a, a])
    assert units(twice, a[0]) == [0, 1, 2, 0, 1, 2]
    assert not repeats(twice)
    assert repeats([*a, *a])
    assert repeats(concatenated([[Atom(2)], [*a, *a]]))
    assert not repeats([*concatenated([a, [Atom(2)]]), Atom(4)])


def test_concatenations_with_other_borders_are_cut_at_all_of_them() -> None:
    """2 + 4 read as 4 + 2 is 2 + 2 + 2."""
    a, b, c, d = plain(2, 4, 4, 2)
    left, right = concatenated([a, b]), concatenated([c, d])
    unify(left, right, where="x")
    assert [product(s) for s in segments_of(left)] == [2, 2, 2]
    assert positions(left) == positions(right)
    assert positions(c) == positions(left)[:4]
    assert positions(d) == positions(left)[4:]


def test_pieces_are_dimensions_of_their_own() -> None:
    whole = [Atom(7)]
    pieces = carve(whole, [3, 2, 2])
    assert pieces is not None
    assert [product(flatten(p)) for p in pieces] == [3, 2, 2]
    assert positions(whole) == [label for p in pieces for label in positions(p)]
    assert not set(positions(pieces[0])) & set(positions(pieces[1]))


def test_pieces_of_a_concatenation_follow_or_cross_its_borders() -> None:
    a, b = plain(3, 4)
    pieces = carve(concatenated([a, b]), [5, 2])
    assert pieces is not None
    assert units(pieces[0], a[0]) == [0, 1, 2, -1, -1]
    assert positions(b) == positions(pieces[0])[3:] + positions(pieces[1])


def test_a_cut_through_an_inner_factor_is_refused() -> None:
    assert carve([Atom(3), Atom(4)], [6, 6]) is None
    pieces = carve([Atom(3), Atom(4)], [8, 4])
    assert pieces is not None
    assert [a.size for a in flatten(pieces[0])] == [2, 4]
    assert carve([Atom("s0")], [2, 2]) is None
    assert carve([Atom(4)], [3, 2]) is None
    assert carve([Atom(4)], [3]) is None


def test_a_channel_shuffle_is_read_in_strides() -> None:
    """(2, 4) written, (4, 2) read: position p belongs to group p % 2 and channel p // 2."""
    channels = [Atom(8)]
    pool = flatten(channels)
    groups = take(pool, 2)
    within = take(pool, 4)
    assert groups is not None
    assert within is not None
    shuffled = [*within, *groups]
    assert units(channels, groups[0]) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert units(shuffled, groups[0]) == [0, 1] * 4
    assert units(shuffled, within[0]) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_halves_of_equal_size_are_read_as_groups_that_share_their_channels() -> None:
    """What a shuffle does to a concatenation of two branches."""
    a, b = plain(4, 4)
    both = concatenated([a, b])
    assert regroup(both, 2)
    assert flatten(a)[-1] is flatten(b)[-1]
    shared = flatten(a)[-1]
    assert [atom.size for atom in flatten(both)] == [2, 4]
    assert units(both, shared) == [0, 1, 2, 3, 0, 1, 2, 3]
    assert flatten(both)[0].pins
    assert not shared.pins


def test_segments_of_several_groups_share_one_group_of_channels() -> None:
    a, b = plain(2, 4)
    both = concatenated([a, b])
    assert regroup(both, 3)
    assert [atom.size for atom in flatten(both)] == [3, 2]
    assert [atom.size for atom in flatten(b)] == [2, 2]
    assert flatten(b)[0].pins
    assert units(b, flatten(a)[-1]) == [0, 1, 0, 1]


@pytest.mark.parametrize(("sizes", "outer"), [((3, 5), 2), ((2, 3), 5 + 1), ((4, 2), 4 - 1 + 4)])
def test_groups_that_cross_a_border_are_refused(sizes: tuple[int, ...], outer: int) -> None:
    assert not regroup(concatenated(plain(*sizes)), outer)
    assert not regroup([Atom(8)], 2)


def test_a_view_that_cuts_through_a_factor_takes_nothing() -> None:
    assert take([Atom(4), Atom(3)], 6) is None
    assert take([Atom(6)], 4) is None
    assert take([Atom("s0")], 4) is None
    pool = [Atom("s0"), Atom("s1"), Atom(4)]
    taken = take(pool, "s0*s1")
    assert taken is not None
    assert [a.size for a in taken] == ["s0", "s1"]
    assert [a.size for a in pool] == [4]


def test_split_refuses_what_has_no_two_factors() -> None:
    assert not split(Atom(6), 4)
    assert not split(Atom("s0"), 2)
    assert not split(concatenated(plain(2, 2))[0], 2)
    atom = Atom(6)
    pin([[atom]], "why")
    assert split(atom, 2)
    assert [(a.size, a.pins) for a in flatten([atom])] == [(2, ["why"]), (3, ["why"])]


# --- by random programs --------------------------------------------------------------------------

STEPS = ("new", "cat", "carve", "chunk", "view", "merge", "unify", "pad")
Steps = list[tuple[str, int, int, int]]


class Program:
    """Dimensions made by random operations, and what each operation says of their positions."""

    def __init__(self) -> None:
        self.dims: list[Dim] = [[Atom(6)], [Atom(4)]]
        self.same: list[tuple[Dim, Dim]] = []
        self.ends: list[tuple[Dim, list[Dim]]] = []  # whole, parts end to end
        self.grids: list[tuple[Dim, list[Dim]]] = []  # whole, (outer, inner)

    def step(self, kind: str, i: int, j: int, size: int) -> None:
        a, b = self.dims[-1 - i % len(self.dims)], self.dims[-1 - j % len(self.dims)]
        count, other = product(flatten(a)), product(flatten(b))
        if kind == "new":
            self.dims.append([Atom(size)])
        elif kind == "cat" and count + other <= 40:
            self._joined([a, b])
        elif kind == "pad":
            edge: Dim = [Atom(size)]
            pin([edge], "padding")
            self._joined([a, edge] if i % 2 else [edge, a])
        elif kind == "carve" and count > 1:
            first = 1 + size % (count - 1)
            self._carved(a, [first, count - first])
        elif kind == "chunk" and count % 2 == 0:
            if self._carved(a, [count // 2, count // 2]):
                self._equal(self.dims[-2], self.dims[-1])
        elif kind == "view":
            outer = next((d for d in range(size, count) if count % d == 0), 1)
            pool = flatten(a)
            taken = take(pool, outer)
            rest = None if taken is None else take(pool, count // outer)
            if taken is None or rest is None:
                pin([a], "the view is not understood")
                return
            self.grids.append((a, [taken, rest]))
            self.dims += [taken, rest]
        elif kind == "merge" and count * other <= 60:
            self.dims.append([*flatten(a), *flatten(b)])
            self.grids.append((self.dims[-1], [a, b]))
        elif kind == "unify":
            equal = [d for d in self.dims if product(flatten(d)) == count and d is not a]
            if equal:
                self._equal(a, equal[j % len(equal)])

    def _equal(self, a: Dim, b: Dim) -> None:
        unify(a, b, where="somewhere")
        self.same.append((a, b))

    def _joined(self, parts: list[Dim]) -> None:
        self.dims.append(concatenated(parts))
        self.ends.append((self.dims[-1], parts))

    def _carved(self, whole: Dim, sizes: list[int]) -> bool:
        pieces = carve(whole, sizes)
        if pieces is None:
            pin([whole], "it cannot be cut there")
            return False
        self.ends.append((whole, pieces))
        self.dims += pieces
        return True


steps = st.lists(
    st.tuples(st.sampled_from(STEPS), st.integers(0, 5), st.integers(0, 5), st.integers(2, 8)),
    max_size=14,
)


def run(made: Steps) -> Program:
    program = Program()
    for step in made:
        program.step(*step)
    for dim in program.dims:
        if repeats(dim):
            pin([dim], "its units meet each other in one dimension")
    return program


WITHIN_A_FACTOR: Steps = [  # an outer product in a concatenation that is itself an inner factor
    *(("merge", 0, 0, 2), ("pad", 0, 0, 4), ("carve", 0, 0, 2)),
    *(("carve", 2, 0, 3), ("carve", 0, 0, 3), ("merge", 5, 4, 2)),
]


@settings(max_examples=400, deadline=None)
@given(steps)
@example(WITHIN_A_FACTOR)
def test_owners_are_those_of_the_enumeration(made: Steps) -> None:
    for dim in run(made).dims:
        labels = positions(dim)
        assert product(flatten(dim)) == len(labels)
        if repeats(dim):
            continue
        found = owners(dim)
        assert set(found) == {atom for label in labels for atom, _ in label}
        for atom, own in found.items():
            assert own.tolist() == [dict(label).get(atom, -1) for label in labels]


@settings(max_examples=600, deadline=None)
@given(steps, st.integers(0, 1000))
def test_removing_free_units_leaves_every_operation_true(made: Steps, seed: int) -> None:
    program = run(made)
    rng = random.Random(seed)
    free = {id(a): a for d in program.dims for a in leaves(d) if not a.pins}
    gone = {
        key: {i for i in range(int(atom.size)) if rng.random() < 0.4} for key, atom in free.items()
    }
    for a, b in program.same:
        assert stays(a, gone) == stays(b, gone)
    for whole, parts in program.ends:
        assert stays(whole, gone) == [kept for part in parts for kept in stays(part, gone)]
    for whole, (outer, inner) in program.grids:
        grid = np.outer(stays(outer, gone), stays(inner, gone))
        assert stays(whole, gone) == grid.flatten().tolist()
    counts = {key: len(units) for key, units in gone.items()}
    for dim in program.dims:
        if not repeats(dim):
            assert kept_size(dim, counts) == sum(stays(dim, gone))


@settings(max_examples=200, deadline=None)
@given(steps)
def test_what_operations_equate_has_the_same_owners(made: Steps) -> None:
    """Unless it could not be made equal: then none of it may go."""
    program = run(made)
    for a, b in program.same:
        if positions(a) != positions(b):
            assert all(atom.pins for atom in leaves([*a, *b]))
