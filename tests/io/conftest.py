"""Fixtures of the tests that read adapter folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from moelora.io.peft import CONFIG, WEIGHTS
from tests.io.written import written


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that PEFT wrote; not to be changed."""
    return written(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def copied(plain: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    path = tmp_path / "adapter"
    path.mkdir()
    for name in (CONFIG, WEIGHTS):
        (path / name).write_bytes((plain / name).read_bytes())
    return path
