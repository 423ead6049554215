"""The arrays of .npz files, under the names they are known by here."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from zipc.core.errors import UsageError
from zipc.core.request import Request
from zipc.predict import Array
from zipc.read_table import find_files
from zipc.samples.scale import MEAN, STD

SUFFIX = ".npz"
LABELS = "labels"
LABEL_NAMES = (LABELS, "label", "y", "targets", "target")  # any of these is taken for them
NPY = b"\x93NUMPY"  # how a file of one array begins
_SAVE = "Save plain numbers or strings with numpy.savez(FILE, name=array)."


def find_npz(request: Request) -> dict[str, Path]:
    return find_files(Path(str(request.data)).expanduser(), (SUFFIX,))


def read_arrays(
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
