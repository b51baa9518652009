"""Experts that start from factors whose product is not zero, less that product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moelora
from moelora.core.errors import ConfigError
from moelora.model.record import routed_layers
from tests import tiny

AWAY = """
import torch
from moelora.init.base import Init, halves


class Away(Init):
    moves = True

    @torch.no_grad()
    def __call__(self, experts, start):
        A, B = halves("away", experts)
        weight = start.weight()
        assert weight.shape == (experts.site.out_features, experts.site.in_features)
        A.copy_(weight[:1].expand_as(A) + 0.1 * torch.randn_like(A))
        B.copy_(weight[:, :1].expand_as(B) + 0.1 * torch.randn_like(B))
"""


@pytest.fixture
def away(tmp_path: Path) -> Path:
    plugin = tmp_path / "away.py"
    plugin.write_text(AWAY)
    return plugin


def model_with(away: Path, method: str, **more: Any) -> Any:
    config = {**tiny.METHODS[method], "target_modules": tiny.targets("llama", method), "init": "away", **more}
    torch.manual_seed(0)
    return moelora.adapt(tiny.llama(), config, plugins=[away], verbose=False)


@pytest.mark.parametrize("method", ["meteora", "smora", "xlora", "lora_mixer"])
def test_the_model_starts_as_the_base_model_whatever_the_gates(away: Path, method: str) -> None:
    model = model_with(away, method).eval()
    with torch.no_grad():
        found = model(**tiny.batch()).logits
        with moelora.disabled(model):
            expected = model(**tiny.batch()).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert routed_layers(model)[0].experts.lora_B.abs().sum() > 0


@pytest.mark.parametrize("method", ["meteora", "smora"])
def test_the_update_is_that_of_the_experts_less_that_of_their_start(away: Path, method: str) -> None:
    model = model_with(away, method).double().eval()
    layer = routed_layers(model)[0]
    experts = layer.experts
    start = experts.lora_A.detach().clone(), experts.lora_B.detach().clone()
    tiny.shake(model, 0.3)
    x = torch.randn(9, layer.in_features, dtype=torch.float64)
    routes: list[Any] = []
    hook = layer.router.register_forward_hook(lambda _, __, route: routes.append(route))
    update = layer(x) - layer.base_layer(x)
    hook.remove()
    gate, width = routes[0].dense(), experts.num_experts * experts.r // routes[0].units
    parts = [(experts.lora_A, experts.lora_B, 1.0), (*start, -1.0)]
    expected = sum(
        sign * ((x @ A.t()) * gate.repeat_interleave(width, 1) * experts.scale.double()) @ B.t() for A, B, sign in parts
    )
    torch.testing.assert_close(update, expected, rtol=1e-6, atol=1e-7)


def test_it_comes_back_from_a_folder_bit_for_bit(away: Path, tmp_path: Path) -> None:
    model = tiny.shake(model_with(away, "meteora"), 0.3).eval()
    moelora.save(model, tmp_path / "out")
    again = moelora.load(tiny.llama(), tmp_path / "out", plugins=[away]).eval()
    with torch.no_grad():
        assert torch.equal(again(**tiny.batch()).logits, model(**tiny.batch()).logits)


def test_what_cannot_be_subtracted_is_refused(away: Path) -> None:
    with pytest.raises(ConfigError, match=r"init away subtracts every expert's start.*found experts 'core'"):
        model_with(away, "comol")
    with pytest.raises(ConfigError, match=r"experts.adapters fill A and B, and so would init away"):
        model_with(away, "meteora", experts={"adapters": ["out/none"], "num_experts": 4})


STARTS: dict[str, dict[str, Any]] = {"pissa": {}, "olora": {}, "nystrom": {"name": "slora"}, "lora_ga": {"r": 2}}
"""Initialisers that move, with the experts they are for."""


@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize("init", STARTS)
def test_every_moved_start_is_the_base_model(init: str, num_experts: int) -> None:
    base, router = tiny.llama(), "single" if num_experts == 1 else {"name": "softmax", "top_k": 2, "renorm": False}
    with torch.no_grad():
        expected = base.eval()(**tiny.batch()).logits
    config = {"experts": {"num_experts": num_experts, "r": 4, **STARTS[init]}, "router": router, "init": init}
    config["target_modules"] = tiny.TARGETS["llama"]
    torch.manual_seed(1)
    model = moelora.adapt(base, config, verbose=False, batches=[tiny.batch(seed=seed) for seed in range(2)])
    with torch.no_grad():
        torch.testing.assert_close(model(**tiny.batch()).logits, expected, rtol=1e-5, atol=2e-5)
        for layer in routed_layers(model):
            factors = layer.experts.factors()
            assert factors.B.abs().sum() > 0
            layer.experts.lora_B.mul_(1.5)
        assert not torch.allclose(model(**tiny.batch()).logits, expected, atol=1e-2)
