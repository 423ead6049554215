"""A step of generation gives what the whole sequence gives at its last token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_folders import save_family
from zipc.core.errors import UnsupportedModel
from zipc.model_source import SourceModel, load_source, trace_source
from zipc.sources.decode import decode_step

FAMILIES = ["gpt2", "opt", "llama", "llama-tied", "qwen2", "mistral", "mixtral"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folders")


def loaded(folders: Path, family: str) -> SourceModel:
    path = folders / family
    return load_source(str(path if path.is_dir() else save_family(family, path)))


def padded(source: SourceModel, length: int, padding: int) -> tuple[Tensor, Tensor]:
    """Two sequences, the second padded on the left."""
    ids = source.example(batch=4, length=length)["input_ids"][:2]
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    return ids, mask


def step_feeds(source: SourceModel, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The last token, and the cache of those before it as transformers itself fills it."""
    from transformers import DynamicCache

    module: Any = source.module
    cache = DynamicCache()
    whole = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1]}
    with torch.no_grad():
        module(**whole, past_key_values=cache, use_cache=True)
    feeds = {"input_ids": ids[:, -1:], "attention_mask": mask}
    for i, layer in enumerate(cache.layers):
        feeds |= {
            f"past_key_values_{i}_key": layer.keys,
            f"past_key_values_{i}_value": layer.values,
        }
    return feeds


@pytest.mark.parametrize("family", FAMILIES)
def test_step_gives_the_last_logits_of_the_whole_sequence(folders: Path, family: str) -> None:
    source = loaded(folders, family)
    step = decode_step(source)
    ids, mask = padded(source, 11, 4)
    feeds = step_feeds(source, ids, mask)
    assert list(feeds) == step.inputs
    with torch.no_grad():
        found = step.module(**feeds)
        expected = source.module(input_ids=ids, attention_mask=mask).logits[:, -1:]
    torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-5)
    assert [name for _, name in step.outputs] == list(found)
    for i in range(2):
        for part in ("key", "value"):
            present = found[f"present.{i}.{part}"]
            assert torch.equal(present[:, :, :-1], feeds[f"past_key_values_{i}_{part}"])


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "mistral", "mixtral"])
def test_step_is_traced_for_any_past(folders: Path, family: str) -> None:
    source = loaded(folders, family)
    step = decode_step(source)
    program = trace_source(step)
    assert len(program.outputs) == 5
    ids, mask = padded(source, 23, 9)
    feeds = step_feeds(source, ids, mask)
    with torch.no_grad():
        found = program.exported.module()(**feeds)["logits"]
        expected = source.module(input_ids=ids, attention_mask=mask).logits[:, -1:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_step_shares_its_weights_and_leaves_the_model_as_it_was(folders: Path) -> None:
    source = loaded(folders, "llama")
    example = source.example()
    with torch.no_grad():
        before = source.module(**example).logits
        step = decode_step(source)
        step.module(**step.example())
        assert torch.equal(source.module(**example).logits, before)
    theirs = dict(step.module.named_parameters())
    assert all(theirs[name] is value for name, value in source.module.named_parameters())


def test_example_of_a_step_has_the_sizes_asked_for(folders: Path) -> None:
    example = decode_step(loaded(folders, "llama")).example(batch=3, length=7)
    assert example["input_ids"].shape == (3, 1)
    assert example["attention_mask"].shape == (3, 8)
    assert example["past_key_values_1_value"].shape == (3, 2, 7, 8)
    assert example["attention_mask"][:, -1].tolist() == [1, 1, 1]


def test_model_without_a_cache_has_no_step(folders: Path) -> None:
    with pytest.raises(UnsupportedModel, match="no causal language model"):
        decode_step(loaded(folders, "bert"))
