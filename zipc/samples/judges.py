"""How the outputs of one kind of model are judged: against the dense model's, and against labels.

`Classes` reads logits, be it one choice a row, one a pixel or one a token; `Scalars` a column of
numbers; `Features` any outputs, however many; `Labelled` the one of several that labels are of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zipc.core.errors import UsageError
from zipc.losses import divergence, mean_loss, relative_error, unexplained
from zipc.metrics import Array as Figures
from zipc.metrics import choose_metric
from zipc.model_source import SourceModel
from zipc.predict import Array, Outputs
from zipc.samples.base import Oracle, Readout

Shape = tuple[str, tuple[int, ...]]  # an output and the shape of one row of it
KEPT = 1 << 25  # numbers a draw keeps of the outputs: 128 MiB for the dense model, and once more
IGNORED = -100  # a label that stands for none, as in torch's cross entropy
CLASS_AXIS = {1: -1, 2: -1, 3: 1}  # by the dimensions of a row: classes, (tokens, C), (C, H, W)
SPARE_CLASSES = 2  # most classes of an output for each that the labels name
RANKS = ("spearman", "pearson")  # metrics of one number a row
AGREEMENT = "metric: agreement with the dense model x100, not accuracy"
RELATIVE = ": 100 less the relative error of a row in percent"


class Judge(Protocol):
    """Turns outputs into what the search minimises and what the report states."""

    @property
    def metric(self) -> str: ...

    def judging(self, rows: int) -> tuple[Readout, Oracle]:
        """What is kept of the outputs on a draw of `rows`, and the loss between two of it."""

    def figures(
        self, dense: Outputs, found: Outputs, feeds: Mapping[str, Array], labels: Array | None
    ) -> Figures:
        """Prediction and target of every row, (b, 2), for `metrics.METRICS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """Logits over classes. With several choices a row, each counts alike."""

    metric: str
    output: str
    axis: int  # of the classes: 1 in (n, C, H, W), the last one elsewhere
    classes: int
    mask: str | None = None  # the input that is 0 where a choice is padding

    def judging(self, rows: int) -> tuple[Readout, Oracle]:
        """Read log-probabilities at places spread evenly over each row; the loss is their KL."""
        most = max(1, KEPT // (rows * self.classes))

        def readout(outputs: Sequence[Tensor], feeds: Mapping[str, Tensor]) -> Tensor:
            logits = outputs[0].movedim(self.axis, -1)
            logits = logits.reshape(len(logits), -1, self.classes)  # (b, places, C)
            mask = None if self.mask is None else feeds[self.mask].numpy()
            row, place = _spread(logits.shape[:2], mask, most)
            return logits[row, place].float().log_softmax(-1)

        return readout, lambda dense, candidate: mean_loss(divergence, dense, candidate)

    def figures(
        self, dense: Outputs, found: Outputs, feeds: Mapping[str, Array], labels: Array | None
    ) -> Figures:
        logits = self._choices(found)
        chosen = logits.argmax(-1)  # (b, places)
        valid = np.ones(chosen.shape, bool) if self.mask is None else feeds[self.mask] != 0
        if self.metric == "agreement":
            same = (chosen == self._choices(dense).argmax(-1)) & valid
            return _columns(same.sum(1) / np.maximum(valid.sum(1), 1), np.ones(len(same)))
        if labels is None:
            raise ValueError(f"{self.metric} needs labels")
        wanted = labels.reshape(len(labels), -1)
        if self.metric in ("accuracy", "f1", "mcc"):
            return _columns(chosen[:, 0], wanted[:, 0])
        valid = valid & (wanted != IGNORED)
        if self.metric in ("loss", "perplexity"):
            return _columns((_surprise(logits, wanted) * valid).sum(1), valid.sum(1))
        return _columns(((chosen == wanted) & valid).sum(1), valid.sum(1))

    def _choices(self, outputs: Outputs) -> Array:
        logits = np.moveaxis(outputs[self.output], self.axis, -1)
        return logits.reshape(len(logits), -1, self.classes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalars:
    """One number a row."""

    metric: str
    output: str

    def judging(self, rows: int) -> tuple[Readout, Oracle]:
        """The loss is the squared error over the variance of the dense outputs."""
        return (
            lambda outputs, feeds: outputs[0].reshape(-1, 1).float(),
            lambda dense, candidate: mean_loss(unexplained, dense, candidate),
        )

    def figures(
        self, dense: Outputs, found: Outputs, feeds: Mapping[str, Array], labels: Array | None
    ) -> Figures:
        values = found[self.output].reshape(-1)
        if self.metric == "agreement":
            return _columns(_closeness(dense, found, [self.output], {}), np.ones(len(values)))
        if labels is None:
            raise ValueError(f"{self.metric} needs labels")
        return _columns(values, labels.reshape(-1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Outputs without a meaning that zipc knows: what counts is how near they stay to the dense."""

    metric: str
    outputs: tuple[str, ...]
    widths: tuple[int, ...]  # numbers a row of each output
    mask: str | None = None  # the input that is 0 where a token is padding

    def judging(self, rows: int) -> tuple[Readout, Oracle]:
        """Keep numbers spread evenly over each output; the loss is the mean relative error."""
        most = max(1, KEPT // (rows * len(self.outputs)))
        picked = [torch.from_numpy(_even(width, most)) for width in self.widths]
        ends = np.cumsum([len(index) for index in picked]).tolist()
        spans = list(zip([0, *ends[:-1]], ends, strict=True))

        def readout(outputs: Sequence[Tensor], feeds: Mapping[str, Tensor]) -> Tensor:
            mask = None if self.mask is None else feeds[self.mask]
            flat = [_without_padding(o, mask).reshape(len(o), -1).float() for o in outputs]
            return torch.cat([f[:, index] for f, index in zip(flat, picked, strict=True)], 1)

        def oracle(dense: Tensor, candidate: Tensor) -> float:
            losses = [
                mean_loss(relative_error, dense[:, low:high], candidate[:, low:high])
                for low, high in spans
            ]
            return sum(losses) / len(losses)

        return readout, oracle

    def figures(
        self, dense: Outputs, found: Outputs, feeds: Mapping[str, Array], labels: Array | None
    ) -> Figures:
        closeness = _closeness(dense, found, self.outputs, feeds, self.mask)
        return _columns(closeness, np.ones(len(closeness)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Several outputs: the search keeps all of them, the report reads the one with labels."""

    kept: Features
    read: Judge

    @property
    def metric(self) -> str:
        return self.read.metric

    def judging(self, rows: int) -> tuple[Readout, Oracle]:
        return self.kept.judging(rows)

    def figures(
        self, dense: Outputs, found: Outputs, feeds: Mapping[str, Array], labels: Array | None
    ) -> Figures:
        return self.read.figures(dense, found, feeds, labels)


def choose_judge(
    source: SourceModel,
    shapes: Sequence[Shape],
    *,
    inputs: Mapping[str, Array],
    labels: Array | None,
    metric: str | None,
) -> tuple[Judge, list[str]]:
    """Choose judge and metric from the model's task, its outputs and the labels of the test rows.

    `inputs` are some rows. Returns, besides the judge, what a user should be told.

    Raises:
        UsageError: the metric does not fit, or the labels are not those of this model.
    """
    if len(shapes) > 1:
        return _judge_of_several(source, shapes, inputs=inputs, labels=labels, metric=metric)
    name, row = shapes[0]
    whole = labels is not None and labels.dtype.kind in "iu"
    axis = _class_axis(source, shapes[0], labelled=whole)
    mask = _token_mask(inputs)
    if axis is not None:
        classes, places = _classes(row, axis)
        fitting = _class_metrics(source, places, labels if whole else None, classes)
        masked = mask if mask is not None and inputs[mask].shape[1:] == places else None
        chosen = choose_metric(metric, fitting, what=f"{name} over {classes} classes")
        judge: Judge = Classes(metric=chosen, output=name, axis=axis, classes=classes, mask=masked)
    elif prod(row) == 1:
        usable = labels is not None and labels.dtype.kind in "iuf" and labels[:1].size == 1
        fitting = [*RANKS, "agreement"] if usable else ["agreement"]
        chosen = choose_metric(metric, fitting, what=f"{name}, one number a row")
        judge = Scalars(metric=chosen, output=name)
    else:
        chosen = choose_metric(metric, ["agreement"], what=f"output {name}")
        judge = _features(shapes, mask)
    if chosen != "agreement" or metric is not None:
        return judge, []
    why = "no labels" if labels is None else f"labels unusable with {name} {row}"
    how = "" if axis is not None else RELATIVE
    return judge, [f"{AGREEMENT} ({why}){how}"]


def _judge_of_several(
    source: SourceModel,
    shapes: Sequence[Shape],
    *,
    inputs: Mapping[str, Array],
    labels: Array | None,
    metric: str | None,
) -> tuple[Judge, list[str]]:
    """The search keeps every output; the report reads the one that the labels are of."""
    kept = _features(shapes, _token_mask(inputs))
    told = ", ".join(f"{name} {row}" for name, row in shapes)
    wanted = None if labels is None or metric == "agreement" else _labelled(shapes, labels, metric)
    if wanted is not None:
        read, _ = choose_judge(source, [wanted], inputs=inputs, labels=labels, metric=metric)
        if read.metric != "agreement":
            note = f"the labels are read against {wanted[0]}, one of several outputs: {told}"
            return Labelled(kept=kept, read=read), [note]
    why = "no labels"
    if labels is not None:
        why = f"labels of none of several outputs: {told}; --eval FILE.py:FUNCTION can read them"
    choose_metric(metric, [kept.metric], what=why)
    return kept, [] if metric else [f"{AGREEMENT} ({why}){RELATIVE}"]


def _features(shapes: Sequence[Shape], mask: str | None) -> Features:
    names, widths = zip(*((name, prod(row)) for name, row in shapes), strict=True)
    return Features(metric="agreement", outputs=names, widths=widths, mask=mask)


def _labelled(shapes: Sequence[Shape], labels: Array, metric: str | None) -> Shape | None:
    """The one of several outputs that labels can be of.

    Whole numbers are classes of the output that has the fewest of them, the first of equals. Where
    no metric of classes was asked for, one with more than `SPARE_CLASSES` for each that the labels
    name is none, as embeddings are not. Other labels are of the only output that is one number a
    row.
    """
    known = labels[labels != IGNORED]
    whole = labels.dtype.kind in "iu" and known.size and known.min() >= 0
    if whole and metric not in RANKS:
        named, fitting = int(known.max()) + 1, []
        most = SPARE_CLASSES * named if metric is None else inf
        for name, row in shapes:
            axis = CLASS_AXIS.get(len(row))
            classes, places = (0, ()) if axis is None else _classes(row, axis)
            if labels.shape[1:] == places and named <= classes <= most:
                fitting.append((classes, (name, row)))
        if fitting:
            return min(fitting, key=lambda found: found[0])[1]
    numbers = [shape for shape in shapes if prod(shape[1]) == 1]
    return numbers[0] if len(numbers) == 1 and labels[:1].size == 1 else None


def _class_axis(source: SourceModel, output: Shape, *, labelled: bool) -> int | None:
    """Where the classes are in an output that is logits; None for anything else."""
    name, row = output
    choices = source.task in ("causal_lm", "classes", "image_classes") or labelled
    if source.task in ("regression", "embedding"):
        return None
    if not (choices or name == "logits") or prod(row) == 1:
        return None
    return CLASS_AXIS.get(len(row))


def _classes(row: tuple[int, ...], axis: int) -> tuple[int, tuple[int, ...]]:
    """Number of classes, and the shape of the choices among them."""
    return (row[0], row[1:]) if axis == 1 else (row[-1], row[:-1])


def _class_metrics(
    source: SourceModel, places: tuple[int, ...], labels: Array | None, classes: int
) -> list[str]:
    if labels is None or (labels.ndim != 1 + len(places)):
        return ["agreement"]
    if labels.shape[1:] != places:
        raise UsageError(
            f"The labels of a row have the shape {labels.shape[1:]}, the outputs of "
            f"{source.source} {places}. Bring the labels to the size of the outputs."
        )
    bad = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if bad.size:
        raise UsageError(
            f"The data has class {bad[0]} and {source.source} {classes} classes, counted from 0. "
            "Check the labels."
        )
    if source.task == "causal_lm":
        return ["loss", "perplexity", "agreement"]
    return {
        0: ["accuracy", "f1", "mcc", "agreement"],
        1: ["token_accuracy", "agreement"],
        2: ["pixel_accuracy", "agreement"],
    }[len(places)]


def _token_mask(inputs: Mapping[str, Array]) -> str | None:
    """The input that says which tokens of the output are padding."""
    name = "decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask"
    return name if name in inputs else None


def _columns(prediction: Array, target: Array) -> Figures:
    return np.stack([prediction, target], axis=1).astype(np.float64)


def _even(count: int, most: int) -> npt.NDArray[np.int64]:
    """All of `count` places, or `most` of them, evenly spread."""
    if count <= most:
        return np.arange(count)
    return ((np.arange(most) + 0.5) * count / most).astype(np.int64)


def _spread(
    shape: Sequence[int], mask: Array | None, most: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows and places of the choices that count, at most `most` of each row."""
    places = [
        _even(shape[1], most) if mask is None else _of(np.flatnonzero(mask[i]), most)
        for i in range(shape[0])
    ]
    rows = np.repeat(np.arange(shape[0]), [len(p) for p in places])
    return rows, np.concatenate(places)


def _of(places: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    return places[_even(len(places), most)]


def _surprise(logits: Array, wanted: Array) -> Array:
    """Negative log-likelihood of the wanted class in fp64; 0 where none is wanted."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    index = np.where(wanted == IGNORED, 0, wanted)[..., None]
    chosen = np.take_along_axis(shifted, index, -1)[..., 0]
    return np.where(wanted == IGNORED, 0.0, np.log(np.exp(shifted).sum(-1)) - chosen)


def _closeness(
    dense: Outputs,
    found: Outputs,
    names: Sequence[str],
    feeds: Mapping[str, Array],
    mask: str | None = None,
) -> Array:
    """One minus the relative error of each row, never below 0, averaged over the outputs."""
    held: Any = None if mask is None else torch.from_numpy(feeds[mask])
    figures = []
    for name in names:
        d, f = (_flat(outputs[name], held) for outputs in (dense, found))
        scale = np.maximum(np.linalg.norm(d, axis=1), 1e-12)
        figures.append(np.maximum(1 - np.linalg.norm(f - d, axis=1) / scale, 0.0))
    return np.asarray(np.mean(figures, axis=0))


def _flat(values: Array, mask: Tensor | None) -> Array:
    tensor = torch.from_numpy(np.asarray(values, np.float64))
    return np.asarray(_without_padding(tensor, mask).reshape(len(tensor), -1).numpy())


def _without_padding(output: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros where a token of (b, s, ...) is padding; any other output as it is."""
    if mask is None or output.dim() < 3 or output.shape[:2] != mask.shape:
        return output
    return output * mask.reshape(*mask.shape, *[1] * (output.dim() - 2)).to(output.dtype)
