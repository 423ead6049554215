"""Score candidates by the oracle on really sliced weights, starting where they first differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zipc.core.types import Allocation
from zipc.pruner.graph.interpret import Env, Executor
from zipc.pruner.levels import Levels
from zipc.pruner.workers import side_by_side

Feeds = Mapping[str, Tensor]
Readout = Callable[[Sequence[Tensor], Feeds], Tensor]  # model outputs, feeds -> what is judged
Oracle = Callable[[Tensor, Tensor], float]  # dense, candidate -> loss


@dataclass(slots=True)
class _Prefix:
    allocation: Allocation
    live: list[dict[int, Env]]  # per batch: cut -> live values


class Scorer:
    """The oracle on a fixed set of rows, with the live values of one allocation kept.

    Candidates of a search resemble the best one so far. Whatever comes before the first site at
    which they differ is not computed again. Without `prefixes` nothing is kept, which is what a
    large set of rows scored a few times wants.
    """

    def __init__(
        self,
        executor: Executor,
        levels: Levels,
        batches: Sequence[Feeds],
        *,
        readout: Readout,
        oracle: Oracle,
        prefixes: bool = True,
    ) -> None:
        self._executor = executor
        self._levels = levels
        self._batches = batches
        self._readout = readout
        self._oracle = oracle
        self._cuts = {name: levels.first_effect(executor, name) for name in levels.sites}
        self._prefix: _Prefix | None = None
        self._memo: dict[object, float] = {}
        dense = Allocation({}, 0.0, 0.0)
        self._dense, self._dense_live = self._run(dense, base=None, keep=prefixes)
        self.evaluations = 0

    def score(self, allocation: Allocation, *, keep: bool = False) -> float:
        """Loss of an allocation; `keep` makes it the base that later candidates start from."""
        key = allocation.key
        if key in self._memo and not keep:
            return self._memo[key]
        outputs, live = self._run(allocation, base=self._prefix, keep=keep)
        if keep:
            self._prefix = _Prefix(allocation, live)
            self._dense_live = []  # as large, and not asked for again once a search has begun
        self.evaluations += 1
        self._memo[key] = self._oracle(self._dense, outputs)
        return self._memo[key]

    def judge(self, model: Callable[[Feeds], Sequence[Tensor]]) -> float:
        """Loss of a model that runs elsewhere, an ONNX file say, on the same rows."""
        outputs = [self._readout(model(feeds), feeds) for feeds in self._batches]
        return self._oracle(self._dense, torch.cat(outputs))

    def rebase_on_dense(self) -> None:
        """Start candidates from the dense model, as sensitivities want."""
        dense = Allocation({}, 0.0, 0.0)
        self._prefix = _Prefix(dense, self._dense_live) if self._dense_live else None

    def forget(self) -> None:
        """Drop the kept live values; scores stay."""
        self._prefix, self._dense_live = None, []

    def _run(
        self, allocation: Allocation, *, base: _Prefix | None, keep: bool
    ) -> tuple[Tensor, list[dict[int, Env]]]:
        variant = self._levels.variant(allocation)
        start = 0
        if base is not None:
            old, new = base.allocation.levels, allocation.levels
            changed = [c for s, c in self._cuts.items() if old.get(s) != new.get(s)]
            start = min(changed, default=max(self._cuts.values()))
        cuts = sorted(set(self._cuts.values())) if keep else []
        outputs, saved = [], []

        def run(i: int) -> tuple[Tensor, dict[int, Env]]:
            feeds = self._batches[i]
            live = base.live[i].get(start) if base is not None else None
            first = start if live is not None else 0
            result, envs = self._executor.run(feeds, variant, start=first, live=live, cuts=cuts)
            if keep and base is not None:
                envs = {**{c: e for c, e in base.live[i].items() if c <= first}, **envs}
            return self._readout(result, feeds), envs

        with torch.inference_mode():
            for output, envs in side_by_side(run, range(len(self._batches))):
                outputs.append(output)
                saved.append(envs)
        return torch.cat(outputs), saved
