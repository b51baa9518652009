"""Around the optimiser step: where a gradient is exactly zero nothing changes, and methods see whole pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moelora.core.step import Now, Trained
from moelora.model.record import routed_layers
from moelora.optim.base import Pair, PairOptim
from moelora.train.engine import Engine
from moelora.train.stepping import Stepping
from tests import tiny

NOW = Now(0, 10, 0.1)


def steps(gradients: list[Tensor], watched: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """A weight and its AdamW state after steps with these gradients; by the engine, or by torch alone."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 4, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    if watched:
        Engine(layer, layer, optimizer)
    for gradient in gradients:
        layer.weight.grad = gradient.clone()
        optimizer.step()
    return layer.weight.detach(), optimizer.state[layer.weight]


def test_what_has_no_gradient_keeps_value_and_moments_and_the_rest_is_adamw() -> None:
    gradients = [torch.randn(4, 3) for _ in range(4)]
    before, state_before = steps(gradients[:2], True)
    held, moments = before.clone(), {key: value.clone() for key, value in state_before.items()}
    resting = [*gradients[:2], *(g.index_fill(0, torch.tensor([1, 3]), 0.0) for g in gradients[2:])]
    after, state = steps(resting, True)
    plain, plain_state = steps(gradients, False)
    for row in (1, 3):
        assert torch.equal(after[row], held[row])
        assert all(torch.equal(state[key][row], moments[key][row]) for key in ("exp_avg", "exp_avg_sq"))
        assert not torch.equal(plain[row], held[row])
    for row in (0, 2):
        assert torch.equal(after[row], plain[row])
        assert torch.equal(state["exp_avg_sq"][row], plain_state["exp_avg_sq"][row])


def test_a_first_step_without_gradient_leaves_moments_of_zero() -> None:
    torch.manual_seed(0)
    weight = nn.Linear(3, 4, bias=False).weight.detach()
    after, state = steps([torch.zeros(4, 3)], True)
    assert torch.equal(after, weight) and not state["exp_avg"].any() and not state["exp_avg_sq"].any()


class Doubled(PairOptim):
    """Doubles dA, counts in its state, and remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[Pair] = []

    def change(self, pair: Pair, now: Now) -> tuple[Tensor, Tensor]:
        self.seen.append(pair)
        pair.state["count"] = pair.state.get("count", torch.zeros(len(pair.A), 1)) + 1
        return 2 * pair.dA, torch.ones_like(pair.dB)


def test_pairs_are_those_of_each_expert_and_unused_ones_are_left_alone() -> None:
    model = tiny.adapted("llama", "meteora").train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    engine, method = Engine(model, model, optimizer), Doubled()
    stepping = Stepping(model, engine, method)
    model(**tiny.batch()).loss.backward()
    layer = routed_layers(model)[0]
    experts, r = layer.experts, layer.experts.r
    with torch.no_grad():  # as if no token had used the second expert
        experts.lora_A.grad[r : 2 * r], experts.lora_B.grad[:, r : 2 * r] = 0, 0
    A, B = experts.lora_A.detach().clone(), experts.lora_B.detach().clone()
    dA = experts.lora_A.grad.clone()
    stepping.before(NOW)
    pair = method.seen[0]
    assert torch.equal(pair.A[2], A[2 * r : 3 * r]) and torch.equal(pair.B[2], B[:, 2 * r : 3 * r])
    assert pair.live.tolist()[:3] == [True, False, True]
    torch.testing.assert_close(experts.lora_A.grad, 2 * dA)
    used = torch.ones_like(B)
    used[:, r : 2 * r] = 0
    assert torch.equal(experts.lora_B.grad, used)
    kept = stepping.tensors()[f"optim/{layer.site.name}/count"]
    assert kept[:3, 0].tolist() == [1, 0, 1]
    optimizer.step()
    assert torch.equal(experts.lora_A[r : 2 * r], A[r : 2 * r])
    assert torch.equal(experts.lora_B[:, r : 2 * r], B[:, r : 2 * r])
    assert not torch.equal(experts.lora_A[:r], A[:r])


def stepped(method: PairOptim, model: Any, optimizer: torch.optim.Optimizer) -> Stepping:
    """One step of a method on a model, without the optimiser's own."""
    stepping = Stepping(model, Engine(model, model, optimizer), method)
    model(**tiny.batch()).loss.backward()
    stepping.before(NOW)
    return stepping


def test_every_rank_is_a_pair_where_a_router_chooses_ranks() -> None:
    model, method = tiny.adapted("llama", "smora").train(), Doubled()
    stepped(method, model, torch.optim.SGD(tiny.trainable(model).values(), lr=0.1))
    experts, pair = routed_layers(model)[0].experts, method.seen[0]
    assert pair.A.shape == (8, 1, experts.site.in_features) and pair.B.shape == (8, experts.site.out_features, 1)
    assert torch.equal(pair.A[5, 0] * pair.live[5], experts.lora_A[5] * pair.live[5])
    assert torch.equal(pair.B[5, :, 0] * pair.live[5], experts.lora_B[:, 5] * pair.live[5])


class Frozen(Doubled):
    """Also freezes the first rank of every expert, as a method of another axis does by a gradient of zeros."""

    def before_step(self, layers: Sequence[Trained], now: Now) -> None:
        for layer in layers:
            for name, dim in (("lora_A", 0), ("lora_B", 1)):
                parts = layer.gradient(name).unflatten(dim, (-1, 4)).clone()
                layer.set_gradient(name, parts.index_fill_(dim + 1, FIRST, 0).flatten(dim, dim + 1))
        super().before_step(layers, now)


FIRST = torch.tensor([0])


def test_a_rank_without_gradient_is_zero_in_its_pair_and_gets_none() -> None:
    model, method = tiny.adapted("llama", "meteora").train(), Frozen()
    optimizer = torch.optim.AdamW(tiny.trainable(model).values(), lr=0.1, weight_decay=0.5)
    held = {name: p.detach().clone() for name, p in tiny.trainable(model).items()}
    stepped(method, model, optimizer)
    pair = method.seen[0]
    assert not pair.ranks[:, 0].any() and pair.ranks[pair.live][:, 1:].all()
    assert not pair.A[:, 0].any() and not pair.B[:, :, 0].any() and pair.A[pair.live][:, 1:].any()
    optimizer.step()
    for name, p in tiny.trainable(model).items():
        if name.endswith("lora_B"):
            moved = (p != held[name]).unflatten(1, (-1, 4)).any(0)
            assert not moved[:, 0].any() and moved[:, 1:].any()


class Whole(Doubled):
    """A whole step."""

    whole_step = True


def test_a_whole_step_is_taken_once_with_its_decay_and_routers_are_left_to_torch() -> None:
    model, method = tiny.adapted("llama", "meteora").train(), Whole()
    optimizer = torch.optim.AdamW(tiny.trainable(model).values(), lr=0.1, weight_decay=0.5)
    held = {name: p.detach().clone() for name, p in tiny.trainable(model).items()}
    stepping = Stepping(model, Engine(model, model, optimizer), method)
    model(**tiny.batch()).loss.backward()
    gradients = tiny.gradients(model)
    stepping.before(Now(0, 10, 0.1, 0.5))
    optimizer.step()
    for name, p in tiny.trainable(model).items():
        if ".experts." in name:
            step = 2 * gradients[name] if name.endswith("lora_A") else torch.ones_like(p)
            live = (gradients[name] != 0).any(1 if name.endswith("lora_A") else 0, keepdim=True)
            expected = torch.where(live & (step != 0), 0.95 * held[name] - 0.1 * step, held[name])
            torch.testing.assert_close(p.detach(), expected)
            assert not optimizer.state[p]["exp_avg"].any()
        else:
            assert optimizer.state[p]["exp_avg"].any() and not torch.equal(p, held[name])
