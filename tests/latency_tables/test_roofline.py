"""The roofline: what must hold of any device, and that the shipped models are those of the fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from zipc.core.errors import CorruptFile, UsageError
from zipc.core.types import Pattern, SpecSheet
from zipc.latency_tables import fit as fitting
from zipc.latency_tables.fit import Laid, Source, fit, half_widths, hold_out, read_sources
from zipc.latency_tables.modelled import Doubt, device_model, fitted, network_kind
from zipc.latency_tables.networks import NETWORKS, Setting, kernels
from zipc.latency_tables.operators import Attention, Operator, Pass, Product, convolution, linear
from zipc.latency_tables.roofline import Fractions, milliseconds
from zipc.targets import load_target

SHEET = SpecSheet("8.0", 100, 20.0, 300.0, 600.0, 1500.0, 40.0, True, "a100", ())
FRACTIONS = Fractions(
    launch_us=5.0,
    fp16=0.8,
    int8=0.7,
    bandwidth=0.7,
    cache=3.0,
    tile=20.0,
    attention=0.3,
    sparse=1.5,
)
GFLOPS = {  # of one image or one text of 128 tokens, as the authors of the networks state them
    "yolo11n": (640, 6.5),
    "yolo11s": (640, 21.5),
    "yolo11m": (640, 68.0),
    "yolo11l": (640, 86.9),
    "yolo11x": (640, 194.9),
    "resnet18": (224, 3.64),
    "resnet50": (224, 8.2),
    "resnet101": (224, 15.7),
    "mobilenet-v1": (224, 1.14),
    "mobilenet-v2": (224, 0.6),
    "vit-b16": (224, 35.2),
    "bert-base": (128, 22.4),
}


def ms(*operators: Operator, sheet: SpecSheet = SHEET, fractions: Fractions = FRACTIONS) -> float:
    return milliseconds(operators, sheet, fractions)


def flops(operator: Operator) -> int:
    if isinstance(operator, Product):
        depth = operator.channels * operator.positions
        return 2 * operator.batch * operator.rows * operator.columns * depth
    if isinstance(operator, Attention):
        return 4 * operator.heads * operator.queries * operator.keys * operator.head_size
    return operator.flops


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("rows", [1, 128, 4096])
def test_no_aligned_width_is_faster_than_a_narrower_one(precision: str, rows: int) -> None:
    widths = range(32, 4097, 32)
    out = [ms(linear(rows, w, 768, precision=precision)) for w in widths]  # type: ignore[arg-type]
    read = [ms(linear(rows, 768, w, precision=precision)) for w in widths]  # type: ignore[arg-type]
    assert (np.diff(out) >= -1e-12).all()
    assert (np.diff(read) >= -1e-12).all()
    assert out[-1] > out[0]


def test_a_ragged_width_is_slower_than_the_next_aligned_one() -> None:
    assert ms(linear(4096, 1000, 3001)) > 1.5 * ms(linear(4096, 1000, 3008))
    assert ms(linear(4096, 3001, 1024)) > 1.5 * ms(linear(4096, 3008, 1024))


def test_int8_pads_channels_to_32() -> None:
    padded, full = (ms(linear(8192, 4096, c, precision="int8")) for c in (1032, 1056))
    fewer = ms(linear(8192, 4096, 1024, precision="int8"))
    assert fewer < padded == pytest.approx(full, rel=0.03)


def test_tiles_run_in_waves() -> None:
    """One tile more than there are multiprocessors takes as long as twice as many."""
    one = replace(SHEET, bandwidth_gbs=1e6)
    rows = [128 * tiles for tiles in (100, 101, 200)]
    exact, over, double = (ms(linear(r, 128, 8192), sheet=one) for r in rows)
    assert exact < over <= double * 1.0001


def test_every_kernel_costs_a_launch() -> None:
    nothing = ms(Pass(0))
    assert nothing == pytest.approx(FRACTIONS.launch_us / 1e3)
    assert ms(*[Pass(0)] * 7) == pytest.approx(7 * nothing)
    assert ms(Pass(0, fused=True)) == 0
    assert ms(linear(8, 32, 32)) == pytest.approx(nothing, rel=0.1)


def test_traffic_is_bytes_over_bandwidth() -> None:
    """1 GB at 1500 GB/s of which 70 % are reached."""
    free = replace(FRACTIONS, launch_us=1e-6)
    assert ms(Pass(10**9), fractions=free) == pytest.approx(1e3 / (1500 * 0.7), rel=1e-6)


def test_a_large_product_nears_the_peak_it_can_reach() -> None:
    side = 16384
    peak_ms = 2 * side**3 / (300e9 * FRACTIONS.fp16)
    assert 1.0 < ms(linear(side, side, side)) / peak_ms < 1.25


def test_two_of_four_pays_where_arithmetic_rules_and_never_costs() -> None:
    large = [ms(linear(8192, 4096, 4096, pattern=p)) for p in ("dense", "2:4")]  # type: ignore[arg-type]
    small = [ms(linear(1, 64, 64, pattern=p)) for p in ("dense", "2:4")]  # type: ignore[arg-type]
    assert 1.3 < large[0] / large[1] < 1.6
    assert small[1] <= small[0] * 1.0001
    turing = replace(SHEET, sparse=False)
    assert ms(linear(8192, 4096, 4096, pattern="2:4"), sheet=turing) == pytest.approx(large[0])


def test_depthwise_convolutions_run_without_tensor_cores() -> None:
    found = convolution((1, 56, 56), 64, 64, kernel=(3, 3), groups=64)
    assert isinstance(found, Pass)
    assert found.flops == 2 * 56 * 56 * 64 * 9


@pytest.mark.parametrize("network", GFLOPS)
def test_networks_do_as_much_as_their_authors_say(network: str) -> None:
    size, expected = GFLOPS[network]
    assert sum(map(flops, kernels(network, Setting(1, size)))) / 1e9 == pytest.approx(
        expected, rel=0.03
    )


def test_an_unknown_network_is_answered_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"No network 'lenet'.*bert-base"):
        kernels("lenet", Setting(1, 28))


def test_networks_of_attention_are_told_from_others() -> None:
    kinds = {name: network_kind(kernels(name, Setting(1, 224))) for name in NETWORKS}
    attention = {"bert-base", "bert-large", "vit-b16", "vit-l16"}
    assert {name for name, kind in kinds.items() if kind == "attention"} == attention


def source(name: str, *, slower: float = 1.0, patterns: Sequence[Pattern] = ("dense",)) -> Source:
    kinds = product((1, 8, 32), ("fp16", "int8"), patterns)
    figures = [("bert-base", b, 128, precision, pattern, 1.0) for b, precision, pattern in kinds]
    made = Source(
        name=name, target="a100", tag="P", style="whole", title="t", url="u", figures=figures
    )
    exact = np.exp(Laid(made, SHEET).log_errors(FRACTIONS)) * slower
    named = [(*f[:-1], float(ms)) for f, ms in zip(figures, exact, strict=True)]
    return made.model_copy(update={"figures": tuple(named)})


def test_a_fit_finds_what_made_the_figures() -> None:
    laid = [Laid(source(name), SHEET) for name in "ab"]
    assert np.abs(np.concatenate([s.log_errors(fit(laid)) for s in laid])).max() < 0.05
    for held in hold_out(laid):
        assert held.worst_error < 0.05


def test_a_sparse_figure_counts_by_what_it_gains() -> None:
    """At other clocks the dense figures are off, what 2:4 gains is not."""
    laid = Laid(source("a", slower=1.5, patterns=("dense", "2:4")), SHEET)
    off = laid.residuals(FRACTIONS)
    assert off[~laid.sparse] == pytest.approx(-math.log(1.5))
    assert off[laid.sparse] == pytest.approx(0.0, abs=1e-9)
    faster = laid.residuals(replace(FRACTIONS, sparse=2.0))
    assert faster[laid.sparse].min() < -0.01
    assert hold_out([laid, laid])[0].figures == sum(~laid.sparse)


def test_a_source_at_other_clocks_has_an_error_but_its_ratios_have_not() -> None:
    laid = [
        Laid(source("a"), SHEET),
        Laid(source("b"), SHEET),
        Laid(source("c", slower=1.5), SHEET),
    ]
    held = {h.source: h for h in hold_out(laid)}
    assert held["c"].median_error == pytest.approx(1 / 3, abs=0.05)
    assert max(map(abs, held["c"].ratios["int8"])) < 0.1
    assert half_widths(tuple(held.values()))["int8"] < 0.3


def test_doubt_grows_with_what_differs_and_without_anchors() -> None:
    doubt = Doubt({"width": 0.3, "int8": 0.4, "2:4": 0.1}, anchored=True)
    assert doubt.reach(["width"]) == pytest.approx(0.3)
    assert doubt.reach(["width", "int8"]) == pytest.approx(0.5)
    assert replace(doubt, anchored=False).reach(["width"]) == pytest.approx(0.6)
    assert "unanchored" in replace(doubt, anchored=False).note
    assert "unanchored" not in doubt.note


@pytest.mark.parametrize(("family", "most"), [("a100", 0.20), ("orin", 0.30)])
def test_shipped_models_are_those_of_their_anchors(family: str, most: float) -> None:
    sources = read_sources(family)
    sheets = {s.target: load_target(s.target).sheet for s in sources}
    again = fitted(sources, {n: sheet for n, sheet in sheets.items() if sheet is not None})
    shipped = device_model(family)
    assert shipped.anchors == again.anchors
    for name in Fractions.__slots__:
        held, made = (getattr(m.fractions, name) for m in (shipped, again))
        assert held == pytest.approx(made, rel=0.02)
    for held_out, made_out in zip(shipped.held_out, again.held_out, strict=True):
        assert held_out.median_error <= most
        assert held_out.median_error == pytest.approx(made_out.median_error, abs=0.01)


def test_what_is_anchored_follows_from_the_published_figures() -> None:
    orin, a100 = device_model("orin"), device_model("a100")
    assert orin.anchored("orin", "other")
    assert not orin.anchored("orin", "attention")  # one transformer
    assert a100.anchored("a100", "attention")
    assert not a100.anchored("h100", "attention")


def test_an_unknown_family_is_answered_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"'v100'.*a100"):
        device_model("v100")


SOURCE = """[[source]]
name = "x"
target = "a100"
tag = "{tag}"
style = "whole"
title = ""
url = ""
figures = [["bert-base", 1, 128, "fp16", "dense", {ms}]]
"""


@pytest.mark.parametrize(
    "text",
    [
        "[[source]\n",
        "source = 3\n",
        '[[source]]\nname = "x"\n',
        SOURCE.format(tag="M", ms=1.0),
        SOURCE.format(tag="P", ms=-1.0),
    ],
)
def test_bad_anchors_are_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.toml").write_text(text)
    monkeypatch.setattr(fitting, "FOLDER", tmp_path)
    with pytest.raises(CorruptFile, match=r"mine\.toml does not hold published latencies"):
        read_sources("mine")
