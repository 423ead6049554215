"""2:4 in whole compiles: chosen where it can pay, kept up to the graph, told where it is not."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file

import zipc
from tests.command_line import Run
from tests.price_tables import prices_by
from tests.tiny_project import Told, fake_clock, request
from zipc.clock import Clock
from zipc.core.errors import UsageError
from zipc.core.types import Allocation, Level
from zipc.exporters.sparse_weights import SparseWeight, sparse_weights
from zipc.groundwork import Setup, set_up
from zipc.latency_tables.modelled import Doubt
from zipc.manifest import Manifest
from zipc.model_source import load_source
from zipc.numerics.pattern import conforms
from zipc.numerics.sparsity import sparsify
from zipc.patterns import asked_for, notes_on
from zipc.pipeline import compile_model, plan_model
from zipc.targets import load_target, shipped_files

pytestmark = pytest.mark.usefixtures("little_effort")


@pytest.fixture(scope="module")
def root(sources: tuple[Path, Path], little_effort: None) -> Path:
    return sources[0].parent


def compiled(root: Path, name: str, **asked: object) -> Manifest:
    """Compile the model of `root`; the cache is shared."""
    told = {"target": "a100", "speedup": None, "prune": False} | asked
    return compile_model(
        request(root / "model", root / "pairs.csv", root / name, root / "cache", **told),
        progress=Told(),
    )


def weights_of(out: Path) -> dict[str, SparseWeight]:
    found = sparse_weights(onnx.load(out / "model.onnx"), folder=out)
    return {w.name: w for w in found if w.name.startswith("encoder.")}


@pytest.fixture(scope="module")
def whole(root: Path) -> Manifest:
    return compiled(root, "whole", pattern="2:4")


def test_every_weight_that_can_is_sparse_where_it_is_asked_for(root: Path, whole: Manifest) -> None:
    assert whole.verdict == "predicted"
    assert {a.level.pattern for a in whole.allocation} == {"2:4"}
    found = weights_of(root / "whole")
    assert len(found) == 12
    assert all(w.obstacle is None and w.conforms for w in found.values())
    assert "12 weights of model.onnx are in the 2:4 pattern" in whole.latency.notes


def test_the_checkpoint_has_the_zeros_of_the_graph(root: Path, whole: Manifest) -> None:
    held = load_file(root / "whole" / "checkpoint" / "model.safetensors")
    module = zipc.load(root / "whole")
    for name in weights_of(root / "whole"):
        assert conforms(held[name].numpy(), axis=1)
        assert torch.equal(module.get_parameter(name), held[name])


def test_the_manifest_records_request_and_pattern(root: Path, whole: Manifest) -> None:
    document = json.loads((root / "whole" / "manifest.json").read_text())
    assert document["request"]["pattern"] == "2:4"
    assert {entry["level"]["pattern"] for entry in document["allocation"]} == {"2:4"}


def test_inspect_shows_the_pattern_and_how_trtexec_uses_it(
    root: Path, whole: Manifest, run: Run
) -> None:
    code, out, _ = run("inspect", str(root / "whole"))
    assert code == 0
    assert "fp16 2:4" in out
    assert "--sparsity=enable" in (root / "whole" / "build.sh").read_text()


@pytest.fixture(scope="module")
def pruned(root: Path) -> Manifest:
    return compiled(root, "pruned", pattern="2:4", prune=True, speedup=1.2)


def test_pruned_and_sparse_at_once(root: Path, pruned: Manifest) -> None:
    levels = [a.level for a in pruned.allocation]
    assert any(a.level.width < (a.units or 0) for a in pruned.allocation)
    assert {lv.pattern for lv in levels if not lv.removed} == {"2:4"}
    assert all(w.conforms for w in weights_of(root / "pruned").values() if w.obstacle is None)


def test_where_it_cannot_pay_it_is_not_offered_and_the_report_says_so(
    root: Path, pruned: Manifest
) -> None:
    """In the same cache: what was found with 2:4 is not taken for a search without."""
    manifest = compiled(root, "auto", prune=True, speedup=1.2)
    assert {a.level.pattern for a in manifest.allocation} == {"dense"}
    assert not any(w.conforms for w in weights_of(root / "auto").values())
    (note,) = [n for n in manifest.latency.notes if n.startswith("2:4")]
    assert "offered at 0 of 4 sites" in note
    assert "a factor of 1.18" in note


def test_where_it_pays_beyond_doubt_the_search_takes_it(root: Path) -> None:
    """An A100 so slow that arithmetic is all that counts."""
    text = shipped_files()["a100"].read_text().replace("fp16_tflops = 312", "fp16_tflops = 0.02")
    (root / "slow.toml").write_text(f'name = "a100"\n{text}')
    asked = {"target": str(root / "slow.toml"), "speedup": None, "prune": False}
    asked["numerics"] = "fp16"
    plan = plan_model(
        request(root / "model", root / "pairs.csv", None, root / "slow-cache", **asked),
        progress=Told(),
    )
    assert {lv.pattern for lv in plan.allocation.levels.values()} == {"2:4"}
    assert plan.predicted_speedup > 1.1
    assert any("2:4 is offered at 4 of 4 sites" in note for note in plan.notes)


def test_integers_keep_the_zeros(root: Path) -> None:
    asked = {"target": "a100", "numerics": "int8", "pattern": "2:4"}
    manifest = compiled(root, "integers", **asked)
    assert {str(a.level).partition("@")[2] for a in manifest.allocation} == {"int8-static+2:4"}
    held = load_file(root / "integers" / "checkpoint" / "model.safetensors")
    integers = {n: t.numpy() for n, t in held.items() if t.dtype == torch.int8}
    assert len(integers) == 12
    assert all(conforms(values, axis=1) for values in integers.values())


def test_on_a_processor_it_is_never_offered_and_the_report_says_why(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_clock(monkeypatch)
    asked = request(
        root / "model", root / "pairs.csv", None, root / "cache", numerics="fp32", speedup=1.2
    )
    plan = plan_model(asked, progress=Told())
    assert {lv.pattern for lv in plan.allocation.levels.values()} == {"dense"}
    assert any("multiply zeros like any other number" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("target", "said"),
    [("cpu", "multiply zeros like any other number"), ("t4", "capability 7.5 has no sparse")],
)
@pytest.mark.parametrize("verb", ["compile", "plan"])
def test_asking_for_it_where_it_gains_nothing_is_an_error(
    root: Path, run: Run, target: str, said: str, verb: str
) -> None:
    flags = ["--speedup", "2x", "--data", str(root / "pairs.csv"), "--pattern", "2:4", "--dry-run"]
    flags += ["-o", str(root / "x")] if verb == "compile" else []
    code, _, err = run(verb, str(root / "model"), "--target", target, *flags)
    assert code == 2
    assert said in err
    assert "--target a100" in err


@pytest.mark.parametrize(("target", "pattern"), [("a100", "none"), ("t4", "auto")])
def test_asking_for_nothing_is_an_error(root: Path, target: str, pattern: str) -> None:
    asked = request(root / "model", None, None, root / "cache", target=target, pattern=pattern)
    with pytest.raises(UsageError, match="leaves the model as it is"):
        replace(asked, numerics="fp16", prune=False, speedup=None).check(load_target(target))


def test_a_pattern_nobody_knows_is_an_error(root: Path) -> None:
    asked = request(root / "model", None, None, root / "cache", pattern="1:4")
    with pytest.raises(UsageError, match="Choose from: auto, 2:4, none"):
        asked.check(load_target("a100"))


def test_which_targets_offer_it() -> None:
    for name in shipped_files():
        target = load_target(name)
        sparse = target.sheet is not None and target.sheet.sparse
        assert ("2:4" in target.patterns) == sparse
        assert (target.only_dense is None) == sparse


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("t4", "width_step", 'patterns = ["dense", "2:4"]\nwidth_step', "sparse = true"),
        ("cpu", "width_step", 'patterns = ["dense", "2:4"]\nwidth_step', "runtime tensorrt"),
        ("a100", '["dense", "2:4"]', '["2:4"]', 'must contain "dense"'),
        ("a100", '"2:4"]', '"1:4"]', "patterns"),
    ],
)
def test_patterns_a_target_cannot_have_are_refused(
    tmp_path: Path, name: str, old: str, new: str, said: str
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(shipped_files()[name].read_text().replace(old, new))
    with pytest.raises(UsageError, match=said):
        load_target(str(file))


@pytest.fixture(scope="module")
def setup(root: Path) -> Setup:
    asked = request(
        root / "model", root / "pairs.csv", None, root / "cache", target="a100", pattern="2:4"
    )
    return set_up(asked, Clock(Told()))


def test_sites_that_no_kernel_takes_are_told_with_a_reason(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zipc.patterns.refusal", lambda *_, **__: "10 are too few")
    (note,) = notes_on(
        setup.prepared,
        setup.target,
        setup.request,
        setup.candidates.ladders,
        ms=setup.prices.ms,
        doubted=None,
    )
    assert "takes 4 sites whole" in note
    assert "query: 10 are too few" in note


def test_a_loss_is_that_of_the_mask(root: Path, setup: Setup) -> None:
    """The oracle on a level equals the oracle on weights brought to the pattern by hand."""
    candidates, prepared = setup.candidates, setup.prepared
    site = next(s for s in prepared.structure.sites if s.kind == "ffn")
    found = candidates.scorer.score(Allocation({site.name: Level(site.units, "fp32", "2:4")}, 0, 0))
    module = load_source(str(root / "model")).module
    for path in site.maps:
        held, linear = candidates.levels.stats[path], module.get_submodule(path)
        mean = held.total[0] / held.count
        gram = held.gram[0] - held.count * torch.outer(mean, mean)
        sparse = sparsify(linear.weight.detach(), gram)
        with torch.no_grad():
            linear.bias += (linear.weight - sparse) @ mean.float()
            linear.weight.copy_(sparse)
    names = [i for i, _ in prepared.source.outputs]
    byhand = candidates.scorer.judge(lambda feeds: [module(**feeds)[i] for i in names])
    assert byhand > 0
    assert found == pytest.approx(byhand, rel=1e-3)


SPARSE, DENSE = Level(64, "fp32", "2:4"), Level(64)


@pytest.mark.parametrize(
    ("levels", "kept"),
    [
        ([Level(0), Level(32), DENSE, SPARSE], [Level(0), SPARSE]),
        ([Level(0), Level(24), DENSE], [Level(0), Level(24), DENSE]),
        (
            [Level(32), replace(SPARSE, width=32), DENSE],
            [replace(SPARSE, width=32), DENSE],
        ),
    ],
)
def test_where_it_is_asked_for_dense_levels_stay_only_for_want_of_others(
    levels: list[Level], kept: list[Level]
) -> None:
    assert asked_for(levels, units=64) == kept


def alone_ms(level: Level) -> float:
    """1 ms in floats; INT8 and 2:4 each take a share of it."""
    sparse = 0.8 if level.pattern == "2:4" else 1.0
    return sparse * (0.6 if level.numeric == "int8-static" else 1.0)


def test_each_thing_a_level_differs_in_must_gain_by_itself() -> None:
    prices = prices_by(alone_ms)
    both = Level(8, "int8-static", "2:4")
    for sure, offered in ((1.2, True), (1.3, False)):
        half = {"width": 0.1, "int8": math.log(1.5), "2:4": math.log(sure)}
        prices.doubt = Doubt(half, anchored=True)
        assert prices.gains("site", both) is offered
        assert prices.gains("site", SPARSE) is offered
        assert prices.gains("site", both, asked=["2:4"])
