"""`zipc.load` gives a module back, and runs no code but what the caller hands over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file

import zipc
from tests.plain_levels import plain_levels
from tests.tiny_folders import save_family
from zipc.build import build, checkpoint
from zipc.core.errors import CorruptFile, UsageError
from zipc.core.request import Request
from zipc.core.shapes import parse_input_shapes
from zipc.core.types import Allocation, Level, Silent
from zipc.model_source import SourceModel, load_source, settle, with_cache
from zipc.numerics.bf16 import BF16
from zipc.output import _copy_texts
from zipc.prepare import prepare
from zipc.pruner.graph.as_traced import AsTraced
from zipc.pruner.graph.interpret import Variant
from zipc.pruner.graph.surgery import SCHEMA_VERSION
from zipc.pruner.levels import Levels
from zipc.pruner.states import variant_of
from zipc.stage_cache import StageCache

NETS = """
import torch
from torch import nn
class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
    def forward(self, ids): return self.layers(self.table(ids), src_key_padding_mask=ids == 0)
def reader(): return Reader()
def net(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
def other(): return nn.Sequential(nn.Linear(3, 2))
def bad(): raise RuntimeError("out of luck")
"""


def written(source: SourceModel, out: Path) -> Path:
    """The checkpoint of a model that nothing was removed from."""
    folder = out / "checkpoint"
    folder.mkdir(parents=True)
    untouched: dict[str, Any] = {
        "tensors": {},
        "numerics": {},
        "biased": [],
        "untied": [],
        "stubs": {},
        "dropped": [],
    }
    document = {"schema_version": SCHEMA_VERSION, **untouched, "attributes": {}}
    document["source"] = source.recipe
    (folder / "structure.json").write_text(json.dumps(document))
    tensors = {n: t.detach().clone() for n, t in source.module.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    if source.folder is not None:
        _copy_texts(source.folder, folder)
    return out


def equal(source: SourceModel, module: torch.nn.Module) -> bool:
    example = source.example()
    with torch.no_grad():
        found, expected = (source.chosen(m(**example)) for m in (module, source.module))
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def nets(tmp_path: Path) -> Path:
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    return path


@pytest.fixture
def out(nets: Path, tmp_path: Path) -> tuple[SourceModel, Path]:
    shapes = parse_input_shapes("input:1x3x8x8")
    source = load_source(f"{nets}:net", input_shapes=shapes)
    with torch.no_grad():
        for value in source.module.parameters():
            value.mul_(2.0)
    return source, written(source, tmp_path / "OUT")


def test_factory_model_comes_back_with_the_function_or_its_name(
    nets: Path, out: tuple[SourceModel, Path]
) -> None:
    source, folder = out
    assert equal(source, zipc.load(folder, factory=f"{nets}:net"))
    assert equal(source, zipc.load(str(folder), factory=source.blank))


def test_factory_model_without_its_factory_says_which_it_needs(
    out: tuple[SourceModel, Path],
) -> None:
    with pytest.raises(UsageError, match=r"factory nets\.py:net, and a folder never names code"):
        zipc.load(out[1])


def test_code_an_artifact_names_is_never_run(out: tuple[SourceModel, Path], tmp_path: Path) -> None:
    path = out[1] / "checkpoint" / "structure.json"
    document = json.loads(path.read_text())
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    document["source"]["factory"] = f"{trap}:net"
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="never names code"):
        zipc.load(out[1])
    assert not (tmp_path / "ran").exists()


def test_attention_that_was_taken_apart_is_so_again(nets: Path, tmp_path: Path) -> None:
    source = load_source(f"{nets}:reader", input_shapes=parse_input_shapes("ids:1x5:int64"))
    assert source.recipe["parted_attention"] == [f"layers.layers.{i}.self_attn" for i in (0, 1)]
    folder = written(source, tmp_path / "OUT")
    assert equal(source, zipc.load(folder, factory=f"{nets}:reader"))
    assert equal(source, zipc.load(folder, factory=source.blank))
    with pytest.raises(CorruptFile, match=r"does not fit .*Give the factory nets\.py:reader"):
        zipc.load(folder, factory=f"{nets}:net")


def test_another_factory_does_not_fit(nets: Path, out: tuple[SourceModel, Path]) -> None:
    with pytest.raises(CorruptFile, match=r"nets\.py:other does not fit .*nets\.py:net"):
        zipc.load(out[1], factory=f"{nets}:other")
    with pytest.raises(UsageError, match="raised RuntimeError: out of luck"):
        zipc.load(out[1], factory=f"{nets}:bad")


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "mpnet", "t5", "resnet"])
def test_hugging_face_model_comes_back_as_it_was_traced(family: str, tmp_path: Path) -> None:
    shapes: Any = parse_input_shapes("pixel_values:1x3x16x16") if family == "resnet" else ()
    source = load_source(str(save_family(family, tmp_path / "model")), input_shapes=shapes)
    assert equal(source, zipc.load(written(source, tmp_path / "OUT")))


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_maps_in_bf16_come_back_whichever_way_their_weights_lie(
    family: str, tmp_path: Path
) -> None:
    path = save_family(family, tmp_path / "model")
    source = load_source(str(path))
    asked = settle(Request(model=str(path)), source)
    made = prepare(source, asked, cache=StageCache(tmp_path / "cache"), progress=Silent())
    at = Allocation({n: Level(s.units, BF16) for n, s in made.sites.items()}, 0.0, 0.0)
    states = Levels(made.sites, made.calls, made.weights, {}, {}).states(at)
    document, tensors, module = checkpoint(made, at, states)
    assert set(document["numerics"].values()) == {BF16}
    assert all(tensors[f"{m}.weight"].dtype == torch.bfloat16 for m in document["numerics"])
    example = made.example(batch=1, length=6)
    (expected, *_), _ = made.executor.run(example, variant_of(at, states))
    with torch.no_grad():
        found = source.chosen(module(**example))[0]
    assert (found - expected).norm() < 2e-3 * expected.norm()
    exact = made.executor.run(example, Variant())[0][0]
    assert 1e-4 * exact.norm() < (exact - expected).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_heads_of_code_that_does_not_follow_are_cut_and_load_gives_the_graph(
    phase: Literal["prefill", "decode"], tmp_path: Path
) -> None:
    """Phi-3 slices queries, keys and values out of one map by the numbers of its config."""
    path = str(save_family("phi3", tmp_path / "model", resid_pdrop=0.5))
    source = load_source(path)
    if phase == "decode":
        source = with_cache(source)
    asked = settle(Request(model=path, phase=phase), source)
    made = prepare(source, asked, cache=StageCache(tmp_path / "cache"), progress=Silent())
    kinds = {n: s.kind for n, s in made.sites.items()}
    assert list(kinds.values()).count("heads") == 2
    assert any("where they are cut, zipc.load gives its traced graph" in n for n in source.notes)
    cut = Allocation({n: Level(1) for n, kind in kinds.items() if kind == "heads"}, 0.0, 0.0)
    states = plain_levels(made, [made.example(batch=4, length=8)]).states(cut)
    build(made, cut, states, workload=asked.workload)
    document, tensors, _ = checkpoint(made, cut, states)
    folder = tmp_path / "OUT" / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "structure.json").write_text(json.dumps(document))
    save_file({n: t.clone() for n, t in tensors.items()}, folder / "model.safetensors")
    _copy_texts(Path(path), folder)
    loaded = zipc.load(tmp_path / "OUT")
    assert type(loaded) is AsTraced
    for length in (3, 20):  # the length that was traced is another
        example = made.example(batch=1, length=length, widths=cut.widths)
        if phase == "decode":
            example = {"input_ids": torch.arange(5, 5 + length)[None]}
            example["attention_mask"] = torch.ones_like(example["input_ids"])
        expected, _ = made.executor.run(example, variant_of(cut, states))
        with torch.no_grad():
            found = loaded(**example).logits
        assert (found - expected[0]).norm() <= 1e-5 * expected[0].norm()


def test_factory_for_a_hugging_face_model_is_refused(nets: Path, tmp_path: Path) -> None:
    source = load_source(str(save_family("bert", tmp_path / "model")))
    folder = written(source, tmp_path / "OUT")
    with pytest.raises(UsageError, match=r"zipc\.load takes no factory"):
        zipc.load(folder, factory=f"{nets}:net")


@pytest.mark.parametrize("name", ["structure.json", "model.safetensors", "config.json"])
def test_missing_file_is_named(name: str, tmp_path: Path) -> None:
    source = load_source(str(save_family("bert", tmp_path / "model")))
    folder = written(source, tmp_path / "OUT")
    (folder / "checkpoint" / name).unlink()
    with pytest.raises(CorruptFile, match=rf"checkpoint/{name} is missing"):
        zipc.load(folder)
