"""The README quotes what the benchmarks wrote; what they measure is what they say."""

import importlib
import json
import subprocess
import sys

import numpy as np
import pytest

from cometrt.plan import PlanShape
from cometrt.specs import Geometry
from tests.launch import ROOT


def test_the_readme_has_the_tables_of_the_results():
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def benchmarks(monkeypatch):
    """Imports a module of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_every_cell_can_be(benchmarks):
    cells = benchmarks("layer_cells").cells("all")
    assert len({str(cell) for cell in cells}) == len(cells)
    for cell in cells:
        shape = PlanShape(Geometry(cell.spec, 0, cell.ranks), cell.config)
        assert shape.capacity >= shape.balanced_rows


def test_cells_are_chosen_by_words_of_their_names(benchmarks):
    cells = benchmarks("layer_cells").cells
    chosen = [str(cell) for cell in cells("all", "qwen3 T=1024,mixtral skew")]
    assert [name.split()[0] for name in chosen] == ["mixtral-8x7b"] * 3 + ["qwen3-30b-a3b"]
    assert len(cells("models")) == 5
    assert len(cells("short")) == 2


def test_routing_has_the_skew_that_a_cell_says(benchmarks):
    module = benchmarks("layer_cells")
    cell = module.Cell("qwen3-30b-a3b", tokens=2048, skew=0.4)
    loads = np.bincount(module.routing(cell).ravel(), minlength=128)
    assert loads.std() / loads.mean() == pytest.approx(0.4, abs=0.08)
    even = module.Cell("qwen3-30b-a3b", tokens=2048)
    assert module.busiest_rank(even, module.routing(even)) < 1.02
    assert module.busiest_rank(cell, module.routing(cell)) > 1.05
    sharded = module.Cell("qwen3-30b-a3b", tokens=64, tp=8)
    assert module.busiest_rank(sharded, module.routing(sharded)) == 1


OWN = [" W=8 TP=1 T=8192 link=h100", " W=1 TP=1 T=16384 link=None"]
AROUND = [f"{OWN[0]} skew=0.4", f"{OWN[0]} columns", " W=4 TP=1 T=8192 link=h100"]


def test_figures_and_the_table_of_them(benchmarks, tmp_path, monkeypatch):
    cells, tables = benchmarks("layer_cells"), benchmarks("tables")
    cell = cells.Cell("mixtral-8x7b")
    slowest = {"fused": 10.0, "sequential": 15.0, "chunked 2": 13.0, "chunked 4": 12.0}
    slowest |= {"gemms": 8.0, "planning": 0.2}
    found = cells.figures(cell, {name: [ms] * 7 for name, ms in slowest.items()}, 3.0)
    assert found["best_chunked"] == "chunked 4"
    assert found["speedup_over_chunked"] == pytest.approx(1.2)
    assert found["speedup_over_sequential"] == pytest.approx(1.5)
    assert found["hidden_share"] == pytest.approx(2 / 3)
    assert found["planning_share"] == pytest.approx(0.02)
    found["busiest_rank"] = 1.0
    machine = {"gpu": "A GPU", "date": "2026-01-01", "commit": "abc"}
    other = found | {"machine": machine | {"commit": "def"}}
    data = {"machine": machine, "cells": {str(cell): found, "other": other}, "skipped": {}}
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "layer.json").write_text(json.dumps(data))
    lines = tables.all_layers_table()
    assert lines[0].startswith("A GPU cut into virtual ranks, 2026-01-01, at abc, def;")
    assert "| 1.50 | 1.20 | 0.80 | 0.67 | 2.0% | 1.00 |" in lines[4]
    assert "Geometric mean over chunked: 1.20." in lines
    data["cells"] = {f"a{end}": found for end in OWN + AROUND}
    (tmp_path / "layer.json").write_text(json.dumps(data))
    assert [line.split(" |")[0] for line in tables.layer_table()[4:]] == [
        f"| a{end}" for end in OWN
    ]
    assert "(4 " in cells.line(cell, found)


def test_the_table_of_peers(benchmarks, tmp_path, monkeypatch):
    tables = benchmarks("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rates = {"fused": 500.0, "sequential": 250.0, "chunked 2": 400.0, "gemms": 625.0}
    cell = {
        "tflops": rates | {"nccl": 200.0},
        "best_chunked": "chunked 2",
        "speedup_over_sequential": 2.0,
        "efficiency": 0.8,
        "config": {"order": "columns"},
    }
    alone = cell | {"tflops": rates, "hidden_share": 0.4}
    twin = {"tflops": {"fused": 450.0, "gemms": 600.0}, "speedup_over_sequential": 1.5}
    machine = {"gpu": "A GPU", "date": "2026-01-01", "commit": "abc"}

    def write(name, cells, commit="abc"):
        data = {"machine": machine | {"commit": commit}, "gbps": 380.0, "cells": cells}
        (tmp_path / name).write_text(json.dumps(data))

    write("peers_4.json", {"a": cell, "b": alone, "c": {"skipped": "no room"}})
    write("twin_4.json", {"a": twin, "b": {"skipped": "no room"}})
    write("peers_2.json", {"d": cell}, "def")
    lines = tables.peers_table()
    assert lines[0].startswith("A GPU, 2026-01-01, at abc, def;")
    head = "| 500 | 250 | 400 (2) |"
    tail = "| 0.80 | little to hide | columns |"
    assert lines[4:] == [
        f"| a {head} 200 | 625 | 2.00 | 2.50 {tail} 450, 600, 1.50 |",
        f"| b {head} - | 625 | 2.00 | - | 0.80 | 0.40 | columns | - |",
        f"| d {head} 200 | 625 | 2.00 | 2.50 {tail} - |",
    ]


def test_the_table_of_the_link(benchmarks, tmp_path, monkeypatch):
    tables = benchmarks("tables")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    machine = {"gpu": "A GPU", "date": "2026-01-01", "commit": "abc"}
    rates = {"copy engine": 387.1, "NCCL": None, "pull": {"1": 50.0, "16": 371.0}}
    data = {"machine": machine, "ranks": 4, "gbps": rates, "us": {"hop": 2.011}}
    (tmp_path / "link.json").write_text(json.dumps(data))
    assert tables.link_table()[2:] == [
        "| | its own choice | 1 | 16 |",
        "|---|---|---|---|",
        "| copy engine | 387 |  |  |",
        "| NCCL |  |  |  |",
        "| pull |  | 50 | 371 |",
        "",
        "Microseconds: hop 2.01.",
    ]


def test_a_check_writes_nothing(benchmarks, tmp_path, monkeypatch):
    tables = benchmarks("tables")
    page = tmp_path / "page.md"
    page.write_text("<!-- table: one -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "TABLES", {"page.md": {"one": lambda: ["new"]}})
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit, match="page"):
        tables.main()
    assert "old" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    tables.main()
    assert "new" in page.read_text()
