"""Arrays named like the model's inputs, from .npz files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from zipc.core.errors import UsageError
from zipc.core.request import Request
from zipc.core.types import InputSpec
from zipc.model_source import SourceModel
from zipc.predict import Array
from zipc.samples.base import Part
from zipc.samples.judges import IGNORED, Shape
from zipc.samples.npz import LABELS, SUFFIX, find_npz, read_arrays
from zipc.samples.rows import (
    Item,
    RowSamples,
    check_row,
    named_classes,
    probe,
    row_samples,
    user_function,
)
from zipc.samples.scale import MEAN, STD, Scale, find_scale, normalised
from zipc.splitting import Cut, cut


@dataclass(frozen=True, slots=True)
class ArrayRows:
    """Rows of arrays; those of each role have arrays of their own."""

    arrays: Mapping[str, Mapping[str, Array]]  # role -> input -> (rows, ...)
    targets: Mapping[str, Array] = field(default_factory=dict)  # role -> labels
    scale: Scale | None = None  # for images of bytes

    def feeds(self, items: Sequence[Item]) -> dict[str, Array]:
        names = self.arrays[items[0][0]]
        stacked = {n: np.stack([self.arrays[role][n][i] for role, i in items]) for n in names}
        return _with_defaults({name: self._fed(value) for name, value in stacked.items()})

    def labels(self, items: Sequence[Item]) -> Array | None:
        if any(role not in self.targets for role, _ in items):
            return None
        return np.stack([self.targets[role][i] for role, i in items])

    def _fed(self, values: Array) -> Array:
        if values.dtype == np.uint8 and values.ndim == 4 and self.scale is not None:
            return normalised(values, self.scale)
        return values.astype(np.float32 if values.dtype.kind == "f" else np.int64)


def array_samples(source: SourceModel, request: Request) -> RowSamples:
    """Read the .npz files at `request.data` for any model.

    Bytes (rows, height, width, channels) are images: they are normalised with the arrays `mean`
    and `std` of the file, or as the model folder says. Other arrays are fed as they are.

    Raises:
        UsageError: a file is damaged or holds pickles, arrays do not fit the model or each other,
            or there are too few rows.
    """
    user = user_function(request.evaluator, request.metric)
    files = find_npz(request)
    read, notes = read_arrays(files, request, source.inputs)
    held = {role: _inputs(read[role], source, path) for role, path in files.items()}
    targets = _labels(read, held, files, request)
    _alike(held, files)
    scale, how = find_scale(source, held, read, files)
    rows = ArrayRows(held, targets, scale)
    made = _cut(held, targets, files, request)
    probed = rows.feeds(made.parts["calibration"][:2])
    shapes = probe(source, probed)
    rows, told = _numbered(rows, source, shapes)
    notes += told
    return row_samples(
        source,
        rows,
        made.parts,
        shapes=shapes,
        request=request,
        user=user,
        unit="images" if how else "rows",
        description=" · ".join([_shapes(held), *how, made.description]),
        sha256=_digest(rows, made.parts),
        notes=notes,
    )


def describe_arrays(request: Request) -> str:
    """One line on the arrays and parts of the .npz files at `request.data`.

    Raises:
        UsageError: a file is damaged, has other inputs or sizes than --input-shapes, or too few
            rows.
    """
    files, specs = find_npz(request), request.input_shapes
    read, _ = read_arrays(files, request, [spec.name for spec in specs if len(specs) > 1])
    other = (LABELS, MEAN, STD)
    held = {role: {n: v for n, v in a.items() if n not in other} for role, a in read.items()}
    for role, path in files.items():
        _check_given(specs, held[role], path, request)
    targets = _labels(read, held, files, request)
    return f"{_shapes(held)} · {_cut(held, targets, files, request).description}"


def array_inputs(request: Request) -> list[InputSpec]:
    """The inputs that the first .npz file at `request.data` has rows of.

    Raises:
        UsageError: it is damaged, or an array has no rows.
    """
    role, path = next(iter(find_npz(request).items()))
    read, _ = read_arrays({role: path}, request, ())
    empty = [name for name, values in read[role].items() if values.ndim and not len(values)]
    if empty:
        raise UsageError(f"'{empty[0]}' in {path} has no rows.")
    return list(_specs_of(read[role]).values())


def _specs_of(arrays: Mapping[str, Array]) -> dict[str, InputSpec]:
    return {
        name: _spec_of(name, values)
        for name, values in arrays.items()
        if name not in (LABELS, MEAN, STD)
        and values.dtype.kind in "fiub"
        and values.ndim
        and values.size
    }


def _spec_of(name: str, values: Array) -> InputSpec:
    if values.dtype == np.uint8 and values.ndim == 4:  # images of bytes, as `ArrayRows` feeds them
        _, height, width, channels = values.shape
        return InputSpec(name, "float32", (1, channels, height, width))
    shape = (1, *values.shape[1:])
    if values.dtype.kind == "f":
        return InputSpec(name, "float32", shape)
    return InputSpec(name, "int64", shape, int(values.max()) + 1)


def _check_given(
    specs: Sequence[InputSpec], arrays: Mapping[str, Array], path: Path, request: Request
) -> None:
    """Refuse arrays of other sizes than --input-shapes gives, and inputs that are not finite.

    Its types may come from the arrays; without it all of them are inputs.

    The shape of a single input may have any name, as its array may.
    """
    found = _specs_of(arrays)
    if len(specs) > 1:
        _named(arrays, [spec.name for spec in specs], path, model=request.model)
    elif specs and len(found) == 1:
        specs = [replace(specs[0], name=next(iter(found)))]
    for spec in specs:
        if spec.name in found:
            kind = found[spec.name].dtype if spec.dtype == "float32" else spec.dtype
            check_row(replace(spec, dtype=kind), found[spec.name])
    for name in [spec.name for spec in specs] or found:
        if name in found:
            _finite(name, arrays[name], path)


def next_tokens(ids: Array, mask: Array) -> Array:
    """Labels of a language model: the next id of each token, none for the last and for padding."""
    labels = np.full(ids.shape, IGNORED, np.int64)
    labels[:, :-1] = np.where(mask[:, 1:] != 0, ids[:, 1:], IGNORED)
    return labels


def _inputs(arrays: Mapping[str, Array], source: SourceModel, path: Path) -> dict[str, Array]:
    """The model's own inputs among the arrays, checked.

    Raises:
        UsageError: one is missing, or has another number of rows than the others.
    """
    named = _named(arrays, source.inputs, path, model=source.source)
    if "attention_mask" in arrays:
        named["attention_mask"] = arrays["attention_mask"]
    for name, values in named.items():
        if values.ndim == 0:
            raise UsageError(f"'{name}' in {path} is one number; its first axis must be the rows.")
        if values.dtype.kind not in "fiub":
            raise UsageError(f"'{name}' in {path} holds {values.dtype}, not numbers.")
        _finite(name, values, path)
    _same_rows(named, path)
    ids = named.get("input_ids")
    if ids is not None and ids.ndim == 2 and 0 < source.max_length < ids.shape[1]:
        raise UsageError(
            f"'input_ids' in {path} has {ids.shape[1]} tokens a row, more than the model takes "
            f"({source.max_length})."
        )
    for spec in source.specs:
        high = spec.high if source.folder is not None else None
        if spec.name in named and high is not None and (named[spec.name] >= high).any():
            raise UsageError(
                f"'{spec.name}' in {path} goes up to {named[spec.name].max()}, and the model knows "
                f"0 to {high - 1}."
            )
    return named


def _finite(name: str, values: Array, path: Path) -> None:
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return
    wrong = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))
    raise UsageError(
        f"'{name}' in {path} contains NaN or infinity in {len(wrong)} of {len(values)} "
        f"rows, the first of them row {wrong[0]}. Mend them, or leave them out."
    )


def _named(
    arrays: Mapping[str, Array], inputs: Sequence[str], path: Path, *, model: str
) -> dict[str, Array]:
    named = {n: a for n, a in arrays.items() if n in inputs}
    optional = set(_with_defaults(named))
    missing = [n for n in inputs if n not in optional]
    if missing:
        raise UsageError(
            f"{path} has no array '{missing[0]}', which {model} takes. Its arrays but for labels: "
            f"{', '.join(n for n in arrays if n != LABELS) or 'none'}; the model's inputs: "
            f"{', '.join(inputs)}."
        )
    return named


def _same_rows(arrays: Mapping[str, Array], path: Path) -> None:
    counts = {name: len(values) for name, values in arrays.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise UsageError(
            f"The arrays in {path} have different numbers of rows: {told}. "
            "Each needs one for every example."
        )


def _alike(held: Mapping[str, Mapping[str, Array]], files: Mapping[str, Path]) -> None:
    first_role, first = next(iter(held.items()))
    for role, arrays in held.items():
        for name in {*arrays, *first}:
            kinds = [
                (a[name].dtype.kind, a[name].shape[1:]) if name in a else None
                for a in (first, arrays)
            ]
            if kinds[0] != kinds[1]:
                raise UsageError(
                    f"'{name}' is not alike in {files[first_role]} and {files[role].name}: "
                    "other rows, or other numbers. Save both the same way."
                )


def _with_defaults(feeds: dict[str, Array]) -> dict[str, Array]:
    """Add what goes without saying beside token ids."""
    ids = feeds.get("input_ids")
    if ids is None:
        return feeds
    mask = feeds.get("attention_mask", np.ones_like(ids, dtype=np.int64))
    places = np.broadcast_to(np.arange(ids.shape[-1], dtype=np.int64), ids.shape)
    defaults = {
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(ids, dtype=np.int64),
        "position_ids": places,
    }
    return {**defaults, **feeds}


def _labels(
    read: Mapping[str, Mapping[str, Array]],
    held: Mapping[str, Mapping[str, Array]],
    files: Mapping[str, Path],
    request: Request,
) -> dict[str, Array]:
    """The labels by role; None of them where the user wants none."""
    if request.text_columns:
        raise UsageError(f"--text-column names columns of a table, and {SUFFIX} files have none.")
    found = {}
    for role, arrays in read.items():
        labels = arrays.get(LABELS)
        if labels is None or request.label_column == "none":
            continue
        if labels.ndim == 0 or labels.dtype.kind not in "fiubU":
            raise UsageError(f"'{LABELS}' in {files[role]} is not one label a row.")
        _same_rows({**held[role], LABELS: labels}, files[role])
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        found[role] = _numbers(labels)
    if len({values.dtype.kind for values in found.values()}) > 1:
        raise UsageError(
            f"The files have '{LABELS}' of different kinds: numbers, words, fractions."
        )
    return found


def _numbers(labels: Array) -> Array:
    """Whole numbers as such, none of them where a float is NaN; other labels as they are."""
    if labels.dtype.kind != "f":
        return labels.astype(np.int64) if labels.dtype.kind in "iub" else labels
    none = np.isnan(labels)
    if none.all() or (labels[~none] != np.round(labels[~none])).any():
        return labels
    return np.where(none, IGNORED, labels).astype(np.int64)


def _cut(
    held: Mapping[str, Mapping[str, Array]],
    targets: Mapping[str, Array],
    files: Mapping[str, Path],
    request: Request,
) -> Cut[Item]:
    """Cut by the bytes of the rows' inputs, so that equal rows share a part."""
    keys: dict[Item, str] = {}
    read: dict[str, list[Item]] = {}
    for role, arrays in held.items():
        if not arrays:
            raise UsageError(f"{files[role]} holds no arrays but labels. Check --data.")
        count = len(next(iter(arrays.values())))
        whole = [np.ascontiguousarray(values) for values in arrays.values()]
        read[role] = [(role, i) for i in range(count)]
        for i in range(count):
            digest = hashlib.blake2b(digest_size=16)
            for values in whole:
                digest.update(values[i].tobytes())
            keys[role, i] = digest.hexdigest()

    def labelled(item: Item) -> bool:
        role, i = item
        return role in targets and not _is_none(targets[role][i])

    return cut(
        read,
        files,
        key=lambda item: keys[item],
        labelled=labelled if targets else None,
        seed=request.seed,
    )


def _is_none(label: Any) -> bool:
    values = np.asarray(label)
    if values.dtype.kind == "f":
        return bool(np.isnan(values).all())
    if values.dtype.kind == "U":
        return not str(label).strip()
    return bool((values == IGNORED).all())


def _numbered(
    rows: ArrayRows, source: SourceModel, shapes: Sequence[Shape]
) -> tuple[ArrayRows, list[str]]:
    """Turn names of classes into the model's numbers; shift a language model's labels."""
    if source.task == "causal_lm":
        targets = {}
        for role, arrays in rows.arrays.items():
            fed = _with_defaults(dict(arrays))
            ids = rows.targets.get(role, fed["input_ids"])
            targets[role] = next_tokens(ids, fed["attention_mask"])
        return replace(rows, targets=targets), ["labels: the next token"]
    if not any(values.dtype.kind == "U" for values in rows.targets.values()):
        return rows, []
    names = sorted({str(v) for values in rows.targets.values() for v in values.flat} - {""})
    order, note = named_classes(source, shapes, names)
    if order is None:
        return replace(rows, targets={}), [note]
    numbers = {
        role: np.array([order.get(str(v), IGNORED) for v in values.flat]).reshape(values.shape)
        for role, values in rows.targets.items()
    }
    return replace(rows, targets=numbers), [note]


def _shapes(held: Mapping[str, Mapping[str, Array]]) -> str:
    arrays = next(iter(held.values()))
    return "arrays: " + ", ".join(
        f"{name} {'x'.join(map(str, values.shape[1:])) or 'scalar'} {values.dtype}"
        for name, values in arrays.items()
    )


def _digest(rows: ArrayRows, parts: Mapping[Part, Sequence[Item]]) -> str:
    digest = hashlib.sha256()
    for part, items in sorted(parts.items()):
        digest.update(f"{part} {len(items)}".encode())
        for role, i in items:
            for name, values in rows.arrays[role].items():
                digest.update(f"{name} {values.dtype} {values.shape[1:]}".encode())
                digest.update(values[i].tobytes())
            if role in rows.targets:
                digest.update(rows.targets[role][i].tobytes())
    for values in rows.scale or ():
        digest.update(values.tobytes())
    return digest.hexdigest()
