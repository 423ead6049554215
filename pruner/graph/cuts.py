"""Which indices of which tensors stay when units go. Several sites may cut one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from zipc.core.types import Site, Slice

Kept = Mapping[str, Sequence[int]]  # site -> units kept; sites not named keep all


class Cuts:
    """The slices of a set of sites, by tensor."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self.pieces: dict[str, list[tuple[Site, Slice]]] = {}
        for site in sites:
            for piece in site.slices:
                self.pieces.setdefault(piece.parameter, []).append((site, piece))

    def sites_of(self, parameter: str) -> list[str]:
        """Names of the sites that cut a tensor."""
        return list(dict.fromkeys(site.name for site, _ in self.pieces.get(parameter, [])))

    def stays(self, parameter: str, dim: int, size: int, kept: Kept) -> Tensor:
        """Positions along a dimension that no removed unit owns, ascending."""
        mask = torch.ones(size, dtype=torch.bool)
        for site, piece in self.pieces.get(parameter, []):
            if piece.dim == dim and site.name in kept:
                staying = set(kept[site.name])
                gone = [p for u in range(site.units) if u not in staying for p in piece.index[u]]
                mask[torch.tensor(gone, dtype=torch.long)] = False
        return mask.nonzero().flatten()

    def cut(self, tensor: Tensor, parameter: str, kept: Kept) -> Tensor:
        """The tensor without what the removed units own."""
        for dim in {piece.dim for _, piece in self.pieces.get(parameter, [])}:
            stays = self.stays(parameter, dim, tensor.shape[dim], kept)
            if len(stays) < tensor.shape[dim]:
                tensor = tensor.index_select(dim, stays.to(tensor.device))
        return tensor

    def shape(self, parameter: str, shape: Sequence[int], widths: Mapping[str, int]) -> list[int]:
        """The shape of a tensor at the given widths; which units stay does not matter to it."""
        kept = {
            site.name: range(widths[site.name])
            for site, _ in self.pieces.get(parameter, [])
            if site.name in widths
        }
        dims = {piece.dim for _, piece in self.pieces.get(parameter, [])}
        return [
            len(self.stays(parameter, d, size, kept)) if d in dims else int(size)
            for d, size in enumerate(shape)
        ]
