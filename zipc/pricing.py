"""Price every level of every site in milliseconds on the target; check sums on whole models."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from zipc.core.errors import TableMissing
from zipc.core.files import fingerprint as short_hash
from zipc.core.request import Request
from zipc.core.types import Level, Progress, Site, Target
from zipc.exporters.graph import OnnxGraph
from zipc.exporters.site_graph import extract
from zipc.exporters.specialise import EMISSION, Edit, specialise
from zipc.latency_tables import correction
from zipc.latency_tables.store import TableStore, differences
from zipc.latency_tables.table import Entry, LatencyTable
from zipc.patterns import SPARSE, sparse_level
from zipc.plain_edits import first_units, plain_edit
from zipc.prepare import Prepared
from zipc.prices import Prices, SitePrices, added_up, with_savings_in_place
from zipc.profiler.device import Device, GraphTimer
from zipc.profiler.sweep import GROUP, PricedGraph, sweep
from zipc.profiler.timing import interleave, warm_up
from zipc.pruner.graph.mixtures import nested, settled
from zipc.pruner.ladder import widths_of

WHOLE, FASTEST = "model", "model-fastest"  # stand in a table at the level of width 1
MIN_PART = 0.04  # of the whole: what sites of one signature take to be timed in place, too
PLACE_ROUNDS = 12, 60  # of a whole model: as many as fit
PLACE_MS = 1500.0
PLACE_SECONDS = 60.0
PLACE_GROUP = 2, GROUP  # whole models that are held beside the dense one: as many as fit
PLACE_BYTES = 400e6
CORRECTION_POINTS = 6
TRUSTED_ERROR = 0.06  # a table whose sums are further off than this (median) is not kept
CORRECTION_ROUNDS = 10, 60  # of a whole model beside dense: as many as fit
CORRECTION_MS = 2000.0
WARM_RUNS = 6


@dataclass(frozen=True, slots=True)
class How:
    """How graphs are swept: rounds, seconds after which noise gets no more, graphs held at once."""

    rounds: int
    seconds: float
    group: int
    stage: str
    in_place: bool = False


ALONE = How(rounds=20, seconds=200.0, group=GROUP, stage="measuring prices")


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
    own = prepared.structure.sites
    signatures, parts = surroundings(prepared.dense, own)
    offered = {s.name: offered_levels(prepared, s, target) for s in own}
    path, stored = _stored(prepared, target, request, signatures, device, store, progress)
    dense_bytes = prepared.specialise(prepared.dense, Edit()).to_bytes()
    dense, whole = Level(1, prepared.floats), Level(1, prepared.numeric)
    undiminished = _whole(prepared, {})
    graphs = [PricedGraph(WHOLE, whole, lambda: undiminished)]
    for signature, part in parts.items():
        site = next(s for s in own if signatures[s.name] == signature)
        graphs += [
            PricedGraph(signature, level, _builder(part, site, level, prepared))
            for level in offered[site.name]
        ]
    largest = max(parts, key=lambda s: sum(a.size for a in parts[s].arrays.values()))
    anchor = prepared.specialise(parts[largest], Edit()).to_bytes()
    table = stored or LatencyTable(
        kind=device.kind,
        target=target.name,
        runtime=target.runtime,
        workload=request.workload,
        fingerprint=device.fingerprint(),
        state=device.state(),
        anchor=hashlib.sha256(anchor).hexdigest(),
    )
    extend = partial(_extended, device=device, store=store, path=path, progress=progress)
    table, seconds = extend(table, graphs, anchor, ALONE)
    sites = SitePrices(table, signatures, {s.name: Level(s.units) for s in own}, prepared.numeric)
    calls = {s.name: s.calls for s in own}
    whole_ms = table.price(WHOLE, whole)
    placed: list[PricedGraph] = []
    if device.kind == "measured":
        placed += _in_place(prepared, sites, offered, part_ms=MIN_PART * whole_ms)
    fastest = _fastest(prepared, target, sites) if _overlapping(prepared) else None
    if fastest is not None:
        placed.append(PricedGraph(FASTEST, whole, lambda: _whole(prepared, fastest)))
    if dense != whole:  # a speedup is over the model in floats
        placed.append(PricedGraph(WHOLE, dense, lambda: dense_bytes))
    table, more = extend(table, placed, undiminished, _gently(whole_ms, len(undiminished)))
    sites = with_savings_in_place(replace(sites, table=table), calls, whole_ms)
    ratios = {e.key: e.ratio for e in table.in_place}
    dense_ms = ratios.get((WHOLE, dense), 1.0) * whole_ms
    together = None
    if fastest is not None:
        together = fastest, (1 - ratios[FASTEST, whole]) * whole_ms
    inner = {s.name: [n for names in nested(s, own) for n in names] for s in own if s.experts}
    prices = Prices(
        table=table,
        path=path,
        sites=sites,
        calls=calls,
        dense_ms=dense_ms,
        whole_ms=whole_ms,
        add=added_up(
            *(sites, calls, offered, inner),
            whole_ms=whole_ms,
            together=together,
            measured=device.kind == "measured",
        ),
        seconds=seconds + more,
        from_cache=seconds + more == 0.0,
        doubt=device.doubt(dense_bytes, request.workload),
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


def _stored(
    prepared: Prepared,
    target: Target,
    request: Request,
    signatures: Mapping[str, str],
    device: Device,
    store: TableStore,
    progress: Progress,
) -> tuple[Path, LatencyTable | None]:
    """Where the table of a model lives, and what is there already of this device."""
    key = short_hash(
        EMISSION,
        sorted(signatures.values()),
        target.width_step,
        sorted(prepared.dense.op_counts().items()),
        *([] if prepared.body is None else [prepared.numeric]),
    )
    prints = device.fingerprint()
    place = f"{target.name}@{prints['host']}" if "host" in prints else target.name
    path = store.path(place, request.workload, target.runtime, key)
    stored = store.load(path, fingerprint=None)
    changed = differences(stored.fingerprint, prints) if stored else []
    if changed and request.allow_table_mismatch:
        stored = store.load(path, fingerprint=prints, allow_mismatch=True)
    elif changed:
        progress.info(
            f"the latency table is of another device or state ({'; '.join(changed)}): measured anew"
        )
        stored = None
    return path, stored


def _extended(
    table: LatencyTable,
    graphs: Sequence[PricedGraph],
    anchor: bytes,
    how: How,
    *,
    device: Device,
    store: TableStore,
    path: Path,
    progress: Progress,
) -> tuple[LatencyTable, float]:
    """The table with all of these graphs in it, timed beside the anchor, and the seconds spent.

    Raises:
        TableMissing: the table is of another device and lacks some.
    """
    known = {e.key for e in (table.in_place if how.in_place else table.entries)}
    missing = [g for g in graphs if g.key not in known]
    foreign = table.fingerprint != device.fingerprint()
    if not missing:
        if not how.in_place:
            progress.stage("prices")
            progress.done(f"reused {len(graphs)} from the latency table")
        return table, 0.0
    if foreign:
        raise TableMissing(
            f"The table {path} lacks {len(missing)} entries and was measured on another device;"
            " it cannot be extended here. Run the same command without --allow-table-mismatch."
        )
    if len(missing) < len(graphs):
        progress.info(f"{len(graphs) - len(missing)} prices reused from the latency table")
    table = table.with_correction(None) if how.in_place else table.unplaced()
    started = time.monotonic()
    held = [table]

    def keep(entries: list[Entry]) -> None:
        held[0] = held[0].with_entries(entries, in_place=how.in_place)
        if time.monotonic() - saved[0] > 5:  # all that a killed sweep loses
            store.save(held[0], path)
            saved[0] = time.monotonic()

    saved, workload, timer = [started], table.workload, device.timer()
    try:
        sweep(
            missing,
            anchor=timer.load(anchor, workload=workload),
            make_runner=lambda model: timer.load(model, workload=workload),
            progress=progress,
            rounds=how.rounds,
            seconds_budget=how.seconds,
            group=how.group,
            stage=how.stage,
            on_entries=keep,
        )
    finally:  # a board that was lost, or Ctrl-C, costs nothing that was measured
        held[0] = _noted(held[0], device)
        if held[0].entries:
            store.save(held[0], path)
    return held[0], time.monotonic() - started


def _gently(whole_ms: float, size: int) -> How:
    """How whole models of so many milliseconds and bytes are swept."""
    return How(
        rounds=_fitting(PLACE_MS / (2 * whole_ms), *PLACE_ROUNDS),
        seconds=PLACE_SECONDS,
        group=_fitting(PLACE_BYTES / size, *PLACE_GROUP),
        stage="measuring prices in place",
        in_place=True,
    )


def _fitting(count: float, least: int, most: int) -> int:
    return max(least, min(most, int(count)))


def _noted(table: LatencyTable, device: Device) -> LatencyTable:
    for note in device.notes:
        table = table.with_note(note)
    return table


def _overlapping(prepared: Prepared) -> bool:
    """Whether sites share maps, as in a chain of convolutions: each then prices them once more."""
    sites = prepared.structure.sites
    maps = [m for s in sites for m in s.maps]
    return len(maps) > len(set(maps))


def _fastest(prepared: Prepared, target: Target, sites: SitePrices) -> dict[str, Level]:
    """Every site at the width above none that is fastest alone, in plain floats."""
    levels = {
        s.name: min(
            (Level(w) for w in float_widths(prepared, s, target) if w),
            key=partial(sites.alone_ms, s.name),
        )
        for s in prepared.structure.sites
    }
    return settled(prepared.sites, levels, first_units(levels))


def _in_place(
    prepared: Prepared,
    sites: SitePrices,
    offered: Mapping[str, Sequence[Level]],
    *,
    part_ms: float,
) -> list[PricedGraph]:
    """The whole model with all sites of a signature at one level: widest and fastest by numeric.

    Signatures that take less than `part_ms` together are left out: what they save would drown in
    noise.
    """
    graphs = []
    for signature in dict.fromkeys(sites.signatures.values()):
        own = [s for s in prepared.structure.sites if sites.signatures[s.name] == signature]
        if sum(sites.alone_ms(s.name, sites.dense[s.name]) * s.calls for s in own) < part_ms:
            continue
        lines: dict[tuple[str, str, bool], list[Level]] = {}
        for level in offered[own[0].name]:
            lines.setdefault((level.numeric, level.pattern, level.removed), []).append(level)
        alone = partial(sites.alone_ms, own[0].name)
        ends = {end for line in lines.values() for end in (min(line, key=alone), max(line))}
        ends.discard(sites.dense[own[0].name].within(prepared.numeric))
        graphs += [
            PricedGraph(signature, level, _placed(prepared, own, level)) for level in sorted(ends)
        ]
    return graphs


def _placed(prepared: Prepared, sites: Sequence[Site], level: Level) -> Callable[[], bytes]:
    plain = replace(level, numeric="fp32") if level.numeric == prepared.numeric else level
    levels = {s.name: plain for s in sites}
    return lambda: _whole(prepared, settled(prepared.sites, levels, first_units(levels)))


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


def random_levels(
    prepared: Prepared, target: Target, prices: Prices, rng: np.random.Generator
) -> dict[str, Level]:
    """A random allocation: widths around a random overall density, one numeric policy.

    Of widths that a search may choose: none that costs as much as a wider one.
    """
    density = rng.uniform(0.15, 0.95)
    mixed = list(target.numerics)
    policy = mixed[int(rng.integers(len(mixed)))] if rng.random() < 0.7 else None
    levels = {}
    for site in prepared.structure.sites:
        numeric = policy or mixed[int(rng.integers(len(mixed)))]
        whole = prepared.body is not None or numeric == prepared.floats
        plain = whole or not prepared.on_integers(site)
        choice: list[Level] = []
        for width in reversed(float_widths(prepared, site, target)):
            level = Level(width, numeric)
            if plain or not width or not suits(level, site, target):
                level = Level(width)
            if not choice or prices.ms(site.name, level) < prices.ms(site.name, choice[-1]):
                choice.append(level)
        wanted = float(np.clip(density + rng.normal(0, 0.2), 0, 1)) * site.units
        away = [abs(level.width - wanted) for level in choice]
        levels[site.name] = choice[int(np.argmin(away))]
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
    """(sum of prices, measured latency), both relative to the undiminished whole, of random
    allocations.

    Without `rounds`, each is timed as often as its time allows.
    """
    workload = prices.table.workload
    dense = timer.load(prepared.specialise(prepared.dense, Edit()).to_bytes(), workload=workload)
    if rounds is None:  # a round runs each graph twice
        rounds = _fitting(CORRECTION_MS / (4 * prices.dense_ms), *CORRECTION_ROUNDS)
    warm_up(dense)
    found = []
    for _ in range(points):
        levels = random_levels(prepared, target, prices, rng)
        runner = timer.load(_whole(prepared, levels), workload=workload)
        warm_up(runner, max_runs=WARM_RUNS)
        base, times = interleave([dense, runner], rounds=rounds)
        total = prices.add.fixed_ms + sum(prices.ms(n, lv) for n, lv in levels.items())
        measured = float(np.median(np.array(times) / np.array(base)))
        found.append((total / prices.whole_ms, measured * prices.dense_ms / prices.whole_ms))
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


__all__ = ["measure_points", "offered_levels", "price"]
