"""Price every level of every site in milliseconds on the target; check sums on whole models."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from zipc.core.errors import TableMissing
from zipc.core.files import fingerprint as short_hash
from zipc.core.request import Request
from zipc.core.types import Difference, Level, Progress, Site, Target
from zipc.exporters.graph import OnnxGraph
from zipc.exporters.site_graph import extract
from zipc.exporters.specialise import EMISSION, Edit, specialise
from zipc.latency_tables import correction
from zipc.latency_tables.modelled import Doubt
from zipc.latency_tables.store import TableStore, differences
from zipc.latency_tables.table import Entry, LatencyTable
from zipc.patterns import SPARSE, sparse_level
from zipc.plain_edits import first_units, plain_edit
from zipc.prepare import Prepared
from zipc.profiler.device import Device, GraphTimer
from zipc.profiler.sweep import PricedGraph, sweep
from zipc.profiler.timing import interleave, warm_up
from zipc.pruner.graph.mixtures import nested, settled
from zipc.pruner.ladder import widths_of

WHOLE, NARROWEST = "model", "model-narrowest"  # stand in a table at the level of width 1
MIN_SHARE = 0.05
SWEEP_ROUNDS = 20
SWEEP_SECONDS = 200.0  # spent, as on a busy machine, noisy prices get no more rounds
CORRECTION_POINTS = 6
TRUSTED_ERROR = 0.06  # a table whose sums are further off than this (median) is not kept
CORRECTION_ROUNDS = (10, 20)  # of a whole model beside dense: as many as fit
CORRECTION_MS = 4000.0
WARM_RUNS = 6


@dataclass(slots=True)
class Prices:
    """A table with what is needed to price a whole allocation."""

    table: LatencyTable
    path: Path
    signatures: dict[str, str]  # site -> signature in the table
    calls: dict[str, int]
    dense_ms: float
    fixed_ms: float
    seconds: float
    from_cache: bool
    dense_prices: dict[str, float]
    share: float  # of what a level saves on its site alone that the whole model saves too
    numeric: str  # of the whole network, which a level in fp32 means too
    doubt: Doubt | None  # how far prices that nobody measured may be off
    inside: Mapping[str, float]  # mixture -> ms of the dense sites in its experts, priced alone

    def ms(self, site: str, level: Level) -> float:
        """Time of all calls of a site at a level, as part of the whole model."""
        alone = self.table.price(self.signatures[site], level.within(self.numeric))
        dense = self.dense_prices[site]
        whole = (dense - self.share * (dense - alone)) * self.calls[site]
        return whole - self.inside.get(site, 0.0)

    def gains(self, site: str, level: Level, *, asked: Collection[Difference] = ()) -> bool:
        """Whether a level is faster beyond doubt than without its numeric, and than without its
        pattern, those `asked` for excepted.

        What was measured is left to the search; of a model's prices the interval of the gain must
        exclude 1.
        """
        if self.doubt is None:
            return True
        ms = self.ms(site, level)
        return all(
            math.log(self.ms(site, level.without(kind)) / ms) > self.doubt.reach([kind])
            for kind in level.differs
            if kind not in asked
        )

    def ratio(self, allocation_ms: float) -> float:
        """Latency relative to dense that a sum of prices means for the whole model."""
        raw = allocation_ms / self.dense_ms
        return self.table.correction.apply(raw) if self.table.correction else raw

    def budget_ms(self, ratio: float) -> float:
        """Sum of prices that comes out at `ratio` of the dense latency."""
        raw = self.table.correction.invert(ratio) if self.table.correction else ratio
        return max(raw, 0.0) * self.dense_ms


def offered_levels(prepared: Prepared, site: Site, target: Target) -> list[Level]:
    """Every level the table prices for a site, the dense one included."""
    widths = widths_of(site, step=target.width_step)
    integers = prepared.on_integers(site)
    numerics = [n for n in target.numerics if integers or not n.startswith("int8")]
    if prepared.body is not None:
        numerics = [prepared.numeric]
    levels = [Level(w, n) for n in numerics for w in widths if w]
    if SPARSE in target.patterns:
        sparse = (sparse_level(prepared, site, lv) for lv in levels)
        levels += [lv for lv in sparse if lv is not None]
    removed = [Level(0)] if site.removable else []
    return [*removed, *(lv for lv in levels if suits(lv, site, target))]


def suits(level: Level, site: Site, target: Target) -> bool:
    """Whether a level is on the target's grid; heads and experts are whole, dense is offered."""
    return site.kind in ("heads", "experts") or level.width == site.units or target.on_grid(level)


def float_widths(prepared: Prepared, site: Site, target: Target) -> list[int]:
    """Widths of a site, ascending, that suit what it runs in where its level says nothing else."""
    widths = widths_of(site, step=target.width_step)
    return [w for w in widths if suits(Level(w, prepared.numeric), site, target)]


def surroundings(
    dense: OnnxGraph, sites: Sequence[Site]
) -> tuple[dict[str, str], dict[str, OnnxGraph]]:
    """What each site is priced in: its signature by name, and the graph of each signature.

    Sites of one signature cost the same at equal levels.
    """
    signatures: dict[str, str] = {}
    parts: dict[str, OnnxGraph] = {}
    for site in sites:
        part = extract(dense, site)
        ops = [n.op_type for n in specialise(part, Edit()).nodes]
        fed = [part.shapes[i.name] for i in part.proto.graph.input]
        signature = f"{site.kind}-{site.units}-{short_hash(site.signature, ops, fed)[:10]}"
        signatures[site.name] = signature
        parts.setdefault(signature, part)
    return signatures, parts


def price(
    prepared: Prepared,
    target: Target,
    request: Request,
    *,
    device: Device,
    store: TableStore,
    progress: Progress,
) -> Prices:
    """Load the table of this model's sites, or measure what is missing in it.

    A table that was measured on another device is measured anew, unless the request allows it.

    Raises:
        TableMissing: an allowed table of another device lacks prices.
    """
    workload = request.workload
    signatures, parts = surroundings(prepared.dense, prepared.structure.sites)
    examples = {signatures[s.name]: s for s in reversed(prepared.structure.sites)}
    key = short_hash(
        EMISSION,
        sorted(signatures.values()),
        target.width_step,
        sorted(prepared.dense.op_counts().items()),
        *([] if prepared.body is None else [prepared.numeric]),
    )
    prints = device.fingerprint()
    place = f"{target.name}@{prints['host']}" if "host" in prints else target.name
    path = store.path(place, workload, target.runtime, key)
    stored = store.load(path, fingerprint=None)
    changed = differences(stored.fingerprint, prints) if stored else []
    if changed and request.allow_table_mismatch:
        stored = store.load(path, fingerprint=prints, allow_mismatch=True)
    elif changed:
        progress.info(
            f"the latency table is of another device or state ({'; '.join(changed)}): measured anew"
        )
        stored = None
    dense_bytes = prepared.specialise(prepared.dense, Edit()).to_bytes()
    dense, whole = Level(1, prepared.floats), Level(1, prepared.numeric)
    graphs = [PricedGraph(WHOLE, dense, lambda: dense_bytes)]
    if prepared.body is not None:
        graphs.append(PricedGraph(WHOLE, whole, lambda: _whole(prepared, {})))
    narrow = _narrowest(prepared, target) if _overlapping(prepared) else None
    if narrow is not None:
        graphs.append(PricedGraph(NARROWEST, whole, lambda: _whole(prepared, narrow)))
    for signature, part in parts.items():
        site = examples[signature]
        graphs += [
            PricedGraph(signature, level, _builder(part, site, level, prepared))
            for level in offered_levels(prepared, site, target)
        ]
    largest = max(parts, key=lambda s: sum(a.size for a in parts[s].arrays.values()))
    anchor_bytes = prepared.specialise(parts[largest], Edit()).to_bytes()
    table = stored or LatencyTable(
        kind=device.kind,
        target=target.name,
        runtime=target.runtime,
        workload=workload,
        fingerprint=prints,
        state=device.state(),
        anchor=hashlib.sha256(anchor_bytes).hexdigest(),
    )
    missing = [g for g in graphs if not table.has(g.signature, g.level)]
    seconds = 0.0
    if not missing:
        progress.stage("prices")
        progress.done(f"reused {len(graphs)} from the latency table")
    else:
        if stored is not None and stored.fingerprint != prints:
            raise TableMissing(
                f"The table {path} lacks {len(missing)} entries and was measured on another device;"
                " it cannot be extended here. Run the same command without --allow-table-mismatch."
            )
        if len(missing) < len(graphs):
            progress.info(f"{len(graphs) - len(missing)} prices reused from the latency table")
        table, seconds = _measure(
            table, missing, anchor_bytes, device, store=store, path=path, progress=progress
        )
    calls = {s.name: s.calls for s in prepared.structure.sites}
    dense_ms, whole_ms = table.price(WHOLE, dense), table.price(WHOLE, whole)
    dense_prices = {
        s.name: table.price(signatures[s.name], Level(s.units, prepared.numeric))
        for s in prepared.structure.sites
    }
    fastest = {
        s.name: s.calls
        * min(table.price(signatures[s.name], lv) for lv in offered_levels(prepared, s, target))
        for s in prepared.structure.sites
    }
    inside = {  # what is priced as sites of their own is not counted in the mixture again
        s.name: min(
            fastest[s.name],
            sum(
                dense_prices[n] * calls[n]
                for names in nested(s, prepared.structure.sites)
                for n in names
            ),
        )
        for s in prepared.structure.sites
        if s.experts
    }
    sites = sum(
        dense_prices[s.name] * s.calls - inside.get(s.name, 0.0) for s in prepared.structure.sites
    )
    least = [
        dense_prices[n] * calls[n] - inside[n] if n in inside else ms for n, ms in fastest.items()
    ]
    fixed_ms = whole_ms - sites
    share = 1.0
    if narrow is not None:
        gains = sum(
            s.calls
            * (
                dense_prices[s.name]
                - table.price(signatures[s.name], narrow[s.name].within(prepared.numeric))
            )
            for s in prepared.structure.sites
        )
        gained = whole_ms - table.price(NARROWEST, whole)
        share = min(max(gained / gains, MIN_SHARE), 1.0) if gains > 0 else 1.0
    else:
        # No whole is faster than one of its parts. Prices of a busy machine can say so; the check
        # on whole models below then finds them out.
        fixed_ms = max(fixed_ms, max(least) - sum(least))
    prices = Prices(
        table,
        path,
        signatures,
        calls,
        dense_ms,
        fixed_ms,
        seconds,
        not missing,
        dense_prices,
        share,
        prepared.numeric,
        device.doubt(dense_bytes, workload),
        inside,
    )
    if table.correction is None:
        fitted = _fit_correction(prepared, target, prices, device.timer(), progress)
        prices.table = _noted(table.with_correction(fitted), device)
        if fitted.median_error <= TRUSTED_ERROR or prices.doubt is not None:
            store.save(prices.table, path)
        else:
            path.unlink(missing_ok=True)
            progress.info(
                f"sums of prices are off by {fitted.median_error:.1%}: the machine was busy. They "
                "serve this run only; the next one measures again"
            )
    return prices


def _measure(
    table: LatencyTable,
    graphs: list[PricedGraph],
    anchor_bytes: bytes,
    device: Device,
    *,
    store: TableStore,
    path: Path,
    progress: Progress,
) -> tuple[LatencyTable, float]:
    started = time.monotonic()
    held = [table]

    def keep(entries: list[Entry]) -> None:
        held[0] = held[0].with_entries(entries)
        if time.monotonic() - saved[0] > 5:  # all that a killed sweep loses
            store.save(held[0], path)
            saved[0] = time.monotonic()

    saved, workload, timer = [started], table.workload, device.timer()
    try:
        sweep(
            graphs,
            anchor=timer.load(anchor_bytes, workload=workload),
            make_runner=lambda model: timer.load(model, workload=workload),
            rounds=SWEEP_ROUNDS,
            seconds_budget=SWEEP_SECONDS,
            progress=progress,
            on_entries=keep,
        )
    finally:  # a board that was lost, or Ctrl-C, costs nothing that was measured
        held[0] = _noted(held[0], device)
        if held[0].entries:
            store.save(held[0], path)
    return held[0], time.monotonic() - started


def _noted(table: LatencyTable, device: Device) -> LatencyTable:
    for note in device.notes:
        table = table.with_note(note)
    return table


def _overlapping(prepared: Prepared) -> bool:
    """Whether sites share maps, as in a chain of convolutions: each then prices them once more."""
    sites = prepared.structure.sites
    maps = [m for s in sites for m in s.maps]
    return len(maps) > len(set(maps))


def _narrowest(prepared: Prepared, target: Target) -> dict[str, Level]:
    """Every site at the least width above none, in fp32."""
    levels = {
        s.name: Level(min(w for w in float_widths(prepared, s, target) if w))
        for s in prepared.structure.sites
    }
    return settled(prepared.sites, levels, first_units(levels))


def _whole(prepared: Prepared, levels: Mapping[str, Level]) -> bytes:
    """The whole model at some levels, with unrepaired weights."""
    edit = plain_edit(prepared, levels, first_units(levels))
    return prepared.emit(prepared.specialise(prepared.dense, edit))


def _builder(part: OnnxGraph, site: Site, level: Level, prepared: Prepared) -> Callable[[], bytes]:
    cut = replace(level, numeric="fp32") if level.numeric == prepared.numeric else level

    def build() -> bytes:
        kept = {site.name: tuple(range(level.width))}
        edit = plain_edit(prepared, {site.name: cut}, kept)
        return prepared.emit(prepared.specialise(part, edit, part=True), part=True)

    return build


def random_levels(prepared: Prepared, target: Target, rng: np.random.Generator) -> dict[str, Level]:
    """A random allocation: widths around a random overall density, one numeric policy."""
    density = rng.uniform(0.15, 0.95)
    mixed = list(target.numerics)
    policy = mixed[int(rng.integers(len(mixed)))] if rng.random() < 0.7 else None
    levels = {}
    for site in prepared.structure.sites:
        widths = np.array(float_widths(prepared, site, target))
        wanted = float(np.clip(density + rng.normal(0, 0.2), 0, 1)) * site.units
        width = int(widths[np.abs(widths - wanted).argmin()])
        numeric = policy or mixed[int(rng.integers(len(mixed)))]
        level = Level(width, numeric)
        whole = prepared.body is not None or numeric == prepared.floats
        if whole or not prepared.on_integers(site) or not suits(level, site, target):
            level = Level(width)
        levels[site.name] = level if width else Level(0)
    return settled(prepared.sites, levels, first_units(levels))


def measure_points(
    prepared: Prepared,
    target: Target,
    prices: Prices,
    *,
    timer: GraphTimer,
    points: int,
    rng: np.random.Generator,
    rounds: int | None = None,
    progress: Progress,
) -> list[tuple[float, float]]:
    """(sum of prices, measured latency), both relative to dense, of random allocations.

    Without `rounds`, each is timed as often as its time allows.
    """
    workload = prices.table.workload
    dense = timer.load(prepared.specialise(prepared.dense, Edit()).to_bytes(), workload=workload)
    if rounds is None:  # a round runs each graph twice
        least, most = CORRECTION_ROUNDS
        rounds = max(least, min(most, int(CORRECTION_MS / (4 * prices.dense_ms))))
    warm_up(dense)
    found = []
    for _ in range(points):
        levels = random_levels(prepared, target, rng)
        runner = timer.load(_whole(prepared, levels), workload=workload)
        warm_up(runner, max_runs=WARM_RUNS)
        base, times = interleave([dense, runner], rounds=rounds)
        total = prices.fixed_ms + sum(prices.ms(n, lv) for n, lv in levels.items())
        measured = float(np.median(np.array(times) / np.array(base)))
        found.append((total / prices.dense_ms, measured))
        progress.advance()
    return found


def _fit_correction(
    prepared: Prepared, target: Target, prices: Prices, timer: GraphTimer, progress: Progress
) -> correction.Correction:
    progress.stage("check prices on whole models", CORRECTION_POINTS)
    points = measure_points(
        prepared,
        target,
        prices,
        timer=timer,
        points=CORRECTION_POINTS,
        rng=np.random.default_rng(0),
        progress=progress,
    )
    fitted = correction.fit(points)
    progress.done(
        f"sum of prices off by {fitted.median_error:.1%} (median), {fitted.worst_error:.1%} (worst)"
    )
    return fitted


__all__ = ["Prices", "measure_points", "offered_levels", "price"]
