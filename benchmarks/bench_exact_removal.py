"""Removing units is exact on every small network of the tests, where Torch-Pruning errs on some.

    python benchmarks/bench_exact_removal.py

For zipc half the units of each site leave; for Torch-Pruning (`pip install torch-pruning`) half the
channels of each of its groups, heads as a whole, chosen at random. In float64 the smaller network
is compared with the dense one in which the same units are shown to their readers as zeros: `exact`,
`wrong` (it runs and says nothing, but computes something else), `fails` (it raises) or `endless`
(no group is found within 120 s of processor time).
Torch-Pruning is told the heads of every projection, as its manual asks, and its groups are left out
where zeros are no oracle: those with a normalisation over the channels, and those that change the
shape of an output. Adversaries are graphs made to mislead: there a unit may also be left alone,
which both tools do by offering nothing. Results go to benchmarks/results/exact_removal.json.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from provenance import commit
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tests.three_ways import by_surgery, case_of, gap, inert, tolerance
from tests.tiny_models import Case, everything
from tests.zoo import ZOO, Family
from tests.zoo.adversarial import ADVERSARIES
from zipc.core.errors import ZipcError
from zipc.core.files import write_json
from zipc.core.quiet import hush

RESULTS = Path(__file__).parent / "results" / "exact_removal.json"
LIMIT_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    networks = {
        kind: {name: one_network(name, made) for name, made in families.items()}
        for kind, families in (("families", ZOO), ("adversaries", ADVERSARIES))
    }
    every = [row["zipc"] for rows in networks.values() for row in rows.values()]
    document = {
        "schema_version": 1,
        "claim": __doc__.splitlines()[0],
        "passed": all(set(row) == {"exact"} for row in every if row),
        "commit": commit(),
        "summary": {kind: summary(rows) for kind, rows in networks.items()},
        **networks,
    }
    write_json(arguments.out, document)
    print(f"{document['summary']}\npassed: {document['passed']}; written to {arguments.out}")


def one_network(name: str, family: Family) -> dict[str, Any]:
    """How often each tool is right on this network."""
    with hush():
        try:
            made = case_of(family)
        except ZipcError as error:
            return {"zipc": {}, "zipc_says": str(error), "torch_pruning": {}}
        ours = Counter(of_zipc(made, tolerance(family)))
        theirs = Counter(of_torch_pruning(made, tolerance(family)))
    row = {"zipc": dict(ours), "torch_pruning": dict(theirs)}
    print(f"{name}: {row}", flush=True)
    return row


def of_zipc(made: Case, bound: float) -> Iterator[str]:
    for site in made.sites:
        kept = everything(made) | {site.name: range(0, site.units, 2)}
        want = inert(made, kept, made.example)
        yield verdict(partial(by_surgery, made, kept, made.example), want, bound)


def of_torch_pruning(made: Case, bound: float) -> Iterator[str]:
    """A verdict for every group, each cut alone from a fresh copy of the network."""
    try:
        with limited():
            count = len(list(grouped(made)[1]))
    except TimeoutError:
        yield "endless"
        return
    except Exception:  # whatever it raises on a graph it cannot follow
        yield "fails"
        return
    for index in range(count):
        module, groups = grouped(made)
        group = next(itertools.islice(groups, index, None), None)
        if group is None:  # it finds fewer in a second copy of the same network
            yield "fails"
            return
        if any(masks(dependency.target.module) for dependency, _ in group):
            continue
        want = zeroed(made, module, group)
        found = verdict(partial(pruned, made, module, group), want, bound)
        if found != "reaches an output":
            yield found


@contextmanager
def limited() -> Iterator[None]:
    """Raise TimeoutError in what runs longer than the limit."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def grouped(made: Case) -> tuple[nn.Module, Iterator[Any]]:
    """A copy of the network and the groups that Torch-Pruning would halve in it."""
    import torch_pruning as tp

    module = copy.deepcopy(made.written)
    for parameter in module.parameters():  # it follows gradients
        parameter.requires_grad_(True)
    heads = {module.get_submodule(path): count for path, count in heads_of(made)}
    pruner = tp.pruner.BasePruner(
        module,
        example_inputs=made.example,
        importance=tp.importance.RandomImportance(),
        pruning_ratio=0.5,
        head_pruning_ratio=0.5,
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        in_channel_groups={},
        out_channel_groups={},
        forward_fn=lambda net, feeds: net(**feeds),
    )
    return module, pruner.step(interactive=True)


def heads_of(made: Case) -> Iterator[tuple[str, int]]:
    """The projections of attention, each with its number of heads."""
    for site in made.sites:
        if site.kind != "heads":
            continue
        calls = [made.calls[path] for path in site.producers]
        owned = {
            call.module: len(piece.index[0])
            for call in calls
            for piece in site.slices
            if (piece.parameter, piece.dim) == (call.weight, call.out_dim)
        }
        for path, rows in owned.items():
            yield path, site.units * rows // min(owned.values())


def masks(module: nn.Module) -> bool:
    """Whether zeros at some channels change what it gives at others, or it is no module."""
    return isinstance(module, nn.Parameter | nn.GroupNorm) or type(module).__name__.endswith(
        ("LayerNorm", "RMSNorm")
    )


@torch.no_grad()
def zeroed(made: Case, module: nn.Module, group: Any) -> list[Tensor]:
    """Outputs of the dense network whose readers of the group's channels are shown zeros."""
    handles = [
        dependency.target.module.register_forward_pre_hook(
            partial(hide, channels=[getattr(c, "idx", c) for c in channels])
        )
        for dependency, channels in group
        if dependency.handler.__name__ == "prune_in_channels"
    ]
    try:
        return made.chosen(module(**made.example))
    finally:
        for handle in handles:
            handle.remove()


def hide(reader: nn.Module, given: tuple[Tensor, ...], *, channels: list[int]) -> Tensor:
    x = given[0].clone()
    x.movedim(1 if isinstance(reader, _ConvNd) else -1, 0)[channels] = 0.0
    return x


@torch.no_grad()
def pruned(made: Case, module: nn.Module, group: Any) -> list[Tensor]:
    group.prune()
    return made.chosen(module(**made.example))


def verdict(run: Callable[[], list[Tensor]], want: list[Tensor], bound: float) -> str:
    try:
        apart = gap(run(), want)
    except Exception:  # whatever a network raises that was cut wrongly
        return "fails"
    if apart == float("inf"):
        return "reaches an output"
    return "exact" if apart < bound else "wrong"


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Networks by the worst that happens to any of their cuts; `offers nothing` has none."""
    found: dict[str, dict[str, int]] = {}
    for tool in ("zipc", "torch_pruning"):
        worst = [
            next(
                (v for v in ("wrong", "fails", "endless", "exact") if v in row[tool]),
                "offers nothing",
            )
            for row in rows.values()
        ]
        found[tool] = dict(Counter(worst))
    return found


if __name__ == "__main__":
    main()
