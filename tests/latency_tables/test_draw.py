"""The picture of a table shows its prices and their intervals, and which levels save nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.price_tables import made
from zipc.core.errors import UsageError
from zipc.latency_tables.draw import draw, figure_of

PRICES = {(8, "fp32"): 0.8, (4, "fp32"): 0.5, (2, "fp32"): 0.6, (4, "int8-static"): 0.2}


def test_a_line_for_each_precision_and_hollow_points_that_save_nothing() -> None:
    pytest.importorskip("matplotlib")
    (axes,) = figure_of(made(PRICES | {(0, "fp32"): 0.1})).axes
    lines = {str(line.get_label()): line for line in axes.lines}
    assert {name: line.get_xydata().tolist() for name, line in lines.items()} == {
        "fp32": [[2, 0.6], [4, 0.5], [8, 0.8]],
        "int8-static": [[4, 0.2]],
        "no faster than a wider one": [[2, 0.6]],
        "removed": [[0, 0.1]],
    }


def test_the_shade_is_the_interval_of_the_price() -> None:
    pytest.importorskip("matplotlib")
    table = made({(8, "fp32"): 0.8, (4, "fp32"): 0.5}, spread=0.1)
    (axes,) = figure_of(table).axes
    (shade,) = axes.collections
    (path,) = shade.get_paths()
    noise = {entry.level.width: entry.noise for entry in table.entries}
    reach = [y for x, y in path.vertices if x == 8]
    assert noise[8] > 0
    assert max(reach) == pytest.approx(0.8 * (1 + 1.96 * noise[8]))
    assert min(reach) == pytest.approx(0.8 * (1 - 1.96 * noise[8]))


def test_every_kind_of_site_has_a_panel_in_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table = made(PRICES)
    others = [
        e.model_copy(update={"signature": f"heads-{n}"}) for n in range(3) for e in table.entries
    ]
    both = table.with_entries(others)
    assert len(figure_of(both).axes) == 4
    draw(both, tmp_path / "table.png")
    with Image.open(tmp_path / "table.png") as image:
        assert (image.format, min(image.size) > 300) == ("PNG", True)


def test_a_table_of_whole_models_alone_cannot_be_drawn() -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match="no site at two widths"):
        figure_of(made({(1, "fp32"): 2.0}))


def test_without_matplotlib_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"pip install 'zipc\[plot\]'"):
        draw(made(PRICES), tmp_path / "table.png")
    assert not list(tmp_path.iterdir())
