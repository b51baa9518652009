"""`moelora env`: versions, active kernels and why others are not, GPUs, threads."""

from __future__ import annotations

import importlib.metadata
import json
import types
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moelora import __version__
from moelora.cli import env
from moelora.cli.main import app
from moelora.ops import cpu, cuda


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["env", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def line(shown: str, begin: str) -> str:
    [found] = [text for text in shown.splitlines() if text.strip().startswith(begin)]
    return found.strip()


def test_versions_are_those_of_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(run("--json"))["versions"]
    assert found["moelora"] == __version__ and found["torch"] == importlib.metadata.version("torch")
    monkeypatch.setattr(env, "PACKAGES", ("torch", "no-such-package"))
    assert line(run(), "torch").split() == ["torch", found["torch"]]
    assert line(run(), "no-such-package").endswith("not installed")
    assert json.loads(run("--json"))["versions"]["no-such-package"] is None


def test_kernels_that_are_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "PROBLEM", "")
    monkeypatch.setattr(cpu, "HIGHEST", cpu.Level.AVX2)
    assert line(run(), "compiled kernels") == "compiled kernels (CPU): active: AVX2"
    assert json.loads(run("--json"))["kernels"]["cpu"] == {"active": True, "status": "AVX2"}


def test_the_reason_for_absent_kernels_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "PROBLEM", "not built")
    monkeypatch.setattr(cuda, "PROBLEM", "triton is not installed")
    shown = run()
    assert line(shown, "compiled kernels").endswith("absent, PyTorch computes: not built")
    assert line(shown, "Triton kernels").endswith("absent, PyTorch computes: triton is not installed")
    assert not any(kernels["active"] for kernels in json.loads(run("--json"))["kernels"].values())


@pytest.mark.parametrize("count", [0, 2])
def test_gpus_and_threads(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    card = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=85_000_000_000)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(cuda, "PROBLEM", "")
    monkeypatch.setattr(cuda, "status", lambda: "Triton 3.6.0, sm_90")
    shown, found = run(), json.loads(run("--json"))
    said: dict[int, Any] = {0: "none", 2: "; ".join(["NVIDIA H100 80GB HBM3, sm_90, 79 GiB"] * 2)}
    assert line(shown, "GPUs") == f"GPUs: {said[count]}"
    assert len(found["gpus"]) == count and found["kernels"]["cuda"]["active"] is (count > 0)
    assert line(shown, "CPU threads") == f"CPU threads: {torch.get_num_threads()}" and found["threads"] >= 1
