"""The data of a compile, whatever its kind, behind one interface: `base.Samples`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from zipc.core.errors import UsageError
from zipc.core.request import Request
from zipc.core.types import InputSpec, ModelTask
from zipc.model_source import SourceModel
from zipc.read_table import find_files
from zipc.samples.arrays import array_inputs, array_samples, describe_arrays
from zipc.samples.base import Drawn, Feeds, Part, Samples
from zipc.samples.documents import document_samples
from zipc.samples.images import describe_images, holds_images, image_samples
from zipc.samples.npz import SUFFIX
from zipc.samples.text import describe_texts, text_samples
from zipc.samples.tokens import token_samples

Kind = Literal["arrays", "documents", "images", "text", "tokens"]
READERS: dict[ModelTask, Kind] = {"causal_lm": "documents", "tensors": "tokens"}  # of text
OPEN: dict[Kind, Callable[[SourceModel, Request], Samples]] = {
    "arrays": array_samples,
    "documents": document_samples,
    "images": image_samples,
    "text": text_samples,
    "tokens": token_samples,
}
DESCRIBE: dict[Kind, Callable[[Request], str]] = {
    "arrays": describe_arrays,
    "images": describe_images,
    "text": describe_texts,
}


def open_samples(source: SourceModel, request: Request) -> Samples:
    """Read `request.data` for a model and choose how quality is read.

    Raises:
        UsageError: there is nothing usable, or it does not fit the model.
    """
    return OPEN[kind_of(request, source.task)](source, request)


def inputs_of_rows(request: Request) -> list[InputSpec]:
    """How large the inputs are by the data, where that names them."""
    if request.data is None or kind_of(request) != "arrays":
        return []
    return array_inputs(request)


def describe_data(request: Request) -> str:
    """One line on `request.data` and how it is cut, as far as that is known without the model.

    Text is described as the table it is; a language model joins its rows to windows.

    Raises:
        UsageError: there is nothing usable.
    """
    return DESCRIBE[kind_of(request)](request)


def kind_of(request: Request, task: ModelTask | None = None) -> Kind:
    """What kind of data lies at `request.data`; a model's task tells how it reads text.

    Raises:
        UsageError: no data was named, or there is none of a known kind.
    """
    if request.data is None:
        raise UsageError(
            "--data is needed: unlabelled texts or images like those the model will see decide "
            "which parts can go, and held-out ones read the quality. A csv, tsv, jsonl or txt "
            "file, a folder of images, or arrays in an .npz file will do, for example: "
            "--data examples/stsb"
        )
    path = Path(request.data).expanduser()
    if path.suffix == SUFFIX or (path.is_dir() and any(path.glob(f"*{SUFFIX}"))):
        return "arrays"
    if path.is_dir() and holds_images(path):
        return "images"
    find_files(path)
    return "text" if task is None else READERS.get(task, "text")


__all__ = [
    "Drawn",
    "Feeds",
    "Part",
    "Samples",
    "describe_data",
    "inputs_of_rows",
    "kind_of",
    "open_samples",
]
