"""AdaLoRA: importance, budget and masks, on experts of all layers together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model

import moelora
from moelora.core.errors import ConfigError
from moelora.core.methods import Methods
from moelora.model.config import resolve
from moelora.model.record import routed_layers
from moelora.model.routed import after_step
from moelora.tools.export.plain import single_expert
from tests import tiny
from tests.ranks.runs import Run, experts_of, model_with, plain

ONE = {"experts": {"num_experts": 1, "r": 6, "lora_alpha": 12}, "router": "single"}


def ranks(**options: Any) -> dict[str, Any]:
    return {"name": "adalora", **options}


def test_a_layer_is_singular_values_between_lora_halves_and_starts_at_zero() -> None:
    model = model_with(ranks())
    layer = routed_layers(model)[0]
    experts = layer.experts
    E = experts.allocator.E
    assert not E.any() and 0.015 < experts.lora_A.std() < 0.025 and 0.015 < experts.lora_B.std() < 0.025
    with moelora.disabled(model):
        base = model(**tiny.given()).logits
    assert torch.equal(model(**tiny.given()).logits, base)
    E.data.normal_()
    A, B, e = (p.detach().clone().requires_grad_() for p in (experts.lora_A, experts.lora_B, E))
    x = torch.randn(7, layer.in_features, dtype=torch.float64)
    update = layer(x) - layer.base_layer(x)
    expected = plain(layer, x, A * e.unsqueeze(1), B, 2.0)
    up = torch.randn_like(update)
    model.zero_grad()
    (update * up).sum().backward()
    (expected * up).sum().backward()
    torch.testing.assert_close(update, expected, rtol=1e-10, atol=1e-12)
    for mine, theirs in ((experts.lora_A, A), (experts.lora_B, B), (E, e)):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def peft_and_ours() -> tuple[Any, Any, list[float], list[float]]:
    """Twelve steps of PEFT's AdaLoRA and of ours, from the same start, with one expert. By SGD: moments would go on
    moving P and Q of a rank that is masked in PEFT, while here they rest."""
    steps, given = 12, {"tinit": 2, "tfinal": 3, "deltaT": 2}
    ours = model_with(ranks(target_r=2, **given), **ONE)
    base = tiny.llama(0, torch.float64)
    config = AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=12, total_step=steps, orth_reg_weight=0.0,
        target_modules=["q_proj", "down_proj"], **given,
    )  # fmt: skip
    theirs = get_peft_model(base, config).double().train()
    for layer in routed_layers(ours):
        other = theirs.base_model.model.get_submodule(layer.site.name)
        for mine, name in (("lora_A", "lora_A"), ("lora_B", "lora_B")):
            getattr(other, name)["default"].data.copy_(getattr(layer.experts, mine))
        layer.experts.scale.fill_(12 / (6 + 1e-5))
        other.ranknum["default"].data.fill_(6.0)
    own, optimizer = (torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=3.0) for m in (ours, theirs))
    run = Run(ours, steps, optimizer=own)
    allocator = theirs.base_model.rankallocator
    update, losses = allocator.update_ipt, ([], [])
    for step in range(steps):
        batch = tiny.batch(seed=step + 1)
        loss = theirs(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        losses[0].append(loss.item())
        if step + 1 <= steps - 3:
            update(theirs.base_model.model)  # of the weights that have these gradients, as in the paper
        optimizer.step()
        allocator.update_ipt = lambda model: None
        theirs.base_model.update_and_allocate(step + 1)
        losses[1].append(ours(**batch).loss.item())
        run.step()
    return ours, theirs, *losses


def test_it_is_pefts_with_one_expert(peft_and_ours: tuple[Any, Any, list[float], list[float]]) -> None:
    ours, theirs, wanted, found = peft_and_ours
    assert found == pytest.approx(wanted, rel=1e-6) and len({round(loss, 3) for loss in found}) > 3
    for layer in routed_layers(ours):
        other = theirs.base_model.model.get_submodule(layer.site.name)
        E = other.lora_E["default"].flatten()
        torch.testing.assert_close(layer.experts.allocator.E.detach(), E.detach(), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            layer.experts.lora_B.detach(), other.lora_B["default"].detach(), rtol=1e-5, atol=1e-6
        )


def test_the_budget_is_met_by_all_layers_together_and_exported(
    peft_and_ours: tuple[Any, Any, list[float], list[float]],
) -> None:
    kept = [int(experts.allocator.mask.sum()) for experts in experts_of(peft_and_ours[0])]
    assert sum(kept) == 2 * 4 and len(set(kept)) > 1
    for experts, rank in zip(experts_of(peft_and_ours[0]), kept, strict=True):
        assert torch.equal(experts.allocator.E != 0, experts.allocator.mask)
        assert single_expert(experts, 0).rank == rank


def test_what_is_masked_in_the_end_rests() -> None:
    run = Run(model_with(ranks(target_r=1, tfinal=4)), steps=8).step(times=4)
    before = [(experts.allocator.mask.clone(), experts.lora_B.detach().clone()) for experts in experts_of(run.model)]
    assert sum(int(mask.sum()) for mask, _ in before) == 1 * 3 * 4
    state = set(run.stepping.tensors())
    run.step(times=4)
    for experts, (mask, B) in zip(experts_of(run.model), before, strict=True):
        assert torch.equal(experts.allocator.mask, mask) and torch.equal(experts.lora_B[:, ~mask], B[:, ~mask])
        assert not experts.allocator.E[~mask].any()
        assert not mask.any() or not torch.equal(experts.lora_B[:, mask], B[:, mask])
    assert set(run.stepping.tensors()) == state and not any(name.endswith(("now", "live")) for name in state)


def test_the_budget_falls_by_a_cube() -> None:
    run = Run(model_with(ranks(target_r=1, tinit=2, tfinal=2)), steps=10)
    layers = run.stepping.layers["ranks"]
    found = [experts_of(run.model)[0].allocator.budget(done, layers, 8) for done in range(2, 9)]
    assert found == [int(36 * (1 - (done - 2) / 6) ** 3 + 12) for done in range(2, 9)] and found[-1] == 12


def test_importance_is_per_token_of_the_expert() -> None:
    model = model_with(ranks(tinit=5))
    run = Run(model).step(times=1)
    now = run.begin()
    given = tiny.given(seed=2)
    counts: dict[str, Any] = {}

    def count(view: Any, route: Any) -> None:
        counts[view.site.name] = route.load(view.mask)

    with moelora.collect(model, count) as collector:
        model(**given).loss.backward()
    assert collector is not None
    run.stepping.before(now)
    layer = run.stepping.layers["ranks"][0]
    mean = {name: layer.state[f"{name}.mean"].clone() for name in ("lora_A", "lora_B", "allocator.E")}
    value = {name: (layer.value(name) * layer.gradient(name)).abs() for name in mean}
    live = layer.gradient("allocator.E") != 0
    after_step(model)
    run.stepping.after(now)
    load = counts[layer.site.name].double()
    assert len(set(load.tolist())) > 1
    share = (load / load.mean()).repeat_interleave(4)
    for name, per in (("lora_A", share.unsqueeze(1)), ("lora_B", share), ("allocator.E", share)):
        alive = live.unsqueeze(1) if name == "lora_A" else live
        expected = torch.where(alive, 0.85 * mean[name] + 0.15 * value[name] / per, mean[name])
        torch.testing.assert_close(layer.state[f"{name}.mean"], expected, rtol=1e-5, atol=1e-15)


def test_loads_are_counted_once_and_for_all_layers_of_a_block() -> None:
    for method in ("smora", "mixlora", "single"):
        model = tiny.adapted("llama", method, noise=0.0, ranks=ranks(tinit=5))
        run = Run(model)
        now = run.begin()
        given = tiny.given()
        model(**given).loss.backward()
        run.stepping.before(now)
        after_step(model)
        tokens = int(given["attention_mask"].sum())
        for experts in experts_of(model):
            chosen = {"smora": 4, "mixlora": 2, "single": 1}[method]
            assert int(experts.allocator.load.sum()) == chosen * tokens, (method, experts.site.name)


def test_what_it_needs_and_cannot_have_is_refused() -> None:
    config: dict[str, Any] = {"router": "meteora", "experts": {"num_experts": 2, "r": 4}, "ranks": "adalora"}
    with pytest.raises(ConfigError, match=r"ranks.adalora: target_r 5 is more than experts.r, which is 4"):
        resolve({**config, "ranks": ranks(target_r=5)}, Methods())
    with pytest.raises(ConfigError, match="ranks adalora sets A and B at the start, and so would init sparse"):
        resolve({**config, "init": "sparse"}, Methods())
    with pytest.raises(ConfigError, match="ranks adalora trains A, B and what is between them"):
        resolve({**config, "experts": {"num_experts": 2, "r": 4, "train": "B"}}, Methods())
    with pytest.raises(ConfigError, match="tinit 3 and tfinal 2 leave none of 5 steps"):
        Run(model_with(ranks(tinit=3, tfinal=2)), steps=5).step()
