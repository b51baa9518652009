"""Localised balance: the squared coefficient of variation of a typed load, sample by expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError, DataError
from moelora.core.route import Route
from moelora.losses.localised_balance import LocalisedBalance
from tests import tiny

TYPES: dict[str, Any] = {"expert_types": [0, 0, 1], "task_types": [1, 0, 0]}
LOSS = LocalisedBalance(1.0, **TYPES, delta=0.25)
GATES = torch.rand(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def term(gates: Tensor, task: Tensor, mask: Tensor | None = None, loss: LocalisedBalance = LOSS) -> Tensor:
    return loss(Route(gates, 3), tiny.view((3, 4), mask, task=task))


def by_hand(gates: Tensor, samples: list[list[int]], task: list[int], delta: float = 0.25) -> Tensor:
    """Z as a loop over samples, their tokens and experts, then torch's variance and mean of the whole matrix."""
    z = []
    for tokens in samples:
        for e in range(3):
            total = gates.new_zeros(())
            for t in tokens:
                same = task[t] >= 0 and TYPES["expert_types"][e] == TYPES["task_types"][task[t]]
                factor = 1.0 if task[t] < 0 else 1 + delta if same else 1 - delta
                total = total + factor * gates[t, e]
            z.append(total)
    return torch.stack(z).var(unbiased=True) / (torch.stack(z).mean() ** 2 + 1e-10)


@pytest.mark.parametrize("per_token", [False, True])
def test_value_and_gradient_are_those_of_the_formula(per_token: bool) -> None:
    mine, theirs = GATES.clone().requires_grad_(), GATES.clone().requires_grad_()
    task = torch.tensor([2, 0, 1]).repeat_interleave(4)
    found = term(mine, task.view(3, 4) if per_token else torch.tensor([2, 0, 1]))
    expected = by_hand(theirs, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]], task.tolist())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-11, atol=1e-12)


def test_tokens_of_a_packed_row_have_their_own_types() -> None:
    task = [0, 0, 1, 1, 1, 2, -1, 0, 2, 2, 2, -1]
    expected = by_hand(GATES, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]], task)
    torch.testing.assert_close(term(GATES, torch.tensor(task).view(3, 4)), expected)


@pytest.mark.parametrize("delta", [0.5, -0.5, 0.0])
def test_it_is_zero_where_the_typed_load_is_level(delta: float) -> None:
    # With delta above zero, experts of the sample's type then carry less than the others.
    loss = LocalisedBalance(1.0, **TYPES, delta=delta)
    task = torch.tensor([0, 1, 2])
    same = torch.tensor([[False, False, True], [True, True, False], [True, True, False]])
    level = (1 / torch.where(same, 1 + delta, 1 - delta)).repeat_interleave(4, 0)
    assert term(level, task, loss=loss).item() == pytest.approx(0, abs=1e-9)
    assert bool(level[::4][same].max() < level[::4][~same].min()) == (delta > 0)
    assert term(torch.eye(3).repeat(4, 1), task, loss=loss) > 0


def test_one_expert_for_all_is_the_number_of_experts_at_delta_zero() -> None:
    one = torch.tensor([[0.0, 1.0, 0.0]]).double().expand(12, 3)
    found = term(one, torch.tensor([0, 1, 2]), loss=LocalisedBalance(1.0, **TYPES, delta=0.0))
    assert found.item() == pytest.approx(9 / 8 * (3 - 1))  # unbiased: 9 entries


def test_the_size_of_the_gates_does_not_matter() -> None:
    task = torch.tensor([0, 1, 2])
    torch.testing.assert_close(term(7 * GATES, task), term(GATES, task), rtol=1e-8, atol=0)


@pytest.mark.parametrize("filler", [0.0, 50.0])
def test_padding_and_rows_of_padding_change_nothing(filler: float) -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    gates = torch.where(mask.reshape(-1, 1) == 1, GATES, filler * torch.rand(12, 3).double())
    task = torch.tensor([1, 0, 2])
    expected = by_hand(GATES, [[0, 1, 2], [5, 6, 7]], task.repeat_interleave(4).tolist())
    torch.testing.assert_close(term(gates, task, mask), expected)


def test_answers_are_counted_alone() -> None:
    answers = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]).bool()
    task = torch.tensor([1, 0, 2])
    view = tiny.view((3, 4), task=task, answers={"input": answers}).only("answers")
    expected = by_hand(GATES, [[1, 2], [4], [11]], task.repeat_interleave(4).tolist())
    torch.testing.assert_close(LOSS(Route(GATES, 3), view), expected)


def test_nothing_to_compare_is_zero_with_a_graph() -> None:
    gates = GATES.clone().requires_grad_()
    nothing = term(gates, torch.tensor([0, 1, 2]), torch.zeros(3, 4))
    one = LocalisedBalance(1.0, expert_types=[0], task_types=[0], delta=0.1)
    alone = one(Route(gates[:4, :1], 1), tiny.view((1, 4), task=torch.tensor([0])))
    for found in (nothing, alone):
        found.backward(retain_graph=True)
        assert found.item() == 0 and gates.grad.isfinite().all()


def test_chosen_gates_count_as_what_they_are() -> None:
    index = torch.tensor([[0, 2]]).expand(12, 2)
    dense = torch.zeros(12, 3).double().scatter(1, index, GATES[:, :2])
    task = torch.tensor([0, 1, 2])
    sparse = LOSS(Route(GATES[:, :2], 3, index), tiny.view((3, 4), task=task))
    torch.testing.assert_close(sparse, term(dense, task))


def test_one_state_per_sequence_is_a_sample_of_one_token() -> None:
    found = LOSS(Route(GATES[:2], 3), tiny.view((2,), task=torch.tensor([0, 1])))
    torch.testing.assert_close(found, by_hand(GATES, [[0], [1]], [0, 1]))


def test_lengths_and_types_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"task_types has \[2\], a type that no expert has; expert_types is \[0, 1\]"):
        LocalisedBalance(1.0, expert_types=[0, 1], task_types=[0, 2], delta=0.1)
    with pytest.raises(ConfigError, match="expert_types has 3 entries, but the router chooses between 4"):
        LOSS.admit(4)
    with pytest.raises(DataError, match="task id 3, but task_types has 3 entries"):
        term(GATES, torch.tensor([0, 3, 1]))
    with pytest.raises(DataError, match="needs the task of every sequence"):
        LOSS(Route(GATES, 3), tiny.view((3, 4)))


@pytest.mark.parametrize("spec", [{"delta": 0.1}, {**TYPES}, {**TYPES, "delta": 2.0}, {**TYPES, "expert_types": []}])
def test_options_must_be_given_and_sensible(spec: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"losses\.localised_balance\."):
        moelora.adapt(tiny.llama(), {**tiny.METHODS["meteora"], "losses": {"localised_balance": {"weight": 1, **spec}}})


def test_a_model_learns_from_it() -> None:
    losses = {"localised_balance": {"weight": 1.0, **TYPES, "delta": -0.5}}
    model = tiny.adapted("llama", "meteora", router={"name": "meteora", "top_k": 3}, losses=losses)
    sgd = torch.optim.SGD([p for name, p in tiny.trainable(model).items() if "router" in name], lr=0.5)
    seen = []
    for _ in range(6):
        with moelora.collect(model) as collected:
            model(**tiny.batch(), task_ids=torch.tensor([0, 1, 2]))
        sgd.zero_grad()
        collected.terms[0]["localised_balance"].backward()
        sgd.step()
        seen.append(collected.terms[0]["localised_balance"].item())
    assert seen[-1] < 0.8 * seen[0]
