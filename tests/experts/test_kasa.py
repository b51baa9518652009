"""KaSA experts: the truncated base, the formula, PEFT's KaSA, what is saved and exported."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import KasaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import moelora
from moelora.core.errors import ConfigError
from moelora.model.record import routed_layers
from moelora.model.routed import weighted_sum
from moelora.tools.export import export_lora, export_merged, export_peft
from tests import tiny
from tests.adapters import base as biased

S, R = 2.0, 3
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def config(num_experts: int = 4, router: Any = "softmax", **more: Any) -> dict[str, Any]:
    own = {"name": "kasa", "num_experts": num_experts, "r": R, "lora_alpha": S * R, **more.pop("experts", {})}
    return {"router": router, "experts": own, **more}


def truncated(W: Tensor, cut: int) -> Tensor:
    """W without its smallest directions, as a matrix."""
    U, sigma, V = torch.linalg.svd(W, full_matrices=False)
    keep = len(sigma) - cut
    return (U[:, :keep] * sigma[:keep]) @ V[:keep]


def oracle(E: int, top_k: int, cut: int = R) -> tiny.Oracle:
    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        logits = x @ w["Wg"].t()
        gates = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf).softmax(-1)
        y = x @ truncated(w["W"], cut).t() + w["b"]
        for e in range(E):
            own = slice(e * R, (e + 1) * R)
            update = w["B"][:, own] @ torch.diag(w["sigma"][own]) @ w["A"][own]
            y = y + gates[:, e : e + 1] * (S * x @ update.t())
        return y, gates

    return formula


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("cut", [None, 0, 1, 4])
def test_equals_the_formula(num_experts: int, top_k: int, cut: int | None) -> None:
    router = {"name": "softmax", "top_k": top_k}
    model, layer = tiny.toy(config(num_experts, router, experts={"trunc_rank": cut}))
    tiny.assert_layer_equals(model, layer, oracle(num_experts, top_k, R if cut is None else cut), rtol=1e-10)


@pytest.mark.parametrize("router", [{"name": "smora", "top_k": 2}, "uniform", "task"])
def test_the_start_is_the_truncated_base_whatever_the_gates(router: Any) -> None:
    model, layer = tiny.toy(config(3, router))
    with torch.no_grad():
        layer.experts.lora_B.zero_()
    x, cut = torch.randn(2, 4, 5, dtype=torch.float64), truncated(layer.base_layer.weight, R)
    y = model(x, task_ids=torch.tensor([0, 2]))
    torch.testing.assert_close(y, x @ cut.t() + layer.base_layer.bias, rtol=1e-12, atol=1e-12)
    with moelora.disabled(model):
        assert torch.equal(model(x), layer.base_layer(x))


def test_what_is_cut_off_are_the_smallest_directions() -> None:
    layer = tiny.toy(config(2))[1]
    W = layer.base_layer.weight.detach()
    sigma = torch.linalg.svdvals(W)
    cut = layer.experts.fixed_B @ layer.experts.fixed_A
    torch.testing.assert_close(cut.square().sum(), sigma[-R:].square().sum())
    assert torch.linalg.matrix_rank(W + cut) == len(sigma) - R
    assert layer.experts.fixed_A.shape == (R, 5) and cut.dtype == torch.float64


def test_a_rank_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="trunc_rank 5 would leave nothing of the 5 directions of 'lin'"):
        tiny.toy(config(2, experts={"trunc_rank": 5}))
    with pytest.raises(ConfigError, match="trunc_rank 8 would leave nothing"):
        tiny.toy(config(2, experts={"r": 8}))


def test_dropout_is_for_the_experts_and_not_for_the_base() -> None:
    model, layer = tiny.toy(config(2, experts={"lora_dropout": 0.5}))
    with torch.no_grad():
        layer.experts.lora_B.zero_()
    x = torch.randn(1, 6, 5, dtype=torch.float64)
    expected = x @ truncated(layer.base_layer.weight, R).t() + layer.base_layer.bias
    torch.testing.assert_close(model.train()(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("router", ["mixlora", "smora", "meteora"])
def test_every_router_stands_on_it(router: str) -> None:
    targets = tiny.targets("llama", router)
    made = {**tiny.METHODS[router], "target_modules": targets}
    model = tiny.adapt(tiny.llama(), {**made, "experts": {**made["experts"], "name": "kasa"}}).eval()
    cut = tiny.llama().eval()
    with torch.no_grad():
        for layer in routed_layers(model):
            held = cut.get_submodule(layer.site.name).weight
            held.copy_(truncated(held, layer.experts.r))
        torch.testing.assert_close(model(**tiny.batch()).logits, cut(**tiny.batch()).logits, rtol=1e-4, atol=1e-4)


# PEFT


def peft_twin(seed: int = 0) -> tuple[Any, Any]:
    """A PEFT KaSA, and one expert with its values."""
    targets = tiny.TARGETS["llama"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = LoraConfig(r=R, lora_alpha=int(S * R), target_modules=targets, kasa_config=KasaConfig())
        peft = get_peft_model(tiny.llama(), given)
    weights = {"spectrum": 1e-4 * 6, "orthogonality": 1e-3 * 6}  # PEFT adds up six layers, we take their mean
    model = tiny.adapt(tiny.llama(), config(1, "single", target_modules=targets, losses=weights))
    made = torch.Generator().manual_seed(seed)
    for layer in routed_layers(model):
        theirs, own = peft.base_model.model.get_submodule(layer.site.name), layer.experts
        with torch.no_grad():
            theirs.lora_B["default"].weight.copy_(0.3 * torch.randn(own.lora_B.shape, generator=made))
            own.lora_A.copy_(theirs.lora_A["default"].weight)
            own.lora_B.copy_(theirs.lora_B["default"].weight)
            own.sigma.copy_(theirs.lora_diag["default"])
    return peft, model


def test_one_expert_is_pefts_kasa_with_its_losses() -> None:
    peft, model = peft_twin()
    theirs, given = peft(**tiny.batch()).loss, tiny.batch()
    theirs = theirs + peft.base_model._get_kasa_loss()
    with moelora.collect(model) as collected:
        mine = model(**given).loss
    mine = mine + weighted_sum(model, collected.terms[0])
    torch.testing.assert_close(mine, theirs, **CLOSE)
    mine.backward()
    theirs.backward()
    for layer in routed_layers(model):
        other, own = peft.base_model.model.get_submodule(layer.site.name), layer.experts
        pairs = [(own.lora_A, other.lora_A["default"].weight), (own.lora_B, other.lora_B["default"].weight)]
        for one, two in [*pairs, (own.sigma, other.lora_diag["default"])]:
            torch.testing.assert_close(one.grad, two.grad, rtol=2e-4, atol=2e-5)


# Training, saving, exporting


def model_of(router: Any = "softmax", num_experts: int = 3, base: Any = None) -> Any:
    base = biased("qwen") if base is None else base
    return tiny.shake(tiny.adapt(base, config(num_experts, router, target_modules=["q_proj", "o_proj"])))


def test_a_trained_model_comes_back_from_a_folder_bit_for_bit(tmp_path: Path) -> None:
    model = model_of().train()
    sgd = torch.optim.SGD(list(tiny.trainable(model).values()), lr=0.1)
    model(**tiny.batch()).loss.backward()
    sgd.step()
    moelora.save(model, tmp_path / "out")
    again = moelora.load(biased("qwen"), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again.eval()(**tiny.batch()).logits, model.eval()(**tiny.batch()).logits)


def test_checkpointing_gives_the_same_gradients() -> None:
    plain, checkpointed = model_of().train(), tiny.checkpointing(model_of().train())
    for model in (plain, checkpointed):
        model(**tiny.batch()).loss.backward()
    tiny.assert_same(tiny.gradients(plain), tiny.gradients(checkpointed))


def test_constant_gates_make_one_lora_and_one_weight(tmp_path: Path) -> None:
    biased("qwen").save_pretrained(tmp_path / "base")
    model = model_of({"name": "static", "weights_fn": "sigmoid"}).eval()
    given = tiny.unlabelled(tiny.batch())
    export_lora(model, tmp_path / "lora")
    export_merged(model, tmp_path / "merged", tmp_path / "base")
    peft = PeftModel.from_pretrained(biased("qwen"), tmp_path / "lora").eval()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    with torch.no_grad():
        expected = model(**given).logits
        torch.testing.assert_close(peft(**given).logits, expected, **CLOSE)
        torch.testing.assert_close(again(**given).logits, expected, **CLOSE)
    assert peft.peft_config["default"].r == 3 * R + R


def test_every_expert_is_a_lora_of_the_whole_base(tmp_path: Path) -> None:
    model = model_of({"name": "static", "weights_fn": "free"}, 2).eval()
    export_peft(model, tmp_path / "out")
    given = tiny.unlabelled(tiny.batch())
    for index in range(2):
        for layer in routed_layers(model):
            layer.router.theta.data.copy_(torch.eye(2)[index])
        peft = PeftModel.from_pretrained(biased("qwen"), tmp_path / "out" / f"expert_{index}").eval()
        with torch.no_grad():
            torch.testing.assert_close(peft(**given).logits, model(**given).logits, **CLOSE)


def test_one_lora_near_a_router_by_token_is_measured_with_what_was_cut_off(tmp_path: Path) -> None:
    model = model_of("softmax").eval()
    for layer in routed_layers(model):
        layer.router.weight.data.mul_(1e-4)  # gates that hardly vary are hardly lost
    probe = [[tiny.batch(rows=8, length=12, seed=seed) for seed in seeds] for seeds in ((0, 1), (2, 3))]
    export = export_lora(model, tmp_path / "out", probe=(probe[0], probe[1]))
    assert export.figures["measured"]["least_squares"]["update_error"] < 1e-3
    assert export.figures["measured"]["least_squares"]["kl"] < 1e-4
    peft, given = PeftModel.from_pretrained(biased("qwen"), tmp_path / "out").eval(), tiny.unlabelled(tiny.batch())
    with torch.no_grad():
        torch.testing.assert_close(peft(**given).logits, model(**given).logits, rtol=1e-2, atol=1e-2)
