"""DoRA experts: the formula, PEFT's DoRA, what is saved and exported."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import moelora
from moelora.core.errors import ConfigError
from moelora.model.record import routed_layers
from moelora.tools.export import export_lora, export_merged, export_peft
from moelora.tools.export.merge import merge
from tests import tiny
from tests.adapters import base as biased
from tests.init.test_base import AWAY

S, R = 2.0, 3
ALPHA = S * R
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def config(num_experts: int = 4, **more: Any) -> dict[str, Any]:
    experts = {"name": "dora", "num_experts": num_experts, "r": R, "lora_alpha": ALPHA}
    return {"router": "softmax", **more, "experts": {**experts, **more.get("experts", {})}}


def oracle(E: int, top_k: int) -> tiny.Oracle:
    """Every expert's whole weight, its rows divided by norms that have no gradient; what they add to W is gated."""

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        logits = x @ w["Wg"].t()
        kept = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
        gates = kept.softmax(-1)
        y = x @ w["W"].t() + w["b"]
        for e in range(E):
            own = slice(e * R, (e + 1) * R)
            V = w["W"] + S * w["B"][:, own] @ w["A"][own]
            changed = w["magnitude"][e].unsqueeze(1) * V / V.detach().norm(dim=1, keepdim=True)
            y = y + gates[:, e : e + 1] * (x @ (changed - w["W"]).t())
        return y, gates

    return formula


@torch.no_grad()
def moved(model: Any) -> Any:
    """The model with magnitudes away from their start."""
    made = torch.Generator().manual_seed(4)
    for layer in routed_layers(model):
        held = layer.experts.magnitude
        held.mul_(0.5 + torch.rand(held.shape, generator=made, dtype=torch.float64).to(held))
    return model


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 4), (4, 2), (3, 1)])
def test_equals_the_formula(num_experts: int, top_k: int) -> None:
    router = {"name": "softmax", "top_k": top_k}
    model, layer = tiny.toy(config(num_experts, router=router))
    tiny.assert_layer_equals(moved(model), layer, oracle(num_experts, top_k), rtol=1e-10)


def test_the_start_is_the_base_model_bit_for_bit() -> None:
    model = tiny.adapt(biased("qwen"), config(target_modules="all-linear")).eval()
    with torch.no_grad():
        found = model(**tiny.batch()).logits
        with moelora.disabled(model):
            assert torch.equal(model(**tiny.batch()).logits, found)
    for layer in routed_layers(model):
        assert torch.equal(layer.experts.magnitude[0], layer.base_layer.weight.square().sum(1).sqrt())


def test_rows_have_the_length_of_their_magnitude() -> None:
    model, layer = tiny.toy(config(1, router="single"))
    moved(model)
    changed = layer(torch.eye(5, dtype=torch.float64)).detach() - layer.base_layer.bias
    torch.testing.assert_close(changed.norm(dim=0), layer.experts.magnitude[0].detach(), rtol=1e-12, atol=0)


def test_a_large_bias_does_not_drown_the_weight_in_half_precision() -> None:
    base = tiny.Toy(64, 48).float()
    with torch.no_grad():
        base.lin.bias.fill_(50.0)
    model = tiny.adapt(base.bfloat16(), {"target_modules": ["lin"], **config(1, router="single")})
    layer, rows = model.lin, torch.randn(5, 64)
    exact = rows.bfloat16().double() @ layer.base_layer.weight.double().t()
    product, bias = layer.affine(rows)
    assert (product - exact).abs().max() < 0.02 * exact.abs().max() and torch.equal(bias, torch.full((48,), 50.0))


def test_a_weight_without_a_row_is_no_trouble() -> None:
    layer = tiny.toy(config(2))[1]
    with torch.no_grad():
        layer.base_layer.weight[3] = 0
    start = moelora.core.start.Start(lambda: layer.base_layer.weight.detach())
    with torch.no_grad():
        layer.experts.begin(start)
        layer.experts.lora_B.zero_()
    x = torch.randn(4, 5, dtype=torch.float64)
    y = layer(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, layer.base_layer(x), rtol=1e-12, atol=1e-12)
    assert layer.experts.magnitude.grad.isfinite().all()


# PEFT


def twins(kind: str, seed: int = 0) -> tuple[Any, Any]:
    """A PEFT DoRA, and one expert with its values."""
    targets = tiny.TARGETS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(
            biased(kind), LoraConfig(r=R, lora_alpha=int(ALPHA), target_modules=targets, use_dora=True)
        )
    made = torch.Generator().manual_seed(seed)
    model = tiny.adapt(biased(kind), config(1, router="single", target_modules=targets))
    for layer in routed_layers(model):
        theirs, own = peft.base_model.model.get_submodule(layer.site.name), layer.experts
        with torch.no_grad():
            magnitude = theirs.lora_magnitude_vector["default"].weight
            torch.testing.assert_close(own.magnitude[0], magnitude)
            magnitude.mul_(0.7 + 0.6 * torch.rand(magnitude.shape, generator=made))
            theirs.lora_B["default"].weight.copy_(0.3 * torch.randn(own.lora_B.shape, generator=made))
            own.magnitude[0] = magnitude
            own.lora_A.copy_(theirs.lora_A["default"].weight)
            own.lora_B.copy_(theirs.lora_B["default"].weight)
    return peft, model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_one_expert_is_pefts_dora_through_a_step_of_adamw(kind: str) -> None:
    peft, model = twins(kind)
    for one in (peft, model):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
        one(**tiny.batch(kind)).loss.backward()
        one.stepped = optimizer
    pairs = []
    for layer in routed_layers(model):
        theirs, own = peft.base_model.model.get_submodule(layer.site.name), layer.experts
        pairs += [
            (own.lora_A, theirs.lora_A["default"].weight),
            (own.lora_B, theirs.lora_B["default"].weight),
            (own.magnitude, theirs.lora_magnitude_vector["default"].weight),
        ]
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad.view_as(other), other.grad, rtol=2e-4, atol=2e-5)
        mine.grad.copy_(other.grad.view_as(mine))  # Adam divides by what is rounding where a gradient is nearly zero
    for one in (peft, model):
        one.stepped.step()
    for mine, other in pairs:
        torch.testing.assert_close(mine.view_as(other), other, rtol=1e-6, atol=1e-7)
    given = tiny.unlabelled(tiny.batch(kind))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**given).logits, peft.eval()(**given).logits, **CLOSE)


# Beside other methods


def test_an_initialisers_start_is_subtracted_inside_the_norm(tmp_path: Path) -> None:
    (tmp_path / "away.py").write_text(AWAY)
    toy = tiny.Toy()
    with torch.random.fork_rng(devices=[]):
        model = moelora.adapt(
            toy, {"target_modules": ["lin"], **config(2, init="away")}, plugins=[tmp_path / "away.py"], verbose=False
        )
    layer, x = model.lin, torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=1e-12, atol=1e-12)
    start = (layer.experts.lora_A.detach().clone(), layer.experts.lora_B.detach().clone())
    moved(tiny.shake(model, 1.0))

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        gates = (x @ w["Wg"].t()).softmax(-1)
        y = x @ w["W"].t() + w["b"]
        for e in range(2):
            own = slice(e * R, (e + 1) * R)
            V = w["W"] + S * (w["B"][:, own] @ w["A"][own] - start[1][:, own] @ start[0][own])
            changed = w["magnitude"][e].unsqueeze(1) * V / V.detach().norm(dim=1, keepdim=True)
            y = y + gates[:, e : e + 1] * (x @ (changed - w["W"]).t())
        return y, gates

    tiny.assert_layer_equals(model, layer, formula, rtol=1e-10)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_starts_it_as_the_base_model(init: str) -> None:
    more = {"target_modules": ["q_proj"], "init": init, "experts": {"r": 2}}
    model = tiny.adapt(tiny.llama(), config(2, router="meteora", **more)).eval()
    with torch.no_grad():
        found = model(**tiny.batch()).logits
        with moelora.disabled(model):
            torch.testing.assert_close(found, model(**tiny.batch()).logits, **CLOSE)
    assert routed_layers(model)[0].experts.lora_B.any()


def test_an_unused_expert_has_no_gradient_at_all() -> None:
    layer = tiny.toy(config(4, router={"name": "softmax", "top_k": 1}))[1]
    layer.router.weight.data[2] = 0
    layer.router.weight.data[[0, 1, 3]] = torch.eye(5, dtype=torch.float64)[:3]
    x = torch.eye(5, dtype=torch.float64)[:3] * 4
    layer(x).square().sum().backward()
    grads = layer.experts.magnitude.grad, layer.experts.lora_A.grad.view(4, R, 5)
    assert all((grad[2] == 0).all() and (grad[[0, 1, 3]] != 0).any() for grad in grads)


@pytest.mark.parametrize("router", ["smora", "mixlora"])
def test_gates_of_anything_but_whole_experts_in_one_layer_are_refused(router: str) -> None:
    targets = tiny.FFN_TARGETS["llama"] if router == "mixlora" else ["q_proj"]
    method = {"name": "smora", "top_k": 2} if router == "smora" else router
    said = "change the base layer's output, and those" if router == "mixlora" else "takes the gate of a whole expert"
    with pytest.raises(ConfigError, match=said):
        tiny.adapt(tiny.llama(), config(2, router=method, target_modules=targets))


# Training, saving, exporting


def model_of(router: Any = "softmax", kind: str = "llama", num_experts: int = 3) -> Any:
    made = tiny.adapt(biased(kind), config(num_experts, router=router, target_modules=tiny.TARGETS[kind]))
    return moved(tiny.shake(made))


def test_a_trained_model_comes_back_from_a_folder_bit_for_bit(tmp_path: Path) -> None:
    model = model_of().train()
    sgd = torch.optim.SGD(list(tiny.trainable(model).values()), lr=0.1)
    model(**tiny.batch()).loss.backward()
    sgd.step()
    moelora.save(model, tmp_path / "out")
    again = moelora.load(biased("llama"), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again.eval()(**tiny.batch()).logits, model.eval()(**tiny.batch()).logits)


def test_checkpointing_gives_the_same_gradients() -> None:
    plain, checkpointed = model_of().train(), tiny.checkpointing(model_of().train())
    for model in (plain, checkpointed):
        model(**tiny.batch()).loss.backward()
    tiny.assert_same(tiny.gradients(plain), tiny.gradients(checkpointed))


def test_a_copy_has_a_base_layer_of_its_own() -> None:
    model = model_of().eval()
    twin = copy.deepcopy(model)
    for layer in routed_layers(model):
        layer.base_layer.weight.data.zero_()
    with torch.no_grad():
        assert torch.equal(twin(**tiny.batch()).logits, model_of().eval()(**tiny.batch()).logits)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merging_is_exact_where_gates_are_constant(kind: str, tmp_path: Path) -> None:
    biased(kind).save_pretrained(tmp_path / "base")
    given = tiny.unlabelled(tiny.batch(kind))
    model = model_of({"name": "static", "weights_fn": "sigmoid"}, kind).eval()
    with torch.no_grad():
        expected = model(**given).logits
        export_merged(model, tmp_path / "out", tmp_path / "base")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
        torch.testing.assert_close(again(**given).logits, expected, **CLOSE)
        torch.testing.assert_close(merge(model)(**given).logits, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_expert_is_a_dora_that_peft_reads(kind: str, tmp_path: Path) -> None:
    model = model_of({"name": "static", "weights_fn": "free"}, kind, 2).eval()
    export_peft(model, tmp_path / "out")
    given = tiny.unlabelled(tiny.batch(kind))
    for index in range(2):
        for layer in routed_layers(model):
            layer.router.theta.data.copy_(torch.eye(2)[index])
        peft = PeftModel.from_pretrained(biased(kind), tmp_path / "out" / f"expert_{index}").eval()
        with torch.no_grad():
            torch.testing.assert_close(peft(**given).logits, model(**given).logits, **CLOSE)


def test_a_plain_lora_cannot_hold_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="have DoRA, and this export is of plain LoRA only"):
        export_lora(model_of("uniform"), tmp_path / "out")
