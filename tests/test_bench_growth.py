"""The benchmark of growth: its cells, its table and picture, and the whole command in short."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_plan import TWO_CORES
from tiny_models import TinyModel

from ridgeline.apps.plan import timing
from ridgeline.apps.plan.host import Rates
from ridgeline.apps.plan.timing import Pair
from ridgeline.apps.step_meter import Cell
from ridgeline.resources.step_costs import costs_of

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import growth
from bench.growth import BATCHES, CONTEXTS, Grown, cells_of, picture, shown

Tiny = Callable[[str], TinyModel]


def grown(cell: Cell, *pairs: tuple[float, float]) -> Grown:
    """Of seconds that were measured, and expected."""
    rates = Rates.of(TWO_CORES, 1)
    return Grown(cell, [Pair(cell, measured, expected, expected / 2, rates) for measured, expected in pairs])


def test_cells_are_those_of_both_growths_once() -> None:
    cells = cells_of(BATCHES, CONTEXTS, 8192)
    assert len(cells) == len(BATCHES) + len(CONTEXTS) - 1
    assert cells[-1] == Cell(1, 8160)
    assert cells_of((1, 2), CONTEXTS, 512) == [
        *(Cell(1, 256), Cell(2, 256)),
        *(Cell(1, 128), Cell(1, 480)),
    ]


def test_the_round_with_the_median_error_counts() -> None:
    found = grown(Cell(4, 256), (1.0, 1.5), (2.0, 1.8), (1.0, 0.7)).to_json()
    assert found["error"] == pytest.approx(-0.1)
    assert (found["measured_s"], found["expected_s"], found["roofline_s"]) == (2.0, 1.8, 0.9)
    assert found["measured_between_s"] == [1.0, 2.0]
    assert found["errors_between"] == pytest.approx([-0.3, 0.5])
    assert found["tokens_per_s"] == 2.0


def test_table_and_picture_have_every_cell() -> None:
    cells = cells_of((1, 2), (128, 256), 8192)
    found = {cell: grown(cell, (0.001 * (cell.batch + cell.context), 0.3)) for cell in cells}
    table = shown(found)
    assert len(table) == 4
    assert table[2].split()[:3] == ["2", "256", "258.00"]
    assert "+16.3%" in table[2]
    batch, context = picture([one.to_json() for one in found.values()])
    assert (list(batch.x), list(context.x)) == ([1, 2], [128, 256])
    assert [line.name.split(",")[0].split(":")[0] for line in batch.lines] == [
        "the roofline",
        "expected",
        "measured",
    ]
    assert context.lines[2].values == pytest.approx([129, 257])


@pytest.mark.parametrize(
    "arguments", [("--rounds", "0"), ("--plot", "growth.pdf"), ("--model", "/none.gguf")]
)
def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    monkeypatch.setattr(sys, "argv", ["growth", *arguments])
    with pytest.raises(SystemExit, match=r"^error: .*\Z"):
        growth.main()


def test_it_runs(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(timing, "fitted_costs", lambda *_: costs_of("cpu"))
    monkeypatch.setattr(timing, "measure", lambda *_, **__: TWO_CORES)
    model, line, plot = tiny("llama3").gguf, tmp_path / "growth.json", tmp_path / "growth.png"
    options = ["--device", "cpu", "--threads", "1", "--smoke", "--json", str(line), "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", ["growth", "--model", str(model), *options])
    assert growth.main() == 0
    said = capsys.readouterr().out.splitlines()
    found = json.loads(said[-1])
    assert found == json.loads(line.read_text())
    assert [(one["batch"], one["context"]) for one in found["cells"]] == [(1, 256), (2, 256), (1, 128)]
    assert len(said) == 5
    assert found["worst_error"] == max(abs(one["error"]) for one in found["cells"])
    assert plot.read_bytes().startswith(b"\x89PNG")
