"""Folders of images, one subfolder a class, fed as the model's own preprocessing says."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zipc.core.errors import UsageError
from zipc.core.quiet import hush
from zipc.core.request import Request
from zipc.model_source import SourceModel
from zipc.pooling import read_model_json
from zipc.predict import Array
from zipc.read_table import ROLES
from zipc.read_table import SUFFIXES as TABLES
from zipc.samples.rows import (
    Item,
    RowSamples,
    named_classes,
    probe,
    row_samples,
    user_function,
)
from zipc.splitting import Cut, cut

SUFFIXES = (".png", ".jpg", ".jpeg")
INPUT = "pixel_values"
CONFIG = "preprocessor_config.json"
POOL = 20_000  # images of train that are looked at: more than any effort draws


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file, with the name of its class where it lies in a class folder."""

    path: Path
    label: str | None


@dataclass(frozen=True, slots=True)
class ImageRows:
    """Images read from their files when they are fed."""

    pictures: Mapping[str, Sequence[Picture]]  # role -> images
    processor: Any
    classes: Mapping[str, int] | None = None  # class folder -> the model's class

    def feeds(self, items: Sequence[Item]) -> dict[str, Array]:
        paths = [self.pictures[role][i].path for role, i in items]
        try:
            fed = self.processor(images=[_decoded(p) for p in paths], return_tensors="np")
            pixels = np.asarray(fed[INPUT], np.float32)
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"The preprocessing of the model fails on {paths[0]} and {len(paths) - 1} other "
                f"images: {error}. It must bring all images to one size."
            ) from error
        return {INPUT: pixels}

    def labels(self, items: Sequence[Item]) -> Array | None:
        names = [self.pictures[role][i].label for role, i in items]
        if self.classes is None or None in names:
            return None
        return np.array([self.classes[str(name)] for name in names], np.int64)


def image_samples(source: SourceModel, request: Request) -> RowSamples:
    """Read the image folder at `request.data` for a model of images.

    Images are resized, cropped and normalised by the model folder's preprocessor_config.json.

    Raises:
        UsageError: the model takes no images or does not say how, an image cannot be read, or
            there are too few.
    """
    user = user_function(request.evaluator, request.metric)
    if source.inputs != [INPUT]:
        raise UsageError(
            f"{source.source} takes {', '.join(source.inputs)}, not images as Hugging Face models "
            f"do ({INPUT}). Pass its inputs as arrays in an .npz file instead of {request.data}."
        )
    processor, document = _processor(source)
    pictures, made, keys = _cut(request)
    rows = ImageRows(pictures, processor)
    shapes = probe(source, rows.feeds(made.parts["calibration"][:2]))
    notes = []
    names = _names(pictures)
    if names:
        classes, note = named_classes(source, shapes, names)
        rows = ImageRows(pictures, processor, classes)
        notes.append(note)
    return row_samples(
        source,
        rows,
        made.parts,
        shapes=shapes,
        request=request,
        user=user,
        unit="images",
        description=_told(names, made),
        sha256=_digest(made, keys, rows, document),
        notes=notes,
    )


def describe_images(request: Request) -> str:
    """One line on the classes and parts of the image folder at `request.data`."""
    pictures, made, _ = _cut(request)
    return _told(_names(pictures), made)


def holds_images(folder: Path) -> bool:
    """Whether there are images in its class folders or those of its parts, or nothing but images.

    One picture beside tables of text is no image data.
    """
    if any(_images(inner) for inner in _inner(folder, depth=2)):
        return True
    tables = any(p.name.removesuffix(".gz").endswith(TABLES) for p in folder.iterdir())
    return bool(_images(folder)) and not tables


def _cut(request: Request) -> tuple[dict[str, list[Picture]], Cut[Item], dict[Item, str]]:
    """Pictures by role, cut by the bytes of their files."""
    if request.text_columns or request.label_column not in (None, "none"):
        raise UsageError("--text-column and --label-column name columns of a table, not images.")
    folder = Path(str(request.data)).expanduser()
    found, places = _find(folder)
    if request.label_column == "none":
        found = {r: [Picture(p.path, None) for p in held] for r, held in found.items()}
    pool = "train" if "train" in found else next(iter(found))
    notes = []
    if len(found) > 1 and len(found[pool]) > POOL:
        notes = [f"{POOL:,} of {len(found[pool]):,} images of {pool} used"]
        found[pool] = sorted(found[pool], key=_by_name)[:POOL]
    keys = {(r, i): _checked(p.path) for r, held in found.items() for i, p in enumerate(held)}
    labelled = any(p.label is not None for held in found.values() for p in held)
    made = cut(
        {role: [(role, i) for i in range(len(held))] for role, held in found.items()},
        places,
        key=lambda item: keys[item],
        labelled=(lambda item: found[item[0]][item[1]].label is not None) if labelled else None,
        seed=request.seed,
    )
    made.notes.extend(notes)
    return found, made, keys


def _by_name(picture: Picture) -> bytes:
    """A place in no order of the classes, the same wherever the folder lies."""
    name = f"{picture.label}/{picture.path.name}"
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def _find(folder: Path) -> tuple[dict[str, list[Picture]], dict[str, Path]]:
    """Map roles (train, dev, test, or "all") to the pictures of a folder, and to where they lie.

    Raises:
        UsageError: two folders for one role, or roles without images.
    """
    roles: dict[str, Path] = {}
    for inner in _inner(folder):
        role = ROLES.get(inner.name.casefold())
        if role is not None:
            if role in roles:
                raise UsageError(
                    f"{folder} has two folders for {role}: {roles[role].name} and {inner.name}."
                )
            roles[role] = inner
    if not roles:
        return {"all": _pictures(folder)}, {"all": folder}
    found = {role: _pictures(inner) for role, inner in roles.items()}
    empty = [roles[role] for role, held in found.items() if not held]
    if empty:
        raise UsageError(f"{empty[0]} has no images ({', '.join(SUFFIXES)}). Remove it or fill it.")
    if len(found) > 1:
        return found, roles
    return {"all": next(iter(found.values()))}, {"all": next(iter(roles.values()))}


def _pictures(folder: Path) -> list[Picture]:
    """Images in class folders, by name; where there are none, those in the folder itself."""
    held = [Picture(path, inner.name) for inner in _inner(folder) for path in _images(inner)]
    return held or [Picture(path, None) for path in _images(folder)]


def _inner(folder: Path, *, depth: int = 1) -> list[Path]:
    held = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if depth == 1:
        return held
    return [*held, *(deep for inner in held for deep in _inner(inner, depth=depth - 1))]


def _images(folder: Path) -> list[Path]:
    return sorted(
        p
        for p in folder.iterdir()
        if p.suffix.casefold() in SUFFIXES and not p.name.startswith(".") and p.is_file()
    )


def _checked(path: Path) -> str:
    """Decode an image quickly, so that a damaged one is found now; returns a hash of its bytes."""
    content = _content(path)
    with _open(path, content) as image:
        image.draft("RGB", (1, 1))  # a JPEG in an eighth of its size
        _load(path, image)
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _decoded(path: Path) -> Any:
    with _open(path, _content(path)) as image:
        _load(path, image)
        return image.convert("RGB")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"The image {path} cannot be read: {error.strerror or error}.") from error


def _open(path: Path, content: bytes) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(content), formats=("PNG", "JPEG"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UsageError(
            f"{path} is not a PNG or JPEG image, or is damaged. Remove it or save it again."
        ) from error
    except Image.DecompressionBombError as error:
        raise UsageError(f"{path} is too large to be decoded safely: {error}.") from error


def _load(path: Path, image: Any) -> None:
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise UsageError(
            f"The image {path} is damaged ({error}). Remove it or save it again."
        ) from error


def _processor(source: SourceModel) -> tuple[Any, str]:
    """The model's own preprocessing, in Pillow, and the document that describes it.

    Raises:
        UsageError: the model has none, it is damaged, or it wants code of its own.
    """
    path = None if source.folder is None else source.folder / CONFIG
    if path is None or not path.is_file():
        raise UsageError(
            f"{source.source} has no {CONFIG}, so nothing says how images become its input. "
            f"Add it to the model folder, or pass {INPUT} as arrays in an .npz file."
        )
    document = read_model_json(path)
    if not isinstance(document, dict) or "auto_map" in document:
        raise UsageError(
            f"{path} is no plain description, or needs code of its own, which zipc does not run. "
            f"Pass {INPUT} as arrays in an .npz file instead."
        )
    from transformers import AutoImageProcessor

    load: Any = AutoImageProcessor.from_pretrained
    try:
        with hush():
            return load(path.parent, backend="pil"), repr(document)
    except Exception as error:  # unrelated types from many processors
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise UsageError(f"The preprocessing in {path} cannot be loaded: {first}") from error


def _names(pictures: Mapping[str, Sequence[Picture]]) -> list[str]:
    return sorted({p.label for held in pictures.values() for p in held if p.label is not None})


def _told(names: Sequence[str], made: Cut[Item]) -> str:
    classes = f"{len(names)} classes" if names else "no labels"
    return f"images: {classes} · {made.description}"


def _digest(made: Cut[Item], keys: Mapping[Item, str], rows: ImageRows, document: str) -> str:
    digest = hashlib.sha256(document.encode())
    for part, items in sorted(made.parts.items()):
        digest.update(f"{part} {len(items)}".encode())
        labels = rows.labels(items)
        for at, item in enumerate(items):
            digest.update(f"{keys[item]} {None if labels is None else labels[at]} ".encode())
    return digest.hexdigest()
