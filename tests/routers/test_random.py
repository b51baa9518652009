"""Experts by chance: the formula, and what the two kinds of chance promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError
from tests import tiny

ALPHA = 8.0
TOKENS = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def config(num_experts: int = 4, r: int = 2, **options: Any) -> dict[str, Any]:
    return {
        "router": {"name": "random", **options},
        "experts": {"num_experts": num_experts, "r": r, "lora_alpha": ALPHA},
    }


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_equals_the_formula(top_k: int) -> None:
    model, layer = tiny.toy(config(top_k=top_k))
    projection = layer.router.weight.double()

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        for t in range(x.shape[0]):
            scores = (projection @ x[t]).tolist()
            y, gate = w["W"] @ x[t] + w["b"], x.new_zeros(4)
            for e in sorted(range(4), key=lambda e, scores=scores: -scores[e])[:top_k]:
                own = slice(2 * e, 2 * e + 2)
                gate[e] = 1 / top_k
                y = y + (ALPHA / 2) * (w["B"][:, own] @ (w["A"][own] @ x[t])) / top_k
            rows.append(y)
            gates.append(gate)
        return torch.stack(rows), torch.stack(gates)

    tiny.assert_layer_equals(model, layer, formula)


def test_a_fixed_choice_is_saved_and_never_trained(tmp_path: Path) -> None:
    model = tiny.adapted("llama", "random")
    assert not any("router" in name for name in tiny.trainable(model))
    moelora.save(model, tmp_path / "adapter")
    again = moelora.load(tiny.llama(), tmp_path / "adapter")
    given = tiny.unlabelled(tiny.batch())
    for one, two in zip(tiny.routes(model, **given), tiny.routes(again, **given), strict=True):
        assert torch.equal(one.index, two.index)


def test_a_fixed_choice_survives_a_cast_of_the_model() -> None:
    model, layer = tiny.toy(config())
    before = layer.router.weight.clone()
    model.to(torch.bfloat16)
    assert torch.equal(layer.router.weight, before) and before.dtype == torch.float32


def test_a_fixed_choice_is_the_same_with_a_cache() -> None:
    model = tiny.adapted("llama", "random", dtype=torch.float64).eval()
    ids = tiny.batch(padded=False)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        past = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        last = model(input_ids=ids[:, 4:], past_key_values=past).logits
    torch.testing.assert_close(last, whole[:, 4:], rtol=1e-10, atol=1e-10)


def test_fresh_draws_differ_and_use_every_expert_alike() -> None:
    model, layer = tiny.toy(config(num_experts=5, top_k=2, fixed=False))
    assert not layer.router.state_dict()
    x = TOKENS[:1].expand(4000, 5)  # one token, many times
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one, two = (tiny.routes(model, x=x)[0] for _ in range(2))
        torch.manual_seed(0)
        assert torch.equal(tiny.routes(model, x=x)[0].index, one.index)
    assert not torch.equal(one.index, two.index)
    assert (one.index[:, 0] != one.index[:, 1]).all() and (one.weight == 0.5).all()
    torch.testing.assert_close(one.load() / 4000, torch.full((5,), 2 / 5, dtype=torch.float64), rtol=0, atol=0.03)


@pytest.mark.parametrize("fixed", [True, False])
def test_checkpointing_changes_no_gradient(fixed: bool) -> None:
    # Dropout draws from the same generator: recomputed masks are the first pass's only if routers draw again too.
    found = []
    for checkpointed in (False, True):
        experts = {"num_experts": 4, "r": 2, "lora_alpha": ALPHA, "lora_dropout": 0.3}
        model = tiny.adapted("llama", "random", router={"name": "random", "fixed": fixed}, experts=experts)
        if checkpointed:
            tiny.checkpointing(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model(**tiny.batch()).loss.backward()
        found.append(tiny.gradients(model))
    tiny.assert_same(*found)


def test_a_recomputed_region_keeps_its_draw_when_the_generator_has_moved_on() -> None:
    found = []
    for checkpointed in (False, True):
        model = tiny.adapted("llama", "random", router={"name": "random", "fixed": False})
        if checkpointed:
            kept = {"use_reentrant": False, "preserve_rng_state": False}
            tiny.checkpointing(model, gradient_checkpointing_kwargs=kept)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model(**tiny.batch()).loss.backward()
        found.append(tiny.gradients(model))
    tiny.assert_same(*found)


def test_one_expert_is_plain_lora() -> None:
    mixture, layer = tiny.toy(config(num_experts=1, r=4, top_k=1))
    plain, other = tiny.toy({"router": "single", "experts": {"r": 4, "lora_alpha": ALPHA}})
    other.experts.load_state_dict(layer.experts.state_dict())
    assert torch.equal(mixture(TOKENS), plain(TOKENS))


def test_more_choices_than_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"routers\.random: top_k 2 is more than the 1 experts"):
        tiny.toy(config(num_experts=1))
