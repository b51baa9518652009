"""Which modules an adapter is for, as PEFT's settings say it; modules in full; starts that PEFT takes out again."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from safetensors.torch import load_file, save_file

import moelora
from moelora.core.errors import AdapterError
from moelora.io.peft import CONFIG, PREFIX, WEIGHTS, read_peft
from tests import tiny
from tests.adapters import base, logits, mixture, only, peft_folder, peft_logits, shaken
from tests.model.test_peft_experts import CLOSE, MOVED, assert_golden

LINEAR = "all-linear"
FORMS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("llama", {"target_modules": ["q_proj", "mlp.up_proj"]}, ["0.self_attn.q_proj", "1.mlp.up_proj"]),
    ("llama", {"target_modules": r".*\.1\..*_proj"}, ["1.self_attn.o_proj", "1.mlp.gate_proj"]),
    ("llama", {"target_modules": LINEAR}, ["0.mlp.down_proj", "1.self_attn.v_proj"]),
    ("llama", {"target_modules": LINEAR, "exclude_modules": ["v_proj", "1.mlp.down_proj"]}, ["0.mlp.down_proj"]),
    ("llama", {"target_modules": LINEAR, "exclude_modules": r".*\.1\..*"}, ["0.mlp.down_proj"]),
    ("llama", {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": 0}, ["0.self_attn.q_proj"]),
    (
        "llama",
        {"target_modules": ["mlp.up_proj", "q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        ["1.mlp"],
    ),
    (
        "llama",
        {"target_modules": ["v_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1]},
        ["0.mlp.", "1."],
    ),
    ("gpt2", {"target_modules": ["c_proj"], "fan_in_fan_out": True}, ["h.0.attn.c_proj", "h.1.mlp.c_proj"]),
    ("gpt2", {"target_modules": r".*\.mlp\.c_\w+"}, ["h.0.mlp.c_fc"]),
    ("gpt2", {"target_modules": LINEAR}, ["h.0.attn.c_attn", "h.1.mlp.c_proj"]),
    (
        "gpt2",
        {"target_modules": ["c_fc", "c_attn"], "layers_to_transform": [0], "layers_pattern": ["x", "h"]},
        ["h.0."],
    ),
    ("bert", {"target_modules": LINEAR}, ["bert.pooler.dense", "0.output.dense"]),
    ("bert", {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]}, ["0.output.dense"]),
    ("t5", {"target_modules": LINEAR}, ["decoder.block.1.layer.1.EncDecAttention.k", "encoder.block.0"]),
    ("t5", {"target_modules": ["q", "wi"], "layers_to_transform": [1]}, ["decoder.block.1.layer.1", "encoder.block.1"]),
    ("t5", {"target_modules": r"decoder\..*\.(k|v)"}, ["decoder.block.0.layer.0"]),
    ("mamba", {"target_modules": ["in_proj", "x_proj"], "exclude_modules": ["0.mixer.x_proj"]}, ["1.mixer.x_proj"]),
]


@pytest.mark.parametrize(("kind", "options", "some"), FORMS)
def test_targets_in_every_form(kind: str, options: dict[str, Any], some: list[str], tmp_path: Path) -> None:
    """The mixture's own targets are the linear layers that PEFT adapted."""
    folder = peft_folder(tmp_path / "a", kind, **options)
    paths = list(read_peft(folder).modules)
    assert all(any(part in path for path in paths) for part in some), paths
    assert_golden([folder], kind, tmp_path / "out", CLOSE, target_modules=paths)


@pytest.mark.parametrize(("kind", "options", "some"), FORMS)
def test_an_incomplete_adapter_is_noticed_in_every_form(
    kind: str, options: dict[str, Any], some: list[str], tmp_path: Path
) -> None:
    folder = peft_folder(tmp_path, kind, **options)
    paths = list(read_peft(folder).modules)
    tensors = load_file(folder / WEIGHTS)
    lost = next(path for path in paths if some[0] in path)
    save_file({name: value for name, value in tensors.items() if f".{lost}." not in name}, folder / WEIGHTS)
    with pytest.raises(AdapterError, match=f"no tensors for '{lost}' .1 such modules., which its target_modules name"):
        mixture([folder], kind, target_modules=paths)


def test_the_mixture_may_target_more_layers_than_any_adapter(tmp_path: Path) -> None:
    folders = [peft_folder(tmp_path / "a", target_modules=["q_proj"]), peft_folder(tmp_path / "b", seed=2, r=2)]
    assert_golden(folders, "llama", tmp_path / "out", CLOSE, target_modules=LINEAR)


@pytest.mark.parametrize(("kind", "head"), [("bert", "classifier"), ("llama", "lm_head"), ("qwen", "lm_head")])
def test_modules_in_full(kind: str, head: str, tmp_path: Path) -> None:
    """Both adapters come from one run, so they agree on the module; and so does what was saved."""
    folders = [peft_folder(tmp_path / name, kind, seed=seed, modules_to_save=[head]) for seed, name in enumerate("ab")]
    one, other = (load_file(folder / WEIGHTS) for folder in folders)
    full = [name for name in one if f".{head}." in name]
    assert full and not all(torch.equal(one[name], other[name]) for name in full)
    save_file({**other, **{name: one[name] for name in full}}, folders[1] / WEIGHTS)
    model = mixture(folders, kind, modules_to_save=[head])
    moelora.save(model, tmp_path / "out")
    again = moelora.load(base(kind), tmp_path / "out").eval()
    for expert, folder in enumerate(folders):
        expected = peft_logits(folder, kind)
        found = logits(only(model, expert), kind)
        torch.testing.assert_close(found, expected, **CLOSE)
        assert torch.equal(logits(only(again, expert), kind), found)
    without = mixture(folders, kind, experts={"modules_from": "ignore"})
    assert (logits(only(without, 0), kind) - peft_logits(folders[0], kind)).abs().max() > 1e-3


def test_a_classifier_that_peft_adds_by_itself(tmp_path: Path) -> None:
    """With task_type SEQ_CLS every classifier is trained in full, whether it was asked for or not."""
    folder = peft_folder(tmp_path, "bert", task_type="SEQ_CLS", target_modules=["query", "value"])
    with pytest.raises(AdapterError, match=r"has trained 'classifier.(weight|bias)' in full, which no gate can choose"):
        mixture([folder], "bert")
    model = mixture([folder], "bert", modules_to_save=["classifier"])
    torch.testing.assert_close(logits(only(model, 0), "bert"), peft_logits(folder, "bert"), **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_eva(kind: str, tmp_path: Path) -> None:
    """EVA shares ranks out by the variance of the inputs, so that every module has its own."""
    config = LoraConfig(
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0),
        r=3,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "down_proj"] if kind == "llama" else ["c_attn", "c_proj"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base(kind), config)
        data = [tiny.unlabelled(tiny.batch(seed=seed, rows=6, padded=False)) for seed in range(4)]
        initialize_lora_eva_weights(model, data, show_progress_bar=False)
    folder = shaken(model, tmp_path / "a")
    ranks = {module.rank for module in read_peft(folder).modules.values()}
    assert len(ranks) > 1
    targets = list(read_peft(folder).modules)
    assert_golden([folder], kind, tmp_path / "out", CLOSE, target_modules=targets)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "pissa patterns"])
def test_starts_that_peft_has_taken_out_again_are_plain(start: str, tmp_path: Path) -> None:
    """path_initial_model_for_weight_conversion, PEFT's way to keep the base as it was."""
    name, _, patterns = start.partition(" ")
    more = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}} if patterns else {}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=name, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base(), config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "start")
        model.peft_config["default"].init_lora_weights = name
        shaken(model, tmp_path / "whole")
        expected = logits(model.eval(), "llama")
        model.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    found = mixture([tmp_path / "a"], r=8, target_modules=["q_proj", "v_proj"])
    torch.testing.assert_close(logits(only(found, 0), "llama"), expected, **MOVED)
    if name == "pissa_niter_4":
        with pytest.raises(AdapterError, match=r"init_lora_weights: found 'pissa_niter_4'.*_for_weight_conversion"):
            mixture([tmp_path / "whole"], r=8, target_modules=["q_proj", "v_proj"])


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_moved_base_is_that_of_this_model(start: str, tmp_path: Path) -> None:
    """What PEFT took out is computed from the weights here; on other weights PEFT takes out something else, too."""
    folder = peft_folder(tmp_path, init_lora_weights=start)
    model = mixture([folder], r=8, model=base(seed=5))
    torch.testing.assert_close(logits(only(model, 0), "llama"), peft_logits(folder, model=base(seed=5)), **MOVED)


def test_the_first_configurations_of_peft(tmp_path: Path) -> None:
    """Version 0.3 wrote few settings, and two that are gone."""
    folder = peft_folder(tmp_path / "a")
    expected = peft_logits(folder)
    old = {
        **{"base_model_name_or_path": None, "bias": "none", "enable_lora": None, "fan_in_fan_out": False},
        **{"inference_mode": True, "lora_alpha": 8, "lora_dropout": 0.05, "merge_weights": False, "r": 4},
        **{"modules_to_save": None, "peft_type": "LORA", "task_type": "CAUSAL_LM"},
        "target_modules": ["q_proj", "v_proj", "down_proj"],
    }
    (folder / CONFIG).write_text(json.dumps(old))
    with pytest.warns(UserWarning, match="unknown settings, all off: .'enable_lora', 'merge_weights'."):
        model = mixture([folder])
    torch.testing.assert_close(logits(only(model, 0), "llama"), expected, **CLOSE)


def test_the_order_of_the_tensors_in_the_file_means_nothing(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", "qwen", use_dora=True, bias="lora_only")
    tensors = load_file(folder / WEIGHTS)
    expected = logits(only(mixture([folder], "qwen"), 0), "qwen")
    named = {f"{PREFIX}x": torch.zeros(1), **dict(reversed(tensors.items()))}
    del named[f"{PREFIX}x"]
    save_file(named, folder / WEIGHTS)
    assert torch.equal(logits(only(mixture([folder], "qwen"), 0), "qwen"), expected)
