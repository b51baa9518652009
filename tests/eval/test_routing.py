"""Routing statistics from small hand-made routes, and the alarm that reads them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moelora.core.route import Route
from moelora.core.tape import Site, Tape, View
from moelora.eval.routing import CollapseAlarm, RoutingStats

SITE = Site("model.layers.0.q_proj", 0, 4, 4)
OTHER = Site("model.layers.1.q_proj", 1, 4, 4)
FIGURES = ["load_entropy", "top_share", "dead", "specialisation", "top1", "token_entropy", "agreement"]


def view(task: list[int] | None, mask: list[bool] | None = None, site: Site = SITE, tokens: int = 0) -> View:
    shape = torch.Size([1, tokens if task is None else len(task)])
    masked = None if mask is None else torch.tensor(mask)
    return View(Tape(), site, shape, masked, None if task is None else torch.tensor(task))


def figures(weight: Tensor, task: list[int], tasks: int = 2, index: Tensor | None = None) -> dict[str, float]:
    stats = RoutingStats([str(number) for number in range(tasks)])
    stats(view(task), Route(weight, weight.shape[1] if index is None else 4, index))
    return stats.layers[SITE.name].figures


def test_loads_are_shares_of_gate_mass_by_task() -> None:
    stats = RoutingStats(["a", "b"])
    weight = torch.tensor([[3.0, 1.0], [2.0, 2.0], [8.0, 0.0], [1.0, 1.0]])
    index = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1]])
    stats(view([0, 0, 1, -1]), Route(weight, 3, index))
    expected = torch.tensor([[0.75 / 2, 0.75 / 2, 0.25], [0.0, 0.0, 1.0]]).double()
    layer = stats.layers[SITE.name]
    torch.testing.assert_close(layer.load, expected)
    torch.testing.assert_close(layer.overall, torch.tensor([0.75, 0.75, 1.5]).double() / 3)
    assert layer.tokens.tolist() == [2, 1]
    assert layer.chosen.tolist() == [4, 1]  # a chosen unit with a gate of zero is not chosen
    assert layer.first.tolist() == [[1, 0.5, 0.5], [0, 0, 1]]  # equal gates are first in equal parts


def test_padding_and_unknown_tasks_do_not_count_and_passes_add_up() -> None:
    once, twice = RoutingStats(["a", "b"]), RoutingStats(["a", "b"])
    gates = torch.rand(6, 3)
    once(view([0, 1, 0, 1, 2, -1], [True, True, False, True, True, True]), Route(gates, 3))
    twice(view([0, 1]), Route(gates[:2], 3))
    assert twice.layers[SITE.name].tokens.tolist() == [1, 1]  # what was asked for before counts on
    twice(view([1]), Route(gates[3:4], 3))
    torch.testing.assert_close(once.sums, twice.sums)
    assert once.summary() == pytest.approx(twice.summary())


def test_without_task_ids_all_tokens_are_of_the_first_task() -> None:
    stats = RoutingStats(["a", "b"])
    stats(view(None, tokens=5), Route(torch.rand(5, 3), 3))
    assert stats.layers[SITE.name].tokens.tolist() == [5, 0]


def test_figures_of_an_even_router() -> None:
    found = figures(torch.ones(4, 4), [0, 0, 1, 1])
    expected = dict(zip(FIGURES, [1.0, 0.25, 0.0, 0.0, 0.25, 1.0, 0.0], strict=True))
    assert found == pytest.approx(expected, abs=1e-6)


def test_figures_of_a_collapsed_router() -> None:
    one = torch.zeros(4, 4)
    one[:, 2] = 1
    found = figures(one, [0, 0, 1, 1])
    assert found == pytest.approx(dict(zip(FIGURES, [0.0, 1.0, 0.75, 0.0, 1.0, 0.0, 0.0], strict=True)), abs=1e-6)


def test_figures_of_a_router_by_task() -> None:
    found = figures(torch.eye(2)[[0, 0, 1, 1]], [0, 0, 1, 1])
    assert found == pytest.approx(dict(zip(FIGURES, [1.0, 0.5, 0.0, 0.5, 0.5, 0.0, 1.0], strict=True)), abs=1e-6)


def test_the_signs_of_gates_do_not_matter() -> None:
    gates = torch.rand(6, 4)
    assert figures(-gates, [0, 1] * 3) == pytest.approx(figures(gates, [0, 1] * 3))


def test_top1_and_token_entropy_by_hand() -> None:
    weight = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.5, 0.5], [0.7, 0.3], [0.6, 0.4]])
    index = torch.tensor([[0, 1], [0, 2], [1, 0], [3, 0], [0, 3]])
    found = figures(weight, [0, 0, 1, 1, 1], index=index)
    assert found["top1"] == pytest.approx((1 + 1 + 0.5 + 1) / 5)
    by_hand = sum(-p * math.log(p) for row in weight.tolist() for p in row) / 5 / math.log(4)
    assert found["token_entropy"] == pytest.approx(by_hand)


def test_agreement_is_mutual_information_by_the_entropy_of_the_task() -> None:
    first = [0, 0, 1, 2, 2, 2, 1, 3]
    task = [0, 0, 0, 0, 1, 1, 1, 1]
    pairs, n = list(zip(first, task, strict=True)), len(first)
    information = sum(
        1 / n * math.log((pairs.count(pair) / n) / ((first.count(pair[0]) / n) * (task.count(pair[1]) / n)))
        for pair in pairs
    )
    assert figures(torch.eye(4)[first], task)["agreement"] == pytest.approx(information / math.log(2))


@pytest.mark.parametrize(
    ("first", "task", "tasks", "expected"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], 4, 1.0),
        ([3, 2, 0, 1], [0, 0, 1, 1], 2, 1.0),  # two units each: the unit tells the task all the same
        ([0, 0, 1, 1], [0, 1, 2, 3], 4, 0.5),  # two tasks a unit
        ([0, 1, 0, 1], [0, 0, 1, 1], 2, 0.0),
        ([0, 1, 2, 3], [1, 1, 1, 1], 2, 0.0),  # one task seen: nothing to tell
        ([0, 1, 2, 3], [0, 0, 0, 0], 1, 0.0),
    ],
)
def test_agreement_at_its_ends(first: list[int], task: list[int], tasks: int, expected: float) -> None:
    assert figures(torch.eye(4)[first], task, tasks)["agreement"] == pytest.approx(expected, abs=1e-9)


def test_the_summary_is_the_mean_over_layers() -> None:
    stats = RoutingStats(["a", "b"])
    stats(view([0, 1] * 20), Route(torch.eye(4)[[0, 1] * 20], 4))
    stats(view([0, 1] * 20, site=OTHER), Route(torch.ones(40, 2), 2))
    summary = stats.summary()
    assert summary["agreement"] == pytest.approx(0.5)
    assert summary["token_entropy"] == pytest.approx(0.5)
    assert summary["collapsed"] == 0
    assert list(summary) == [*FIGURES, "collapsed"]


def test_json_has_every_layer_rounded() -> None:
    stats = RoutingStats(["a", "b"])
    stats(view([0, 1, 1]), Route(torch.tensor([[1.0, 2.0, 4.0]]).expand(3, 3), 3))
    found = json.loads(json.dumps(stats.to_json()))
    assert found["tasks"] == ["a", "b"]
    assert found["sites"][SITE.name]["load"] == [[0.14286, 0.28571, 0.57143]] * 2
    assert found["sites"][SITE.name]["units"] == 3
    assert set(found["sites"][SITE.name]) == {"load", "units", *FIGURES}
    assert set(found["summary"]) == {*FIGURES, "collapsed"}


def test_a_router_with_one_unit_has_nothing_to_show() -> None:
    stats = RoutingStats(["a"])
    stats(view([0]), Route(torch.ones(1, 1), 1))
    stats.reduce(lambda value: 2 * value)
    assert stats.summary() == {}
    assert stats.to_json() == {"tasks": ["a"], "sites": {}, "summary": {}}


def test_no_token_at_all_gives_figures_without_nan() -> None:
    found = figures(torch.rand(3, 4), [-1, -1, -1])
    assert all(math.isfinite(value) for value in found.values())


def test_the_sums_of_processes_add_up() -> None:
    apart, together = [RoutingStats(["a", "b"]) for _ in range(2)], RoutingStats(["a", "b"])
    for number, stats in enumerate(apart):
        for site, units in ((SITE, 3), (OTHER, 5)):
            gates = torch.rand(7, units, generator=torch.Generator().manual_seed(number))
            for each in (stats, together):
                each(view([0, 1, 1, 0, 1, 0, 0], site=site), Route(gates, units))
    sent: list[Tensor] = []

    def add_up(value: Tensor) -> Tensor:
        sent.append(value)
        return value + apart[1]._flat()

    before = apart[0].layers[SITE.name].tokens.sum()
    apart[0].reduce(add_up)
    assert apart[0].layers[SITE.name].tokens.sum() == 2 * before
    assert len(sent) == 1  # one message, however many layers
    torch.testing.assert_close(apart[0].sums, together.sums)
    assert apart[0].summary() == pytest.approx(together.summary())


def test_watching_leaves_the_device_alone_until_asked() -> None:
    """Every operator a layer adds, on the meta device, where reading a value would fail."""
    stats = RoutingStats(["a", "b"])
    gates = torch.rand(6, 4, device="meta")
    seen = View(Tape(), SITE, torch.Size([1, 6]), torch.ones(6, device="meta").bool(), gates[:, 0].long())
    for route in (Route(gates, 4), Route(gates[:, :2], 4, torch.zeros(6, 2, device="meta").long())):
        stats(seen, route)
        stats(seen, route)
    assert stats.sums[SITE.name].shape == (2, 11)


def one_for_all(tokens: int = 60, units: int = 4) -> Route:
    return Route(torch.ones(tokens, 1), units, torch.full((tokens, 1), 2))


def spread(tokens: int = 60, units: int = 4) -> Route:
    return Route(torch.ones(tokens, 1), units, (torch.arange(tokens) // 2 % units).unsqueeze(1))


def step(*routes: Route, task: list[int] | None = None) -> RoutingStats:
    """One step's statistics: one route per layer, two tasks in turn unless said otherwise."""
    stats = RoutingStats(["a", "b"])
    for number, route in enumerate(routes):
        tokens = len(route.weight)
        site = Site(f"layer.{number}", number, 4, 4)
        stats(view([0, 1] * (tokens // 2) if task is None else task, site=site), route)
    return stats


def test_a_collapse_is_reported_at_the_second_step_in_a_row() -> None:
    alarm = CollapseAlarm()
    assert alarm.update(step(one_for_all(), spread())) is None
    said = alarm.update(step(one_for_all(), spread()))
    assert said is not None and "\n" not in said
    assert said.startswith("warning: routing has collapsed in 1 of 2 layers; worst is layer.0: one of its 4 units")
    assert "first choice of 100 % of the tokens, 3 are dead, load entropy 0.00" in said
    assert "try losses: {balance: 0.01} or a lower learning rate" in said


def test_it_is_said_once_and_again_when_more_layers_collapse() -> None:
    alarm, one, two = CollapseAlarm(), step(one_for_all(), spread()), step(one_for_all(), one_for_all())
    said = [alarm.update(stats) for stats in (one, one, one, two, two, two, one, one, two, two)]
    assert [None if text is None else text.split(";")[0][-13:] for text in said] == [
        None, "1 of 2 layers", None, None, "2 of 2 layers", None, None, None, None, None,
    ]  # fmt: skip


def test_one_bad_step_is_not_enough() -> None:
    alarm, bad, good = CollapseAlarm(), step(one_for_all(), spread()), step(spread(), spread())
    other = step(spread(), one_for_all())  # bad twice in a row, but not the same layer
    assert [alarm.update(stats) for stats in (bad, good, bad, other, good)] == [None] * 5


def mostly(share: float, tokens: int = 400) -> Route:
    """Of eight units, one is the first choice of this share of tokens; seconds are spread over all others."""
    first = torch.where(torch.arange(tokens) < share * tokens, 0, 1 + torch.arange(tokens) % 7)
    second = (first + 1 + torch.arange(tokens) % 7) % 8
    return Route(torch.tensor([[0.6, 0.4]]).expand(tokens, 2), 8, torch.stack([first, second], 1))


@pytest.mark.parametrize(("share", "collapsed"), [(0.97, True), (0.94, False)])
def test_a_favourite_of_95_percent_of_the_tokens_is_a_collapse(share: float, collapsed: bool) -> None:
    stats = step(mostly(share))
    assert stats.layers["layer.0"].figures["dead"] == 0
    assert stats.layers["layer.0"].collapsed is collapsed
    assert stats.summary()["collapsed"] == collapsed


@pytest.mark.parametrize(("used", "collapsed"), [(3, True), (4, False), (8, False)])
def test_more_than_half_of_the_units_dead_is_a_collapse(used: int, collapsed: bool) -> None:
    route = Route(torch.ones(80, 1), 8, (torch.arange(80) // 2 % used).unsqueeze(1))
    assert step(route).layers["layer.0"].collapsed is collapsed


def test_soft_mixtures_of_all_units_may_have_a_favourite() -> None:
    # The same unit is a little ahead for every token: nothing has collapsed.
    rather_even = torch.tensor([[0.3, 0.25, 0.25, 0.2]]).expand(60, 4)
    stats = step(Route(rather_even, 4), Route(torch.ones(60, 4), 4))
    assert stats.layers["layer.0"].figures["top1"] == 1
    assert [layer.collapsed for layer in stats.layers.values()] == [False, False]
    sharp = torch.tensor([[0.9, 0.04, 0.03, 0.03]]).expand(60, 4)
    assert step(Route(sharp, 4)).layers["layer.0"].collapsed is True
    two_of_four = Route(rather_even[:, :2], 4, torch.tensor([[0, 1]]).expand(60, 2))
    assert step(two_of_four).layers["layer.0"].collapsed is True


@pytest.mark.parametrize(
    ("route", "task"),
    [(one_for_all(38), None), (one_for_all(60), [1] * 60), (one_for_all(60), [-1] * 60)],
    ids=["few tokens", "one task of two", "no token of a known task"],
)
def test_a_step_that_says_nothing_neither_raises_nor_clears(route: Route, task: list[int] | None) -> None:
    alarm, nothing, bad = CollapseAlarm(), step(route, task=task), step(one_for_all())
    assert nothing.layers["layer.0"].collapsed is None
    assert nothing.summary()["collapsed"] == 0
    assert alarm.update(nothing) is None and alarm.update(nothing) is None
    assert alarm.update(bad) is None
    assert alarm.update(nothing) is None
    assert alarm.update(bad) is not None


def test_the_worst_layer_is_named() -> None:
    alarm, stats = CollapseAlarm(), step(mostly(0.97), one_for_all(), spread())
    alarm.update(stats)
    said: Any = alarm.update(stats)
    assert "2 of 3 layers; worst is layer.1" in said
