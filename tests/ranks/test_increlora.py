"""IncreLoRA: experts that get ranks while they train."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moelora
from moelora.core.errors import ConfigError
from moelora.core.methods import Methods
from moelora.core.step import Now
from moelora.model.config import resolve
from moelora.model.record import routed_layers
from moelora.tools.export.plain import single_expert
from tests import tiny
from tests.ranks.runs import Run, experts_of, model_with, plain


def ranks(**options: Any) -> dict[str, Any]:
    return {"name": "increlora", "warmup": 2, "interval": 2, "reserve": 1e-3, **options}


def taken(model: Any) -> list[list[int]]:
    return [experts.allocator.rank.tolist() for experts in experts_of(model)]


def test_a_layer_is_scaled_by_its_ranks_with_a_fixed_reserve() -> None:
    model = model_with(ranks())
    layer = routed_layers(model)[0]
    experts, own = layer.experts, layer.experts.allocator
    own.rank.copy_(torch.tensor([1, 2, 4]))
    own.E.data.normal_()
    A, B, e = (p.detach().clone().requires_grad_() for p in (experts.lora_A, experts.lora_B, own.E))
    place = torch.arange(4)
    rank = own.rank.unsqueeze(1)
    learns, used = (place < rank).flatten(), (place < rank + 1).flatten()
    E = torch.where(learns, e, e.detach()) * used
    x = torch.randn(7, layer.in_features, dtype=torch.float64)
    update = layer(x) - layer.base_layer(x)
    expected = plain(layer, x, A * E.unsqueeze(1), B, torch.tensor([8.0, 4.0, 2.0]))
    up = torch.randn_like(update)
    model.zero_grad()
    (update * up).sum().backward()
    (expected * up).sum().backward()
    torch.testing.assert_close(update, expected, rtol=1e-6, atol=1e-8)
    for mine, theirs in ((experts.lora_A, A), (experts.lora_B, B), (own.E, e)):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-8)
    assert own.E.grad[learns].all() and not own.E.grad[~learns].any() and not experts.lora_A.grad[~used].any()
    own.open.fill_(False)
    without = plain(layer, x, A * (e * learns).unsqueeze(1), B, torch.tensor([8.0, 4.0, 2.0]))
    torch.testing.assert_close(layer(x) - layer.base_layer(x), without, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reserve", [0.0, 1e-3])
def test_the_start_is_the_base_model_up_to_the_reserve_which_learns_ahead(reserve: float) -> None:
    run = Run(model_with(ranks(reserve=reserve)))
    with moelora.disabled(run.model):
        base = run.model(**tiny.given()).logits
    off = (run.model(**tiny.given()).logits - base).abs().max()
    assert off == 0 if reserve == 0 else 0 < off < 1e-4
    before = [experts.lora_A.detach().clone() for experts in experts_of(run.model)]
    run.step()
    for experts, A in zip(experts_of(run.model), before, strict=True):
        moved = (experts.lora_A != A).any(1).view(3, 4)
        assert moved[:, 1].all() == (reserve > 0) and not moved[:, 2:].any()
        E = experts.allocator.E.detach().view(3, 4)
        assert E[:, 0].all() and torch.equal(E[:, 1:], torch.full_like(E[:, 1:], reserve))


def test_the_most_important_grow_until_the_target_is_met() -> None:
    run = Run(model_with(ranks(target_r=2, top_h=5, warmup=3)), steps=30)
    assert taken(run.model) == [[1] * 3] * 4
    run.step(times=3)
    assert taken(run.model) == [[1] * 3] * 4  # still waiting
    totals, last = [], taken(run.model)
    for _ in range(8):
        run.step()
        now = taken(run.model)
        grown = torch.tensor(now).flatten() - torch.tensor(last).flatten()
        if run.done % 2 == 0 and grown.any():
            state = [layer.state for layer in run.stepping.layers["ranks"]]
            score = torch.cat([one["I.mean"] * one["I.uncertainty"] for one in state])
            assert score[grown > 0].min() > score[(grown == 0) & (torch.tensor(last).flatten() < 4)].max()
        assert grown.min() >= 0 and grown.sum() in (0, 5, 2)
        totals.append(sum(map(sum, now)))
        last = now
    assert totals == [17, 17, 22, 22, 24, 24, 24, 24]
    assert not any(experts.allocator.open for experts in experts_of(run.model))
    assert set(run.stepping.tensors()) == {
        f"ranks/{experts.site.name}/I.{part}" for experts in experts_of(run.model) for part in ("mean", "uncertainty")
    }
    for experts, own in zip(experts_of(run.model), last, strict=True):
        assert [single_expert(experts, expert).rank for expert in range(3)] == own


def test_no_expert_has_more_than_r_and_the_last_ranks_are_fewer() -> None:
    run = Run(model_with(ranks(target_r=3, grow=2, top_h=1, warmup=1, interval=1)), steps=40).step(times=30)
    assert max(max(own) for own in taken(run.model)) == 4
    assert sum(map(sum, taken(run.model))) == 3 * 12


def test_with_the_target_at_the_start_nothing_grows() -> None:
    run = Run(model_with(ranks(target_r=1, warmup=1, interval=1))).step(times=4)
    assert taken(run.model) == [[1] * 3] * 4 and not run.stepping.tensors()
    with moelora.disabled(run.model):
        base = run.model(**tiny.given()).logits
    assert not torch.equal(run.model(**tiny.given()).logits, base)


def test_new_ranks_take_shorter_steps_at_first() -> None:
    def moves(warm: bool) -> dict[str, torch.Tensor]:
        model = model_with(ranks(warmup=10), dtype=torch.float64)
        own = experts_of(model)[0].allocator
        own.rank[0] = 2
        if warm:
            own.since[0, 0, 2], own.since[1, 0, 1] = 0, 0
        tiny.shake(model, 0.3)
        own.E.data.fill_(0.1)
        before = {name: p.detach().clone() for name, p in own_parameters(model).items()}
        Run(model).step()
        return {name: p.detach() - before[name] for name, p in own_parameters(model).items()}

    plainly, warm = moves(False), moves(True)
    part = {"lora_A": torch.ones(12), "lora_B": torch.ones(12), "allocator.E": torch.ones(12)}
    part["lora_A"][2] = part["lora_B"][2] = part["allocator.E"][1] = 0.1
    for name, moved in plainly.items():
        per = part[name].unsqueeze(1) if name == "lora_A" else part[name]
        assert moved[2].any() or name == "allocator.E"
        torch.testing.assert_close(warm[name], moved * per, rtol=1e-6, atol=1e-9)


def own_parameters(model: Any) -> dict[str, Any]:
    return dict(experts_of(model)[0].named_parameters())


def test_growth_can_leave_the_update_as_it_is() -> None:
    updates = []
    for continuous in (True, False):
        model = model_with(ranks(continuous=continuous, reserve=0.0))
        layer, own = routed_layers(model)[0], experts_of(model)[0].allocator
        own.E.data[::4] = 1.0
        x = torch.randn(5, layer.in_features, dtype=torch.float64)
        before = layer(x) - layer.base_layer(x)
        run = Run(model)
        held = run.stepping.layers["ranks"][0]
        assert [own._grow(held, expert, 12, 4) for expert in range(3)] == [1, 1, 1]
        updates.append((before, layer(x) - layer.base_layer(x)))
    torch.testing.assert_close(updates[0][1], updates[0][0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(updates[1][1], updates[1][0] / 2, rtol=1e-6, atol=1e-9)


def test_importance_is_of_the_ranks_in_use_and_waits_for_tokens() -> None:
    model = model_with(ranks(per_token=False))
    for experts in experts_of(model):
        experts.allocator.E.data.fill_(0.1)
    run = Run(model)
    now = run.begin()
    model(**tiny.given()).loss.backward()
    layer = run.stepping.layers["ranks"][0]
    E, slope = layer.value("allocator.E"), layer.gradient("allocator.E")
    with torch.no_grad():
        slope[4:8] = 0  # as if no token had used the second expert
    layer.state.update({f"I.{part}": torch.full((3,), 0.5, dtype=torch.float64) for part in ("mean", "uncertainty")})
    run.stepping.before(now)
    run.optimizer.step()
    value = (0.1 * slope).abs().view(3, 4).sum(1) / (32 * 32) ** 0.5
    run.stepping.after(Now(0, 10, 0.05))
    mean = 0.85 * 0.5 + 0.15 * value
    expected = torch.where(torch.tensor([True, False, True]), mean, 0.5)
    torch.testing.assert_close(layer.state["I.mean"], expected)
    assert layer.state["I.uncertainty"][1] == 0.5 and E.shape == (12,)


def test_a_target_beyond_r_is_refused() -> None:
    config: dict[str, Any] = {"router": "meteora", "experts": {"num_experts": 2, "r": 4}}
    with pytest.raises(ConfigError, match=r"ranks.increlora: target_r 5 is more than experts.r, which is 4"):
        resolve({**config, "ranks": ranks(target_r=5)}, Methods())
