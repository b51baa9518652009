"""Routing statistics from small hand-made routes."""

from __future__ import annotations

import math

import pytest
import torch

from moelora.core.route import Route
from moelora.core.tape import Site, Tape, View
from moelora.eval.routing import RoutingStats

SITE = Site("model.layers.0.q_proj", 0, 4, 4)


def view(task: list[int], mask: list[bool] | None = None) -> View:
    shape = torch.Size([1, len(task)])
    return View(Tape(), SITE, shape, None if mask is None else torch.tensor(mask), torch.tensor(task))


def test_loads_are_shares_of_gate_mass_by_task() -> None:
    stats = RoutingStats(["a", "b"])
    weight = torch.tensor([[3.0, 1.0], [2.0, 2.0], [8.0, 0.0], [1.0, 1.0]])
    index = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1]])
    stats(view([0, 0, 1, -1]), Route(weight, 3, index))
    expected = torch.tensor([[0.75 / 2, 0.75 / 2, 0.25], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(stats.load(SITE.name), expected)
    torch.testing.assert_close(stats.overall(SITE.name), torch.tensor([0.75, 0.75, 1.5]) / 3)
    assert stats.tokens[SITE.name].tolist() == [2, 1]


def test_padding_does_not_count_and_passes_add_up() -> None:
    once, twice = RoutingStats(["a"]), RoutingStats(["a"])
    gates = torch.rand(4, 3)
    once(view([0, 0, 0, 0], [True, True, False, True]), Route(gates, 3))
    twice(view([0, 0]), Route(gates[:2], 3))
    twice(view([0]), Route(gates[3:], 3))
    torch.testing.assert_close(once.mass[SITE.name], twice.mass[SITE.name])


def test_figures_of_even_collapsed_and_specialised_routers() -> None:
    def figures(weight: torch.Tensor, tasks: list[int]) -> dict[str, float]:
        stats = RoutingStats(["a", "b"])
        stats(view(tasks), Route(weight, weight.shape[1]))
        return stats.summary()

    even = figures(torch.ones(4, 4), [0, 0, 1, 1])
    assert even == pytest.approx({"load_entropy": 1.0, "top_share": 0.25, "dead": 0.0, "specialisation": 0.0}, abs=1e-6)
    one = torch.zeros(4, 4)
    one[:, 2] = 1
    collapsed = figures(one, [0, 0, 1, 1])
    assert collapsed == pytest.approx(
        {"load_entropy": 0.0, "top_share": 1.0, "dead": 0.75, "specialisation": 0.0}, abs=1e-6
    )
    apart = figures(torch.eye(2)[[0, 0, 1, 1]], [0, 0, 1, 1])
    assert apart["specialisation"] == pytest.approx(0.5)
    assert apart["load_entropy"] == pytest.approx(1.0)


def test_a_router_with_one_unit_has_nothing_to_show() -> None:
    stats = RoutingStats(["a"])
    stats(view([0]), Route(torch.ones(1, 1), 1))
    assert stats.summary() == {}
    assert not math.isnan(float(len(stats.to_json()["sites"])))
