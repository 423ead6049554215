"""`--phase decode`: a compiled language model, one token after another."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

import zipc
from tests.tiny_folders import family_folder, save_family
from tests.tiny_project import (
    SETTINGS,
    Told,
    fake_clock,
    save_tokenizer,
    sentences,
    small_effort,
)
from tests.tiny_project import request as request_of
from zipc.candidates import _numerics
from zipc.core.errors import UsageError
from zipc.core.request import Request
from zipc.core.types import Level, Silent
from zipc.exporters.specialise import specialise
from zipc.inspect import inspect_onnx
from zipc.manifest import Manifest
from zipc.model_source import SourceModel, load_source, settle, with_cache
from zipc.numerics.int4 import INT4
from zipc.numerics.int8 import Int8Linear, QuantizedWeight
from zipc.pipeline import compile_model
from zipc.plain_edits import plain_edit
from zipc.prepare import Prepared, prepare
from zipc.pruner.graph.interpret import Variant
from zipc.pruner.maps import own_layout
from zipc.runtimes import integer_kernels
from zipc.stage_cache import StageCache
from zipc.targets import load_target, requested_target


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folders")


@pytest.fixture(scope="module", params=["gpt2", "opt", "llama", "qwen2", "mistral", "mixtral"])
def prepared(folders: Path, request: pytest.FixtureRequest) -> Prepared:
    path = family_folder(folders, request.param)
    source = with_cache(load_source(str(path)))
    asked = settle(Request(model=str(path), phase="decode"), source)
    return prepare(source, asked, cache=StageCache(folders / "cache"), progress=Silent())


def token_by_token(session: ort.InferenceSession, ids: Tensor) -> Tensor:
    """Logits of a graph that is given one token at a time, and its own cache."""
    caches = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
    held = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in caches}
    found = []
    for at in range(ids.shape[1]):
        feeds = {
            "input_ids": ids[:, at : at + 1].numpy(),
            "attention_mask": np.ones((1, at + 1), np.int64),
        }
        given = {i.name for i in session.get_inputs()}
        feeds = {k: v for k, v in (feeds | held).items() if k in given}
        names = [o.name for o in session.get_outputs()]
        results = dict(zip(names, session.run(names, feeds), strict=True))
        held = {n: results[n.replace("past_key_values", "present")] for n in held}
        found.append(torch.from_numpy(results["logits"]))
    return torch.cat(found, 1)


def opened(model: bytes | Path, *, as_written: bool = False) -> ort.InferenceSession:
    options = ort.SessionOptions()
    if as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return ort.InferenceSession(model if isinstance(model, bytes) else str(model), options)


@pytest.mark.parametrize("width", ["all", "half", "none", "first layer none"])
def test_a_cut_graph_decodes_what_the_cut_network_reads(prepared: Prepared, width: str) -> None:
    made = prepared
    first = next(iter(made.sites))
    levels = {}
    for name, site in made.sites.items():
        gone = site.removable and (
            width == "none" or (width == "first layer none" and name == first)
        )
        kept = site.units if width == "all" else max(1, site.units // 2)
        levels[name] = Level(0 if gone else kept)
    edit = plain_edit(made, levels, {n: tuple(range(lv.width)) for n, lv in levels.items()})
    session = opened(specialise(made.dense, edit).to_bytes())
    variant = Variant(
        tensors={k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in edit.tensors.items()},
        constants={k: torch.from_numpy(v) for k, v in edit.removed.items()},
        widths={name: level.width for name, level in levels.items()},
    )
    ids = made.source.example(batch=2, length=10, cached=False)["input_ids"][:1]
    (expected,), _ = made.executor.run(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, variant
    )
    torch.testing.assert_close(token_by_token(session, ids), expected, rtol=1e-3, atol=1e-4)
    heads = [i.shape[1] for i in session.get_inputs() if i.name.startswith("past_key_values.")]
    attention = [n for n, site in made.sites.items() if site.kind == "heads"]
    assert heads == [levels[n].width for n in attention for _ in "kv" if levels[n].width]


def test_int4_weights_decode_as_what_they_stand_for(prepared: Prepared) -> None:
    made, integers = prepared, [n for n, s in prepared.sites.items() if prepared.on_integers(s)]
    levels = {n: Level(s.units, INT4 if n in integers else "fp32") for n, s in made.sites.items()}
    edit = plain_edit(made, levels, {n: tuple(range(lv.width)) for n, lv in levels.items()})
    assert set(edit.int8) == {m for n in integers for m in made.sites[n].maps}
    model = specialise(made.dense, edit).to_bytes()
    products = sum(len(made.dense.map_nodes(f"{m}.weight")) for m in edit.int8)
    assert integer_kernels(model) == products > 0
    tensors = {}
    for module, held in edit.int8.items():
        call = made.calls[module]
        rounded = QuantizedWeight(torch.from_numpy(held.values), torch.from_numpy(held.scale))
        tensors[call.weight] = own_layout(
            call, rounded.dequantized()[None], made.weights[call.weight]
        )
    ids = made.source.example(batch=2, length=10, cached=False)["input_ids"][:1]
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    (expected,), _ = made.executor.run(feeds, Variant(tensors=tensors))
    found = token_by_token(opened(model), ids)
    assert (found - expected).norm() <= 0.03 * expected.norm()  # the kernel rounds activations


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model folder with a tokenizer, and text."""
    folder = tmp_path_factory.mktemp("language")
    sizes = {k: SETTINGS[k] for k in ("vocab_size", "intermediate_size", "pad_token_id")}
    model = save_family("llama", folder / "model", **sizes)
    save_tokenizer(model, inputs=["input_ids", "attention_mask"])
    data = folder / "text.txt"
    data.write_text("\n".join(sentences(600)))
    return model, data


ASKED: dict[str, dict[str, object]] = {
    "auto": {"speedup": 1.5},
    INT4: {"numerics": INT4, "prune": False, "speedup": None},
}


@pytest.fixture(scope="module", params=list(ASKED))
def compiled(
    language_model: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Path:
    out = tmp_path_factory.mktemp("decode")
    model, data = language_model
    with pytest.MonkeyPatch.context() as patch:
        fake_clock(patch)
        small_effort(patch)
        asked = request_of(
            model,
            data,
            out / "out",
            out / "cache",
            phase="decode",
            sequence_length=None,
            past_length=15,
            **ASKED[request.param],
        )
        compile_model(asked, progress=Told())
    return out / "out"


def test_a_decode_compile_is_timed_at_its_past(compiled: Path) -> None:
    manifest = Manifest.read(compiled)
    assert manifest.verdict == "validated"
    assert (manifest.workload.sequence_length, manifest.workload.past_length) == (1, 15)
    assert manifest.quality.metric == "loss"
    assert np.isfinite(manifest.quality.compiled)


def test_a_compiled_model_decodes_what_its_checkpoint_reads(compiled: Path) -> None:
    module = zipc.load(compiled)
    ids = torch.randint(4, 20, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    integers = any(a.level.numeric != "fp32" for a in Manifest.read(compiled).allocation)
    bound = 0.3 if integers else 1e-4
    found = token_by_token(opened(compiled / "model.onnx"), ids)
    assert (found - expected).norm() <= bound * expected.norm()


def test_a_compiled_model_generates(compiled: Path) -> None:
    module = zipc.load(compiled)
    ids = torch.tensor([[5, 6, 7]])
    made = module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
    )
    with torch.no_grad():
        for _ in range(4):
            following = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1:]
            ids = torch.cat([ids, following.argmax(-1)], 1)
    assert torch.equal(made, ids[:, : made.shape[1]])


@pytest.mark.parametrize("compiled", [INT4], indirect=True)
def test_int4_weights_are_at_every_site_that_was_asked(compiled: Path) -> None:
    manifest = Manifest.read(compiled)
    assert {a.level.numeric for a in manifest.allocation} == {INT4}
    assert all(a.level.width == a.units for a in manifest.allocation)
    found = inspect_onnx(compiled / "model.onnx")
    assert found["integer_products"] == found["ops"]["DequantizeLinear"] == 2 * 7
    module = zipc.load(compiled)
    maps = [m for m in module.modules() if isinstance(m, Int8Linear)]
    assert [m.numeric for m in maps] == [INT4] * 14
    ids = torch.randint(4, 20, (1, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    written = opened(compiled / "model.onnx", as_written=True)  # the kernel rounds activations
    torch.testing.assert_close(token_by_token(written, ids), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("goal", "taken"),
    [({"speedup": 3.0}, True), ({"latency_ms": 1.0}, True), ({"prune": False}, False)],
)
def test_int4_is_taken_for_a_speedup_alone(
    prepared: Prepared, goal: dict[str, Any], taken: bool
) -> None:
    asked = Request(model="m", phase="decode", **goal)
    prices: Any = SimpleNamespace(sum_ms=lambda levels: float(len(levels)))
    found = _numerics(prepared, prices, requested_target(asked), asked, [])
    assert (INT4 in found) == taken
    assert {"fp32", "int8-dynamic"} <= set(found)


def settled(asked: Request, source: SourceModel) -> Request:
    asked.check(load_target("cpu"))
    return settle(asked, source)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"phase": "decode", "sequence_length": 8}, "--past-length"),
        ({"phase": "decode", "past_length": 64}, "more than the model takes"),
        ({"past_length": 8}, "--phase decode"),
    ],
)
def test_sizes_that_contradict_the_phase_are_refused(
    folders: Path, sizes: dict[str, object], told: str
) -> None:
    path = family_folder(folders, "llama")
    source = load_source(str(path))
    asked = Request(model=str(path), **sizes)  # type: ignore[arg-type]
    source = with_cache(source) if asked.phase == "decode" else source
    with pytest.raises(UsageError, match=told):
        settled(asked, source)
