"""Before the search: the device is opened, the model loaded and priced, the evidence gathered."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock

from zipc.build import dense_model
from zipc.candidates import Candidates, gather, weight_limit
from zipc.clock import Clock, one_thread
from zipc.core.beside import beside
from zipc.core.engine_options import EngineOptions
from zipc.core.errors import UsageError, ZipcError
from zipc.core.request import Request
from zipc.core.types import Progress, Target
from zipc.devices import open_device, refuse_other_gpu
from zipc.effort import effort_of
from zipc.exporters.tensorrt.engine import choose_builder
from zipc.integer_body import IntegerBody
from zipc.latency_tables.store import TableStore
from zipc.metrics import check_metric
from zipc.model_source import SourceModel, load_source, settle, with_cache
from zipc.numerics.int8 import FULL, STATIC
from zipc.prepare import Prepared, prepare
from zipc.prices import Prices
from zipc.pricing import price
from zipc.profiler.device import Device
from zipc.proof import paired_speedup
from zipc.quantizer import check_modelopt
from zipc.runtimes import runtime_of
from zipc.samples import Samples, inputs_of_rows, kind_of, open_samples
from zipc.sources.common import BATCH
from zipc.stage_cache import StageCache, cache_of, cache_root
from zipc.targets import AUTO, SERVING, on_device, on_runtime, requested_target
from zipc.turns import faster_runtime

BODY_PAIRS = 60
BODY_GAIN = 1.4  # least speedup of the unpruned network for which it is brought to INT8


@dataclass(frozen=True, slots=True)
class Priced:
    """A model whose sites have their prices, and the device these are of."""

    target: Target
    device: Device
    prepared: Prepared
    prices: Prices


def price_model(request: Request, *, progress: Progress) -> Priced:
    """The prices of a model's sites on the target; what its table lacks is measured."""
    with one_thread():
        clock = Clock(progress)
        target, device = open_target(request)
        source, request = _load(request, clock)
        prepared = _prepare(source, request, clock)
        if request.runtime == AUTO:
            target, device, _ = faster_runtime(prepared, request, target, clock)
        return Priced(target, device, prepared, _price(prepared, request, target, device, clock))


def price_on_boards(
    requests: Sequence[Request], *, progress: Progress, progress_of: Callable[[str], Progress]
) -> list[Priced | ZipcError]:
    """The same on several boards at once; `requests` differ in their board alone.

    What becomes of a board that fails is its error; the others go on. What is done on a board is
    told to the `progress_of` its host.
    """
    with one_thread():
        clock = Clock(progress)
        opened = dict(zip(requests, beside(open_target, requests), strict=True))
        unreached = [found for found in opened.values() if isinstance(found, ZipcError)]
        if len(unreached) == len(requests):
            return [*unreached]
        source, settled = _load(requests[0], clock)
        prepared = _prepare(source, settled, clock)
        turns: defaultdict[str, Lock] = defaultdict(Lock)  # two names of one machine wait in line

        def price_on(request: Request) -> Priced:
            found = opened[request]
            if isinstance(found, ZipcError):
                raise found
            target, device = found
            own = replace(settled, host=request.host, host_python=request.host_python)
            told, copy = Clock(progress_of(str(request.host))), replace(prepared)
            with turns[device.fingerprint()["machine"]]:
                if own.runtime == AUTO:
                    target, device, _ = faster_runtime(copy, own, target, told)
                return Priced(target, device, copy, _price(copy, own, target, device, told))

        return beside(price_on, requests)


@dataclass(slots=True)
class Setup:
    """All that is known before the first candidate is scored."""

    request: Request  # with every size filled in
    target: Target
    device: Device
    samples: Samples
    prepared: Prepared
    prices: Prices
    candidates: Candidates


def set_up(request: Request, progress: Progress) -> Setup:
    kind_of(request)
    check_metric(request.metric)
    if request.recover != "none":
        raise UsageError(f"--recover {request.recover} is not available; the only choice is none.")
    target, device = open_target(request)
    effort = effort_of(request.effort)
    cache = cache_of(request)
    source, request = _load(request, progress)
    samples = open_samples(source, request)
    for line in (f"data: {samples.description}", *samples.notes):
        progress.info(line)
    prepared = _prepare(source, request, progress)
    told = []
    if request.runtime == AUTO:
        target, device, note = faster_runtime(prepared, request, target, progress)
        told = [note]
    prices = _price(prepared, request, target, device, progress)
    candidates = gather(
        prepared,
        prices,
        target,
        samples,
        request,
        effort=effort,
        cache=cache,
        progress=progress,
    )
    _tell_discarded(cache, progress)
    for note in candidates.notes:
        progress.info(note)
    candidates.notes += told
    return Setup(request, target, device, samples, prepared, prices, candidates)


def open_target(request: Request) -> tuple[Target, Device]:
    """The target and its device, if they can do what is asked.

    Raises:
        RemoteError: the board cannot be reached.
        UsageError: two wishes contradict each other, or there are not as many processors.
    """
    target = requested_target(request)
    if request.engine is not None and target.sheet is not None:
        choose_builder(request.engine, target.sheet.sm, EngineOptions.parse(request.engine_options))
    device = open_device(target, request.host, python=request.host_python)
    refuse_other_gpu(target, device.fingerprint())
    target = on_device(target, device.fingerprint())
    request.check(target)
    if request.runtime == AUTO:
        for name in SERVING:  # one that is missing is told before anything is loaded
            open_device(on_runtime(target, name), request.host, python=request.host_python)
    if request.quantizer == "modelopt":
        check_modelopt(weight_limit(device.fingerprint()))
    processors = device.fingerprint().get("cores")
    if request.threads and processors and request.threads > processors:
        raise UsageError(
            f"--threads {request.threads} is more than the {processors} processors of "
            f"{request.host or 'this machine'}."
        )
    return target, device


def _load(request: Request, progress: Progress) -> tuple[SourceModel, Request]:
    progress.stage("load model")
    source = load_source(
        request.model,
        weights=request.weights,
        input_shapes=request.input_shapes,
        rows=partial(inputs_of_rows, request),
    )
    if request.phase == "decode":
        source = with_cache(source)
    progress.done(type(source.module).__name__)
    for note in source.notes:
        progress.info(note)
    return source, settle(request, source)


def _prepare(source: SourceModel, request: Request, progress: Progress) -> Prepared:
    cache = cache_of(request)
    prepared = prepare(source, request, cache=cache, progress=progress)
    _tell_discarded(cache, progress)
    return prepared


def _price(
    prepared: Prepared, request: Request, target: Target, device: Device, progress: Progress
) -> Prices:
    prepared.floats, runtime = target.reference_numeric, runtime_of(target, device.kind)
    if request.quantizer != "zipc":  # it is for linear maps
        runtime = replace(runtime, convolutions=False)
    prepared.runtime = runtime
    prepared.body = _body(prepared, request, target, device, progress)
    store = TableStore(cache_root(request) / "tables")
    return price(prepared, target, request, device=device, store=store, progress=progress)


def _body(
    prepared: Prepared, request: Request, target: Target, device: Device, progress: Progress
) -> IntegerBody | None:
    """INT8 for the whole network, where it has convolutions to cut, may run in it, and gains.

    Sites of linear maps alone choose their numeric one by one: see `candidates`. ONNX Runtime's
    quantiser writes the graph, with unsigned activations: TensorRT would not take it.
    """
    kinds = {site.kind for site in prepared.structure.sites}
    wanted = request.numerics in ("auto", "int8", STATIC) and STATIC in target.numerics
    if "channels" not in kinds or "heads" in kinds or not wanted or target.signed:
        return None
    if request.quantizer != "zipc":
        raise UsageError(
            f"--quantizer {request.quantizer} is for linear maps, and {request.model} is brought "
            "to INT8 with its convolutions as a whole. Leave it out."
        )
    progress.stage("whole network in INT8")
    body = IntegerBody(
        request.workload,
        reduce_range=weight_limit(device.fingerprint()) < FULL,
        row_bytes=prepared.dense.row_bytes() if BATCH in prepared.source.axes else 0,
    )
    dense = dense_model(prepared)
    timer = device.timer()
    runners = [timer.load(m, workload=request.workload) for m in (dense, body.emit(dense))]
    speedup = paired_speedup(*runners, pairs=BODY_PAIRS).speedup
    doubt = device.doubt(dense, request.workload)
    least = BODY_GAIN if doubt is None else math.exp(doubt.reach(["int8"]))
    pays = speedup >= least or request.numerics != "auto"
    progress.done(f"{speedup:.2f}x unpruned{'' if pays else ': not used'}")
    return body if pays else None


def _tell_discarded(cache: StageCache, progress: Progress) -> None:
    for entry in cache.discarded:
        progress.info(f"damaged cache entry {entry} was thrown away")
