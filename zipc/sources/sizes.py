"""The sizes a model is timed at: what the user asked for, and what the model decides."""

from __future__ import annotations

from dataclasses import replace

from zipc.core.errors import UsageError
from zipc.core.request import Request
from zipc.sources.common import BATCH, DECODER, SEQUENCE, SourceModel

USUAL_LENGTH = 128  # tokens timed, where the user does not say


def settle(request: Request, source: SourceModel) -> Request:
    """The request with the sizes it leaves open filled in for this model.

    A model whose inputs are all (batch, sequence) is timed at a length, one with a cache on one
    token after others; any other at the whole shapes of its inputs, and has no sequence length.

    Raises:
        UsageError: two sizes contradict each other, or the model cannot take one.
    """
    batch = _batch(request, source)
    if source.cache is not None:
        return _settle_decode(replace(request, batch_size=batch), source)
    texts = all(set(spec.shape) <= {BATCH, SEQUENCE, DECODER} for spec in source.specs)
    if texts and SEQUENCE in source.axes:
        length = request.sequence_length or min(USUAL_LENGTH, source.max_length)
        if length > source.max_length:
            raise UsageError(
                f"--sequence-length {length} is more than the model takes ({source.max_length})."
            )
        return replace(request, batch_size=batch, sequence_length=length, input_shapes=())
    if request.sequence_length is not None:
        raise UsageError(
            f"{type(source.module).__name__} has no sequence axis: its inputs are "
            f"{', '.join(map(str, source.specs))}. Leave --sequence-length out; other sizes are "
            "given with --input-shapes."
        )
    shapes = tuple(
        replace(s, shape=tuple(batch if size == BATCH else size for size in s.shape))
        for s in source.specs
    )
    return replace(request, batch_size=batch, input_shapes=shapes)


def _settle_decode(request: Request, source: SourceModel) -> Request:
    most = source.max_length - 1
    past = request.past_length or min(USUAL_LENGTH, most)
    if past > most:
        raise UsageError(
            f"--past-length {past} is more than the model takes before another token ({most})."
        )
    return replace(request, sequence_length=1, past_length=past, input_shapes=())


def _batch(request: Request, source: SourceModel) -> int:
    firsts = {spec.shape[0] for spec in request.input_shapes if spec.shape}
    fixed = {spec.shape[0] for spec in source.specs if spec.shape} - {BATCH}
    given = firsts if len(firsts) == 1 else fixed
    if not given:
        return request.batch_size
    batch = int(next(iter(given))) if len(given) == 1 else request.batch_size
    if request.batch_size not in (1, batch):
        where = "--input-shapes has" if firsts else "the model takes"
        raise UsageError(f"--batch-size is {request.batch_size}, but {where} a batch of {batch}.")
    return batch
