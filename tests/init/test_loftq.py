"""LoftQ: what quantising has lost, as a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import moelora
from moelora.core.errors import ConfigError
from moelora.core.start import Start
from moelora.init.loftq import LoftQ
from moelora.model.base import base_source
from moelora.model.quantised import steady
from moelora.model.record import routed_layers
from moelora.model.sources import dense_weight
from moelora.recipe import read_recipe
from moelora.train.run import load_base, train
from tests import tiny
from tests.init.steps import layer_of, parts, weight_of

CONFIG = {
    "experts": {"r": 8, "lora_alpha": 16},
    "init": "loftq",
    "target_modules": ["q_proj", "down_proj"],
}


def rounded(W: Tensor) -> Tensor:
    """W as a coarse quantiser leaves it."""
    return (W * 2).round() / 2


def started(W: Tensor, r: int = 3, scale: float = 0.5, **options: Any) -> Any:
    experts, _ = layer_of(W, r=r, scale=scale)
    LoftQ(**options)(experts, Start(lambda: rounded(W), full=lambda: W.clone()))
    return experts


@pytest.mark.parametrize("niter", [None, 40])
def test_the_factors_are_the_best_of_what_was_lost(niter: int | None) -> None:
    W = weight_of(12, 9)
    experts = started(W, niter=niter)
    lost = W - rounded(W)
    U, S, V = torch.linalg.svd(lost, full_matrices=False)
    torch.testing.assert_close(parts(experts)[0], U[:, :3] @ S[:3].diag() @ V[:3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(experts.lora_A @ experts.lora_A.t(), (2 * S[:3]).diag(), rtol=1e-4, atol=1e-4)
    left = (lost - parts(experts)[0]).norm()
    torch.testing.assert_close(left, S[3:].norm(), rtol=1e-4, atol=1e-4)
    assert left < lost.norm()


def test_it_is_pefts_decomposition() -> None:
    W = weight_of(12, 9)
    theirs = _low_rank_decomposition(W - rounded(W), reduced_rank=3)
    experts = started(W, scale=1.0)
    torch.testing.assert_close(experts.lora_A.detach(), theirs["R"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(experts.lora_B.detach(), theirs["L"], rtol=1e-10, atol=1e-10)


def test_a_layer_that_lost_nothing_starts_as_usual() -> None:
    W = rounded(weight_of(12, 9))
    experts = started(W)
    assert (experts.lora_A != 0).all() and (experts.lora_B == 0).all()


def test_mixtures_and_too_many_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"init loftq corrects the base, which no gate may .* router 'meteora' gates"):
        moelora.adapt(tiny.llama(), {**CONFIG, "router": "meteora"}, verbose=False)
    with pytest.raises(ConfigError, match=r"init loftq takes 10 directions and 'layer' has 9; lower experts.r"):
        started(weight_of(12, 9), r=10)
    with pytest.raises(ConfigError, match=r"this base is not quantised; add quantization_config to the recipe"):
        moelora.adapt(tiny.llama(), CONFIG, verbose=False, full=tiny.llama())


def quantised() -> tuple[Any, Any]:
    """The package's base in NF4, and as it was."""
    pytest.importorskip("bitsandbytes")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    source = base_source("moelora/tiny")
    small = AutoModelForCausalLM.from_pretrained(source, quantization_config=how, device_map={"": "cpu"})
    steady(small)
    return small.eval(), AutoModelForCausalLM.from_pretrained(source).eval()


def test_a_quantised_base_comes_nearer_to_what_it_was(tmp_path: Path) -> None:
    small, full = quantised()
    given = {"input_ids": torch.arange(5, 37).view(2, 16)}
    with torch.no_grad():
        expected, before = full(**given).logits, small(**given).logits
    with pytest.raises(ConfigError, match=r"give moelora.adapt the unquantised model, full=...; found nothing"):
        moelora.adapt(small, CONFIG, verbose=False)
    with pytest.raises(ConfigError, match=r"found a quantised model"):
        moelora.adapt(small, CONFIG, verbose=False, full=small)
    model = moelora.adapt(small, {**CONFIG, "experts": {"r": 64, "lora_alpha": 64}}, verbose=False, full=full).eval()
    with torch.no_grad():
        found = model(**given).logits
    assert float((found - expected).norm()) < 0.8 * float((before - expected).norm())
    for layer in routed_layers(model):
        W, Q = full.get_submodule(layer.site.name).weight.detach(), dense_weight(layer.base_layer)
        S = torch.linalg.svdvals(W - Q)
        torch.testing.assert_close((W - Q - parts(layer.experts)[0]).norm(), S[64:].norm(), rtol=1e-3, atol=1e-4)
    moelora.save(model, tmp_path / "own")
    again = moelora.load(quantised()[0], tmp_path / "own").eval()
    with torch.no_grad():
        assert torch.equal(again(**given).logits, found)


def test_a_run_loads_the_base_twice_and_corrects_it(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    recipe = read_recipe(
        "single",
        [
            "quantization_config={load_in_4bit: true, bnb_4bit_quant_type: nf4}", "adapter.init=loftq",
            "data.builtin=false", "data.tasks={reverse: {path: builtin/reverse}}", "data.max_rows=20",
            "training.max_steps=1", "training.use_cpu=true", "training.report_to=none", "training.disable_tqdm=true",
            "training.gradient_checkpointing=false", "data.max_eval_rows=1", "training.learning_rate=1e-9",
            f"training.output_dir={tmp_path / 'run'}",
        ],
    )  # fmt: skip
    result = train(recipe)
    full = load_base(recipe.model_copy(update={"quantization_config": None}))[0]
    for layer in routed_layers(result.model):
        W, Q = full.get_submodule(layer.site.name).weight.detach(), dense_weight(layer.base_layer)
        assert float((W - Q - parts(layer.experts)[0]).norm()) < 0.97 * float((W - Q).norm())
