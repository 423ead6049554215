"""A Hugging Face folder or hub id with any task head."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zipc.core.errors import UnsupportedModel, UsageError, first_line
from zipc.core.quiet import hush
from zipc.core.types import InputSpec, ModelTask
from zipc.sources.attention import ATTENTION, register_attention
from zipc.sources.checks import check_files, check_weights
from zipc.sources.common import (
    BATCH,
    DECODER,
    SEQUENCE,
    SourceModel,
    forward_parameters,
    named_outputs,
)
from zipc.sources.experts import EXPERTS, part_experts_, register_experts
from zipc.sources.hub import digest_of, locate, weights_of
from zipc.sources.plain_maps import plain_maps_
from zipc.sources.positions import follow_padding_, settle_positions_

Rows = Callable[[], Sequence[InputSpec]]
KIND = "hugging-face"
OWN = "eager"  # what transformers calls the attention and experts written in the model
TEXT, IMAGE = "input_ids", "pixel_values"
TOKENIZERS = ("tokenizer.json", "vocab.txt", "tokenizer.model", "spiece.model", "vocab.json")
USUAL_SIZE = 224  # of an image, where neither config.json nor preprocessor_config.json says
SAME = 1e-3  # relative; two ways to compute one attention in fp32 differ by far less


def load_folder(
    model: str, *, input_shapes: Sequence[InputSpec] = (), rows: Rows = tuple
) -> SourceModel:
    """Load MODEL with its task head in fp32 evaluation mode.

    How large inputs are that are neither texts nor images is told by `input_shapes`; else `rows`
    reads it off the data.

    Raises:
        UsageError: a file is missing or corrupt, the alias' weights have another hash, or it takes
            neither texts nor images and `input_shapes` do not say how large its inputs are.
        UnsupportedModel: the architecture is unknown to transformers, needs custom code, or is
            quantised already.
    """
    folder, revision = locate(model)
    files = weights_of(folder)
    digest = digest_of(model, folder, files)
    config = load_config(folder)
    notes = check_files(files, where=str(folder))
    module = _load_module(folder, config)
    module.eval().requires_grad_(False)
    plain_maps_(module)
    notes += check_weights(module, where=str(folder))
    tokenizer, more = _load_tokenizer(folder, reads_text=TEXT in forward_parameters(module))
    specs, also = _input_specs(module, config, tokenizer, folder, given=input_shapes, rows=rows)
    texts = any(SEQUENCE in spec.shape for spec in specs)
    source = SourceModel(
        module=module,
        folder=folder,
        source=model,
        sha256=digest,
        revision=revision,
        config=config,
        tokenizer=tokenizer,
        max_length=_max_length(config, folder) if texts else 0,
        specs=specs,
        outputs=[],
        task="tensors",
        blank=functools.partial(build_module, config),
        recipe={"kind": KIND, "positions": "arange"},
        notes=[*notes, *more, *also],
    )
    _settle_implementations_(source)
    result = _forward(source)
    source.outputs = _public_outputs(source, result)
    source.task = _task(source, result)
    if source.task == "causal_lm":
        settle_positions_(source)
    source.blank = functools.partial(build_module, config, source.recipe)
    return source


def load_config(folder: Path) -> Any:
    """The config of a folder, set to trace a single forward pass.

    Raises:
        UsageError: it cannot be read.
        UnsupportedModel: it needs code of its own, or its weights are quantised.
    """
    from transformers import AutoConfig

    try:
        with hush():
            raw = json.loads((folder / "config.json").read_text())
            if "auto_map" in raw:
                raise UnsupportedModel(
                    f"{folder} needs code from its own files (auto_map in config.json); zipc runs "
                    "no code that comes with a model."
                )
            method = (raw.get("quantization_config") or {}).get("quant_method")
            if raw.get("quantization_config"):
                raise UnsupportedModel(
                    f"{folder} is quantised already ({method or 'quantization_config'} in "
                    "config.json). Give the weights in floating point; zipc quantises them itself."
                )
            config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{folder / 'config.json'} cannot be read: {first_line(error, 200)}"
        ) from error
    _one_pass_(config)
    return config


def build_module(config: Any, recipe: dict[str, Any] | None = None) -> nn.Module:
    """An uninitialised module of the architecture the config names (no weights are read)."""
    recipe = recipe or {}
    cls = _architecture(config)
    with _quiet():
        module: nn.Module = cls._from_config(
            config,
            **_implementations(
                cls, recipe.get("attention", ATTENTION), recipe.get("experts", EXPERTS)
            ),
        )
    plain_maps_(module)
    if recipe.get("experts", EXPERTS) == EXPERTS:
        part_experts_(module)
    if recipe.get("positions") == "mask":
        follow_padding_(module)
    return module


def _one_pass_(config: Any) -> None:
    """No cache, and no outputs beside those of the task."""
    config.return_dict = True
    for part in (config, *(getattr(config, n, None) for n in getattr(config, "sub_configs", ()))):
        for name in ("use_cache", "output_hidden_states", "output_attentions"):
            if getattr(part, name, False):
                setattr(part, name, False)


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


def _implementations(cls: Any, attention: str, experts: str) -> dict[str, str]:
    register_attention()
    register_experts()
    if not cls._can_set_attn_implementation():
        attention = OWN
    return {"attn_implementation": attention, "experts_implementation": experts}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging as hf_logging

    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with hush():
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _load_module(folder: Path, config: Any) -> nn.Module:
    cls = _architecture(config)
    try:
        with _quiet():
            module, info = cls.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                **_implementations(cls, ATTENTION, EXPERTS),
            )
    except (UsageError, UnsupportedModel):
        raise
    except Exception as error:  # safetensors, shape and architecture errors share no base
        raise UsageError(
            f"The weights in {folder} cannot be loaded ({type(error).__name__}: "
            f"{first_line(error)}). The file may be truncated: fetch the model again."
        ) from error
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


def _load_tokenizer(folder: Path, *, reads_text: bool) -> tuple[Any, list[str]]:
    from transformers import AutoTokenizer

    if not reads_text:
        return None, []
    if not any((folder / name).is_file() for name in TOKENIZERS):
        told = "texts cannot be read, arrays (.npz) named like its inputs can"
        return None, [f"{folder} has no tokenizer: {told}"]
    try:
        with hush():
            return AutoTokenizer.from_pretrained(folder), []
    except Exception as error:  # unrelated types from several tokenizer back-ends
        raise UsageError(
            f"The tokenizer in {folder} cannot be loaded: {first_line(error, 200)}"
        ) from error


def _input_specs(
    module: nn.Module,
    config: Any,
    tokenizer: Any,
    folder: Path,
    *,
    given: Sequence[InputSpec],
    rows: Rows,
) -> tuple[tuple[InputSpec, ...], list[str]]:
    accepted = forward_parameters(module)
    if TEXT in accepted and getattr(module, "main_input_name", TEXT) == TEXT:
        if given:
            raise UsageError(
                f"{type(module).__name__} reads token sequences of any size: say which one to time "
                "with --batch-size and --sequence-length, not --input-shapes."
            )
        return _text_specs(accepted, config, tokenizer), []
    if IMAGE in accepted:
        return _image_specs(module, config, folder, given)
    return _other_specs(module, accepted, given or [r for r in rows() if r.name in accepted]), []


def _text_specs(accepted: Any, config: Any, tokenizer: Any) -> tuple[InputSpec, ...]:
    wanted = [TEXT, "attention_mask", "token_type_ids"]
    offered = getattr(tokenizer, "model_input_names", None) or wanted[:2]
    names = [n for n in wanted if n in accepted and n in offered]
    axes = {name: (BATCH, SEQUENCE) for name in names}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        decoder = ("decoder_input_ids", "decoder_attention_mask")
        axes |= {name: (BATCH, DECODER) for name in decoder if name in accepted}
    vocabulary = int(getattr(config.get_text_config(), "vocab_size", 100) or 100)
    return tuple(
        InputSpec(name, "int64", shape, high=vocabulary if name.endswith(TEXT) else 2)
        for name, shape in axes.items()
    )


def _other_specs(
    module: nn.Module, accepted: Any, given: Sequence[InputSpec]
) -> tuple[InputSpec, ...]:
    """Of sounds, series and whatever else a model reads: only the user knows how large they are."""
    name, main = type(module).__name__, getattr(module, "main_input_name", "x")
    if not given:
        raise UsageError(
            f"{name} reads {main}, neither texts nor images: say how large one is, as in "
            f"--input-shapes {main}:1x16000."
        )
    wrong = [spec.name for spec in given if spec.name not in accepted]
    if wrong or any(not spec.shape for spec in given):
        raise UsageError(
            f"--input-shapes names {wrong[0] if wrong else given[0].name}, and {name} takes "
            f"{', '.join(accepted)}, each with a batch as its first axis."
        )
    return tuple(replace(spec, shape=(BATCH, *spec.shape[1:])) for spec in given)


def _image_specs(
    module: nn.Module, config: Any, folder: Path, given: Sequence[InputSpec]
) -> tuple[tuple[InputSpec, ...], list[str]]:
    channels = int(getattr(config, "num_channels", 0) or getattr(config, "in_channels", 0) or 3)
    if not given:
        size, notes = _image_size(config, folder)
        return (InputSpec(IMAGE, "float32", (BATCH, channels, *size)),), notes
    (spec, *more) = given
    if more or spec.name != IMAGE or len(spec.shape) != 4 or spec.dtype != "float32":
        raise UsageError(
            f"{type(module).__name__} takes one input, {IMAGE}: --input-shapes "
            f"{IMAGE}:1x{channels}x224x224, not {','.join(map(str, given))}."
        )
    if spec.shape[1] != channels:
        raise UsageError(
            f"{type(module).__name__} takes images of {channels} channels, not {spec.shape[1]} "
            f"(--input-shapes {spec})."
        )
    return (InputSpec(IMAGE, "float32", (BATCH, *spec.shape[1:])),), []


def _image_size(config: Any, folder: Path) -> tuple[tuple[int, int], list[str]]:
    """Height and width that the model's own preprocessing gives, else those of the config."""
    path = folder / "preprocessor_config.json"
    if path.is_file():
        try:
            raw = json.loads(path.read_text())
            crop = raw.get("crop_size") if raw.get("do_center_crop") else None
            size = _height_width(crop or raw.get("size"))
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from error
        if size is not None:
            return size, []
    size = _height_width(getattr(config, "image_size", None))
    if size is not None:
        return size, []
    return (USUAL_SIZE, USUAL_SIZE), [
        f"the folder does not say how large its images are: {USUAL_SIZE} x {USUAL_SIZE} is "
        "assumed; --input-shapes says otherwise"
    ]


def _height_width(value: Any) -> tuple[int, int] | None:
    if isinstance(value, dict):
        edge = value.get("shortest_edge")
        value = (value.get("height", edge), value.get("width", edge))
    if isinstance(value, int):
        value = (value, value)
    if isinstance(value, list | tuple) and len(value) == 2 and all(value):
        return int(value[0]), int(value[1])
    return None


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


def _settle_implementations_(source: SourceModel) -> None:
    """Trace with our attention and experts where they compute what the model's own do."""
    module: Any = source.module
    swappable = module.config._attn_implementation == ATTENTION
    attentions = (ATTENTION, OWN) if swappable else (OWN,)
    theirs, failed = _outputs_with(source, OWN, OWN)
    mask = source.example().get("attention_mask")
    reason = ""
    for attention, experts in itertools.product(attentions, (EXPERTS, OWN)):
        ours, error = _outputs_with(source, attention, experts)
        if ours is None:
            reason = reason or error
        elif theirs is None or all(_equal(a, b, mask) for a, b in zip(ours, theirs, strict=True)):
            break
    source.recipe |= {"attention": attention, "experts": experts}
    if experts == EXPERTS:
        part_experts_(module)
    if swappable and attention == OWN and not failed:
        source.notes.append(
            f"{type(module).__name__} is traced with its own attention: scaled dot product "
            f"{f'fails in it ({reason})' if reason else 'differs from it'}"
        )


def _outputs_with(
    source: SourceModel, attention: str, experts: str
) -> tuple[list[Tensor] | None, str]:
    """The outputs on the example under these implementations, which stay set; or what failed."""
    module: Any = source.module
    try:
        with torch.no_grad(), _quiet():
            if module.config._attn_implementation != attention:
                module.set_attn_implementation(attention)
            module.set_experts_implementation(experts)
            return [t for _, t in named_outputs(module(**source.example()))], ""
    except Exception as error:  # anything a model's own code raises
        return None, f"{type(error).__name__}: {first_line(error, 100)}"


def _equal(ours: Tensor, theirs: Tensor, mask: Tensor | None) -> bool:
    """Equal up to rounding where tokens are; values that are not finite are judged elsewhere."""
    if ours.shape != theirs.shape or not torch.isfinite(theirs).all():
        return ours.shape == theirs.shape
    if mask is not None and ours.shape[:2] == mask.shape:
        ours, theirs = ours[mask > 0], theirs[mask > 0]
    return bool((ours - theirs).norm() <= SAME * theirs.norm().clamp_min(1e-12))


def _forward(source: SourceModel) -> Any:
    try:
        with torch.no_grad():
            return source.module(**source.example())
    except Exception as error:  # anything a model's own code raises
        sized = SEQUENCE not in source.axes
        raise UnsupportedModel(
            f"{type(source.module).__name__} fails on a plain input of "
            f"{', '.join(map(str, source.specs))}: {type(error).__name__}: {first_line(error)}. "
            f"{'Give other sizes with --input-shapes, or wrap' if sized else 'Wrap'} the model in "
            "a factory (path/to/file.py:factory)."
        ) from error


def _public_outputs(source: SourceModel, result: Any) -> list[tuple[int, str]]:
    """The outputs of the task, by the names they have in exports of Optimum."""
    named = named_outputs(result)
    names = [name for name, _ in named]
    wanted = [n for n in names if n == "logits" or n.endswith("_logits") or n.startswith("pred_")]
    if "logits" in names:
        wanted = [n for n in wanted if not n.endswith("_logits")]
    elif "last_hidden_state" in names:
        wanted = ["last_hidden_state"]
    wanted = wanted or names
    for name, tensor in named:
        if name in wanted and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UnsupportedModel(
                f"{type(source.module).__name__} gives NaN or infinity in fp32 on a plain "
                f"input. Its weights in {source.folder} may be damaged: fetch it again."
            )
    if not wanted:
        raise UnsupportedModel(f"{type(source.module).__name__} gives no tensor.")
    return [(names.index(name), name) for name in wanted]


def _task(source: SourceModel, result: Any) -> ModelTask:
    """What the outputs are for, and so how a candidate is judged."""
    tensors = dict(named_outputs(result))
    names = [name for _, name in source.outputs]
    images = source.specs[0].name == IMAGE
    if names == ["last_hidden_state"]:
        return "embedding" if SEQUENCE in source.axes and DECODER not in source.axes else "tensors"
    if names != ["logits"]:
        return "tensors"
    if tensors["logits"].dim() == 2:
        if images:
            return "image_classes"
        return "regression" if tensors["logits"].shape[1] == 1 else "classes"
    if type(source.module).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal_lm"
    return "tensors"
