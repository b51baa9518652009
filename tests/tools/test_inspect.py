"""moelora inspect: what adapters hold, and which cannot be experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import moelora
from moelora.cli.main import app
from moelora.tools.inspect import inspect_adapters
from tests import tiny
from tests.model.test_peft_experts import peft_folder


def test_figures(tmp_path: Path) -> None:
    options = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}}
    [entry] = inspect_adapters([peft_folder(tmp_path / "a", r=4, **options)])
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert entry["error"] is None
    assert (entry["ranks"], entry["scales"], entry["modules"], entry["zero"]) == ([2, 4], [2.0, 2.5], 6, 0)
    assert entry["targets"] == {"q_proj": 2, "v_proj": 2, "down_proj": 2}
    assert entry["parameters"] == sum(t.numel() for t in tensors.values())
    assert entry["dtypes"] == ["float32"]
    total = 0.0
    for name, A in tensors.items():
        if "lora_A" in name:
            delta = tensors[name.replace("lora_A", "lora_B")].double() @ A.double()
            total += float((delta * (2.5 if "q_proj" in name else 2.0)).square().sum())
    assert entry["norm"] == pytest.approx(total**0.5, rel=1e-6)


def test_a_folder_of_ours_is_its_experts(tmp_path: Path) -> None:
    moelora.save(tiny.adapted("llama", "meteora"), tmp_path / "a")
    entries = inspect_adapters([tmp_path / "a"])
    assert [Path(entry["folder"]).name for entry in entries] == ["expert_0", "expert_1", "expert_2"]
    assert all(entry["ranks"] == [4] and entry["scales"] == [2.0] for entry in entries)


def test_the_command(tmp_path: Path) -> None:
    good, dora = peft_folder(tmp_path / "good"), peft_folder(tmp_path / "dora", use_dora=True)
    shown = CliRunner().invoke(app, ["inspect", str(good), "--json"])
    assert shown.exit_code == 0 and json.loads(shown.output)[0]["modules"] == 6
    both = CliRunner().invoke(app, ["inspect", str(good), str(dora)], env={"COLUMNS": "200"})
    assert both.exit_code == 1
    assert (
        "down_proj, q_proj, v_proj" in both.output
        and "cannot be an expert" in both.output
        and "use_dora" in both.output
    )


def test_updates_of_zero_are_counted(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a")
    from safetensors.torch import save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, folder / "adapter_model.safetensors")
    assert inspect_adapters([folder])[0]["zero"] == 1
