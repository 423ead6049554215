"""Arrays named like the model's inputs, from .npz files."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
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
from zipc.read_table import find_files
from zipc.samples.base import Part
from zipc.samples.judges import IGNORED, Shape
from zipc.samples.rows import (
    Item,
    RowSamples,
    named_classes,
    probe,
    row_samples,
    user_function,
)
from zipc.samples.scale import MEAN, STD, Scale, find_scale, normalised
from zipc.splitting import Cut, cut

SUFFIX = ".npz"
LABELS = "labels"
LABEL_NAMES = (LABELS, "label", "y", "targets", "target")  # any of these is taken for them
NPY = b"\x93NUMPY"  # how a file of one array begins


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
    files = _find(request)
    read, notes = _renamed(files, request, source.inputs)
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
    """One line on the arrays and parts of the .npz files at `request.data`."""
    files = _find(request)
    read, _ = _renamed(files, request, ())
    other = (LABELS, MEAN, STD)
    held = {role: {n: v for n, v in a.items() if n not in other} for role, a in read.items()}
    targets = _labels(read, held, files, request)
    return f"{_shapes(held)} · {_cut(held, targets, files, request).description}"


def array_inputs(request: Request) -> list[InputSpec]:
    """The inputs that the first .npz file at `request.data` has rows of.

    Raises:
        UsageError: it is damaged.
    """
    read, _ = _renamed(_find(request), request, ())
    arrays = next(iter(read.values()))
    return [
        _spec_of(name, values)
        for name, values in arrays.items()
        if name not in (LABELS, MEAN, STD) and values.ndim and values.size
    ]


def _spec_of(name: str, values: Array) -> InputSpec:
    if values.dtype == np.uint8 and values.ndim == 4:  # images of bytes, as `ArrayRows` feeds them
        _, height, width, channels = values.shape
        return InputSpec(name, "float32", (1, channels, height, width))
    shape = (1, *values.shape[1:])
    if values.dtype.kind == "f":
        return InputSpec(name, "float32", shape)
    return InputSpec(name, "int64", shape, int(values.max()) + 1)


def read_npz(path: Path) -> dict[str, Array]:
    """Read all arrays of a file; nothing is ever unpickled.

    Raises:
        UsageError: it is damaged, no .npz, or holds objects instead of numbers.
    """
    name = ""
    try:
        with path.open("rb") as stream:
            start = stream.read(len(NPY))
        if start == NPY:
            raise UsageError(f"{path} is a single array. Save it by name: numpy.savez.")
        if not start.startswith(b"PK"):
            raise UsageError(f"{path} is no .npz file (zipc never unpickles). {_SAVE}")
        arrays = {}
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                arrays[name] = np.asarray(file[name])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        at = f"'{name}' in {path}" if name else f"{path}"
        if "pickle" in str(error):
            raise UsageError(f"{at} is pickled, and zipc never unpickles. {_SAVE}") from error
        raise UsageError(f"{at} cannot be read: {error}. Save it again.") from error
    return arrays


_SAVE = "Save plain numbers or strings with numpy.savez(FILE, name=array)."


def next_tokens(ids: Array, mask: Array) -> Array:
    """Labels of a language model: the next id of each token, none for the last and for padding."""
    labels = np.full(ids.shape, IGNORED, np.int64)
    labels[:, :-1] = np.where(mask[:, 1:] != 0, ids[:, 1:], IGNORED)
    return labels


def _find(request: Request) -> dict[str, Path]:
    return find_files(Path(str(request.data)).expanduser(), (SUFFIX,))


def _renamed(
    files: Mapping[str, Path], request: Request, inputs: Sequence[str]
) -> tuple[dict[str, dict[str, Array]], list[str]]:
    """The arrays of every file under the names they are known by here, and what was taken for what.

    The labels are found by their usual names, or by --label-column. Where a model has one input and
    a file one array besides, they are meant for each other.
    """
    read, notes = {}, []
    asked = () if request.label_column in (None, "none") else (request.label_column,)
    for role, path in files.items():
        arrays = read_npz(path)
        labels = [n for n in asked or LABEL_NAMES if n in arrays and n not in inputs]
        if asked and not labels:
            raise UsageError(
                f"{path} has no array '{asked[0]}' for labels. Its arrays: {', '.join(arrays)}."
            )
        others = [n for n in arrays if n not in (*labels, LABELS, MEAN, STD)]
        taken = {labels[0]: LABELS} if labels else {}
        if len(inputs) == len(others) == 1:
            taken[others[0]] = inputs[0]
        read[role] = {
            taken.get(n, n): values
            for n, values in arrays.items()
            if n in taken or n not in taken.values()  # nor what another array stands in for
        }
        notes += [f"'{n}' is taken for {to}" for n, to in taken.items() if n != to]
    return read, list(dict.fromkeys(notes))


def _inputs(arrays: Mapping[str, Array], source: SourceModel, path: Path) -> dict[str, Array]:
    """The model's own inputs among the arrays, checked.

    Raises:
        UsageError: one is missing, or has another number of rows than the others.
    """
    named = {n: a for n, a in arrays.items() if n in source.inputs}
    optional = set(_with_defaults(named))
    missing = [n for n in source.inputs if n not in optional]
    if missing:
        raise UsageError(
            f"{path} has no array '{missing[0]}', which {source.source} takes. Its arrays but for "
            f"labels: {', '.join(n for n in arrays if n != LABELS) or 'none'}; the model's inputs: "
            f"{', '.join(source.inputs)}."
        )
    if "attention_mask" in arrays:
        named["attention_mask"] = arrays["attention_mask"]
    for name, values in named.items():
        if values.ndim == 0:
            raise UsageError(f"'{name}' in {path} is one number; its first axis must be the rows.")
        if values.dtype.kind not in "fiub":
            raise UsageError(f"'{name}' in {path} holds {values.dtype}, not numbers.")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise UsageError(f"'{name}' in {path} contains NaN or infinity.")
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


def _same_rows(arrays: Mapping[str, Array], path: Path) -> None:
    counts = {name: len(values) for name, values in arrays.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise UsageError(f"The arrays in {path} have different numbers of rows: {told}.")


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
        whole = labels.dtype.kind == "f" and bool((labels == np.round(labels)).all())
        found[role] = labels.astype(np.int64) if whole or labels.dtype.kind in "iub" else labels
    if len({values.dtype.kind for values in found.values()}) > 1:
        raise UsageError(
            f"The files have '{LABELS}' of different kinds: numbers, words, fractions."
        )
    return found


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
