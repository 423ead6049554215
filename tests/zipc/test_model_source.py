"""A model folder is loaded, or refused with one message that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny_project import model_folder
from zipc import model_source
from zipc.core.errors import UnsupportedModel, UsageError
from zipc.core.files import sha256_file
from zipc.model_source import Alias, load_source


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_folder_gives_module_tokenizer_inputs_and_limits(good: Path) -> None:
    source = load_source(str(good))
    assert not source.module.training
    assert source.tokenizer("the cat")["input_ids"][0] == 2
    assert source.inputs == ["input_ids", "attention_mask", "token_type_ids"]
    assert source.outputs == [(0, "last_hidden_state")]
    assert source.max_length == 48
    assert source.sha256 == sha256_file(good / "model.safetensors")
    assert source.revision is None


def test_classifier_keeps_its_head(tmp_path: Path) -> None:
    source = load_source(str(model_folder(tmp_path / "m", labels=("no", "yes"))))
    assert source.has_logits
    with torch.no_grad():
        assert source.module(**source.example()).logits.shape == (2, 2)


def test_half_precision_weights_are_loaded_in_fp32(folder: Path) -> None:
    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({n: t.half() for n, t in tensors.items()})

    edit_weights(folder, halve)
    module = load_source(str(folder)).module
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_sentence_limit_of_the_folder_is_respected(folder: Path) -> None:
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 24}')
    assert load_source(str(folder)).max_length == 24


def test_folder_without_tokenizer_is_loaded_with_a_note(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    source = load_source(str(folder))
    assert source.tokenizer is None
    assert any("no tokenizer" in note and "(.npz)" in note for note in source.notes)


def test_missing_folder_names_the_aliases(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"No model folder.*minilm"):
        load_source(str(tmp_path / "nothing"))


def test_file_instead_of_a_folder_is_refused(good: Path) -> None:
    with pytest.raises(UsageError, match="is a file"):
        load_source(str(good / "config.json"))


def test_pickled_weights_are_never_loaded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    with pytest.raises(UsageError, match=r"pickles are not loaded.*save_pretrained"):
        load_source(str(folder))


def test_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match=r"no config\.json"):
        load_source(str(folder))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"model_type": "no-such-model"}'])
def test_unreadable_config_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(UsageError, match=r"config\.json"):
        load_source(str(folder))


@pytest.mark.parametrize("keep", [0, 4, 200, -1000])
def test_truncated_weights_are_refused(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match=r"cannot be loaded.*fetch the model again"):
        load_source(str(folder))


@pytest.mark.parametrize("names", [["NoSuchModel"], [], None])
def test_unknown_architecture_is_unsupported(folder: Path, names: object) -> None:
    edit_config(folder, architectures=names)
    with pytest.raises(UnsupportedModel, match="architecture"):
        load_source(str(folder))


def test_code_beside_a_model_is_never_run(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModel": "modeling.Model"})
    (folder / "modeling.py").write_text("raise SystemExit('was run')")
    with pytest.raises(UnsupportedModel, match="auto_map"):
        load_source(str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["encoder.layer.1.output.dense.weight"][0, 0] = value

    edit_weights(folder, spoil)
    with pytest.raises(UsageError, match=r"encoder\.layer\.1\.output\.dense\.weight.*NaN"):
        load_source(str(folder))


def test_weights_of_another_depth_are_refused(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(UsageError, match=r"do not belong together"):
        load_source(str(folder))


def test_weights_of_another_width_are_refused(folder: Path) -> None:
    edit_config(folder, intermediate_size=128)
    with pytest.raises(UsageError, match=r"cannot be loaded|do not belong together"):
        load_source(str(folder))


def test_weights_with_layers_the_config_lacks_are_refused(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)
    with pytest.raises(UsageError, match=r"do not belong together"):
        load_source(str(folder))


def test_broken_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model":')
    with pytest.raises(UsageError, match="tokenizer"):
        load_source(str(folder))


def test_alias_refuses_weights_with_another_hash(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "gt_tiny_alias"
    shutil.copytree(good, package / "model")
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    digest = sha256_file(good / "model.safetensors")
    monkeypatch.setitem(model_source.ALIASES, "tiny", Alias("gt_tiny_alias", "a/b", digest))
    assert load_source("tiny").sha256 == digest
    monkeypatch.setitem(model_source.ALIASES, "tiny", Alias("gt_tiny_alias", "a/b", "0" * 64))
    with pytest.raises(UsageError, match=rf"{digest}.*Give the folder itself"):
        load_source("tiny")


def test_hub_id_that_cannot_be_resolved_says_what_else_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UsageError, match=r"no route to host.*aliases: minilm"):
        load_source("someone/something")
