"""Which format a folder has, and the command."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import moelora
from moelora.cli.main import app
from moelora.core.errors import AdapterError, MoeloraError
from moelora.tools.mixtures import import_mixture
from tests import tiny
from tests.adapters import peft_folder
from tests.tools.mixtures.test_mixlora import folder_of, logits
from tests.tools.mixtures.test_xlora import folder_of as xlora_folder


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


ODD = [None, True, -1, 0, 10**400, 1.5, "x", [], [[]], {}, {"0": {"a": []}}, ["q_proj", 1], "\ud800"]


@pytest.mark.parametrize("kind", ["xlora", "mixlora", "mola"])
@pytest.mark.filterwarnings("ignore:.*unknown settings, all off.*:UserWarning")
def test_odd_settings_never_do_more_than_be_refused(tmp_path: Path, kind: str) -> None:
    folder = xlora_folder(tmp_path / "x", depth=2) if kind == "xlora" else folder_of(tmp_path / "x", kind)
    path = folder / ("xlora_config.json" if kind == "xlora" else "adapter_config.json")
    settings, refused = json.loads(path.read_text()), 0
    for key in [*settings, "unheard_of", "expert_lora", "router_aux_loss_coef", "jitter_noise"]:
        for value in ODD:
            path.write_text(json.dumps({**settings, key: value}))
            try:
                import_mixture(tiny.llama(), folder, verbose=False)
            except MoeloraError:
                refused += 1
    assert refused > 100


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_refused(tmp_path: Path, seed: int) -> None:
    made = random.Random(seed)
    folder = folder_of(tmp_path / "x")
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    refused, header = 0, 8 + int.from_bytes(whole[:8], "little")
    for _ in range(40):
        spoiled = bytearray(whole)
        for _ in range(made.randint(1, 3)):
            spoiled[made.randrange(header)] = made.randrange(256)
        path.write_bytes(spoiled[: made.choice([len(spoiled), made.randrange(len(spoiled))])])
        try:
            import_mixture(tiny.llama(), folder, verbose=False)
        except AdapterError:
            refused += 1
    assert refused > 30  # a space in the padding of the header may pass
