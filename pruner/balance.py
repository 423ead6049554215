"""Sizes of channels evened out where a site's maps are rounded in calibrated ranges.

Each passage gets its factors once, of all units, when a level first asks for them; units that are
left keep theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zipc.core.types import Level
from zipc.numerics.int8 import STATIC
from zipc.numerics.smooth import Reading, best_factors, of_channels
from zipc.pruner.evidence import InputStats
from zipc.pruner.graph.passages import Passage
from zipc.pruner.graph.trace import MapCall
from zipc.pruner.maps import matrices


@dataclass(frozen=True, slots=True)
class Factors:
    """What is moved at one map; None: nothing."""

    columns: Tensor | None  # (in,), multiplied; what the map reads is divided by them
    rows: Tensor | None  # (out,), divided

    def weight(self, call: MapCall, weight: Tensor) -> Tensor:
        """A weight in its own layout with its columns multiplied."""
        return weight if self.columns is None else weight * self.columns.unsqueeze(1 - call.in_dim)

    def inputs(self, x: Tensor) -> Tensor:
        """What the map then reads (tokens, in)."""
        return x if self.columns is None else x / self.columns

    def gram(self, gram: Tensor) -> Tensor:
        """The second moments of that (in, in)."""
        return gram if self.columns is None else gram / torch.outer(self.columns, self.columns)

    def outputs(self, y: Tensor) -> Tensor:
        """What the map gives, divided (tokens, out) or (out,)."""
        return y if self.rows is None else y / self.rows


class Balance:
    """What rows of maps and channels of norms are divided by, and columns multiplied by."""

    def __init__(
        self,
        passages: Sequence[Passage],
        calls: Mapping[str, MapCall],
        weights: Mapping[str, Tensor],
        stats: Mapping[str, InputStats],
        *,
        limit: int,
        signed: bool,
    ) -> None:
        self._passages = passages
        self._calls = calls
        self._weights = weights
        self._stats = stats
        self._limit = limit
        self._signed = signed
        self._found: dict[int, Tensor | None] = {}  # by number of the passage

    def at(
        self, module: str, levels: Mapping[str, Level], *, inputs: Tensor, outputs: Tensor
    ) -> Factors:
        """What is moved at a map, which has `inputs` and `outputs` of its channels left."""
        columns = _together(
            of_channels(found, torch.tensor(passage.readers[module]))
            for passage, found in self._moved(levels)
            if module in passage.readers
        )
        rows = _together(found for p, found in self._moved(levels) if p.producer == module)
        return Factors(
            None if columns is None else columns[inputs], None if rows is None else rows[outputs]
        )

    def of_vectors(self, levels: Mapping[str, Level]) -> dict[str, Tensor]:
        """Divisors of the vectors that scale channels where no map does, by name."""
        return {
            name: found
            for passage, found in self._moved(levels)
            if passage.producer not in self._calls
            for name in passage.tensors
        }

    def vectors(self, site: str) -> set[str]:
        """Names of the vectors that a level of a site may divide."""
        return {
            name
            for passage in self._passages
            if passage.site == site and passage.producer not in self._calls
            for name in passage.tensors
        }

    def _moved(self, levels: Mapping[str, Level]) -> Iterator[tuple[Passage, Tensor]]:
        """The passages inside sites at such levels through which something is moved."""
        for number, passage in enumerate(self._passages):
            level = levels.get(passage.site)
            if level is None or level.removed or level.numeric != STATIC:
                continue
            if number not in self._found:
                self._found[number] = self._chosen(passage)
            found = self._found[number]
            if found is not None:
                yield passage, found

    def _chosen(self, passage: Passage) -> Tensor | None:
        """The factors of a passage, by the outputs of all that read it."""
        sources: dict[str, list[str]] = {}
        for module in passage.readers:
            sources.setdefault(self._calls[module].source, []).append(module)
        readings = [
            Reading(
                self._stats[readers[0]].sample,
                torch.cat([self._matrix(module) for module in readers]),
                torch.tensor(passage.readers[readers[0]]),
            )
            for readers in sources.values()
        ]
        name, dim = next(iter(passage.tensors.items()))
        count = self._weights[name].shape[dim]
        return best_factors(readings, count, limit=self._limit, signed=self._signed)

    def _matrix(self, module: str) -> Tensor:
        call = self._calls[module]
        return matrices(call, self._weights[call.weight])[0]


def _together(factors: Iterable[Tensor]) -> Tensor | None:
    """The product of all; None of none."""
    product: Tensor | None = None
    for found in factors:
        product = found if product is None else product * found
    return product
