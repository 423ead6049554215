"""`Samples` over rows that are arrays by the names of the model's inputs, judged by a `Judge`."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from zipc.core.errors import UsageError
from zipc.core.request import Request
from zipc.core.types import InputSpec
from zipc.evaluate import class_order, model_config
from zipc.metrics import EvalResult, metric_value
from zipc.model_source import SourceModel
from zipc.predict import Array, Outputs, Predict, onnx_predict
from zipc.pruner.workers import side_by_side
from zipc.samples.base import Drawn, Feeds, Part
from zipc.samples.judges import Judge, Shape, choose_judge
from zipc.user_function import UserFunction, call_user_function, load_user_function

Item = tuple[str, int]  # role and position: a row of the data
BATCH_ROWS = 64
BATCH_NUMBERS = 1 << 22  # inputs of a batch in a draw, as numbers
TOKEN = 1024  # numbers a token stands for
TEXT_TOKENS = 32  # what is counted as one short text
TEXT_NUMBERS = 1 << 14
FEWEST = 16  # rows a draw has whatever they cost
RUN_NUMBERS = 1 << 24  # inputs and outputs of a batch, of which several run at a time


class Rows(Protocol):
    """Where rows come from."""

    def feeds(self, items: Sequence[Item]) -> dict[str, Array]:
        """Stack rows to a batch of each input."""

    def labels(self, items: Sequence[Item]) -> Array | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSamples:
    """Rows as `Samples`."""

    source: SourceModel
    rows: Rows
    parts: Mapping[Part, Sequence[Item]]
    judge: Judge
    outputs: tuple[str, ...]
    unit: str
    description: str
    notes: tuple[str, ...]
    sha256: str
    batch: int  # rows a batch at most
    user: UserFunction | None = None
    user_source: str = ""

    @property
    def metric(self) -> str:
        if self.user is not None:
            return Path(self.user_source).name
        return self.judge.metric

    @property
    def sizes(self) -> Mapping[Part, int]:
        return {part: len(items) for part, items in self.parts.items()}

    def draw(self, part: Part, *, limit: int, seed: int) -> Drawn:
        """Rows drawn by seed. One that costs more than a short text counts as several."""
        items = self.parts[part]
        first = self.rows.feeds(items[:1])
        cost = max(1.0, _tokens(first) / TEXT_TOKENS, _numbers(first) / TEXT_NUMBERS)
        count = max(int(limit / cost), min(limit, FEWEST), 1)
        chosen = [items[i] for i in np.random.default_rng(seed).permutation(len(items))[:count]]
        size = BATCH_NUMBERS // max(1, _numbers(first) + TOKEN * _tokens(first))
        groups = _groups(chosen, self._fixed or max(1, min(self.batch, size)))
        batches = [
            _tensors(_filled(self.rows.feeds(some), self._fixed), self.source) for some in groups
        ]
        readout, oracle = self.judge.judging(len(chosen))
        return Drawn(batches, readout, oracle)

    def compare(
        self, dense: bytes, compiled: bytes, part: Part, *, runtime: str = "onnxruntime"
    ) -> tuple[EvalResult, EvalResult]:
        """Run both batch by batch, so that the outputs of few batches are held."""
        models = [self._predict(model, runtime) for model in (dense, compiled)]
        items = self.parts[part]
        if self.user is not None:
            before, after = (self._by_user(self.user, model, items) for model in models)
            return before, after

        def figures(some: Sequence[Item]) -> tuple[Array, Array]:
            feeds, labels = self.rows.feeds(some), self.rows.labels(some)
            first, second = (_finite(model(feeds)) for model in models)
            return (
                self.judge.figures(first, first, feeds, labels),
                self.judge.figures(first, second, feeds, labels),
            )

        columns = zip(
            *side_by_side(figures, _groups(items, self._fixed or self.batch)), strict=True
        )
        before, after = (self._result(np.concatenate(held)) for held in columns)
        return before, after

    def deviation(self, model: bytes, part: Part, *, runtime: str = "onnxruntime") -> float | None:
        """Return the largest difference, relative to the largest number of the output.

        Of as many rows as a batch holds, spread over the part.
        """
        if self._fixed is not None:
            return None
        items = self.parts[part]
        places = np.unique(
            np.linspace(0, len(items) - 1, min(self.batch, 32, len(items))).astype(int)
        )
        chosen = [items[i] for i in places]
        predict = self._predict(model, runtime)
        together = predict(self.rows.feeds(chosen))
        worst = 0.0
        for i, item in enumerate(chosen):
            alone = predict(self.rows.feeds([item]))
            for name, values in alone.items():
                scale = max(float(np.abs(together[name]).max()), 1e-12)
                worst = max(worst, float(np.abs(values[0] - together[name][i]).max()) / scale)
        return worst

    @property
    def _fixed(self) -> int | None:
        """The only batch the model takes, where tracing it has fixed one."""
        firsts = [spec.shape[0] for spec in self.source.specs if spec.shape]
        return next((size for size in firsts if isinstance(size, int)), None)

    def _predict(self, model: bytes, runtime: str) -> Predict:
        run = onnx_predict(model, self.outputs, runtime=runtime)

        def predict(feeds: Mapping[str, Array]) -> Outputs:
            rows = len(next(iter(feeds.values())))
            found = run(_filled(feeds, self._fixed))
            return {name: values[:rows] for name, values in found.items()}

        return predict

    def _result(self, per_row: Array) -> EvalResult:
        return EvalResult(metric_value(self.metric, per_row), per_row, len(per_row))

    def _by_user(self, function: UserFunction, model: Predict, items: Sequence[Item]) -> EvalResult:
        rows = self.rows.feeds(items)
        labels = self.rows.labels(items)
        if labels is not None:
            rows["labels"] = labels
        predict = functools.partial(_in_batches, model, size=self._fixed or self.batch)
        value = call_user_function(function, predict, rows, source=self.user_source)
        return EvalResult(value, np.empty((0, 2)), len(items))


def user_function(source: str | None, metric: str | None) -> UserFunction | None:
    """Load the user's own metric where one is named.

    Raises:
        UsageError: it cannot be loaded, or a metric is named as well.
    """
    if source is None:
        return None
    if metric is not None:
        raise UsageError("Give --metric or --eval, not both.")
    return load_user_function(source)


def probe(source: SourceModel, feeds: Mapping[str, Array]) -> list[Shape]:
    """Run the torch module on a few rows; returns the shape of a row of each output, by name.

    Raises:
        UsageError: it does not run on them, or an output does not have the rows first.
    """
    _check_sizes(source, feeds)
    fixed = {spec.shape[0] for spec in source.specs if isinstance(spec.shape[0], int)}
    given = len(next(iter(feeds.values())))
    found: list[Shape] = []
    for rows in [*fixed][:1] or (given, given + 1):  # an axis of as many may be another one
        found = _output_shapes(source, _filled(feeds, rows), rows)
    return found


def _output_shapes(source: SourceModel, feeds: Mapping[str, Array], rows: int) -> list[Shape]:
    tensors = _tensors({name: feeds[name] for name in source.inputs}, source)
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in tensors.items())
    try:
        with torch.inference_mode():
            outputs = source.chosen(source.module(**tensors))
    except Exception as error:  # anything a model's own code raises
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise UsageError(
            f"{source.source} does not run on rows of --data ({shapes}): "
            f"{type(error).__name__}: {first}. Check the shapes and the values of the data."
        ) from error
    found = []
    for output, (_, name) in zip(outputs, source.outputs, strict=True):
        if output.dim() == 0 or len(output) != rows:
            raise UsageError(
                f"The output {name} of {source.source} has the shape {tuple(output.shape)} for "
                f"{rows} rows; zipc reads outputs whose first axis is the row. Have forward return "
                "it so, or not at all."
            )
        found.append((name, tuple(output.shape[1:])))
    return found


def _check_sizes(source: SourceModel, feeds: Mapping[str, Array]) -> None:
    for spec in source.specs:
        values = feeds[spec.name]
        check_row(spec, InputSpec(spec.name, str(values.dtype), values.shape))


def check_row(spec: InputSpec, found: InputSpec) -> None:
    """Refuse rows of another size or kind than the model is compiled for.

    Raises:
        UsageError: what was `found` of an input does not fit its `spec`.
    """
    row, wanted = found.shape[1:], spec.shape[1:]
    fits = len(row) == len(wanted) and all(
        isinstance(size, str) or size == have for size, have in zip(wanted, row, strict=True)
    )
    if not fits:
        told = "x".join(map(str, (1, *row)))
        raise UsageError(
            f"A row of '{spec.name}' in --data is {told[2:]}, and the model is compiled for "
            f"{spec}. Compile it for the data's size with --input-shapes {spec.name}:{told}, "
            "or bring the data to the model's."
        )
    if found.dtype.startswith("float") != spec.dtype.startswith("float"):
        raise UsageError(
            f"'{spec.name}' in --data is {found.dtype}, and the model takes {spec.dtype}. Save it "
            "in that type."
        )


def _filled(feeds: Mapping[str, Array], count: int | None) -> dict[str, Array]:
    """Repeat the last row until there are `count`."""
    if count is None:
        return dict(feeds)
    return {
        name: np.concatenate([values, np.repeat(values[-1:], count - len(values), axis=0)])
        for name, values in feeds.items()
    }


def _batch_size(feeds: Mapping[str, Array], shapes: Sequence[Shape]) -> int:
    """Rows a batch at most, from some rows and the shapes of their outputs."""
    rows = len(next(iter(feeds.values())))
    numbers = sum(v.size for v in feeds.values()) / rows + sum(prod(shape) for _, shape in shapes)
    return int(max(2, min(BATCH_ROWS, RUN_NUMBERS // numbers)))


def row_samples(
    source: SourceModel,
    rows: Rows,
    parts: Mapping[Part, Sequence[Item]],
    *,
    shapes: Sequence[Shape],
    request: Request,
    user: UserFunction | None,
    unit: str,
    description: str,
    sha256: str,
    notes: Sequence[str],
) -> RowSamples:
    """Put rows and the judge that suits them together.

    Raises:
        UsageError: the metric does not fit, or the labels are not those of this model.
    """
    some = rows.feeds(parts["calibration"][:2])
    judge, told = choose_judge(
        source,
        shapes,
        inputs=some,
        labels=rows.labels(parts["test"]),
        metric=request.metric,
    )
    return RowSamples(
        source=source,
        rows=rows,
        parts=parts,
        judge=judge,
        outputs=tuple(name for name, _ in shapes),
        unit=unit,
        description=description,
        notes=(*notes, *([] if user is not None else told)),
        sha256=sha256,
        batch=_batch_size(some, shapes),
        user=user,
        user_source=request.evaluator or "",
    )


def named_classes(
    source: SourceModel, shapes: Sequence[Shape], names: Sequence[str]
) -> tuple[dict[str, int] | None, str]:
    """The model's number of each class name; None where the model gives no classes.

    Raises:
        UsageError: the model's classes have other names, or are of another number.
    """
    fitting = [row for _, row in shapes if len(row) == 1 and row[0] > 1]
    if len(shapes) > 1:
        fitting = [row for row in fitting if row[0] == len(names)]
    if not fitting:
        told = ", ".join(f"{name} {row}" for name, row in shapes)
        return None, f"labels are names of classes, and {told} are not classes: not used"
    (row, *_) = fitting
    config = {} if source.folder is None else model_config(source.folder)
    return class_order({"num_labels": row[0], **config}, names)


def _in_batches(model: Predict, rows: Mapping[str, Array], *, size: int) -> Outputs:
    count = len(next(iter(rows.values())))
    parts = [
        _finite(model({name: value[i : i + size] for name, value in rows.items()}))
        for i in range(0, count, size)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _finite(outputs: Outputs) -> Outputs:
    if not all(np.isfinite(value).all() for value in outputs.values()):
        raise UsageError("The model gives NaN or infinity on this data.")
    return outputs


def _groups(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _tensors(feeds: Mapping[str, Array], source: SourceModel) -> Feeds:
    """The model's inputs in its types, and the mask that says what is padding."""
    types = {spec.name: getattr(torch, spec.dtype) for spec in source.specs}
    return {
        name: torch.from_numpy(np.ascontiguousarray(value)).to(types.get(name))
        for name, value in feeds.items()
        if name in types or name.endswith("attention_mask")
    }


def _numbers(feeds: Mapping[str, Array]) -> int:
    """Real numbers a row: pixels and features, not tokens."""
    return sum(v[0].size for v in feeds.values() if v.dtype.kind == "f")


def _tokens(feeds: Mapping[str, Array]) -> int:
    """Tokens a row: the longest of its integers."""
    return max((v[0].size for v in feeds.values() if v.dtype.kind != "f"), default=0)
