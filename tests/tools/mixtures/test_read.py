"""Which format a folder has, and the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import moelora
from moelora.cli.main import app
from moelora.core.errors import AdapterError
from moelora.tools.mixtures import import_mixture
from tests import tiny
from tests.model.test_peft_experts import peft_folder
from tests.tools.mixtures.test_mixlora import folder_of, logits


def test_other_folders_are_refused_with_what_to_do(tmp_path: Path) -> None:
    lora = peft_folder(tmp_path / "lora")
    ours = tmp_path / "ours"
    moelora.save(tiny.adapted("llama", "meteora"), ours)
    (tmp_path / "empty").mkdir()
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file({"model.norm.weight": torch.zeros(2)}, plain / "model.safetensors")
    expected = {
        lora: "peft_type: found 'LORA'.*use it with experts: {adapters",
        ours: "moelora wrote this; load it with moelora.load",
        tmp_path / "empty": "files: found none of a mixture, expected those of PEFT X-LoRA",
        plain: "files: found none of a mixture",
        tmp_path / "absent": "folder: found nothing, expected a folder of PEFT X-LoRA",
        lora / "adapter_config.json": "folder: found a file",
    }
    for folder, message in expected.items():
        with pytest.raises(AdapterError, match=message):
            import_mixture(tiny.llama(), folder)


def test_the_command(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    folder, out = folder_of(tmp_path / "x"), tmp_path / "out"
    ran = CliRunner().invoke(app, ["import", str(folder), str(out), "--base", str(tmp_path / "base")])
    assert ran.exit_code == 0, ran.output
    assert "MixLoRA" in ran.output and f"the adapter is in {out}" in ran.output
    expected = logits(import_mixture(tiny.llama(), folder, verbose=False))
    assert torch.equal(logits(moelora.load(tiny.llama(), out)), expected)
    again = CliRunner().invoke(app, ["import", str(tmp_path / "base"), str(out), "--base", str(tmp_path / "base")])
    assert again.exit_code == 2 and "files: found none of a mixture" in again.output
