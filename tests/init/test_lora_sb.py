"""LoRA-SB: full training's first step, in the factors of LoRA-XS experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError
from moelora.core.start import Start
from moelora.core.tape import Site
from moelora.experts.lora import LoRA
from moelora.experts.loraxs import LoRAXS
from moelora.init.lora_sb import LoRASB
from moelora.model.record import routed_layers
from moelora.tools.export import export_lora
from tests import tiny
from tests.init.steps import ours, weight_of

XS = {"name": "loraxs", "r": 4, "lora_alpha": 8}
GIVEN = tiny.batch(seed=4)


def started(num_experts: int = 1, **options: Any) -> tuple[Any, Tensor]:
    experts = LoRAXS(Site("layer", 0, 14, 18), num_experts, 3).double()
    experts.scale.fill_(0.5)
    G = weight_of(18, 14, 9)
    experts.begin(Start(lambda: weight_of(18, 14)))
    LoRASB(**{"niter": None, **options})(experts, Start(lambda: weight_of(18, 14), gradient=lambda: G.clone()))
    return experts, G


def first_rank(D: Tensor, r: int) -> Tensor:
    U, S, V = torch.linalg.svd(D, full_matrices=False)
    return U[:, :r] @ S[:r].diag() @ V[:r]


def gradients(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """G of the base model's layers, by autograd."""
    base = tiny.llama().eval()
    base(**given).loss.backward()
    return {name.removesuffix(".weight"): p.grad for name, p in base.named_parameters()}


@pytest.mark.parametrize("update", ["sign_lr", "raw_grad"])
def test_every_expert_is_the_best_part_of_the_first_step(update: Any) -> None:
    experts, G = started(num_experts=2, update=update, lr=0.01)
    eye = torch.eye(3)
    torch.testing.assert_close(experts.basis_A @ experts.basis_A.t(), eye, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(experts.basis_B.t() @ experts.basis_B, eye, rtol=1e-6, atol=1e-6)
    expected = first_rank(-0.01 * (G.sign() if update == "sign_lr" else G), 3)
    for M in experts.middle.detach():
        found = 0.5 * experts.basis_B.double() @ M @ experts.basis_A.double()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(M, M.diag().diag())
    assert (experts.start_middle == 0).all()


def test_the_start_may_be_subtracted() -> None:
    experts, _ = started(num_experts=2, residual=True)
    assert (experts.start_middle.double() - experts.middle).abs().max() < 1e-10
    assert (experts.middle != 0).any()


def test_a_gradient_and_a_step_are_those_of_the_whole_weight_projected() -> None:
    init = {"name": "lora_sb", "residual": True, "update": "raw_grad", "lr": 1.0, "niter": None}
    model = ours(init, experts=XS, batches=[GIVEN]).eval()
    before = {layer.site.name: layer.experts.middle.detach().clone() for layer in routed_layers(model)}
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    model(**GIVEN).loss.backward()
    sgd.step()
    for layer in routed_layers(model):
        G, A, B = gradients(GIVEN)[layer.site.name], layer.experts.basis_A, layer.experts.basis_B
        close = {"rtol": 1e-3, "atol": 1e-6}
        torch.testing.assert_close(layer.experts.middle.grad[0], 2 * B.t() @ G @ A.t(), **close)
        moved = 2 * B @ (layer.experts.middle - before[layer.site.name])[0].detach() @ A
        torch.testing.assert_close(moved, -0.3 * 2**2 * B @ B.t() @ G @ A.t() @ A, **close)
        torch.testing.assert_close(moved, -0.3 * 2**2 * first_rank(G, 4), **close)
        assert [p.numel() for p in layer.experts.parameters()] == [4 * 4]


@pytest.mark.parametrize("num_experts", [1, 4])
def test_the_model_starts_one_step_on_or_as_the_base_model(num_experts: int) -> None:
    router = "single" if num_experts == 1 else "softmax"
    experts = {**XS, "num_experts": num_experts}
    base, stepped = tiny.llama().eval(), tiny.llama().eval()
    full = gradients(GIVEN)
    with torch.no_grad():
        for name, G in full.items():
            if name.endswith(("q_proj", "v_proj", "down_proj")):
                stepped.get_submodule(name).weight += first_rank(-1e-3 * G.sign(), 4)
    for expected, residual in ((base, True), (stepped, False)):
        init = {"name": "lora_sb", "residual": residual, "lr": 1e-3, "niter": None}
        model = ours(init, router=router, experts=experts, batches=[GIVEN]).eval()
        with torch.no_grad():
            logits = expected(**GIVEN).logits
            torch.testing.assert_close(model(**GIVEN).logits, logits, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(logits, base(**GIVEN).logits, atol=1e-3)


def test_a_trained_one_is_saved_and_exported_exactly(tmp_path: Path) -> None:
    model = ours({"name": "lora_sb", "lr": 1e-3}, experts=XS, batches=[GIVEN])
    frozen = {name: value.clone() for name, value in model.named_buffers() if "basis" in name}
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(**tiny.batch()).loss.backward()
    adam.step()
    assert all(torch.equal(value, frozen[name]) for name, value in model.named_buffers() if "basis" in name)
    moelora.save(model.eval(), tmp_path / "own")
    own = moelora.load(tiny.llama(), tmp_path / "own").eval()
    exported = export_lora(model, tmp_path / "plain")
    plain = moelora.adapt(
        tiny.llama(),
        {"experts": {"r": 4, "adapters": [str(exported.folder)]}, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        verbose=False,
    ).eval()
    with torch.no_grad():
        expected = model(**tiny.batch()).logits
        assert torch.equal(own(**tiny.batch()).logits, expected)
        torch.testing.assert_close(plain(**tiny.batch()).logits, expected, rtol=1e-5, atol=1e-5)


def test_what_it_cannot_start_is_refused() -> None:
    gradient = {"gradient": lambda: weight_of(7, 12)}
    with pytest.raises(ConfigError, match=r"experts 'lora' have no such; use experts: loraxs"):
        LoRASB()(LoRA(Site("layer", 0, 12, 7), 1, 2), Start(lambda: weight_of(7, 12), **gradient))
    with pytest.raises(ConfigError, match=r"init lora_sb takes 8 directions and 'layer' has 7; lower experts.r"):
        LoRASB()(LoRAXS(Site("layer", 0, 12, 7), 1, 8), Start(lambda: weight_of(7, 12), **gradient))
