"""A model made by a function in the user's own file: `path/to/file.py:factory`."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from zipc.core.errors import UnsupportedModel, UsageError, first_line
from zipc.core.files import sha256_file
from zipc.core.types import InputSpec, ModelTask
from zipc.sources.checks import check_files, check_weights
from zipc.sources.common import (
    BATCH,
    SourceModel,
    forward_parameters,
    make_example,
    named_outputs,
    public_outputs,
)
from zipc.sources.multihead import part_attention_, parts_of
from zipc.user_code import FAILURES, importable, load_function, split_reference, told

# In the recipe of a checkpoint.
KIND, PARTED = "factory", "parted_attention"
EXAMPLES = "example_inputs"  # what the user's file may define beside the factory
SEED = 0  # of what the factory draws at random
SHOWN = 3  # names in a message
SAME = 1e-3  # two ways to compute one attention in fp32 differ by far less


@dataclass(frozen=True, slots=True)
class Factory:
    """A function of the user's that makes a model, and the file it stands in."""

    source: str
    path: Path
    make: Callable[[], Any]
    module: ModuleType | None = None

    @classmethod
    def of(cls, make: Callable[[], Any]) -> Factory:
        """A function at hand."""
        code = getattr(make, "__code__", None)
        path = Path(code.co_filename) if code is not None else Path.cwd()
        return cls(getattr(make, "__name__", repr(make)), path, make)


def load_factory(
    model: str,
    *,
    weights: str | Path | None = None,
    input_shapes: Sequence[InputSpec] = (),
    rows: Sequence[InputSpec] = (),
) -> SourceModel:
    """Make the model of `path/to/file.py:factory`, with the weights of a safetensors file.

    Without `weights` it keeps those the factory gave it. The sizes of its inputs come from
    `input_shapes`, from `example_inputs` in the user's file (a tensor, a tuple of them, a dict by
    name, or a function that gives one), or from the `rows` of the data. The first axis of every
    input is the batch and stays open where the model allows; all other sizes are fixed.

    Raises:
        UsageError: the factory raises or gives no module, the weights do not fit, or the inputs
            are not known.
        UnsupportedModel: the module is quantised, or fails on its inputs.
    """
    factory = find_factory(model)
    module = make_blank(factory)
    notes, digest = [], None
    if weights is not None:
        path = Path(weights).expanduser()
        notes += _load_weights_(module, path, factory)
        digest = sha256_file(path)
    notes += _to_float32_(module)
    notes += check_weights(module, where=model)
    if digest is None:
        digest = _digest(module)
        notes.append("no --weights: the model has those its factory gives it")
    specs, tried, taken = _specs(factory, module, input_shapes, rows)
    source = SourceModel(
        module=module,
        folder=None,
        source=model,
        sha256=digest,
        revision=None,
        config=None,
        tokenizer=None,
        max_length=0,
        specs=specs,
        outputs=[],
        task="tensors",
        blank=functools.partial(make_blank, factory),
        recipe={"kind": KIND, "factory": f"{factory.path.name}:{factory.make.__name__}"},
        notes=[*notes, *taken],
    )
    said = "--input-shapes" if input_shapes else EXAMPLES
    if not input_shapes and getattr(factory.module, EXAMPLES, None) is None:
        said = "the arrays at --data"
    result = _forward_(source, factory, batch=tried, said=said)
    source.outputs = public_outputs(module, result, source.inputs)
    paths = _part_attention_(source)
    if paths:
        source.recipe[PARTED] = paths
        source.blank = functools.partial(make_blank, factory, parted=paths)
    source.task = _task(source, result)
    return source


def find_factory(source: str) -> Factory:
    """Import the user's file and find the function in it.

    Raises:
        UsageError: there is no such file or function, or importing it raises.
    """
    make, module = load_function(source)
    reference = split_reference(source)
    assert reference is not None
    return Factory(source, reference[0], make, module)


def _part_attention_(source: SourceModel) -> list[str]:
    """Give attention linear maps of its own where the model gives the same then, and say where."""
    parts = parts_of(source.module)
    if not parts:
        return []
    example = source.example()
    before = named_outputs(_run(source, example))
    part_attention_(source.module, list(parts))
    try:
        after = named_outputs(_run(source, example))
        close = functools.partial(torch.allclose, rtol=SAME, atol=SAME)
        same = all(close(a, b) for (_, a), (_, b) in zip(before, after, strict=True))
        why = "" if same else "the model gives something else"
    except FAILURES as error:
        why = first_line(error, 100)
    if why:
        for path, module in parts.items():
            source.module.set_submodule(path, module)
        source.notes.append(f"the heads of nn.MultiheadAttention stay: taken apart, {why}")
        return []
    source.notes.append(f"{len(parts)} nn.MultiheadAttention taken apart, so that heads can go")
    return list(parts)


def make_blank(factory: Factory, *, parted: Sequence[str] = ()) -> nn.Module:
    """Call the factory under a fixed seed; the module is in evaluation mode.

    The `parted` modules of it are attention with linear maps of its own.

    Raises:
        UsageError: it raises, or gives something that is not an nn.Module.
    """
    with torch.random.fork_rng(devices=[]), importable(factory.path.parent):
        torch.manual_seed(SEED)
        try:
            module = factory.make()
        except FAILURES as error:
            raise UsageError(
                f"{factory.source}, called without arguments, raised {told(error, factory.path)}"
            ) from error
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"{factory.source} must return a torch.nn.Module; it returned an object of type "
            f"{type(module).__name__}."
        )
    part_attention_(module, parted)
    return module.eval().requires_grad_(False)


def _load_weights_(module: nn.Module, path: Path, factory: Factory) -> list[str]:
    """Load strictly: every tensor has its place, every place its tensor (or one tied to it)."""
    if not path.is_file():
        raise UsageError(f"--weights {path}: there is no such file.")
    if path.suffix != ".safetensors":
        raise UsageError(
            f"--weights {path}: only safetensors are loaded, never pickles. Save them with "
            "safetensors.torch.save_model(model, 'x.safetensors')."
        )
    notes = check_files([path], where=str(path))
    tensors = load_file(path)
    wanted = module.state_dict(keep_vars=True)
    shapes = [
        f"{name} is {list(tensors[name].shape)} in the file and {list(wanted[name].shape)} in the "
        "model"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    loaded = {id(wanted[name]) for name in tensors if name in wanted}
    missing = [
        n
        for n, t in wanted.items()
        # a count that evaluation never reads, and that torch itself lets a file leave out
        if n not in tensors and id(t) not in loaded and not n.endswith("num_batches_tracked")
    ]
    spare = sorted(set(tensors) - set(wanted))
    problems = shapes[:SHOWN]
    problems += [f"the file lacks {_some(missing)}"] if missing else []
    problems += [f"the model has no {_some(spare)}"] if spare else []
    if problems:
        raise UsageError(
            f"--weights {path} does not fit {factory.source}: {'; '.join(problems)}. Give the "
            "weights that were saved from this very model."
        )
    meta = any(tensor.is_meta for tensor in wanted.values())
    module.load_state_dict(tensors, strict=False, assign=meta)
    return notes


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _to_float32_(module: nn.Module) -> list[str]:
    found = {t.dtype for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()}
    other = sorted(str(dtype).removeprefix("torch.") for dtype in found - {torch.float32})
    if not other:
        return []
    module.float()
    return [f"the module is in {' and '.join(other)}; it runs in float32 here"]


def _digest(module: nn.Module) -> str:
    """SHA-256 over names and values of a module's state."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):  # the extra state of a module
            digest.update(f"{name} {tensor!r} ".encode())
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        flat = tensor.detach().cpu().reshape(-1).contiguous()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _specs(
    factory: Factory, module: nn.Module, given: Sequence[InputSpec], rows: Sequence[InputSpec]
) -> tuple[tuple[InputSpec, ...], int, list[str]]:
    """Inputs in the order of forward, the batch they were given with, and what a user is told."""
    accepted = forward_parameters(module)
    needed = [n for n, p in accepted.items() if p.default is p.empty]
    shown = {spec.name: spec for spec in _examples(factory, list(accepted))}
    known = {s.name: s for s in _meant(rows, needed, accepted) if s.name in accepted} | shown
    specs = shown or known
    meant = _meant(given, needed, accepted)
    taken = [
        f"'{one.name}' of --input-shapes is taken for {other.name}"
        for one, other in zip(given, meant, strict=True)
        if one.name != other.name
    ]
    if meant:
        specs = {s.name: _with_type(s, known.get(s.name)) for s in meant}
    missing = [name for name in needed if name not in specs]
    sized = [str(specs[name]) for name in accepted if name in specs]
    asked = [f"{name}:1x{'N' if needed[1:] else '3x224x224'}" for name in missing]
    how = (
        f"--input-shapes '{','.join(sized + asked) or 'x:1x3x224x224'}', {EXAMPLES}() in "
        f"{factory.path}, or, for a compile, --data with arrays by these names"
    )
    if missing:
        held = f" (those there: {', '.join(s.name for s in rows)})" if rows else ""
        raise UsageError(
            f"{factory.source}: {type(module).__name__} needs {' and '.join(missing)}, and nothing "
            f"says how large. Give {how}{held}."
        )
    unknown = [name for name in specs if name not in accepted]
    if unknown or not specs:
        raise UsageError(
            f"{factory.source}: {type(module).__name__}.forward takes "
            f"{', '.join(accepted) or 'nothing by name'}, not {', '.join(unknown) or 'that'}. "
            f"Give {how}."
        )
    ordered = [specs[name] for name in accepted if name in specs]
    firsts = {spec.shape[0] for spec in ordered if spec.shape}
    batch = next(iter(firsts)) if len(firsts) == 1 else 0
    if batch and all(spec.shape for spec in ordered):
        ordered = [replace(s, shape=(BATCH, *s.shape[1:])) for s in ordered]
    return tuple(ordered), int(batch) or 1, taken


def _meant(
    specs: Sequence[InputSpec], needed: Sequence[str], accepted: Collection[str]
) -> Sequence[InputSpec]:
    """One shape for a model with one input is meant for it, whatever its name."""
    if len(specs) == len(needed) == 1 and specs[0].name not in accepted:
        return [replace(specs[0], name=needed[0])]
    return specs


def _with_type(given: InputSpec, known: InputSpec | None) -> InputSpec:
    """A shape that names no type takes that of the example."""
    if known is None or given.dtype != "float32":
        return given
    return replace(given, dtype=known.dtype, high=known.high)


def _examples(factory: Factory, accepted: Sequence[str]) -> list[InputSpec]:
    """What `example_inputs` of the user's file says."""
    found: Any = getattr(factory.module, EXAMPLES, None)
    if callable(found):
        try:
            with torch.random.fork_rng(devices=[]), importable(factory.path.parent):
                torch.manual_seed(SEED)
                found = found()
        except FAILURES as error:
            raise UsageError(
                f"{factory.path}:{EXAMPLES} raised {told(error, factory.path)}"
            ) from error
    if found is None:
        return []
    if isinstance(found, Tensor):
        found = (found,)
    if isinstance(found, list | tuple):
        found = dict(zip(accepted, found, strict=False))
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise UsageError(
            f"{factory.path}:{EXAMPLES} must give a tensor, a tuple of tensors, or a dict of "
            "tensors by the names of forward's parameters."
        )
    return [_spec_of(str(name), tensor) for name, tensor in found.items()]


def _spec_of(name: str, tensor: Tensor) -> InputSpec:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    whole = not tensor.is_floating_point() and dtype != torch.bool and tensor.numel()
    high = int(tensor.max()) + 1 if whole else None
    return InputSpec(name, str(dtype).removeprefix("torch."), tuple(tensor.shape), high)


def _forward_(source: SourceModel, factory: Factory, *, batch: int, said: str) -> Any:
    """Run the example; where the model takes its own batch only, close that axis.

    `said` is what says how large the inputs are.
    """
    try:
        return _run(source, source.example())
    except UnsupportedModel:
        raise
    except FAILURES as error:
        first = error
    try:
        result = _run(source, make_example(source.specs, {BATCH: batch}))
    except UnsupportedModel:
        raise
    except FAILURES as error:
        raise UnsupportedModel(
            f"{source.source}: {type(source.module).__name__} fails on "
            f"{', '.join(map(str, source.specs))} (from {said}): {told(error, factory.path)}"
        ) from error
    source.fix_batch_(batch)
    source.notes.append(
        f"the model takes batches of {batch} only ({type(first).__name__} on 2: "
        f"{first_line(first, 100)}): that axis is fixed"
    )
    return result


def _run(source: SourceModel, example: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        result = source.module(**example)
    for name, tensor in named_outputs(result):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UnsupportedModel(
                f"{source.source}: output {name} is NaN or infinity on random input of normal size."
            )
    return result


def _task(source: SourceModel, result: Any) -> ModelTask:
    """Class scores of images where it looks like them; nothing is guessed of other models."""
    (first, *more) = source.specs
    tensors = named_outputs(result)
    image = not more and first.dtype == "float32" and len(first.shape) == 4
    if image and len(tensors) == 1 and tensors[0][1].dim() == 2 and tensors[0][1].shape[1] > 1:
        return "image_classes"
    return "tensors"
