"""Models whose code treats very short or the longest sequences in a way of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_folders import save_family
from zipc.core.errors import UnsupportedModel
from zipc.model_source import SourceModel, load_source, trace_source


class _Longest(nn.Module):
    """Looks at the size of the input before anything else."""

    def __init__(self, inner: nn.Module, *, longest: int, only: int | None = None) -> None:
        super().__init__()
        self.inner, self.longest, self.only = inner, longest, only

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        length = input_ids.shape[1]
        if self.only is not None and length != self.only:
            raise ValueError("not for this length")
        hidden = self.inner(input_ids, attention_mask=attention_mask).last_hidden_state
        return {"hidden": hidden + 1 if length == self.longest else hidden}


def wrapped(tmp_path: Path, *, only: int | None = None) -> SourceModel:
    source = load_source(str(save_family("bert", tmp_path / "bert")))
    source.module = _Longest(source.module, longest=source.max_length, only=only)
    source.specs = tuple(spec for spec in source.specs if spec.name != "token_type_ids")
    source.outputs = [(0, "hidden")]
    return source


def test_lengths_that_all_run_alike_are_traced(tmp_path: Path) -> None:
    source = wrapped(tmp_path)
    program = trace_source(source)
    assert source.max_length == 63
    assert any("4 to 63 tokens" in note for note in source.notes)
    feeds = source.example(batch=2, length=21)
    with torch.no_grad():
        found = source.chosen(program.exported.module()(**feeds))
        (expected,) = source.chosen(source.module(**feeds))
    torch.testing.assert_close(found[0], expected)


def test_a_model_for_one_length_is_refused_with_what_torch_found(tmp_path: Path) -> None:
    source = wrapped(tmp_path, only=16)
    with pytest.raises(UnsupportedModel, match=r"Constraints violated .*sequence"):
        trace_source(source)
    assert source.max_length == 64
