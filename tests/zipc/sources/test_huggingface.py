"""Every family loads from a folder, runs, and can be traced; transformers itself is the oracle."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_folders import FOLDERS, save_family
from zipc.core.errors import UnsupportedModel, UsageError
from zipc.core.shapes import parse_input_shapes
from zipc.model_source import SourceModel, load_source, trace_source
from zipc.pruner.graph.trace import Program
from zipc.sources.huggingface import build_module
from zipc.sources.plain_maps import plain_maps_

TEXT = ["input_ids", "attention_mask"]
PAIR = [*TEXT, "decoder_input_ids", "decoder_attention_mask"]
TASKS: dict[str, tuple[list[str], list[str], str]] = {
    "bert": (TEXT, ["last_hidden_state"], "embedding"),
    "bert-classifier": (TEXT, ["logits"], "classes"),
    "bert-regression": (TEXT, ["logits"], "regression"),
    "bert-answers": (TEXT, ["start_logits", "end_logits"], "tensors"),
    "bert-tags": (TEXT, ["logits"], "tensors"),
    "bert-masked": (TEXT, ["logits"], "tensors"),
    "roberta": (TEXT, ["logits"], "classes"),
    "distilbert": (TEXT, ["logits"], "classes"),
    "electra": (TEXT, ["logits"], "classes"),
    "albert": (TEXT, ["logits"], "classes"),
    "mpnet": (TEXT, ["last_hidden_state"], "embedding"),
    "deberta": (TEXT, ["last_hidden_state"], "embedding"),
    "gpt2": (TEXT, ["logits"], "causal_lm"),
    "opt": (TEXT, ["logits"], "causal_lm"),
    "llama": (TEXT, ["logits"], "causal_lm"),
    "llama-tied": (TEXT, ["logits"], "causal_lm"),
    "llama-classifier": (TEXT, ["logits"], "classes"),
    "qwen2": (TEXT, ["logits"], "causal_lm"),
    "mistral": (TEXT, ["logits"], "causal_lm"),
    "phi3": (TEXT, ["logits"], "causal_lm"),
    "mixtral": (TEXT, ["logits"], "causal_lm"),
    "t5": (PAIR, ["logits"], "tensors"),
    "t5-gated": (PAIR, ["logits"], "tensors"),
    "t5-encoder": (TEXT, ["last_hidden_state"], "embedding"),
    "vit": (["pixel_values"], ["logits"], "image_classes"),
    "vit-body": (["pixel_values"], ["last_hidden_state"], "tensors"),
    "deit": (["pixel_values"], ["logits"], "image_classes"),
    "swin": (["pixel_values"], ["logits"], "image_classes"),
    "convnext": (["pixel_values"], ["logits"], "image_classes"),
    "resnet": (["pixel_values"], ["logits"], "image_classes"),
    "wav2vec2": (["input_values"], ["logits"], "classes"),
}
CAUSAL = [family for family, (_, _, task) in TASKS.items() if task == "causal_lm"]
SMALL = parse_input_shapes("pixel_values:1x3x16x16")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folders")


def saved(folders: Path, family: str) -> Path:
    path = folders / family
    return path if path.is_dir() else save_family(family, path)


def loaded(folders: Path, family: str) -> SourceModel:
    shapes = {"resnet": SMALL, "wav2vec2": parse_input_shapes("input_values:1x800")}.get(family, ())
    return load_source(str(saved(folders, family)), input_shapes=shapes)


@functools.cache
def traced(folders: Path, family: str) -> tuple[SourceModel, Program]:
    source = loaded(folders, family)
    return source, trace_source(source)


def stock(folder: Path, source: SourceModel) -> Any:
    """The same weights with the attention and the experts transformers has without zipc."""
    cls = type(source.module)
    module = cls.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    )
    return module.eval()


def real(tensor: Tensor, mask: Tensor | None) -> Tensor:
    """The rows that stand for tokens, where a tensor has such rows."""
    if mask is not None and tensor.shape[:2] == mask.shape:
        return tensor[mask > 0]
    return tensor


def test_the_table_of_tasks_names_every_folder() -> None:
    assert set(TASKS) == set(FOLDERS)


@pytest.mark.parametrize("family", TASKS)
def test_family_has_the_inputs_outputs_and_values_of_transformers(
    folders: Path, family: str
) -> None:
    source = loaded(folders, family)
    inputs, outputs, task = TASKS[family]
    assert source.inputs == inputs
    assert [name for _, name in source.outputs] == outputs
    assert source.task == task
    own = family in ("mpnet", "deberta")
    assert source.recipe["attention"] == ("eager" if own else "zipc")
    example = source.example(batch=3, length=12)
    assert {len(tensor) for tensor in example.values()} == {3}
    mask = example.get("decoder_attention_mask", example.get("attention_mask"))
    with torch.no_grad():
        found = source.chosen(source.module(**example))
        expected = stock(saved(folders, family), source)(**example)
    for name, tensor in zip(outputs, found, strict=True):
        torch.testing.assert_close(
            real(tensor, mask), real(expected[name], mask), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("family", TASKS)
def test_family_is_traced_for_other_sizes_than_the_example(folders: Path, family: str) -> None:
    source, program = traced(folders, family)
    assert len(program.outputs) == len(source.outputs)
    assert not any(
        "fixed" in note or "only" in note for note in source.notes if "verbs" not in note
    )
    example = source.example(batch=5, length=11)
    with torch.no_grad():
        found = source.chosen(program.exported.module()(**example))
        expected = source.chosen(source.module(**example))
    for tensor, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "mixtral", "t5"])
def test_attention_is_one_operation_without_repeated_keys(folders: Path, family: str) -> None:
    _, program = traced(folders, family)
    calls = [n for n in program.nodes if "scaled_dot_product" in str(n.target)]
    assert len(calls) == (6 if family == "t5" else 2)
    for call in calls:
        query, key, value = (node.meta["val"].shape for node in call.args[:3])
        grouped = int(query[1]) == 2 * int(key[1])
        assert key[1] == value[1]
        assert call.kwargs.get("enable_gqa", False) == grouped
        assert grouped == (family in ("llama", "mistral", "mixtral"))
    assert not any("expand" in str(n.target) for n in program.nodes if n.name.startswith("repeat"))


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("left", [True, False])
def test_padding_on_either_side_leaves_the_tokens_of_a_causal_model_alone(
    folders: Path, family: str, left: bool
) -> None:
    source = loaded(folders, family)
    ids = source.example(length=9)["input_ids"][:1]
    pad = torch.full((1, 5), 7)
    padded = torch.cat([pad, ids] if left else [ids, pad], 1)
    mask = torch.cat([pad * 0, ids * 0 + 1] if left else [ids * 0 + 1, pad * 0], 1)
    with torch.no_grad():
        alone = source.module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        beside = source.module(input_ids=padded, attention_mask=mask).logits
    torch.testing.assert_close(
        beside[:, 5:] if left else beside[:, :9], alone, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "t5", "mpnet", "vit", "resnet"])
def test_blank_module_takes_the_weights_and_gives_the_outputs(folders: Path, family: str) -> None:
    source = loaded(folders, family)
    blank = source.blank()
    blank.load_state_dict(source.module.state_dict())
    blank.eval()
    example = source.example()
    with torch.no_grad():
        found = source.chosen(blank(**example))
        expected = source.chosen(source.module(**example))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_positions_of_gpt2_follow_the_mask_and_those_of_llama_need_not(folders: Path) -> None:
    assert loaded(folders, "gpt2").recipe["positions"] == "mask"
    assert loaded(folders, "llama").recipe["positions"] == "arange"


def test_tied_weights_stay_tied(folders: Path) -> None:
    for family in ("llama-tied", "gpt2", "t5"):
        module: Any = loaded(folders, family).module
        assert module.get_output_embeddings().weight is module.get_input_embeddings().weight


def test_all_experts_equals_the_loop_over_experts_in_double_precision(folders: Path) -> None:
    """Ours hold maps of their own, those of transformers a stack."""
    ours: Any = loaded(folders, "mixtral").module
    theirs: Any = transformers.MixtralForCausalLM.from_pretrained(
        saved(folders, "mixtral"), experts_implementation="eager"
    )
    parted, stacked = (m.model.layers[0].mlp.experts.double() for m in (ours, theirs))
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(20, 32, generator=generator, dtype=torch.float64)
    weights, chosen = torch.rand(20, 4, generator=generator, dtype=torch.float64).topk(2, -1)
    found, expected = (experts(hidden, chosen, weights) for experts in (parted, stacked))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_size_of_images_comes_from_the_preprocessor_then_the_config(tmp_path: Path) -> None:
    folder = save_family("convnext", tmp_path / "m")
    assert load_source(str(folder)).specs[0].shape == ("batch", 3, 16, 16)
    for content, size in [
        ({"size": {"shortest_edge": 24}}, (24, 24)),
        ({"size": 32}, (32, 32)),
        ({"size": {"height": 16, "width": 24}}, (16, 24)),
        ({"size": 32, "crop_size": {"height": 24, "width": 24}, "do_center_crop": True}, (24, 24)),
        ({"do_resize": True}, (16, 16)),
    ]:
        (folder / "preprocessor_config.json").write_text(json.dumps(content))
        assert load_source(str(folder)).specs[0].shape == ("batch", 3, *size)
    shapes = parse_input_shapes("pixel_values:4x3x20x28")
    assert load_source(str(folder), input_shapes=shapes).specs[0].shape == ("batch", 3, 20, 28)
    (folder / "preprocessor_config.json").write_text("[")
    with pytest.raises(UsageError, match=r"preprocessor_config\.json cannot be read"):
        load_source(str(folder))


def test_size_nobody_states_is_assumed_and_said(folders: Path) -> None:
    source = load_source(str(saved(folders, "resnet")))
    assert source.specs[0].shape == ("batch", 3, 224, 224)
    assert any("224 x 224 is assumed" in note for note in source.notes)


@pytest.mark.parametrize(
    ("family", "shapes", "message"),
    [
        ("vit", "pixel_values:1x1x16x16", "images of 3 channels, not 1"),
        ("vit", "pixel_values:1x3x24x24", r"fails on a plain input.*--input-shapes"),
        ("vit", "x:1x3x16x16", "takes one input, pixel_values"),
        ("vit", "pixel_values:3x16x16", "takes one input, pixel_values"),
        ("llama", "input_ids:1x16:int64", "--sequence-length, not --input-shapes"),
    ],
)
def test_shapes_a_model_cannot_take_are_refused(
    folders: Path, family: str, shapes: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load_source(str(saved(folders, family)), input_shapes=parse_input_shapes(shapes))


def test_weights_flag_is_refused_for_a_folder(folders: Path) -> None:
    with pytest.raises(UsageError, match="--weights belongs to a model given as"):
        load_source(str(saved(folders, "bert")), weights="x.safetensors")


def test_sizes_of_sounds_have_to_be_told(tmp_path: Path) -> None:
    config = transformers.WhisperConfig(
        vocab_size=60,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        decoder_start_token_id=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    transformers.WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    folder = str(tmp_path / "m")
    with pytest.raises(UsageError, match=r"reads input_features.* --input-shapes input_features:"):
        load_source(folder)
    sizes = parse_input_shapes("input_features:1x80x3000,decoder_input_ids:1x5:int64")
    source = load_source(folder, input_shapes=sizes)
    assert [spec.shape for spec in source.specs] == [("batch", 80, 3000), ("batch", 5)]
    assert (source.task, source.outputs) == ("tensors", [(0, "logits")])
    with pytest.raises(UsageError, match=r"names input_values, and Whisper.* takes input_features"):
        load_source(folder, input_shapes=parse_input_shapes("input_values:1x80x3000"))


def test_sounds_are_as_long_as_the_data_where_nobody_says(tmp_path: Path) -> None:
    folder = str(save_family("wav2vec2", tmp_path / "m"))
    rows = parse_input_shapes("input_values:1x800,speaker:1:int64")
    source = load_source(folder, rows=lambda: rows)
    assert [(s.name, s.shape) for s in source.specs] == [("input_values", ("batch", 800))]
    assert source.task == "classes"


class OwnLinear(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class Scaled(OwnLinear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Gated(torch.nn.Linear):
    def forward(self, input: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(input) * gate


def test_only_a_class_that_computes_a_plain_map_becomes_one() -> None:
    parts = OwnLinear(4, 6), OwnLinear(6, 6, bias=False), Scaled(6, 6), Gated(6, 6)
    module = torch.nn.Sequential(*parts)
    plain_maps_(module)
    kinds = [torch.nn.Linear, torch.nn.Linear, Scaled, Gated]
    assert [type(part) for part in module] == kinds
    assert all(part.weight is old.weight for part, old in zip(module, parts, strict=True))
    assert module[0].bias is parts[0].bias
    assert module[1].bias is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_loaded_in_fp32_and_said(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_family("llama", tmp_path / "m")
    path = folder / "model.safetensors"
    save_file({n: t.to(dtype) for n, t in load_file(path).items()}, path, metadata={"format": "pt"})
    source = load_source(str(folder))
    assert {p.dtype for p in source.module.parameters()} == {torch.float32}
    name = str(dtype).removeprefix("torch.")
    assert any(f"stored as {name} and were loaded as float32" in note for note in source.notes)


def test_quantised_folder_is_refused(tmp_path: Path) -> None:
    folder = save_family("llama", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(UnsupportedModel, match=r"quantised already \(gptq"):
        load_source(str(folder))


def test_weights_stored_as_integers_are_refused(tmp_path: Path) -> None:
    folder = save_family("llama", tmp_path / "m")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].mul(50).to(torch.int8)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=rf"{name} as I8"):
        load_source(str(folder))


@pytest.mark.parametrize("pattern", ["rows", "2:4"])
def test_pruned_weights_are_said(tmp_path: Path, pattern: str) -> None:
    folder = save_family("llama", tmp_path / "m")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and pattern == "rows":
            tensor[: len(tensor) // 2] = 0
        elif tensor.dim() == 2 and name.endswith("proj.weight"):
            tensor.view(len(tensor), -1, 4)[..., :2] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    (note,) = [n for n in load_source(str(folder)).notes if "pruned before" in n]
    assert ("2:4 in 14 tensors" in note) == (pattern == "2:4")


def test_no_note_about_zeros_in_ordinary_weights(folders: Path) -> None:
    assert not any("pruned before" in note for note in loaded(folders, "llama").notes)


def test_file_without_a_function_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nets.py"
    path.write_text("")
    with pytest.raises(UsageError, match=r"Give it as .*nets\.py:function"):
        load_source(str(path))


def test_building_twice_from_one_config_gives_equal_modules(folders: Path) -> None:
    source = loaded(folders, "t5")
    first, second = (build_module(source.config, source.recipe) for _ in range(2))
    assert [(n, t.shape) for n, t in first.state_dict().items()] == [
        (n, t.shape) for n, t in second.state_dict().items()
    ]
