"""Merged experts: factors are averaged first, so products of different experts are part of the update."""

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
from moelora.model.record import routed_layers
from moelora.model.write import adapter_tensors
from moelora.ops.project import Image
from tests import tiny

ALPHA, E, R = 6.0, 3, 2
TOKENS = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def config(router: Any = "softmax", name: str = "merged", num_experts: int = E) -> dict[str, Any]:
    own = {"name": name, "num_experts": num_experts, "r": R, "lora_alpha": ALPHA}
    return {"router": router, "experts": own}


def oracle(units: int, top_k: int) -> tiny.Oracle:
    """Merged matrices made in full for every token; the gate is softmax over the chosen logits."""
    width = E * R // units

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        for t in range(x.shape[0]):
            logits = w["Wg"] @ x[t]
            chosen = sorted(range(units), key=lambda u, logits=logits: -logits[u].item())[:top_k]
            total = sum(logits[u].exp() for u in chosen)
            gate = [logits[u].exp() / total if u in chosen else x.new_zeros(()) for u in range(units)]
            A = sum(gate[u] * w["A"][u * width : (u + 1) * width] for u in range(units))
            B = sum(gate[u] * w["B"][:, u * width : (u + 1) * width] for u in range(units))
            rows.append(w["W"] @ x[t] + w["b"] + ALPHA / R * (B @ A @ x[t]))
            gates.append(torch.stack(gate))
        return torch.stack(rows), torch.stack(gates)

    return formula


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_equals_the_formula(top_k: int | None) -> None:
    router = {"name": "softmax", **({} if top_k is None else {"top_k": top_k})}
    model, layer = tiny.toy(config(router))
    tiny.assert_layer_equals(model, layer, oracle(E, top_k or E))


def test_ranks_as_units_are_merged_into_one() -> None:
    _, layer = tiny.toy(config())
    made = torch.Generator().manual_seed(1)
    gate = torch.rand(9, E * R, generator=made, dtype=torch.float64)
    A = torch.einsum("tj,jd->td", gate, layer.experts.lora_A)
    B = torch.einsum("tj,oj->to", gate, layer.experts.lora_B)
    expected = ALPHA / R * B * (A * TOKENS).sum(1, keepdim=True)
    torch.testing.assert_close(layer.experts(TOKENS, lambda *_: Route(gate, E * R)), expected, rtol=1e-12, atol=1e-12)


def test_gates_in_any_form_give_the_same_update() -> None:
    _, layer = tiny.toy(config())
    index, weight = torch.tensor([[2, 0]]).expand(9, 2), torch.tensor([[0.7, 0.6]], dtype=torch.float64).expand(9, 2)
    dense = torch.tensor([[0.6, 0.0, 0.7]], dtype=torch.float64).expand(9, 3)

    def decide(factors: Factors, image: Image) -> Route:
        torch.testing.assert_close(image.known(factors.A), TOKENS @ layer.experts.lora_A.t())
        return Route(weight, E, index)

    found = layer.experts(TOKENS, decide)
    torch.testing.assert_close(found, layer.experts(TOKENS, lambda *_: Route(dense, E)), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("e", range(E))
def test_one_chosen_expert_is_that_expert(e: int) -> None:
    merged, lora = tiny.toy(config())[1], tiny.toy(config(name="lora"))[1]
    gate = torch.zeros(9, E, dtype=torch.float64)
    gate[:, e] = 1
    expected = lora.experts(TOKENS, lambda *_: Route(gate, E))
    torch.testing.assert_close(merged.experts(TOKENS, lambda *_: Route(gate, E)), expected, rtol=1e-13, atol=1e-13)


def test_cross_terms_are_what_tells_it_from_a_mixture() -> None:
    merged, lora = tiny.toy(config())[1], tiny.toy(config(name="lora"))[1]
    gate = torch.full((9, E), 1 / E, dtype=torch.float64)
    cross = torch.zeros(9, 7, dtype=torch.float64)
    for e in range(E):
        for f in range(E):
            A, B = merged.experts.lora_A[f * R : (f + 1) * R], merged.experts.lora_B[:, e * R : (e + 1) * R]
            cross = cross + ALPHA / R / E**2 * TOKENS @ A.t() @ B.t()
    found = merged.experts(TOKENS, lambda *_: Route(gate, E))
    torch.testing.assert_close(found, cross, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, lora.experts(TOKENS, lambda *_: Route(gate, E)))


def test_gates_apply_to_both_factors() -> None:
    layer = tiny.toy(config())[1]
    one, half = (torch.full((9, E), g, dtype=torch.float64) for g in (1.0, 0.5))
    whole = layer.experts(TOKENS, lambda *_: Route(one, E))
    torch.testing.assert_close(layer.experts(TOKENS, lambda *_: Route(half, E)), 0.25 * whole)


def test_one_expert_at_gate_one_is_plain_lora() -> None:
    merged, _ = tiny.toy(config("single", num_experts=1))
    plain, _ = tiny.toy(config("single", "lora", 1))
    torch.testing.assert_close(merged(TOKENS), plain(TOKENS), rtol=1e-13, atol=1e-13)


def test_half_precision_comes_out_as_it_went_in() -> None:
    model = tiny.adapt(tiny.llama(dtype=torch.bfloat16), {**config(), "target_modules": ["q_proj"]})
    assert tiny.shake(model)(**tiny.batch()).logits.dtype == torch.bfloat16
    layer = routed_layers(model.to(torch.bfloat16))[0]
    x = torch.randn(4, tiny.HIDDEN, dtype=torch.bfloat16)
    assert layer.experts(x, lambda *_: Route(torch.full((4, E), 1 / E), E)).dtype == torch.bfloat16


def test_saved_bit_for_bit_and_every_expert_is_a_lora(tmp_path: Path) -> None:
    model = tiny.shake(tiny.adapt(tiny.llama(), {**config(), "target_modules": tiny.TARGETS["llama"]}))
    moelora.save(model, tmp_path)
    assert sorted(path.name for path in (tmp_path / "experts").iterdir()) == ["expert_0", "expert_1", "expert_2"]
    again = moelora.load(tiny.llama(), tmp_path)
    tiny.assert_same(adapter_tensors(again), adapter_tensors(model))
    assert torch.equal(again.train()(**tiny.batch()).logits, model(**tiny.batch()).logits)


def test_losses_see_how_the_experts_started() -> None:
    model = tiny.adapt(tiny.llama(), {**config(), "losses": {"l2_preservation": 1.0}})
    with moelora.collect(model) as collected:
        model(**tiny.batch())
        tiny.shake(model)(**tiny.batch())
    assert collected.terms[0]["l2_preservation"] == 0 < collected.terms[1]["l2_preservation"]


def test_blocks_of_experts_are_refused() -> None:
    more = {"router": "mixlora", "experts": {"name": "merged", "num_experts": 4, "r": 2}}
    with pytest.raises(ConfigError, match=r"every expert apart, and experts 'merged' have one .* use experts: lora"):
        tiny.adapt(tiny.llama(), {**more, "target_modules": tiny.FFN_TARGETS["llama"]})
