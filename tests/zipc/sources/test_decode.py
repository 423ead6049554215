"""With its past in a cache, a model gives what it gives on the whole sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_folders import family_folder
from zipc.core.errors import UnsupportedModel
from zipc.model_source import SourceModel, load_source, trace_source
from zipc.pruner.graph.interpret import Executor, Variant
from zipc.pruner.graph.sites import find_sites
from zipc.sources.decode import with_cache

FAMILIES = ["gpt2", "opt", "llama", "llama-tied", "qwen2", "mistral", "mixtral"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folders")


def loaded(folders: Path, family: str) -> SourceModel:
    return load_source(str(family_folder(folders, family)))


def padded(source: SourceModel, length: int, padding: int) -> tuple[Tensor, Tensor]:
    """Two sequences, the second padded on the left."""
    ids = source.example(batch=4, length=length)["input_ids"][:2]
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    return ids, mask


def step_feeds(source: SourceModel, ids: Tensor, mask: Tensor, *, newest: int) -> dict[str, Tensor]:
    """The newest tokens, and the cache of those before as transformers itself fills it."""
    from transformers import DynamicCache

    module: Any = source.module
    cache = DynamicCache()
    whole = {"input_ids": ids[:, :-newest], "attention_mask": mask[:, :-newest]}
    with torch.no_grad():
        module(**whole, past_key_values=cache, use_cache=True)
    feeds = {"input_ids": ids[:, -newest:], "attention_mask": mask}
    for i, layer in enumerate(cache.layers):
        feeds |= {
            f"past_key_values_{i}_key": layer.keys,
            f"past_key_values_{i}_value": layer.values,
        }
    return feeds


@pytest.mark.parametrize("newest", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_newest_tokens_have_the_logits_of_the_whole_sequence(
    folders: Path, family: str, newest: int
) -> None:
    source = loaded(folders, family)
    step = with_cache(source)
    ids, mask = padded(source, 11, 4)
    feeds = step_feeds(source, ids, mask, newest=newest)
    assert step.cache is not None
    assert list(feeds) == [spec.name for spec in step.all_specs]
    with torch.no_grad():
        found = step.module(**feeds)
        expected = source.module(input_ids=ids, attention_mask=mask).logits[:, -newest:]
    torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-5)
    assert [name for _, name in (*step.outputs, *step.cache.outputs)] == list(found)
    for i in range(2):
        for part in ("key", "value"):
            present = found[f"present.{i}.{part}"]
            assert torch.equal(present[:, :, :-newest], feeds[f"past_key_values_{i}_{part}"])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_cache_that_is_not_given_is_empty(folders: Path, family: str) -> None:
    source = loaded(folders, family)
    feeds = source.example(batch=2, length=9)
    with torch.no_grad():
        found = with_cache(source).module(**feeds)["logits"]
        assert torch.equal(found, source.module(**feeds).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_trace_is_for_any_past_and_any_number_of_tokens(folders: Path, family: str) -> None:
    source = loaded(folders, family)
    program = trace_source(with_cache(source))
    assert len(program.outputs) == 1
    assert len(program.kept) == len(program.caches) == 4
    ids, mask = padded(source, 23, 9)
    executor = Executor(program, find_sites(program))
    with torch.no_grad():
        expected = source.module(input_ids=ids, attention_mask=mask).logits
        for newest in (1, 6):
            (found,), _ = executor.run(step_feeds(source, ids, mask, newest=newest), Variant())
            torch.testing.assert_close(found, expected[:, -newest:], rtol=1e-4, atol=1e-5)
        (prompt,), _ = executor.run({"input_ids": ids, "attention_mask": mask}, Variant())
    torch.testing.assert_close(prompt[mask > 0], expected[mask > 0], rtol=1e-4, atol=1e-5)


def test_step_shares_its_weights_and_leaves_the_model_as_it_was(folders: Path) -> None:
    source = loaded(folders, "llama")
    example = source.example()
    with torch.no_grad():
        before = source.module(**example).logits
        step = with_cache(source)
        step.module(**step.example())
        assert torch.equal(source.module(**example).logits, before)
    theirs = dict(step.module.named_parameters())
    assert all(theirs[name] is value for name, value in source.module.named_parameters())


def test_half_of_an_example_is_in_the_cache(folders: Path) -> None:
    step = with_cache(loaded(folders, "llama"))
    example = step.example(batch=3, length=9)
    assert example["input_ids"].shape == (3, 5)
    assert example["attention_mask"].shape == (3, 9)
    assert example["past_key_values_1_value"].shape == (3, 2, 4, 8)
    assert example["attention_mask"][:, -1].tolist() == [1, 1, 1]
    assert list(step.example(cached=False)) == ["input_ids", "attention_mask"]


def test_model_without_a_cache_has_no_step(folders: Path) -> None:
    with pytest.raises(UnsupportedModel, match="no causal language model"):
        with_cache(loaded(folders, "bert"))
