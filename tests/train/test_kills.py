"""Whole runs that are killed at any moment lose at most one save interval, and end as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(1800)


def kill_runs(folder: Path, kills: int, record_property: Callable[[str, object], None]) -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # a driver does not survive a fork
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.killed", str(folder), str(kills)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], env=hidden, timeout=1700,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-6000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    phases = ", ".join(f"{found[phase]} {phase}" for phase in ("starting", "training", "evaluating", "saving"))
    record_property(
        "counts",
        f"{found['kills']} kills ({phases}, {found['finishing']} finishing), {found['partial']} partial folders seen, "
        f"{found['corrupt']} corrupt, {found['lost']} checkpoints lost, at most {found['intervals']} interval lost, "
        f"{found['finished']} runs finished bit for bit",
    )
    assert found["kills"] >= kills and found["finished"] >= 1
    assert min(found[phase] for phase in ("training", "evaluating", "saving")) >= max(1, kills // 10)
    assert found["corrupt"] == 0, "no checkpoint is selected whose files are not what was written"
    assert found["lost"] == 0, "no checkpoint is selected that is older than one known to be complete"
    assert found["intervals"] <= 1, "steps are lost back to the last checkpoint alone"


def test_killed_runs_go_on_to_the_same_adapter(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    kill_runs(tmp_path, 8, record_property)


@pytest.mark.full
def test_two_hundred_killed_runs_go_on_to_the_same_adapters(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    kill_runs(tmp_path, 200, record_property)
