"""A site at which the module's own code does not follow is left alone, and no other is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.three_ways import by_surgery, gap, inert, random_sets, single_units, whole_sites
from tests.tiny_models import Case, randomise_, traced
from zipc.pruner.graph.sites import Rewrite, find_sites
from zipc.pruner.graph.trace import trace
from zipc.pruner.graph.verify import verify

WIDTH, HEADS = 12, 3
EXACT = 1e-10


class Block(nn.Module):
    """Two residual branches; the code of the first is given, the second is an ordinary one."""

    def __init__(self, code: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.query, self.key, self.value = (nn.Linear(8, WIDTH) for _ in range(3))
        self.narrow = nn.Linear(WIDTH // 2, 8)
        self.lanes, self.lane_size = HEADS, WIDTH // HEADS
        self.num_heads = HEADS
        self.breadth = WIDTH
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        return x + self.code(self, x)


class Net(nn.Module):
    def __init__(self, code: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.block = Block(code)
        self.up, self.down = nn.Linear(8, 10), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return x + self.down(F.relu(self.up(x)))


def net(code: Callable[[Block, Tensor], Tensor]) -> Case:
    module = Net(code)
    randomise_(module)
    module = module.double().eval().requires_grad_(False)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    return traced(module, {"x": x}, dynamic={"x": {0: "batch"}})


def prove(made: Case) -> None:
    trials = [kept for _, _, kept in single_units(made)]
    trials += [kept for _, kept in whole_sites(made)]
    trials += random_sets(made, 4)
    for kept in trials:
        assert gap(by_surgery(made, kept, made.example), inert(made, kept, made.example)) < EXACT


def names(made: Case) -> list[str]:
    return [site.name for site in made.sites]


def reason_of(made: Case, site: str) -> str:
    (entry,) = [entry for entry in made.structure.left_alone if entry.path == site]
    return entry.reason


# --- code that does not follow -------------------------------------------------------------------


def _split_by_numbers(m: Block, x: Tensor) -> Tensor:
    a, b = m.up(x).split((6, 6), dim=-1)
    return m.narrow(F.relu(a) * b)


def _view_by_numbers(m: Block, x: Tensor) -> Tensor:
    return m.down(m.up(x).view(-1, 12)).view(x.shape)


def _width_as_a_number(m: Block, x: Tensor) -> Tensor:
    h = F.relu(m.up(x))
    return m.down(h * (1 / h.shape[-1]))


def _width_decides(m: Block, x: Tensor) -> Tensor:
    h = m.up(x)
    return m.down(F.relu(h) if h.shape[-1] > 11 else torch.tanh(h))


def _width_is_asserted(m: Block, x: Tensor) -> Tensor:
    h = m.up(x)
    assert h.shape[-1] == WIDTH, "the width is part of the design"
    return m.down(F.relu(h))


def _apart(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


STUBBORN: dict[str, tuple[Callable[[Block, Tensor], Tensor], str]] = {
    "split by numbers": (_split_by_numbers, "split_with_sizes"),
    "view by numbers": (_view_by_numbers, "invalid for input of size"),
    "width as a number": (_width_as_a_number, "computes something else"),
    "width decides": (_width_decides, "computes something else"),
    "width is asserted": (_width_is_asserted, "the width is part of the design"),
}


@pytest.mark.parametrize("name", STUBBORN)
def test_only_the_site_that_does_not_follow_is_left_alone(name: str) -> None:
    code, reason = STUBBORN[name]
    made = net(code)
    assert names(made) == ["up"]
    (entry,) = [e for e in made.structure.left_alone if "follow" in e.reason]
    assert entry.path.startswith("block")
    assert reason in entry.reason
    prove(made)


# --- code that follows, once an attribute is rewritten -------------------------------------------


def _known_attribute(m: Block, x: Tensor) -> Tensor:
    q, k, v = (_apart(f(x), m.num_heads) for f in (m.query, m.key, m.value))
    return m.down(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _attribute_of_another_name(m: Block, x: Tensor) -> Tensor:
    q, k, v = (_apart(f(x), m.lanes) for f in (m.query, m.key, m.value))
    return m.down(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _two_attributes(m: Block, x: Tensor) -> Tensor:
    batch, length, _ = x.shape
    q, k, v = (
        f(x).view(batch, length, m.lanes, m.lane_size).transpose(1, 2)
        for f in (m.query, m.key, m.value)
    )
    made = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return m.down(made.reshape(batch, length, m.breadth))


def _total_width(m: Block, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)).view(*x.shape[:-1], m.breadth))


FOLLOWS: dict[str, tuple[Callable[[Block, Tensor], Tensor], set[tuple[str, int]]]] = {
    "known attribute": (_known_attribute, {("num_heads", 1)}),
    "attribute of another name": (_attribute_of_another_name, {("lanes", 1)}),
    "two attributes": (_two_attributes, {("lanes", 1), ("breadth", WIDTH // HEADS)}),
    "total width": (_total_width, {("breadth", 1)}),
}


@pytest.mark.parametrize("name", FOLLOWS)
def test_attributes_that_hold_a_width_are_found_and_rewritten(name: str) -> None:
    code, wanted = FOLLOWS[name]
    made = net(code)
    assert len(made.sites) == 2
    site = made.sites[0]
    found = {(a.attribute, a.factor) for a in made.structure.attributes if a.module == "block"}
    assert wanted <= found
    assert {a.site for a in made.structure.attributes} <= {site.name}
    prove(made)
    # the size of a head is no number of heads: it must have stayed
    assert ("lane_size", 1) not in found


def test_attributes_of_a_case_are_rewrites_of_the_site() -> None:
    made = net(_attribute_of_another_name)
    assert Rewrite("block", "lanes", made.sites[0].name, 1) in made.structure.attributes


# --- several sites together ----------------------------------------------------------------------


class Counted(nn.Module):
    """The sum of two inner widths decides what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.up1, self.down1 = nn.Linear(8, 6), nn.Linear(6, 8)
        self.up2, self.down2 = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.up1(x)), F.relu(self.up2(x))
        if a.shape[-1] + b.shape[-1] < 7:
            return x
        return x + self.down1(a) + self.down2(b)


def test_of_sites_that_follow_alone_but_not_together_the_first_stay() -> None:
    module = Counted()
    randomise_(module)
    module = module.double().eval().requires_grad_(False)
    made = traced(module, {"x": torch.randn(2, 8).double()}, dynamic={"x": {0: "batch"}})
    assert names(made) == ["up1"]
    assert "beside other sites" in reason_of(made, "up2")
    prove(made)


class Shuffled(nn.Module):
    """Groups of a convolution are interleaved by a number in the code.

    With one channel left in each group the order is right by chance.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 1)
        self.mix = nn.Conv2d(8, 4, 1, groups=2)
        self.leave = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(F.relu(self.enter(x)))
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2)
        return self.leave(F.relu(x.reshape(batch, channels, height, width)))


def test_a_site_that_is_right_by_chance_beside_others_is_left_alone() -> None:
    module = Shuffled()
    randomise_(module)
    module = module.double().eval().requires_grad_(False)
    made = traced(module, {"x": torch.randn(2, 3, 4, 4).double()}, dynamic={"x": {0: "batch"}})
    prove(made)
    assert made.sites


# --- whole sites ---------------------------------------------------------------------------------


def _asks_the_map(m: Block, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x.to(m.up.weight.dtype))).to(m.down.weight.dtype))


def _asks_for_its_width(m: Block, x: Tensor) -> Tensor:
    h = F.relu(m.up(x))
    assert m.down.in_features == h.shape[-1]
    return m.down(h)


def test_code_that_asks_a_map_for_its_dtype_follows_its_removal() -> None:
    made = net(_asks_the_map)
    assert [s.removable for s in made.sites] == [True, True]
    prove(made)


def test_a_site_whose_removal_the_code_does_not_bear_keeps_a_unit() -> None:
    made = net(_asks_for_its_width)
    assert names(made) == ["block.up", "up"]
    assert [s.removable for s in made.sites] == [False, True]
    prove(made)


# --- what is compared ----------------------------------------------------------------------------


class Two(nn.Module):
    """The second output does not follow; the first does."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.up(x))
        y = self.down(h)
        return y, y / h.shape[-1]


@pytest.mark.parametrize(("outputs", "sites"), [(1, ["up"]), (None, [])])
def test_only_outputs_that_are_asked_for_are_compared(
    outputs: int | None, sites: list[str]
) -> None:
    module = Two()
    randomise_(module)
    module = module.double().eval().requires_grad_(False)
    x = {"x": torch.randn(2, 8).double()}
    made = traced(module, x, dynamic={"x": {0: "batch"}}, outputs=outputs)
    assert names(made) == sites


def test_without_values_the_shapes_alone_are_compared() -> None:
    """A module on the meta device: what disagrees in shape is found, what in value is not."""
    for code, lost in ((_view_by_numbers, True), (_width_as_a_number, False)):
        module = Net(code).to("meta").eval()
        x = {"x": torch.empty(2, 5, 8, device="meta")}
        program = trace(module, x, dynamic={"x": {0: "batch"}})
        structure = verify(module, program, find_sites(program), x)
        assert ("block.up" not in [s.name for s in structure.sites]) == lost
        assert "up" in [s.name for s in structure.sites]
        assert all(s.removable for s in structure.sites)


def test_verifying_leaves_the_module_as_it_was() -> None:
    module = Net(_attribute_of_another_name)
    randomise_(module)
    module = module.eval().requires_grad_(False)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    traced(module, {"x": torch.randn(2, 5, 8)}, dynamic={"x": {0: "batch"}})
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    assert module.block.lanes == HEADS


def test_what_the_outputs_hang_on_cannot_be_removed() -> None:
    """Without it they would be the same for every input; a branch beside a way through may go."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)
            self.up, self.down = nn.Linear(8, 4), nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x))
            return self.last(torch.tanh(x + self.down(F.relu(self.up(x)))))

    made = traced(Net().eval().requires_grad_(False), {"x": torch.randn(3, 5, 6)})
    assert {s.name: s.removable for s in made.sites if s.kind != "width"}["up"]
    assert not any(s.removable for s in made.sites if s.name != "up")


def test_outputs_that_read_the_size_of_an_input_alone_hang_on_none_of_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.first(x))).reshape(x.shape[0], -1)

    example = {"x": torch.randn(3, 5, 6)}
    made = traced(Net().eval().requires_grad_(False), example, dynamic={"x": {0: "batch"}})
    assert [(s.name, s.removable) for s in made.sites] == [("first", False)]
