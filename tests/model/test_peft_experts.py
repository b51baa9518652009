"""PEFT LoRA folders as experts: each one computes what PEFT does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import moelora
from moelora.core.errors import AdapterError
from moelora.model.record import routed_layers
from tests import tiny

BASES = {"llama": tiny.llama, "gpt2": tiny.gpt2, "bert": tiny.bert, "t5": tiny.t5}
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "bert": ["query", "value"],
    "t5": ["q", "wo"],
}


def peft_folder(folder: Path, kind: str = "llama", r: int = 4, seed: int = 0, **options: Any) -> Path:
    """A LoRA as PEFT writes it, scale 2 unless told otherwise, its B random as if trained."""
    config = {"r": r, "lora_alpha": 2 * r, "target_modules": TARGETS[kind], **options}
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(BASES[kind](), LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def mixture(folders: list[Path], kind: str = "llama", r: int = 4, **more: Any) -> Any:
    """The base with these folders as frozen experts, mixed by a gate that a test can set."""
    config = {
        "router": {"name": "static", "weights_fn": "free"},
        "target_modules": TARGETS[kind],
        **more,
        "experts": {
            "num_experts": len(folders), "r": r, "lora_alpha": 2 * r, "train": "none", 
            "adapters": [str(folder) for folder in folders],
            **more.get("experts", {}),
        },
    }  # fmt: skip
    return tiny.adapt(BASES[kind](), config).eval()


@torch.no_grad()
def logits(model: Any, kind: str) -> Tensor:
    return model(
        **tiny.unlabelled(tiny.batch(kind)),
        **({"decoder_input_ids": tiny.batch("llama")["input_ids"]} if kind == "t5" else {}),
    ).logits


@torch.no_grad()
def choose(model: Any, expert: int) -> Any:
    for layer in routed_layers(model):
        layer.router.theta.zero_()[expert] = 1
    return model


@pytest.mark.parametrize("kind", BASES)
def test_every_expert_alone_is_that_adapter_in_peft(kind: str, tmp_path: Path) -> None:
    options = [{"r": 4}, {"r": 2, "lora_alpha": 7}, {"r": 3, "use_rslora": True}, {"r": 4, "lora_alpha": 1, "seed": 7}]
    folders = [peft_folder(tmp_path / str(i), kind, **o) for i, o in enumerate(options)]
    model = mixture(folders, kind)
    base = logits(BASES[kind]().eval(), kind)
    for expert, folder in enumerate(folders):
        expected = logits(PeftModel.from_pretrained(BASES[kind](), folder).eval(), kind)
        torch.testing.assert_close(logits(choose(model, expert), kind), expected, rtol=5e-6, atol=5e-6)
        assert (expected - base).abs().max() > 1e-3


def test_a_module_that_an_adapter_lacks_gets_nothing_from_it(tmp_path: Path) -> None:
    folders = [peft_folder(tmp_path / "a"), peft_folder(tmp_path / "b", target_modules=["q_proj"])]
    model = mixture(folders)
    expected = logits(PeftModel.from_pretrained(tiny.llama(), folders[1]).eval(), "llama")
    torch.testing.assert_close(logits(choose(model, 1), "llama"), expected, rtol=5e-6, atol=5e-6)


def test_rank_patterns(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5, "v_proj": 1})
    expected = logits(PeftModel.from_pretrained(tiny.llama(), folder).eval(), "llama")
    torch.testing.assert_close(logits(choose(mixture([folder]), 0), "llama"), expected, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("router", ["xlora", "meteora", "lora_mixer", "smear"])
def test_a_router_trains_over_them_and_leaves_them_as_they_were(router: str, tmp_path: Path) -> None:
    folders = [peft_folder(tmp_path / str(i), r=2 + i, seed=i) for i in range(3)]
    model = mixture(folders, router=router).train()
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam(tiny.trainable(model).values(), lr=0.05)
    losses = []
    for _ in range(12):
        loss = model(**tiny.given()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_saved_experts_load_in_peft_again(tmp_path: Path) -> None:
    folders = [peft_folder(tmp_path / "a", r=2, lora_alpha=3), peft_folder(tmp_path / "b", alpha_pattern={"q_proj": 1})]
    model = mixture(folders)
    moelora.save(model, tmp_path / "out")
    for expert, source in enumerate(folders):
        one, two = (
            logits(PeftModel.from_pretrained(tiny.llama(), folder).eval(), "llama")
            for folder in (tmp_path / "out" / "experts" / f"expert_{expert}", source)
        )
        torch.testing.assert_close(one, two, rtol=5e-6, atol=5e-6)
    again = moelora.load(tiny.llama(), tmp_path / "out").eval()
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


def test_peft_loras_enter_a_core_space(tmp_path: Path) -> None:
    folders = [peft_folder(tmp_path / "a", r=2), peft_folder(tmp_path / "b", r=3, lora_alpha=3, seed=3)]
    model = mixture(folders, r=5, experts={"name": "core", "lora_alpha": 5})
    for expert, folder in enumerate(folders):
        expected = logits(PeftModel.from_pretrained(tiny.llama(), folder).eval(), "llama")
        torch.testing.assert_close(logits(choose(model, expert), "llama"), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"target_modules": ["q_proj", "k_proj"]}, {}, r"adapts 'model.layers.0.self_attn.k_proj' \(2 such modules\)"),
        ({"r": 8}, {}, "rank 8, but r is 4 here; set experts.r to 8"),
        ({"use_dora": True}, {}, "use_dora"),
        ({}, {"experts": {"num_experts": 2}}, "1 experts in .*, but num_experts is 2"),
    ],
)
def test_what_does_not_fit_is_refused(options: Any, more: Any, message: str, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", **options)
    with pytest.raises(AdapterError, match=message):
        mixture([folder], **more)


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a")
    config = {"router": "single", "experts": {"r": 4, "lora_alpha": 8, "adapters": [str(folder)]}}
    other = tiny.llama(intermediate_size=48)
    with pytest.raises(
        AdapterError, match=r"'model.layers.0.mlp.down_proj' of 40 -> 32 features, here it has 48 -> 32"
    ):
        tiny.adapt(other, {**config, "target_modules": TARGETS["llama"]})
    assert all(p.requires_grad for p in other.parameters())
