"""`zipc.load`: the compiled torch module back from an output folder."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from zipc.build import rebuild
from zipc.core.errors import CorruptFile
from zipc.core.files import read_json
from zipc.model_source import load_config


def load(out: str | Path) -> nn.Module:
    """Load OUT/checkpoint as a torch module in evaluation mode; numerics are simulated.

    It equals OUT/model.onnx within the bound stated in the manifest. Nothing is unpickled, and no
    code that the folder names is run.

    Raises:
        CorruptFile: a file is missing, truncated, or does not fit the others.
        UnsupportedModel: the installed transformers does not know the architecture.
    """
    folder = Path(out)
    folder = folder / "checkpoint" if (folder / "checkpoint").is_dir() else folder
    for name in ("structure.json", "model.safetensors", "config.json"):
        if not (folder / name).is_file():
            raise CorruptFile(f"{out} is not a zipc output: checkpoint/{name} is missing.")
    document = read_json(folder / "structure.json", advice="Compile again.")
    config = load_config(folder)
    try:
        tensors = load_file(folder / "model.safetensors")
        return rebuild(config, document, tensors)
    except CorruptFile:
        raise
    except Exception as error:  # safetensors and torch report damage by several types
        first = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
        raise CorruptFile(
            f"{folder / 'model.safetensors'} does not fit structure.json ({first}). Compile again."
        ) from error
