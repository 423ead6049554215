"""What is looked at in the weights of any model before anything is done with it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zipc.core.errors import UnsupportedModel, UsageError

SPARSE = 0.3  # share of exact zeros from which a model counts as pruned already
HALF = {"F16": "float16", "BF16": "bfloat16"}
PACKED = ("I8", "U8", "F8_E4M3", "F8_E5M2", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0")


def check_files(files: Iterable[Path], *, where: str) -> list[str]:
    """Notes on the precision of stored weights.

    Raises:
        UsageError: a file cannot be read.
        UnsupportedModel: weights are stored as integers, or in eight bits.
    """
    kinds: Counter[str] = Counter()
    for path in files:
        try:
            with safe_open(path, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (it is no mapping)
                    kind = stored.get_slice(name).get_dtype()
                    kinds[kind] += 1
                    if kind in PACKED and "weight" in name:
                        raise UnsupportedModel(
                            f"{where} is quantised already: {path.name} stores {name} as {kind}. "
                            "Give the weights in floating point; zipc quantises them itself."
                        )
        except (SafetensorError, OSError) as error:
            raise UsageError(
                f"The weights in {path} cannot be loaded ({error}). The file may be truncated: "
                "fetch the model again."
            ) from error
    return [
        f"{count} tensors are stored as {HALF[kind]} and were loaded as float32"
        for kind, count in kinds.items()
        if kind in HALF
    ]


def check_weights(module: nn.Module, *, where: str) -> list[str]:
    """Notes on weights that are zero already.

    Raises:
        UsageError: a parameter is not finite, or has no values.
        UnsupportedModel: a module or tensor is quantised, or stored as a sparse one.
    """
    for path, part in module.named_modules():
        if "quantized" in type(part).__module__.split("."):  # torch packs its weights out of sight
            raise UnsupportedModel(
                f"{where}: {path or 'the module'} is a quantised {type(part).__name__}. Give the "
                "model in floating point; zipc quantises it itself."
            )
    zeros = total = 0
    patterned = []
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        _check_kind(module, name, tensor, where=where)
        if not tensor.is_floating_point() or not isinstance(tensor, nn.Parameter):
            continue
        if not torch.isfinite(tensor).all():
            raise UsageError(f"{where}: parameter {name} contains NaN or infinity.")
        if tensor.dim() > 1:
            empty = tensor.numel() - int(tensor.count_nonzero())
            zeros, total = zeros + empty, total + tensor.numel()
            if empty >= 0.45 * tensor.numel() and _two_of_four(tensor):
                patterned.append(name)
    if not total or zeros < SPARSE * total:
        return []
    note = f"{zeros / total:.0%} of the weights are exactly zero: the model was pruned before"
    if patterned:
        note += f" (2:4 in {len(patterned)} tensors, e.g. {patterned[0]})"
    return [f"{note}. Zeros are treated like any other weight and no pattern of them is kept"]


def _check_kind(module: nn.Module, name: str, tensor: Tensor, *, where: str) -> None:
    owner = type(module.get_submodule(name.rpartition(".")[0])).__name__
    if tensor.is_meta:
        raise UsageError(
            f"{where}: {name} of {owner} has no values (it is on the meta device). Give them with "
            "--weights x.safetensors, or make the module on the CPU."
        )
    if tensor.is_quantized or type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
        kind = "quantised" if tensor.is_quantized else f"a {type(tensor).__name__}"
        raise UnsupportedModel(
            f"{where}: {name} of {owner} is {kind}, not a plain tensor. Give the model in floating "
            "point; zipc quantises it itself."
        )
    if tensor.layout != torch.strided:
        raise UnsupportedModel(
            f"{where}: {name} of {owner} is stored as {tensor.layout}. Call .to_dense() on it "
            "first; zeros are treated like any other weight."
        )


def _two_of_four(weight: Tensor) -> bool:
    """Whether every four weights in a row hold two zeros."""
    rows = weight.reshape(len(weight), -1)
    if rows.shape[1] % 4:
        return False
    return bool(((rows.view(len(rows), -1, 4) == 0).sum(-1) >= 2).all())
