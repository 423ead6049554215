"""Price every level of every site in milliseconds on the target, alone and in the whole model."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from zipc.cold import cache_filler
from zipc.core.errors import TableMissing
from zipc.core.files import fingerprint as short_hash
from zipc.core.request import Request
from zipc.core.types import Level, Progress, Site, Target
from zipc.exporters.graph import OnnxGraph
from zipc.exporters.site_graph import extract
from zipc.exporters.specialise import EMISSION, Edit, specialise
from zipc.latency_tables.store import TableStore, differences
from zipc.latency_tables.table import Entry, LatencyTable
from zipc.manifest import TENSORRT
from zipc.offered import offered_levels
from zipc.plain_edits import plain_edit
from zipc.prepare import Prepared
from zipc.prices import Prices, SitePrices, added_up
from zipc.profiler.afresh import HELD_BYTES
from zipc.profiler.device import Device
from zipc.profiler.sweep import GROUP, PricedGraph, sweep
from zipc.pruner.graph.mixtures import nested
from zipc.whole_models import (
    as_fits,
    fastest_widths,
    fit_correction,
    overlapping,
    undiminished,
    untimed_runs,
    whole_model,
)

WHOLE, FASTEST = "model", "model-fastest"  # stand in a table at the level of width 1
PLACE_ROUNDS = 12, 200  # of a whole model: as many as fit
PLACE_MS = 750.0
PLACE_SECONDS = 60.0
PLACE_GROUP = 2, GROUP  # whole models that are held beside the dense one: as many as fit
# A machine may run integers at another pace for seconds, as where another program has half of its
# core: no part should meet that alone.
MANY = 128  # parts that are held at once, where they fit
MANY_BYTES = 1.5e9  # of them, if all were as large as the largest: about four times what they are
TRUSTED_ERROR = 0.06  # a table whose sums are further off than this (median) is not kept, or than
TRUSTED_SHARED = 0.12  # this, where sites share maps: their times go by products of widths


@dataclass(frozen=True, slots=True)
class How:
    """How graphs are swept: rounds, seconds after which noise gets no more, graphs held at once."""

    rounds: int
    seconds: float
    group: int
    stage: str
    untimed: int = 1  # runs of a graph before each one that is timed
    in_place: bool = False
    filler: bytes | None = None  # a graph that empties the cache of what is timed next


ALONE = How(rounds=20, seconds=200.0, group=GROUP, stage="measuring prices")


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
    beside = undiminished(prepared)
    dense_bytes, whole_bytes = beside[0], beside[-1]
    filler = cache_filler(device, request.workload, len(dense_bytes))
    cold = filler is not None
    path, stored = _stored(prepared, target, request, signatures, cold, device, store, progress)
    dense, whole = Level(1, prepared.floats), Level(1, prepared.numeric)
    graphs = [PricedGraph(WHOLE, whole, lambda: whole_bytes)]
    for signature, part in parts.items():
        site = next(s for s in own if signatures[s.name] == signature)
        graphs += [
            PricedGraph(signature, level, _builder(part, site, level, prepared))
            for level in offered[site.name]
        ]
    largest = max(parts, key=lambda s: sum(a.size for a in parts[s].arrays.values()))
    anchor = prepared.timed(parts[largest], Edit())
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
    table, seconds = extend(table, graphs, anchor, _alone(device, len(anchor), filler))
    sites = SitePrices(table, signatures, {s.name: Level(s.units) for s in own}, prepared.numeric)
    calls = {s.name: s.calls for s in own}
    whole_ms = table.price(WHOLE, whole)
    wholes = list[PricedGraph]()
    shared = overlapping(prepared, sites, calls, whole_ms)
    fastest = fastest_widths(prepared, target, sites) if shared else None
    if fastest is not None:
        wholes.append(PricedGraph(FASTEST, whole, lambda: whole_model(prepared, fastest)))
    if dense != whole:  # a speedup is over the model in floats
        wholes.append(PricedGraph(WHOLE, dense, lambda: dense_bytes))
    gently = _gently(whole_ms, len(whole_bytes))
    table, more = extend(table, wholes, whole_bytes, gently)
    sites = replace(sites, table=table)
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
            cold=cold,
        ),
        seconds=seconds + more,
        from_cache=seconds + more == 0.0,
        doubt=device.doubt(dense_bytes, request.workload),
    )
    if table.correction is not None:
        return prices.corrected(table.correction)
    started = time.monotonic()
    fitted, points = fit_correction(
        *(prepared, target, prices, beside, device.timer, progress), cold=cold
    )
    prices.seconds += time.monotonic() - started
    prices.from_cache = False
    if dense != whole:  # what one moment tells of integers beside floats may not last
        floats = Entry(
            signature=WHOLE,
            level=dense,
            samples_ms=tuple(ms for p in points for ms in p.floats_ms),
            anchor_ms=tuple(ms for p in points for ms in p.whole_ms),
        )
        prices.table = table.with_entries([floats], in_place=True)
        prices.dense_ms = floats.ratio * whole_ms
    prices = prices.corrected(fitted)
    prices.table = _noted(prices.table, device)
    trusted = TRUSTED_ERROR if fastest is None else TRUSTED_SHARED
    if fitted.median_error <= trusted or prices.doubt is not None:
        store.save(prices.table, path)
    else:
        path.unlink(missing_ok=True)
        progress.info(
            f"sums of prices are off by {fitted.median_error:.1%}, as on a busy machine. They "
            "serve this run only; the next one measures them again"
        )
    return prices


def _stored(
    prepared: Prepared,
    target: Target,
    request: Request,
    signatures: Mapping[str, str],
    cold: bool,
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
        *(["cold"] if cold else []),
    )
    prints = device.fingerprint()
    place = f"{target.name}@{prints['host']}" if "host" in prints else target.name
    path = store.path(place, request.workload, target.runtime, key)
    stored = store.load(path)
    changed = "; ".join(differences(stored.fingerprint, prints)) if stored else ""
    if stored and changed and request.allow_table_mismatch:
        stored = stored.with_note(f"prices of a different device or state were used: {changed}")
        progress.info(
            f"prices of a different device or state are used ({changed}): allowed by "
            "--allow-table-mismatch"
        )
    elif changed:
        progress.info(f"the latency table is of another device or state ({changed}): measured anew")
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
    if not missing:
        if not how.in_place:
            progress.stage("prices")
            progress.done(f"reused {len(graphs)} from the latency table")
        return table, 0.0
    if table.fingerprint != device.fingerprint():
        raise TableMissing(
            f"The table {path} lacks {len(missing)} entries and was measured on another device;"
            " it cannot be extended here. Run the same command without --allow-table-mismatch."
        )
    if len(missing) < len(graphs):
        progress.info(f"{len(graphs) - len(missing)} prices reused from the latency table")
    if device.kind == "measured" and device.runtime == TENSORRT:
        progress.info(
            f"{len(missing)} engines are built on {table.fingerprint['host']}, some seconds each; "
            "interrupted, the same command goes on from what was measured"
        )
    table = table.with_correction(None) if how.in_place else table.unplaced()
    started = time.monotonic()
    held = [table]

    def keep(entries: list[Entry]) -> None:
        held[0] = held[0].with_entries(entries, in_place=how.in_place)
        if time.monotonic() - saved[0] > 5:  # all that a killed sweep loses
            store.save(held[0], path)
            saved[0] = time.monotonic()

    saved = [started]
    try:
        load = partial(device.timer().load, workload=table.workload)
        sweep(
            missing,
            anchor=load(anchor),
            make_runner=load,
            progress=progress,
            rounds=how.rounds,
            untimed=how.untimed,
            filler=None if how.filler is None else load(how.filler),
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


def _alone(device: Device, size: int, filler: bytes | None) -> How:
    """How parts of a model are swept, of which the largest has so many bytes.

    What was measured is kept group by group, so that boards, which may be lost or take minutes to
    build engines, have small ones.
    """
    small = "host" in device.fingerprint() or filler is not None
    held = GROUP if small else as_fits(MANY_BYTES / size, GROUP, MANY)
    return replace(ALONE, group=held, filler=filler)


def _gently(whole_ms: float, size: int) -> How:
    """How whole models of so many milliseconds and bytes are timed."""
    least, most = PLACE_ROUNDS
    return How(
        rounds=as_fits(PLACE_MS / (2 * whole_ms), least, most),
        seconds=PLACE_SECONDS,
        group=as_fits(HELD_BYTES / size, *PLACE_GROUP),
        stage="measuring whole models",
        untimed=untimed_runs(whole_ms),
        in_place=True,
    )


def _noted(table: LatencyTable, device: Device) -> LatencyTable:
    for note in device.notes:
        table = table.with_note(note)
    return table


def _builder(part: OnnxGraph, site: Site, level: Level, prepared: Prepared) -> Callable[[], bytes]:
    cut = level.beside(prepared.numeric)

    def build() -> bytes:
        kept = {site.name: tuple(range(level.width))}
        edit = plain_edit(prepared, {site.name: cut}, kept)
        return prepared.deployed(part, edit, part=True)

    return build
