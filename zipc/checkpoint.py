"""`zipc.load`: the compiled torch module back from an output folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from zipc.build import rebuild
from zipc.core.errors import CorruptFile, UsageError, first_line
from zipc.core.files import read_json
from zipc.model_source import as_recipe_says
from zipc.sources.factory import KIND as FACTORY
from zipc.sources.factory import PARTED, Factory, find_factory, make_blank
from zipc.sources.huggingface import build_module, load_config


def load(out: str | Path, *, factory: str | Callable[[], nn.Module] | None = None) -> nn.Module:
    """Load OUT/checkpoint as a torch module in evaluation mode; numerics are simulated.

    It equals OUT/model.onnx within the bound stated in the manifest. Nothing is unpickled, and no
    code that the folder names is run: for a model that came from a factory, give that function,
    itself or as "path/to/file.py:factory".

    Raises:
        UsageError: the model came from a factory and none is given, or the factory raises.
        CorruptFile: a file is missing, truncated, or does not fit the others.
        UnsupportedModel: the installed transformers does not know the architecture.
    """
    folder = Path(out)
    folder = folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder
    _require(folder, "structure.json", "model.safetensors", out=out)
    document = read_json(folder / "structure.json", advice="Compile again.")
    recipe = document.get("source") if isinstance(document, dict) else None
    recipe = recipe if isinstance(recipe, dict) else {}
    blank = _blank(folder, recipe, factory, out=out)
    try:
        return rebuild(blank, document, load_file(folder / "model.safetensors"))
    except Exception as error:  # safetensors and torch report damage by several types
        if factory is not None:
            raise CorruptFile(
                f"The module of {_name(factory)} does not fit {out}, which was compiled from "
                f"{recipe.get('factory')} ({first_line(error)}). Give that factory, or compile "
                "again."
            ) from error
        if isinstance(error, CorruptFile):
            raise
        raise CorruptFile(
            f"{folder / 'model.safetensors'} does not fit structure.json ({first_line(error)}). "
            "Compile again."
        ) from error


def _blank(
    folder: Path,
    recipe: dict[str, Any],
    factory: str | Callable[[], nn.Module] | None,
    *,
    out: str | Path,
) -> nn.Module:
    if recipe.get("kind") != FACTORY:
        if factory is not None:
            raise UsageError(
                f"{out} holds a Hugging Face model: zipc.load takes no factory for it."
            )
        _require(folder, "config.json", out=out)
        return as_recipe_says(build_module(load_config(folder), recipe), recipe)
    if factory is None:
        raise UsageError(
            f"{out} was compiled from the factory {recipe.get('factory')}, and a folder never "
            f"names code to run. Give it: zipc.load({str(out)!r}, factory=...), the function "
            "itself or 'path/to/file.py:function'."
        )
    found = find_factory(factory) if isinstance(factory, str) else Factory.of(factory)
    try:
        module = make_blank(found, parted=recipe.get(PARTED, ())).float()
        return as_recipe_says(module, recipe)
    except (AttributeError, TypeError) as error:
        raise CorruptFile(
            f"The module of {_name(factory)} does not fit {out} ({first_line(error)}). Give the "
            f"factory {recipe.get('factory')}, or compile again."
        ) from error


def _name(factory: str | Callable[[], nn.Module]) -> str:
    return factory if isinstance(factory, str) else getattr(factory, "__name__", repr(factory))


def _require(folder: Path, *names: str, out: str | Path) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise CorruptFile(f"{out} is not a zipc output: checkpoint/{name} is missing.")
