"""moelora inspect: what adapters hold, which go together, and whether each computes alone what it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import moelora
from moelora.cli.main import app
from moelora.model import adapters
from moelora.tools.inspect import inspect_adapters
from tests import tiny
from tests.model.test_peft_experts import peft_folder

WEIGHTS = "adapter_model.safetensors"


def only(folder: Path) -> dict[str, Any]:
    [entry] = inspect_adapters([folder])["adapters"]
    return entry


def test_figures(tmp_path: Path) -> None:
    options = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}}
    entry = only(peft_folder(tmp_path / "a", r=4, **options))
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    assert entry["error"] is None and entry["adapter"] == str(tmp_path / "a")
    assert (entry["ranks"], entry["scales"], entry["alphas"]) == ([2, 4], [2.0, 2.5], [5.0, 8.0])
    assert (entry["modules"], entry["zero"], entry["kinds"], entry["dtypes"]) == (6, 0, [], ["float32"])
    assert entry["targets"] == {"q_proj": 2, "v_proj": 2, "down_proj": 2}
    assert entry["parameters"] == sum(t.numel() for t in tensors.values()) == entry["bytes"] // 4
    total = 0.0
    for name, A in tensors.items():
        if "lora_A" in name:
            delta = tensors[name.replace("lora_A", "lora_B")].double() @ A.double()
            total += float((delta * (2.5 if "q_proj" in name else 2.0)).square().sum())
    assert entry["norm"] == pytest.approx(total**0.5, rel=1e-6)


def test_the_alpha_of_rslora(tmp_path: Path) -> None:
    entry = only(peft_folder(tmp_path / "a", r=4, lora_alpha=6, use_rslora=True))
    assert (entry["alphas"], entry["scales"]) == ([6.0], [3.0])


@pytest.mark.parametrize(
    ("options", "kinds", "rank"),
    [
        ({"use_dora": True}, ["DoRA"], 4),
        ({"lora_bias": True}, ["lora_bias"], 4),
        ({"init_lora_weights": "olora"}, ["olora"], 8),  # beside the base as it is, its rank is twice as high
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save"], 4),
    ],
)
def test_what_an_adapter_is_beside_lora(options: Any, kinds: list[str], rank: int, tmp_path: Path) -> None:
    entry = only(peft_folder(tmp_path / "a", **options))
    assert (entry["kinds"], entry["ranks"]) == (kinds, [rank])


def test_a_folder_of_ours_is_its_experts(tmp_path: Path) -> None:
    moelora.save(tiny.adapted("llama", "meteora"), tmp_path / "a")
    entries = inspect_adapters([tmp_path / "a"])["adapters"]
    assert [Path(entry["adapter"]).name for entry in entries] == ["expert_0", "expert_1", "expert_2"]
    assert all(entry["ranks"] == [4] and entry["scales"] == [2.0] for entry in entries)


def test_updates_of_zero_are_counted(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a")
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, folder / WEIGHTS)
    assert only(folder)["zero"] == 1


def test_adapters_of_one_model_are_a_group_with_a_recipe_that_works(tmp_path: Path) -> None:
    folders = [
        peft_folder(tmp_path / "a", r=2),
        peft_folder(tmp_path / "b", r=6, target_modules=["up_proj"]),
        peft_folder(tmp_path / "gpt2", "gpt2"),
    ]
    found = inspect_adapters(folders)
    assert [entry["group"] for entry in found["adapters"]] == [0, 0, 1]
    group = found["groups"][0]
    assert group["experts"] == {
        **{"train": "none", "num_experts": 2, "r": 6, "adapters": [str(folder) for folder in folders[:2]]}
    }
    assert group["target_modules"] == ["down_proj", "q_proj", "up_proj", "v_proj"]
    config = {"router": "meteora", "experts": group["experts"], "target_modules": group["target_modules"]}
    tiny.adapt(tiny.llama(), config)(**tiny.given())


def test_adapters_that_name_unlike_bases_or_sizes_are_apart(tmp_path: Path) -> None:
    folders = [peft_folder(tmp_path / name) for name in ("a", "b", "c")]
    for folder, base in zip(folders, ("org/llama", "mirror/Llama", "org/other"), strict=True):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    assert [entry["group"] for entry in inspect_adapters(folders)["adapters"]] == [0, 0, 1]
    narrow = peft_folder(tmp_path / "d", target_modules=["k_proj"])
    tensors = {name: t[:, :16] if "lora_A" in name else t for name, t in load_file(narrow / WEIGHTS).items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, narrow / WEIGHTS)
    wide = peft_folder(tmp_path / "e", target_modules=["k_proj"])
    assert [entry["group"] for entry in inspect_adapters([narrow, wide])["adapters"]] == [0, 1]


def test_on_a_base_each_is_compared_with_itself_alone(tmp_path: Path) -> None:
    folders = [
        peft_folder(tmp_path / "a"),
        peft_folder(tmp_path / "b", r=2, use_dora=True, seed=3),
        peft_folder(tmp_path / "c", r=3, lora_bias=True, target_modules=["k_proj"]),
        peft_folder(tmp_path / "d", init_lora_weights="pissa"),
        peft_folder(tmp_path / "gpt2", "gpt2"),
    ]
    found = inspect_adapters(folders, tiny.llama())
    assert all(entry["difference"] < 1e-5 and entry["error"] is None for entry in found["adapters"][:4])
    last = found["adapters"][4]
    assert "LlamaForCausalLM has no such module" in last["error"] and "difference" not in last
    assert [group["experts"]["num_experts"] for group in found["groups"]] == [4]


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_on_other_kinds_of_base(kind: str, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", kind, use_dora=True)
    base = tiny.MODELS[kind]()
    [entry] = inspect_adapters([folder], base)["adapters"]
    assert entry["error"] is None and 0 <= entry["difference"] < 1e-5


def test_an_expert_that_computes_something_else_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [peft_folder(tmp_path / "a"), peft_folder(tmp_path / "b", seed=3)]
    whole = adapters._stack

    def wrong(layer: Any, loras: Any, dtype: Any) -> None:
        whole(layer, loras, dtype)
        layer.experts.scale[-1] *= 1.01

    monkeypatch.setattr(adapters, "_stack", wrong)
    monkeypatch.setattr(adapters, "_prove", lambda *_: None)
    first, second = inspect_adapters(folders, tiny.llama())["adapters"]
    assert first["error"] is None and "differ" in second["error"] and str(folders[1]) in second["error"]


def test_the_command(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    good, bad = peft_folder(tmp_path / "good"), peft_folder(tmp_path / "bad", init_lora_weights="pissa_niter_2")
    shown = CliRunner().invoke(app, ["inspect", str(good), "--json"])
    assert shown.exit_code == 0 and json.loads(shown.output)["adapters"][0]["modules"] == 6
    both = CliRunner().invoke(app, ["inspect", str(good), str(bad)], env={"COLUMNS": "200"})
    assert both.exit_code == 1
    assert "down_proj, q_proj, v_proj" in both.output
    assert "cannot be an expert" in both.output and "init_lora_weights" in both.output
    proven = CliRunner().invoke(app, ["inspect", str(good), "--base", str(tmp_path / "base"), "--json"])
    assert proven.exit_code == 0 and json.loads(proven.stdout)["adapters"][0]["difference"] < 1e-5
    absent = CliRunner().invoke(app, ["inspect", str(good), "--base", str(tmp_path / "none")])
    assert absent.exit_code == 2 and "base model" in absent.output


def test_peft_agrees_with_the_reference_that_experts_are_compared_to(tmp_path: Path) -> None:
    from moelora.model.sources import open_sources
    from moelora.tools.inspect import _adding, _logits

    folder = peft_folder(tmp_path / "a", use_dora=True, seed=2)
    base = tiny.llama().eval()
    [source] = open_sources([folder])
    for path in source.adapter.modules:
        base.get_submodule(path).register_forward_hook(_adding(path, source))
    with torch.no_grad():
        expected = _logits(PeftModel.from_pretrained(tiny.llama(), folder).eval().get_base_model())
        torch.testing.assert_close(_logits(base), expected, rtol=5e-6, atol=5e-6)
