"""How quality is read: the label-free oracle of the search and the metric of the report."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from zipc.batches import Batch, Texts, count_truncated, tokenize_batches
from zipc.core.errors import UsageError
from zipc.data import Row, Splits
from zipc.losses import Loss, cosine_loss, divergence, mean_loss, unexplained
from zipc.metrics import EvalResult, choose_metric, metric_value, paired_bootstrap
from zipc.pooling import Pooling, pool, read_model_json, read_pooling
from zipc.predict import Array, Run, onnx_run, torch_run
from zipc.pruner.workers import side_by_side
from zipc.user_function import UserFunction, call_user_function, load_user_function

__all__ = [
    "Batch",
    "EvalResult",
    "Evaluator",
    "Pooling",
    "count_truncated",
    "make_evaluator",
    "paired_bootstrap",
    "pool",
    "read_pooling",
    "tokenize_batches",
]
Head = Literal["embedding", "classes", "regression"]
LOSSES: dict[Head, Loss] = {
    "embedding": cosine_loss,
    "classes": divergence,
    "regression": unexplained,
}
COSINE_SHARE = 0.1  # of each embedding's own cosine in the oracle, beside the similarities


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluator:
    """Reads the quality of a module or an ONNX file; made by `make_evaluator`."""

    metric: str
    pooling: Pooling
    head: Head
    split_name: str
    notes: tuple[str, ...]  # what a user should be told, one line each
    tokenizer: Any
    max_length: int
    class_index: dict[str, int]
    user: UserFunction | None = None
    user_source: str = ""

    def oracle(self, dense_outputs: Any, candidate_outputs: Any, *, pairs: Any = None) -> float:
        """Return the label-free loss of a candidate against the dense model; lower is better.

        Takes pooled embeddings or logits, (n, d) tensors or arrays: mean of 1 - cosine, of
        KL(dense || candidate), or for one logit the squared error over the dense variance. With
        `pairs` (m, 2) of rows, embeddings are judged by what they are for, the similarities: 1 -
        correlation with the dense model's, and a tenth of the mean of 1 - cosine.
        A candidate that is not finite scores infinity.

        Raises:
            UsageError: the dense outputs are not finite.
        """
        dense = torch.as_tensor(dense_outputs).float()
        candidate = torch.as_tensor(candidate_outputs).float()
        loss = mean_loss(LOSSES[self.head], dense, candidate)
        if self.head == "embedding" and pairs is not None and len(pairs) > 2 and loss < math.inf:
            agreement = _correlation(_similarity(dense, pairs), _similarity(candidate, pairs))
            return 1 - agreement + COSINE_SHARE * loss
        return loss

    def score_onnx(
        self,
        model: Path | bytes,
        rows: Sequence[Row],
        *,
        threads: int = 1,
        batch_size: int = 32,
        reference: EvalResult | Literal["self"] | None = None,
        runtime: str = "onnxruntime",
    ) -> EvalResult:
        """Read the metric from an ONNX file as a runtime runs it.

        `reference` is the dense model's result on the same rows; only the metric "agreement" needs
        it, and takes "self" when the dense model itself is scored.

        Raises:
            UsageError: the runtime cannot load or run it, or its outputs are not finite.
        """
        run = onnx_run(model, self.pooling, threads=threads, runtime=runtime)
        return self._score(run, rows, batch_size=batch_size, reference=reference)

    def score_torch(
        self,
        module: torch.nn.Module,
        rows: Sequence[Row],
        *,
        batch_size: int = 32,
        reference: EvalResult | Literal["self"] | None = None,
    ) -> EvalResult:
        """Read the metric from a torch module, in eval mode, where its parameters are."""
        training = module.training
        module.eval()
        try:
            run = torch_run(module, self.pooling)
            return self._score(run, rows, batch_size=batch_size, reference=reference)
        finally:
            module.train(training)

    def sentence_alone_deviation(
        self,
        model: Path | bytes,
        rows: Sequence[Row],
        *,
        n: int = 32,
        threads: int = 1,
        runtime: str = "onnxruntime",
    ) -> float:
        """Return how far a text alone may be from the same text in a batch of `n`.

        The largest cosine distance for embeddings, the largest difference relative to the largest
        logit otherwise. The texts are spread over all lengths, so that padding has its say.
        """
        texts = sorted(self.texts(rows), key=lambda t: len(t if isinstance(t, str) else t[0]))
        picked = np.unique(np.linspace(0, len(texts) - 1, min(n, len(texts))).astype(int))
        chosen = [texts[i] for i in picked]
        run = onnx_run(model, self.pooling, threads=threads, runtime=runtime)
        together = self._encode(run, chosen, batch_size=len(chosen))
        alone = self._encode(run, chosen, batch_size=1)
        if self.head == "embedding":
            return float(np.max(1 - _cosine(alone, together)))
        return float(np.max(np.abs(alone - together)) / max(np.abs(alone).max(), 1e-12))

    def texts(self, rows: Sequence[Row]) -> list[Texts]:
        """Return what is encoded: each different text for embeddings, whole rows for logits."""
        if self.head == "embedding":
            return list(dict.fromkeys(text for row in rows for text in row.texts))
        return [row.texts[0] if len(row.texts) == 1 else row.texts for row in rows]

    def _encode(self, run: Run, texts: Sequence[Texts], *, batch_size: int) -> Array:
        batches = tokenize_batches(
            self.tokenizer, texts, max_length=self.max_length, batch_size=batch_size
        )
        outputs: Array | None = None
        for batch, found in zip(batches, side_by_side(run, batches), strict=True):
            if outputs is None:
                outputs = np.empty((len(texts), found.shape[-1]), found.dtype)
            outputs[batch.indices] = found
        if outputs is None:
            raise UsageError("There are no rows to read the quality from.")
        if not np.isfinite(outputs).all():
            raise UsageError("The model gives NaN or infinity on this data.")
        return outputs

    def _score(
        self,
        run: Run,
        rows: Sequence[Row],
        *,
        batch_size: int,
        reference: EvalResult | Literal["self"] | None,
    ) -> EvalResult:
        if self.user is not None:
            predict = functools.partial(self._encode, run, batch_size=batch_size)
            value = call_user_function(self.user, predict, rows, source=self.user_source)
            return EvalResult(value, np.empty((0, 2)), len(rows), np.empty((0, 0)))
        texts = self.texts(rows)
        outputs = self._encode(run, texts, batch_size=batch_size)
        if self.metric == "agreement":
            if reference is None:
                raise ValueError("agreement needs reference=: the dense result, or 'self'")
            dense = outputs if isinstance(reference, str) else reference.outputs
            if dense.shape != outputs.shape:
                raise UsageError(f"Outputs of shape {outputs.shape} are not like {dense.shape}.")
            prediction, target = self._agreement(dense, outputs), np.ones(len(outputs))
        else:
            prediction, target = self._predictions(texts, outputs, rows)
        per_row = np.stack([prediction, target], axis=1).astype(np.float64)
        return EvalResult(metric_value(self.metric, per_row), per_row, len(rows), outputs)

    def _agreement(self, dense: Array, outputs: Array) -> Array:
        """Cosine, same class, or 1 - squared error over variance: one figure an output."""
        if self.head == "embedding":
            return _cosine(dense, outputs)
        if self.head == "classes":
            return np.asarray(dense.argmax(-1) == outputs.argmax(-1))
        return np.asarray(1 - (dense - outputs)[:, 0] ** 2 / max(float(dense.var()), 1e-12))

    def _predictions(
        self, texts: Sequence[Texts], outputs: Array, rows: Sequence[Row]
    ) -> tuple[Array, Array]:
        if self.head == "classes":
            if max(self.class_index.values()) >= outputs.shape[-1]:
                raise UsageError(
                    f"The data has class {max(self.class_index.values())} and the model "
                    f"{outputs.shape[-1]} classes, counted from 0. Check --label-column."
                )
            target = np.array([self.class_index[str(row.label)] for row in rows])
            return outputs.argmax(-1), target
        if any(row.label is None for row in rows):
            raise ValueError(f"{self.metric} needs labelled rows")
        target = np.array([row.label for row in rows], np.float64)
        if self.head == "regression":
            return outputs[:, 0], target
        place = {text: i for i, text in enumerate(texts)}
        first = outputs[[place[row.texts[0]] for row in rows]]
        second = outputs[[place[row.texts[1]] for row in rows]]
        return _cosine(first, second), target


def make_evaluator(
    model_dir: Path,
    tokenizer: Any,
    splits: Splits,
    *,
    metric: str | None = None,
    user_function: str | None = None,
    has_logits: bool,
    max_length: int,
) -> Evaluator:
    """Choose pooling, head and metric from the model folder, the data and the user's wish.

    Raises:
        UsageError: the metric does not suit, the labels do not match the model's classes, or the
            user's function cannot be loaded.
    """
    if metric is not None and user_function is not None:
        raise UsageError("Give --metric or --eval, not both.")
    config = model_config(model_dir)
    pooling = read_pooling(model_dir, has_logits=has_logits)
    head: Head = "embedding"
    if has_logits:
        one = len(config.get("id2label") or {}) == 1 or config.get("num_labels") == 1
        head = "regression" if one else "classes"
    labelled = splits.task != "none" and all(row.label is not None for row in splits.test)
    pair = len(splits.test[0].texts) == 2
    numeric = all(isinstance(row.label, int | float) for row in splits.test)
    notes = [f"pooling: {pooling.mode}{' + normalize' if pooling.normalize else ''} "]
    notes[0] += f"({pooling.source})"
    fitting: list[str] = []
    if labelled and head == "classes" and splits.task == "classification":
        fitting = ["accuracy", "f1", "mcc"]
    elif labelled and numeric and (head == "regression" or (head == "embedding" and pair)):
        fitting = ["spearman", "pearson"]
    fitting.append("agreement")
    user: UserFunction | None = None
    if user_function is not None:
        user, chosen = load_user_function(user_function), Path(user_function).name
    else:
        chosen = choose_metric(metric, fitting, what=f"{head} output, task {splits.task}")
    if chosen == "agreement" and metric is None:
        why = "no labels" if splits.task == "none" else f"labels unusable with {head} outputs"
        notes.append(f"metric: agreement with the dense model x100, not accuracy ({why})")
    class_index: dict[str, int] = {}
    if chosen in ("accuracy", "f1", "mcc"):
        class_index, note = class_order(config, splits.labels)
        notes.append(note)
    evaluator = Evaluator(
        metric=chosen,
        pooling=pooling,
        head=head,
        split_name="test",
        notes=(),
        tokenizer=tokenizer,
        max_length=max_length,
        class_index=class_index,
        user=user,
        user_source=user_function or "",
    )
    texts = evaluator.texts(splits.test)
    cut = count_truncated(tokenize_batches(tokenizer, texts, max_length=max_length))
    if cut:
        notes.append(f"{cut:,} of {len(texts):,} test texts are cut at {max_length} tokens")
    return replace(evaluator, notes=tuple(notes))


def class_order(config: dict[str, Any], labels: Sequence[str]) -> tuple[dict[str, int], str]:
    """Map the data's labels to the model's classes: by name, else by number, else sorted."""
    named = {str(name): int(index) for index, name in (config.get("id2label") or {}).items()}
    default = all(name == f"LABEL_{index}" for name, index in named.items())
    if not named or default:
        count = len(named) or int(config.get("num_labels") or 2)
        if all(label.isdecimal() for label in labels):
            return {label: int(label) for label in labels}, "classes: numbers of the data"
        if not set(labels) <= set(named):
            if len(labels) != count:
                raise UsageError(
                    f"The data has the classes {', '.join(labels[:10])} and the model "
                    f"{count} without names. Name them in id2label of its config.json."
                )
            order = {label: index for index, label in enumerate(labels)}
            return order, "classes: the model does not name them, taken in sorted order"
    folded = {name.casefold(): index for name, index in named.items()}
    if all(label.casefold() in folded for label in labels):
        return {label: folded[label.casefold()] for label in labels}, "classes: id2label"
    if all(label.isdecimal() and int(label) < len(named) for label in labels):
        return {label: int(label) for label in labels}, "classes: numbers of the data"
    missing = [label for label in labels if label.casefold() not in folded]
    raise UsageError(
        f"The data has classes the model does not know: {', '.join(missing[:10])}. "
        f"Its classes: {', '.join(list(named)[:20])}. "
        "Check --label-column, or the names of the class folders."
    )


def model_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    if not path.exists():
        raise UsageError(f"{model_dir} has no config.json. Give a Hugging Face model folder.")
    config = read_model_json(path)
    if not isinstance(config, dict):
        raise UsageError(f"{path} is not a model configuration.")
    return config


def _similarity(embeddings: torch.Tensor, pairs: Any) -> torch.Tensor:
    index = torch.as_tensor(pairs)
    return torch.nn.functional.cosine_similarity(
        embeddings[index[:, 0]], embeddings[index[:, 1]], dim=-1
    ).double()


def _correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Pearson correlation; 0 where one of them does not vary."""
    x, y = first - first.mean(), second - second.mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale > 0 else 0.0


def _cosine(first: Array, second: Array) -> Array:
    """Cosine of matching rows, (n, d) x (n, d) -> (n,), in fp64."""
    x, y = first.astype(np.float64), second.astype(np.float64)
    scale = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return np.asarray((x * y).sum(axis=-1) / np.maximum(scale, 1e-12))
