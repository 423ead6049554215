"""Structured OBS: in which order the units of a site go, and what each removal costs.

The input columns of one linear map are removed unit by unit, always the unit whose loss the
remaining columns can repair best (ZipLM, Kurtic et al. 2023). With P the inverse of the
damped Gram matrix of the inputs and G = W'W, the price of unit S is `tr((P_SS)^-1 G_SS)`, and
removing it is one block of Gaussian elimination in P and in G. W itself is not needed: the weights
of any width follow in closed form (`compensate.least_squares`), and so do the errors of all widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zipc.pruner.compensate.least_squares import REFIT_DAMP, damped_cholesky

ORDER_DAMP = 1e-2
PANEL = 256  # columns per step of the blocked triangular products


@dataclass(frozen=True, slots=True)
class Sweep:
    """The order of elimination of all units and the error after 0, 1, ..., all of them.

    An error is `||W X - W_K X_K||^2 / ||W X||^2` on the undamped Gram matrix, with W_K the refit.
    """

    order: tuple[int, ...]
    errors: tuple[float, ...]


@torch.no_grad()
def sweep(
    weight: Tensor,
    gram: Tensor,
    *,
    unit_columns: Tensor,
    damp: float = ORDER_DAMP,
    block: int = 48,
    refit_damp: float = REFIT_DAMP,
) -> Sweep:
    """Eliminate all units, cheapest first.

    `weight` is (out, in), `gram` (in, in) is `sum x x^T`, centred or not, and `unit_columns`
    (units, columns per unit) partitions the columns. `damp` (of the mean diagonal) steadies the
    order; `refit_damp` is that of the refit whose errors are reported. Units of nothing but dead
    columns go first; ties go to the lower index. Single columns are eliminated in the dtype of
    `weight`, `block` of them between two matrix products; larger units, being few, in fp64.

    Raises:
        UsageError: the Gram matrix holds NaN or infinity.
    """
    order = eliminate(weight, gram, unit_columns=unit_columns, damp=damp, block=block)
    return Sweep(order, error_curve(weight, gram, order, unit_columns, damp=refit_damp))


@torch.no_grad()
def eliminate(
    weight: Tensor,
    gram: Tensor,
    *,
    unit_columns: Tensor,
    damp: float = ORDER_DAMP,
    block: int = 48,
) -> tuple[int, ...]:
    """Return only the order of `sweep`."""
    _check(weight, gram, unit_columns)
    single = unit_columns.shape[1] == 1
    problem = _Problem(weight if single else weight.double(), gram, damp)
    dead = (gram.diagonal()[unit_columns] == 0).all(dim=1)
    first = dead.nonzero().flatten().tolist()
    alive = (~dead).nonzero().flatten()
    units = unit_columns[alive]
    if not len(alive):
        picked: list[int] = []
    elif single:
        picked = _eliminate_columns(problem, units[:, 0], block)
    else:
        picked = _eliminate_groups(problem, units)
    return (*first, *alive[torch.tensor(picked, dtype=torch.long)].tolist())


def sweep_reference(
    weight: Tensor, gram: Tensor, *, unit_columns: Tensor, damp: float = ORDER_DAMP
) -> Sweep:
    """Do what `sweep` does by the textbook loop, with the errors of its running weights.

    For tests: W and P are rewritten at every step and the error is taken from the definition.
    """
    gram = gram.double()
    order, errors = [], [0.0]
    energy = float((weight.double() @ gram * weight).sum())
    for unit, left in eliminate_plainly(weight, gram, unit_columns=unit_columns, damp=damp):
        lost = weight.double() - left.double()
        order.append(unit)
        errors.append(float((lost @ gram * lost).sum()) / energy if energy > 0 else 0.0)
    return Sweep(tuple(order), tuple(errors))


@torch.no_grad()
def eliminate_plainly(
    weight: Tensor, gram: Tensor, *, unit_columns: Tensor, damp: float = ORDER_DAMP
) -> Iterator[tuple[int, Tensor]]:
    """Yield each unit eliminated and the weights after it, by the loop that rewrites W and P.

    The yielded tensor is updated in place by the next step. Dead units get no precedence.
    """
    damped = gram.double().clone()
    damped.diagonal().add_(damp * float(gram.diagonal().mean()))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped)).to(weight.dtype)
    left = weight.clone()
    alive = torch.ones(len(unit_columns), dtype=torch.bool)
    single = unit_columns.shape[1] == 1
    columns = unit_columns.flatten()
    for _ in range(len(unit_columns)):
        if single:
            scores = (left.square().sum(dim=0) / inverse.diagonal())[columns]
            scores[~alive] = torch.inf
            unit = int(torch.argmin(scores))
            j = int(columns[unit])
            pivot = float(inverse[j, j])
            row = inverse[j].clone()
            left.addr_(left[:, j].clone(), row, alpha=-1 / pivot)
            inverse.addr_(row, row, alpha=-1 / pivot)
            left[:, j], inverse[:, j], inverse[j, :] = 0.0, 0.0, 0.0
            inverse[j, j] = 1.0
        else:
            scores = torch.full((len(unit_columns),), torch.inf, dtype=weight.dtype)
            for other in alive.nonzero().flatten().tolist():
                s = unit_columns[other]
                part = torch.linalg.solve(inverse[s][:, s], left[:, s].T)
                scores[other] = (part * left[:, s].T).sum()
            unit = int(torch.argmin(scores))
            s = unit_columns[unit]
            factor = torch.linalg.solve(inverse[s][:, s], inverse[s])
            left -= left[:, s] @ factor
            inverse -= inverse[:, s] @ factor
            left[:, s] = 0.0
        alive[unit] = False
        yield unit, left


def errors_at(
    weight: Tensor,
    gram: Tensor,
    order: Sequence[int],
    unit_columns: Tensor,
    widths: Sequence[int],
    *,
    damp: float = REFIT_DAMP,
) -> dict[int, float]:
    """Return the error of the refit at each width (units kept) for any order of elimination."""
    errors = error_curve(weight, gram, order, unit_columns, damp=damp)
    return {width: errors[len(order) - width] for width in widths}


@torch.no_grad()
def error_curve(
    weight: Tensor,
    gram: Tensor,
    order: Sequence[int],
    unit_columns: Tensor,
    *,
    damp: float = REFIT_DAMP,
) -> tuple[float, ...]:
    """Return the errors after removing 0, 1, ..., all units in `order`, exactly and all at once.

    With the columns sorted last-eliminated first, every kept set is a prefix, and one factor
    `H + shift I = L L'` serves them all: with Z = W L, the difference D_k between the dense weights
    and the refit on the first k columns satisfies `D_k L = [0, Z_k:]`. Hence the error is
    `||Z_k:||^2 - shift ||D_k||^2` with `D_k = Z_k: (L^-1)_k:`, whose norm is the sum over i, j >= k
    of `(Z'Z)_ij (L^-1 L^-T)_ij`: suffix sums over columns.
    """
    gram = gram.double()
    _check(weight, gram, unit_columns)
    if sorted(order) != list(range(len(unit_columns))):
        raise ValueError("order must name every unit once")
    kept_first = unit_columns[list(reversed(order))].flatten()
    scale = float(gram.diagonal().mean())
    scale = scale if scale > 0 else 1.0
    lower, shift = damped_cholesky(gram[kept_first][:, kept_first] / scale, damp, scale=1.0)
    projected = weight.double()[:, kept_first] @ lower  # Z (out, in)
    own = projected.square().sum(dim=0) - shift * _drift(projected, _inverse_lower(lower))
    own = own.view(len(order), -1).sum(dim=1).flip(0)  # by unit, first eliminated first
    removed = [0.0, *own.cumsum(0).tolist()]
    energy = removed[-1]
    if energy <= 0.0:
        return (0.0,) * len(removed)
    return tuple(max(0.0, error / energy) for error in removed)


def _check(weight: Tensor, gram: Tensor, unit_columns: Tensor) -> None:
    width = weight.shape[1]
    if gram.shape != (width, width):
        raise ValueError(f"gram is {tuple(gram.shape)}, the weight has {width} columns")
    if unit_columns.ndim != 2 or not torch.equal(
        unit_columns.flatten().sort().values.cpu(), torch.arange(width)
    ):
        raise ValueError("unit_columns must hold every column exactly once")


class _Problem:
    """Damped once for the whole run, scaled to a mean diagonal of one; gives P and G afresh."""

    def __init__(self, weight: Tensor, gram: Tensor, damp: float) -> None:
        gram = gram.double()
        scale = float(gram.diagonal().mean())
        self.weight = weight
        self.damped = gram / (scale if scale > 0 else 1.0)
        self.lower, shift = damped_cholesky(self.damped, damp, scale=1.0)
        self.damped.diagonal().add_(shift)
        self.diagonal = self.damped.diagonal().to(weight.dtype)

    def state(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """P and G of the optimal weights on `columns`, in the dtype of `weight`."""
        weight, kept, lower = self.weight, self.weight[:, columns], self.lower
        if len(columns) < weight.shape[1]:
            lower, _ = damped_cholesky(self.damped[columns][:, columns], 0.0, scale=1.0)
            cross = weight.double() @ self.damped[:, columns]  # (out, kept)
            kept = torch.cholesky_solve(cross.T, lower).T.to(weight.dtype)
        # Factored in fp64, where it can fail; inverted in the dtype that the loop can hold.
        inverse = torch.cholesky_inverse(lower.to(weight.dtype))
        if lower is self.lower and not torch.equal(columns, torch.arange(len(columns))):
            inverse = inverse[columns][:, columns]
        energy = kept.T @ kept
        mean = float(energy.diagonal().mean())
        return inverse, energy / (mean if mean > 0 else 1.0)


def _eliminate_columns(problem: _Problem, columns: Tensor, block: int) -> list[int]:
    """Lazy-blocked pivoted elimination of single columns; returns places in `columns`.

    P and G change only once per block, by matrix products. Within a block a row is brought up to
    date when it is picked, from the rank-one pieces U, V of the steps before it:
    `P = P0 - U'U` and `G = G0 - U'V - V'U`. After a block the last columns move into the holes.
    """
    places = torch.arange(len(columns))
    diagonal = problem.diagonal[columns]
    inverse, energy = problem.state(columns)
    picked: list[int] = []
    fresh = True
    while len(places):
        size = len(places)
        steps = inverse.new_empty(2 * block, size)  # U above V
        pivots, powers = inverse.diagonal().clone(), energy.diagonal().clone()
        goal, done = min(block, size), 0
        while done < goal:
            place = _cheapest(powers / pivots, places)
            # P_jj >= 1 / H_jj holds for every kept set: anything less is rounding.
            if not fresh and not float(pivots[place] * diagonal[place]) > 0.5:
                break
            fresh = False
            u, v = steps[done], steps[block + done]
            _rows(inverse, energy, steps, place, done, block, out=(u, v))
            root = float(u[place]) ** 0.5
            v.sub_(u, alpha=float(v[place]) / (2 * root * root)).div_(root)
            u.div_(root)
            pivots.addcmul_(u, u, value=-1)
            powers.addcmul_(u, v, value=-2)
            pivots[place], powers[place] = 1.0, torch.inf
            picked.append(int(places[place]))
            places[place] = -1
            done += 1
        steps = torch.cat([steps[:done], steps[block : block + done]])
        holes = (places[: size - done] < 0).nonzero().flatten()
        movers = (places[size - done :] >= 0).nonzero().flatten() + size - done
        for vector in (places, diagonal):
            vector[holes] = vector[movers]
        places, diagonal = places[: size - done], diagonal[: size - done]
        if done < goal:
            inverse, energy = problem.state(columns[places])
            fresh = True
            continue
        steps[:, holes] = steps[:, movers]
        steps = steps[:, : size - done]
        inverse = _close(inverse, holes, movers, size - done)
        energy = _close(energy, holes, movers, size - done)
        u, v = steps[:done], steps[done:]
        inverse.addmm_(u.T, u, alpha=-1)
        energy.addmm_(steps.T, torch.cat([v, u]), alpha=-1)
    return picked


def _cheapest(scores: Tensor, places: Tensor) -> int:
    """The place of the least score; of equals that of the lowest index."""
    best = int(torch.argmin(scores))
    equal = (scores == scores[best]).nonzero().flatten()
    return best if len(equal) < 2 else int(equal[torch.argmin(places[equal])])


def _close(matrix: Tensor, holes: Tensor, movers: Tensor, size: int) -> Tensor:
    """Move rows and columns into the holes and return the leading square, in place."""
    matrix[holes] = matrix[movers]
    matrix[:, holes] = matrix[:, movers]
    return matrix[:size, :size]


def _rows(
    inverse: Tensor,
    energy: Tensor,
    steps: Tensor,
    place: int,
    done: int,
    block: int,
    *,
    out: tuple[Tensor, Tensor],
) -> None:
    """Write row `place` of the up-to-date P and G into `out`."""
    row, power = out
    if not done:
        row.copy_(inverse[place])
        power.copy_(energy[place])
        return
    u, v = steps[:done], steps[block : block + done]
    at, force = u[:, place], v[:, place]
    torch.addmv(inverse[place], u.T, at, alpha=-1, out=row)
    torch.addmv(energy[place], v.T, at, alpha=-1, out=power)
    power.addmv_(u.T, force, alpha=-1)


def _eliminate_groups(problem: _Problem, units: Tensor) -> list[int]:
    """Block elimination of units of several columns; returns places in `units`."""
    places = torch.arange(len(units))
    width = units.shape[1]
    inverse, energy = problem.state(units.flatten())
    picked: list[int] = []
    fresh = True
    while len(places):
        own = torch.arange(len(places) * width).view(-1, width)
        pivots = inverse[own[:, :, None], own[:, None, :]]  # (units, width, width)
        powers = energy[own[:, :, None], own[:, None, :]]
        lower, failed = torch.linalg.cholesky_ex(pivots)
        sound = inverse.diagonal() * problem.diagonal[units[places].flatten()] > 0.5
        if not fresh and (bool(failed.any()) or not bool(sound.all())):
            inverse, energy = problem.state(units[places].flatten())
            fresh = True
            continue
        fresh = False
        solved = torch.cholesky_solve(powers, lower)
        place = int(torch.argmin(solved.diagonal(dim1=1, dim2=2).sum(dim=1)))
        picked.append(int(places[place]))
        rest = torch.cat([own[:place], own[place + 1 :]]).flatten()
        here = own[place]
        # W' = W - W_S F with F = (P_SS)^-1 P_S:
        factor = torch.cholesky_solve(inverse[here][:, rest], lower[place])
        mixed = energy[here][:, rest] - 0.5 * powers[place] @ factor
        swap = factor.T @ mixed
        update = factor.T @ inverse[here][:, rest]
        inverse = inverse[rest][:, rest].sub_(update)
        energy = energy[rest][:, rest].sub_(swap).sub_(swap.T)
        places = torch.cat([places[:place], places[place + 1 :]])
    return picked


def _inverse_lower(lower: Tensor) -> Tensor:
    """Invert a lower triangular matrix by panels of rows."""
    size = lower.shape[0]
    inverse = torch.zeros_like(lower)
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        corner = lower[start:stop, start:stop]
        own = torch.linalg.solve_triangular(corner, torch.eye(stop - start).to(corner), upper=False)
        inverse[start:stop, start:stop] = own
        if start:
            inverse[start:stop, :start] = -own @ (
                lower[start:stop, :start] @ inverse[:start, :start]
            )
    return inverse


def _drift(projected: Tensor, inverse: Tensor) -> Tensor:
    """Per column k, `||D_k||^2 - ||D_k+1||^2`: the column sums below and on the diagonal."""
    size = inverse.shape[0]
    sums = inverse.new_empty(size)
    for start in range(0, size, PANEL):
        stop = min(start + PANEL, size)
        below = inverse[start:, :stop] @ inverse[start:stop, :stop].T  # (in - start, panel)
        below *= projected[:, start:].T @ projected[:, start:stop]
        corner = below[: stop - start]
        sums[start:stop] = 2 * (corner.tril(-1).sum(dim=0) + below[stop - start :].sum(dim=0))
        sums[start:stop] += corner.diagonal()
    return sums
