"""HydraLoRA experts: one A, a head per expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError
from moelora.core.factors import Factors
from moelora.core.route import Route
from moelora.model.adapt import parameter_counts
from moelora.model.record import routed_layers
from moelora.model.write import adapter_tensors
from moelora.ops.project import Image
from tests import tiny

ALPHA, R = 6.0, 3
TOKENS = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def config(router: Any = "softmax", num_experts: int = 4, **experts: Any) -> dict[str, Any]:
    own = {"name": "hydra", "num_experts": num_experts, "r": R, "lora_alpha": ALPHA, **experts}
    return {"router": router, "experts": own}


def oracle(E: int, top_k: int) -> tiny.Oracle:
    """The gate is softmax over the chosen experts' logits; every head reads the same A x."""

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        for t in range(x.shape[0]):
            logits, h = w["Wg"] @ x[t], w["A"] @ x[t]
            chosen = sorted(range(E), key=lambda e, logits=logits: -logits[e].item())[:top_k]
            total = sum(logits[e].exp() for e in chosen)
            gate = [logits[e].exp() / total if e in chosen else x.new_zeros(()) for e in range(E)]
            y = w["W"] @ x[t] + w["b"]
            for e in range(E):
                y = y + gate[e] * (ALPHA / R) * (w["B"][:, e * R : (e + 1) * R] @ h)
            rows.append(y)
            gates.append(torch.stack(gate))
        return torch.stack(rows), torch.stack(gates)

    return formula


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("train", ["all", "B"])
def test_equals_the_formula(num_experts: int, top_k: int, train: str) -> None:
    router = {"name": "softmax", **({"top_k": top_k} if top_k < num_experts else {})}
    model, layer = tiny.toy(config(router, num_experts, train=train))
    tiny.assert_layer_equals(model, layer, oracle(num_experts, top_k))


@pytest.mark.parametrize("e", range(4))
def test_one_head_alone_is_plain_lora(e: int) -> None:
    _, layer = tiny.toy(config())
    gate = torch.zeros(9, 4, dtype=torch.float64)
    gate[:, e] = 1
    plain, single = tiny.toy({"router": "single", "experts": {"r": R, "lora_alpha": ALPHA}})
    own = layer.experts.lora_B[:, e * R : (e + 1) * R]
    single.experts.load_state_dict({"lora_A": layer.experts.lora_A, "lora_B": own})
    update = layer.experts(TOKENS, lambda factors, h: Route(gate, 4))
    torch.testing.assert_close(layer.base_layer(TOKENS) + update, plain(TOKENS), rtol=1e-13, atol=1e-13)


def test_a_router_may_read_the_shared_rank_space() -> None:
    _, layer = tiny.toy(config())
    seen: list[Tensor] = []

    def decide(factors: Factors, image: Image) -> Route:
        assert factors.A is not None
        seen.append(image.under(factors.A))
        return Route(torch.full((9, 4), 0.25, dtype=torch.float64), 4)

    in_rank_space = layer.experts(TOKENS, decide)
    torch.testing.assert_close(seen[0], TOKENS @ layer.experts.lora_A.t())
    uniform = layer.experts(TOKENS, lambda *_: Route(torch.full((9, 4), 0.25, dtype=torch.float64), 4))
    torch.testing.assert_close(in_rank_space, uniform, rtol=1e-13, atol=1e-13)


def test_all_heads_see_one_dropout_mask() -> None:
    model, layer = tiny.toy(config(lora_dropout=0.5))
    with torch.no_grad():
        layer.experts.lora_B.copy_(layer.experts.lora_B[:, :R].repeat(1, 4))
    seen: list[Tensor] = []
    layer.experts.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    y = model(TOKENS)
    assert (seen[0] == 0).any()
    one = ALPHA / R * seen[0] @ layer.experts.lora_A.t() @ layer.experts.lora_B[:, :R].t()
    torch.testing.assert_close(y, layer.base_layer(TOKENS) + one, rtol=1e-12, atol=1e-12)


def test_starts_as_the_base_model_and_saves_itself_bit_for_bit(tmp_path: Path) -> None:
    more = {**config(), "target_modules": tiny.TARGETS["llama"]}
    model, base = tiny.adapt(tiny.llama(), more), tiny.llama()
    batch = tiny.batch()
    assert torch.equal(model(**batch).logits, base(**batch).logits)
    tiny.shake(model)
    moelora.save(model, tmp_path)
    assert not (tmp_path / "experts").exists()  # a head is no LoRA of its own
    again = moelora.load(tiny.llama(), tmp_path)
    tiny.assert_same(adapter_tensors(again), adapter_tensors(model))
    assert torch.equal(again.train()(**batch).logits, model(**batch).logits)


def test_size() -> None:
    model = tiny.adapt(tiny.llama(), config())
    sizes = [R * s.in_features + 4 * R * s.out_features + 4 * s.in_features for s in model.moelora.sites]
    assert parameter_counts(model)[0] == sum(sizes)
    assert all(layer.experts.lora_A.shape[0] == R for layer in routed_layers(model))


@pytest.mark.parametrize("router", ["smora", "mole", "flylora", "arrow"])
def test_routers_of_experts_with_an_a_of_their_own_are_refused(router: str) -> None:
    with pytest.raises(ConfigError, match=f"router '{router}' is for experts with an A of their own"):
        tiny.adapt(tiny.llama(), config(router))
