"""Nystrom: slices of the base weight around a square core."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError
from moelora.core.methods import Methods
from moelora.core.start import Start
from moelora.core.tape import Site
from moelora.experts.lora import LoRA
from moelora.init.nystrom import Nystrom
from moelora.model.record import routed_layers
from tests import tiny
from tests.init.steps import ours, weight_of

SLORA = {"name": "slora", "num_experts": 1, "r": 4, "lora_alpha": 8}


def started(W: Tensor, num_experts: int = 1, r: int = 3, **options: Any) -> Any:
    out, wide = W.shape
    experts = Methods().build("experts", {"name": "slora"}, Site("layer", 0, wide, out), num_experts, r).double()
    Nystrom(**options)(experts, Start(lambda: W.clone()))
    return experts


def products(experts: Any) -> Tensor:
    """[E, O, D] B M A of each expert."""
    A = experts.lora_A.unflatten(0, (experts.num_experts, -1))
    B = experts.lora_B.unflatten(1, (experts.num_experts, -1))
    product: Tensor = torch.einsum("oei,eij,ejd->eod", B, experts.middle, A).detach()
    return product


def test_every_expert_is_its_slices_of_the_weight() -> None:
    W = weight_of(9, 12)
    for e, part in enumerate(products(started(W, num_experts=3))):
        i = slice(3 * e, 3 * e + 3)
        torch.testing.assert_close(part, W[:, i] @ W[i, i] @ W[i], rtol=1e-12, atol=1e-12)
    for part in products(started(W, num_experts=4, experts="same")):
        torch.testing.assert_close(part, W[:, :3] @ W[:3, :3] @ W[:3], rtol=1e-12, atol=1e-12)


def test_a_pseudo_inverse_core_is_exact_in_its_rows_and_columns() -> None:
    W = weight_of(9, 12)
    for e, part in enumerate(products(started(W, num_experts=3, core="pinv"))):
        i = slice(3 * e, 3 * e + 3)
        torch.testing.assert_close(part[i], W[i], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(part[:, i], W[:, i], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(part, W, atol=0.1)


def test_a_pseudo_inverse_core_is_exact_for_a_weight_of_low_rank() -> None:
    W = weight_of(9, 2) @ weight_of(2, 12)
    part = products(started(W, core="pinv"))[0]
    torch.testing.assert_close(part, W, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("core", ["raw", "pinv"])
def test_the_released_start_is_another_model_and_ours_is_the_base(core: Literal["raw", "pinv"]) -> None:
    given = tiny.unlabelled(tiny.batch())
    for residual in (True, False):
        model = ours({"name": "nystrom", "core": core, "residual": residual}, experts=SLORA).eval()
        with torch.no_grad():
            found = model(**given).logits
            with moelora.disabled(model):
                expected = model(**given).logits
        assert torch.allclose(found, expected, atol=2e-4) == residual
        layer = routed_layers(model)[0]
        x = torch.randn(5, layer.in_features)
        update = x @ (2.0 * products(layer.experts)[0]).t() * (not residual)
        with torch.no_grad():
            torch.testing.assert_close(layer(x) - layer.base_layer(x), update, rtol=1e-3, atol=1e-3)


def test_the_middle_alone_can_be_trained() -> None:
    model = ours("nystrom", experts={**SLORA, "train": "middle"})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(**tiny.batch()).loss.backward()
    sgd.step()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved and all(name.endswith("experts.middle") for name in moved)


def test_a_trained_one_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = ours("nystrom", experts=SLORA)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(**tiny.batch()).loss.backward()
    sgd.step()
    moelora.save(model.eval(), tmp_path / "own")
    again = moelora.load(tiny.llama(), tmp_path / "own").eval()
    with torch.no_grad():
        assert torch.equal(again(**tiny.batch()).logits, model(**tiny.batch()).logits)


def test_what_it_cannot_start_is_refused() -> None:
    W = weight_of(7, 12)
    with pytest.raises(ConfigError, match=r"experts 'lora' train lora_A, lora_B; use experts: slora"):
        Nystrom()(LoRA(Site("layer", 0, 12, 7), 1, 2), Start(lambda: W))
    with pytest.raises(ConfigError, match=r"init nystrom takes 9 directions .* 'layer' has 7"):
        started(W, num_experts=3)
