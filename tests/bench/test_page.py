"""Pages and pictures come from rows alone, and targets are what the rows say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.bench import cpu_page, gpu_page
from tests.bench.layer import BOTH, FORWARD
from tests.bench.measure import Row, row, write
from tests.bench.page import Rows, merged, sizes
from tests.bench.variants import BASE, EAGER, INDEX_ADD, LOOP, OURS, OURS_DENSE, OURS_SORTED, Shape

HEAD = {"command": "make bench", "kind": "cpu", "machine": "m", "versions": {"torch": "2"}, "kernels": "AVX2"}


def measured(suite: str, case: object, what: str, variant: str, ms: float, dtype: str = "float32") -> Row:
    one = row(suite, case, getattr(torch, dtype), what, variant, error=1e-7, saved_bytes=10, peak_bytes=20)
    return {**one, "ms": ms, "p10": ms, "p90": ms, "ratio": 1.0}


def test_cpu_targets() -> None:
    rows = [
        measured("mixture", cpu_page.FEW, BOTH, OURS, 2.0),
        measured("mixture", cpu_page.FEW, BOTH, LOOP, 9.0),
        measured("mixture", cpu_page.FEW, BOTH, EAGER, 1.9),
        measured("mixture", cpu_page.FEW, BOTH, INDEX_ADD, 7.0),
        measured("layer", cpu_page.MANY, BOTH, OURS, 100.0),  # another suite, another pass: not these
        measured("mixture", cpu_page.MANY, FORWARD, OURS, 100.0),
        measured("mixture", cpu_page.MANY, BOTH, OURS, 3.2),
    ]
    found = cpu_page.targets(Rows(rows))
    assert [(target.found, target.held) for target in found[:2]] == [(4.5, True), (0.95, False)]
    assert found[2].found is None and found[2].held is None and "not measured" in found[2].line()
    assert found[-1].found == 1.6 and found[-1].held is False


def test_the_cpu_page(tmp_path: Path) -> None:
    refused = row("mixture", cpu_page.FEW, torch.float32, BOTH, LOOP, error=0.5, refused=True)
    rows = [measured("mixture", cpu_page.FEW, BOTH, OURS, 2.0), refused]
    rows += [measured("scaling E", Shape(8, 8, E, 8, 2), BOTH, OURS, float(E)) for E in (4, 8)]
    cpu_page.page(HEAD, Rows(rows), tmp_path / "cpu")
    text = (tmp_path / "cpu.md").read_text()
    assert "refused: wrong" in text and "| moelora |  |  | 2.000 (2.000 to 2.000) | 1.00 |" in text
    assert (tmp_path / "cpu_scaling.png").stat().st_size > 5000


def test_the_roofline_counts_bytes() -> None:
    case = str(Shape(1000, 3000, 8, 16, 2))
    assert gpu_page.floor(case, FORWARD) == pytest.approx(1e3 * 6 * 1000 * 3000 / 3e12)
    assert gpu_page.floor(case, BOTH) == pytest.approx(1e3 * 16 * 1000 * 3000 / 3e12)


def test_gpu_targets_are_of_the_overhead() -> None:
    floor = gpu_page.floor(gpu_page.MAIN, BOTH)
    rows = [
        measured("layer", gpu_page.MAIN, BOTH, BASE, 2.0, "bfloat16"),
        measured("layer", gpu_page.MAIN, BOTH, OURS, 2.0 + 1.2 * floor, "bfloat16"),
        measured("layer", gpu_page.MAIN, BOTH, LOOP, 3 * (2.0 + 1.2 * floor), "bfloat16"),
    ]
    found = gpu_page.targets(Rows(rows))
    assert found[0].found == pytest.approx(1.2) and found[0].held
    assert found[1].held is None and found[2].held


def test_the_gpu_page_finds_the_crossover(tmp_path: Path) -> None:
    rows = []
    for E, slower in ((16, 2.0), (64, 0.5), (256, 0.25)):
        for what in (FORWARD, BOTH):
            rows.append(measured("crossover", Shape(8, 8, E, 16, 2), what, OURS_DENSE, 1.0))
            rows.append(measured("crossover", Shape(8, 8, E, 16, 2), what, OURS_SORTED, slower))
    gpu_page.page({**HEAD, "kind": "gpu"}, Rows(rows), tmp_path / "gpu")
    assert "| 2 | 512 | 512 | 933 (560) |" in (tmp_path / "gpu.md").read_text()
    assert (tmp_path / "gpu_crossover.png").exists() and not (tmp_path / "gpu_scaling.png").exists()


def test_sizes_of_a_case() -> None:
    assert sizes(str(Shape(4, 8, 2, 16, 1))) == {"T": 4, "d": 8, "n": 8, "E": 2, "r": 16, "k": 1}
    assert sizes(str(Shape(4, 8, 2, 16, 1, n=24, zipf=1.2)))["n"] == 24


def test_parts_become_one(tmp_path: Path) -> None:
    first = [measured("layer", "a", FORWARD, OURS, 1.0), measured("model", "b", FORWARD, OURS, 2.0)]
    write(tmp_path / "1.json", {**HEAD, "command": "one"}, first)
    write(tmp_path / "2.json", {**HEAD, "command": "two"}, [measured("layer", "a", FORWARD, OURS, 3.0)])
    head, rows = merged([tmp_path / "1.json", tmp_path / "2.json"])
    assert head["command"] == "one\ntwo" and [one["ms"] for one in rows] == [3.0, 2.0]
    write(tmp_path / "3.json", {**HEAD, "machine": "another"}, first)
    with pytest.raises(ValueError, match="measured elsewhere"):
        merged([tmp_path / "1.json", tmp_path / "3.json"])
