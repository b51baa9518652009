"""``moelora tune``: the search, its file, and how the operator reads it. Real timings need a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moelora.cli.main import app
from moelora.core.errors import ConfigError
from moelora.ops import cuda
from moelora.tools import tune

needs_triton = pytest.mark.skipif(bool(cuda.PROBLEM), reason="Triton is not installed")


@needs_triton
def test_the_fastest_configuration_is_kept_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moelora.triton_kernels import table

    tried: list[tuple[str, bool, int, object]] = []

    def call(kernel: str, ranks: int, single: bool, config: object, *_: object) -> Callable[[], object]:
        tried.append((kernel, single, ranks, config))
        return lambda: None

    def measure(_: Callable[[], object]) -> float:
        config = tried[-1][3]
        return abs(config.rows - 64) + abs(config.warps - 8) + abs(config.stages - 3) + config.columns  # type: ignore

    monkeypatch.setattr(tune, "call", call)
    rows = tune.search(measure, torch.device("cpu"), 8, 8)
    assert len(rows) == len(table.KERNELS) * 2 * len(table.RANKS)
    path = tmp_path / "deep" / "kernels.json"
    tune.write(path, rows, {"device": "x"})
    assert [file.name for file in path.parent.iterdir()] == ["kernels.json"]
    found = table.tuned(path)
    picked = table.pick("expand", False, 20, 90, found)
    assert (picked.rows, picked.columns, picked.depth, picked.warps, picked.stages) == (64, 64, 32, 8, 3)
    assert picked != table.pick("expand", False, 20, 90, {})
    assert table.pick("expand", False, 20, 90, {}) == table.shipped("expand", False, 32, 90)


@needs_triton
def test_what_does_not_fit_the_chip_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from moelora.triton_kernels import table
    from triton.runtime.errors import OutOfResources

    def call(kernel: str, ranks: int, single: bool, config: object, *_: object) -> Callable[[], object]:
        if config.stages > 2:  # type: ignore[attr-defined]
            raise OutOfResources(300_000, 232_448, "shared memory")
        return lambda: None

    monkeypatch.setattr(tune, "call", call)
    rows = tune.search(lambda _: 1.0, torch.device("cpu"), 8, 8)
    assert all(row["stages"] == 2 for row in rows.values()) and len(rows) == 3 * 2 * len(table.RANKS)


@needs_triton
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "a file of 'moelora tune'"),
        ('{"a": 1}', "a file of 'moelora tune'"),
        ('{"rows": {"expand/half/16": {"rows": 64, "tile": 3}}}', "a file of 'moelora tune'"),
        ('{"rows": {"expand/half/16": {"rows": 0}}}', "sizes that are no powers of two up to 256"),
        ('{"rows": {"expand/half/16": {"rows": 48}}}', "sizes that are no powers of two up to 256"),
        ('{"rows": {"expand/half/16": {"rows": "64"}}}', "sizes that are no powers of two up to 256"),
        ('{"rows": {"expand/half/16": {"stages": 90}}}', "sizes that are no powers of two up to 256"),
    ],
)
def test_a_broken_file_is_named(text: str, said: str, tmp_path: Path) -> None:
    from moelora.triton_kernels import table

    path = tmp_path / "kernels.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        table.tuned(path)
    assert str(path) in str(caught.value)


@needs_triton
def test_every_gpu_has_a_file_of_its_own(tmp_path: Path) -> None:
    from moelora.triton_kernels import table

    assert table.tuned_file("NVIDIA H100 80GB HBM3", tmp_path) == tmp_path / "kernels-NVIDIA-H100-80GB-HBM3.json"
    assert table.tuned(tmp_path / "absent.json") == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["tune", "--out", str(tmp_path / "kernels.json")])
    assert found.exit_code == 2 and not (tmp_path / "kernels.json").exists()


def test_the_written_file_says_where_it_is_from(tmp_path: Path) -> None:
    tune.write(tmp_path / "k.json", {"expand/half/16": {"rows": 64}}, {"device": "H100"})
    assert json.loads((tmp_path / "k.json").read_text())["device"] == "H100"
