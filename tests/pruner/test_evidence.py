"""Evidence equals direct sums over the tokens that are not padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import FAMILIES, Case, build, case, randomise_, text, traced
from zipc.core.errors import UsageError
from zipc.pruner.evidence import SAMPLE_ROWS, InputStats, _InOrder, collect

pytestmark = pytest.mark.xdist_group("encoders")


def seen(made: Case, batches: list[dict[str, Tensor]], module: str) -> Tensor:
    """All unpadded rows that reach a module, over all of its calls, in fp64."""
    rows: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x, mask = args[0], feeds.get("attention_mask")
        rows.append(x[mask.bool()] if mask is not None and x.dim() == 3 else x.flatten(0, -2))

    handle = made.module.get_submodule(module).register_forward_pre_hook(keep)
    with torch.no_grad():
        for feeds in batches:
            made.module(**feeds)
    handle.remove()
    return torch.cat(rows).double()


def check(held: InputStats, rows: Tensor) -> None:
    scale = float((rows.T @ rows).abs().max())
    torch.testing.assert_close(held.gram, (rows.T @ rows)[None], atol=1e-5 * scale, rtol=1e-5)
    torch.testing.assert_close(held.total, rows.sum(0)[None], atol=1e-4, rtol=1e-5)
    assert held.gram.dtype == held.total.dtype == torch.float64
    assert held.count == len(rows)
    assert held.low == pytest.approx(min(0.0, float(rows.min())), abs=1e-6)
    assert held.high == pytest.approx(max(0.0, float(rows.max())), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_the_unpadded_tokens_of_all_calls(family: str) -> None:
    made = case(family)
    # the second batch is as long as the model is wide: rows and channels must not be confused
    batches = [
        text(family, batch=3, length=7, seed=1),
        text(family, batch=2, length=32, seed=2),
    ]
    modules = {m for s in made.sites for m in s.maps}
    stats = collect(made.executor, batches, modules=sorted(modules))
    assert set(stats) == modules
    for module in modules:
        check(stats[module], seen(made, batches, module))


def test_samples_are_rows_that_were_seen() -> None:
    made = case("bert")
    batches = [text("bert", batch=4, length=9, seed=s) for s in range(3)]
    module = made.sites[1].consumers[0].module
    held = collect(made.executor, batches, modules=[module])[module]
    rows = seen(made, batches, module).float()
    assert len(held.sample) == min(len(rows), SAMPLE_ROWS)
    distance = (held.sample[:, None] - rows[None]).abs().amax(2).amin(1)
    assert float(distance.max()) < 1e-4
    again = collect(made.executor, batches, modules=[module])[module]
    assert torch.equal(again.sample, held.sample)


def test_modules_with_one_input_share_one_record() -> None:
    made = case("bert")
    names = ["query", "key", "value"]
    paths = [f"encoder.layer.0.attention.self.{n}" for n in names]
    stats = collect(made.executor, [made.example], modules=paths)
    assert stats[paths[0]] is stats[paths[1]] is stats[paths[2]]
    assert stats[paths[0]].count == int(made.example["attention_mask"].sum())


class Overlap(nn.Module):
    """`b` reads what `a` reads, and something else besides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, 8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        y = self.a(x) + self.b(x)
        return self.b(y.tanh()) * attention_mask[..., None]


def test_inputs_that_overlap_only_in_part_are_not_taken_for_the_same() -> None:
    module = Overlap()
    randomise_(module)
    feeds = {k: v for k, v in text("bert").items() if k != "token_type_ids"}
    made = traced(module.eval().requires_grad_(False), feeds)
    stats = collect(made.executor, [feeds], modules=["a", "b"])
    for path in ("a", "b"):
        check(stats[path], seen(made, [feeds], path))


def test_without_a_mask_every_token_counts() -> None:
    made = case("bert")
    feeds = dict(made.example)
    feeds["attention_mask"] = torch.ones_like(feeds["attention_mask"])
    path = "encoder.layer.0.intermediate.dense"
    assert collect(made.executor, [feeds], modules=[path])[path].count == feeds["input_ids"].numel()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_module(bad: float) -> None:
    module = build("bert")
    module.get_submodule("encoder.layer.0.intermediate.dense").bias.data[3] = bad
    made = traced(module, text("bert"))
    with pytest.raises(UsageError, match=r"encoder\.layer\.0\.output\.dense"):
        collect(made.executor, [made.example], modules=["encoder.layer.0.output.dense"])


def test_only_padding_may_be_anything() -> None:
    """A NaN at a padded position is not looked at."""
    made = case("bert")
    feeds = text("bert", batch=2, length=8)
    path = "encoder.layer.0.attention.self.query"
    module = build("bert")
    module.get_submodule("embeddings.word_embeddings").weight.data[1] = float("nan")  # the pad id
    made = traced(module, text("bert"))
    collect(made.executor, [feeds], modules=[path])


def test_records_are_ordinary_tensors_and_progress_is_reported() -> None:
    made = case("bert")
    ticks: list[int] = []
    path = "encoder.layer.0.intermediate.dense"
    batches = [made.example] * 3
    stats = collect(made.executor, batches, modules=[path], on_batch=lambda: ticks.append(1))
    assert len(ticks) == 3
    assert not any(t.is_inference() for t in (stats[path].gram, stats[path].sample))


def test_what_threads_hand_in_is_done_in_order() -> None:
    done, turns = [], _InOrder()
    for number in (2, 0, 3, 1):
        turns.take("map", number, lambda n=number: done.append(n))  # type: ignore[misc]
        assert done == list(range(len(done)))
    assert done == [0, 1, 2, 3]
    assert turns.idle
    turns.take("other", 1, lambda: None)
    assert not turns.idle
