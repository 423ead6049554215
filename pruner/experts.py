"""In which order the experts of a mixture go: what rerouting their tokens costs on real rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from zipc.core.types import Site
from zipc.pruner.graph.cuts import Cuts
from zipc.pruner.graph.interpret import Env, Executor, Variant
from zipc.pruner.obs import Sweep

TOKENS = 4096  # at which sets of experts are compared
Feeds = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Rows:
    """A batch as a mixture sees it."""

    feeds: Feeds
    live: Env  # all values where the router begins
    tokens: Tensor  # those that are no padding
    shares: Tensor  # (tokens, experts), of the dense router
    gram: Tensor  # (tokens, experts, experts): of what the experts give at a share of 1


@torch.no_grad()
def sweep_experts(executor: Executor, site: Site, batches: Sequence[Feeds]) -> Sweep:
    """Remove experts greedily, always the one without which the mixture's output changes least.

    A mixture gives a token the sum over its experts of share times output. The shares for any set
    of experts come from the router itself, whose softmax and choice run over those that are left;
    the outputs stay. So the error of a set is `sum_t d_t' G_t d_t`, with d the change of the shares
    and G the Gram matrix of the experts' outputs for token t, relative to the same of the dense
    shares.
    """
    rows: list[_Rows] = []
    for feeds in batches:
        if sum(len(r.tokens) for r in rows) < TOKENS:
            rows.append(_rows(executor, site, feeds))
    energy = sum(_energy(r.shares, r.gram) for r in rows)
    left, order, errors = list(range(site.units)), [], [0.0]
    while len(left) > site.least:
        trials = []
        for expert in left:
            kept = [e for e in left if e != expert]
            lost = sum(_energy(r.shares - _shares(executor, site, r, kept), r.gram) for r in rows)
            trials.append((lost, expert))
        lost, gone = min(trials)
        left.remove(gone)
        order.append(gone)
        errors.append(lost / energy if energy > 0 else 0.0)
    # what is left can only go together, and with it all that the mixture gives
    return Sweep((*order, *left), (*errors, *[1.0] * len(left)))


def _energy(shares: Tensor, gram: Tensor) -> float:
    return float(torch.einsum("te,tef,tf->", shares.double(), gram.double(), shares.double()))


def _rows(executor: Executor, site: Site, feeds: Feeds) -> _Rows:
    first = executor.first_effect(site)
    _, saved = executor.run(feeds, Variant(), cuts=[first], stop=first + 1)
    live = saved[first]
    shares = _routed(executor, site, feeds, live, Variant())
    ones = {pick: torch.ones_like(shares[:, :1]) for e in site.experts for pick in e.picks}
    last = [[c.node for c in executor.program.maps if c.module in e.ends] for e in site.experts]
    ends = {node: torch.empty(0) for nodes in last for node in nodes}
    stop = max(map(executor.index, ends)) + 1
    executor.run(feeds, Variant(), start=first, live=live | ones, stop=stop, captured=ends)
    outputs = torch.stack([torch.cat([ends[n] for n in nodes], dim=-1) for nodes in last], dim=1)
    tokens, mask = torch.arange(len(shares)), feeds.get("attention_mask")
    if mask is not None and mask.numel() == len(shares):
        tokens = mask.flatten().nonzero().flatten()
    outputs = outputs[tokens]  # (tokens, experts, d)
    return _Rows(feeds, live, tokens, shares[tokens], outputs @ outputs.transpose(1, 2))


def _shares(executor: Executor, site: Site, rows: _Rows, kept: Sequence[int]) -> Tensor:
    """Shares of all experts (tokens, experts) where only those `kept` can be chosen."""
    cuts, weights = Cuts([site]), dict(executor.program.tensors.values())
    tensors = {n: cuts.cut(weights[n], n, {site.name: kept}) for n in cuts.pieces}
    variant = Variant(tensors=tensors, widths={site.name: len(kept)})
    found = _routed(executor, site, rows.feeds, rows.live, variant)[rows.tokens]
    shares = torch.zeros_like(rows.shares)
    shares[:, list(kept)] = found
    return shares


def _routed(executor: Executor, site: Site, feeds: Feeds, live: Env, variant: Variant) -> Tensor:
    """What the picks of the experts are taken from."""
    picks = {pick for expert in site.experts for pick in expert.picks}
    source = next(n.args[0] for n in executor.program.nodes if n.name in picks)
    assert isinstance(source, fx.Node)
    first, found = executor.first_effect(site), {source.name: torch.empty(0)}
    stop = executor.index(source.name) + 1
    executor.run(feeds, variant, start=first, live=live, stop=stop, captured=found)
    return found[source.name]
