"""Supervised gate: cross-entropy against the task of the next token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import DataError
from moelora.losses.supervised_gate import SupervisedGate
from tests import tiny

LOSS, ANSWERS = SupervisedGate(1.0), SupervisedGate(1.0, "answers")


def term(logits: Tensor, shape: tuple[int, ...], task: Tensor, mask: Tensor | None = None, **tape: Tensor) -> Tensor:
    return LOSS(tiny.route(logits, 1), tiny.view(shape, mask, task=task, **tape))


def by_hand(logits: Tensor, targets: list[int | None]) -> Tensor:
    """Mean of -log softmax(logits[t])[target] over the tokens that have a target."""
    picked = [-logits[t].log_softmax(-1)[target] for t, target in enumerate(targets) if target is not None]
    return torch.stack(picked).mean()


LOGITS = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_last_token_of_a_sequence_has_no_target() -> None:
    expected = by_hand(LOGITS, [2, 2, 2, None, 0, 0, 0, None])
    torch.testing.assert_close(term(LOGITS, (2, 4), torch.tensor([2, 0])), expected)


def test_targets_are_shifted_by_one() -> None:
    task = torch.tensor([[0, 1, 2, 0], [1, 1, 0, 2]])
    expected = by_hand(LOGITS, [1, 2, 0, None, 1, 0, 2, None])
    torch.testing.assert_close(term(LOGITS, (2, 4), task), expected)


def test_borders_of_packed_sequences_are_ignored() -> None:
    task = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
    expected = by_hand(LOGITS, [0, 0, None, 1, None, 2, 2, None])
    torch.testing.assert_close(term(LOGITS, (1, 8), task, positions=positions), expected)


def test_packing_equals_padding() -> None:
    packed = term(LOGITS, (1, 8), torch.tensor([[1] * 5 + [2] * 3]), positions=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]]))
    padded = torch.randn(10, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    padded[:8] = LOGITS
    torch.testing.assert_close(term(padded, (2, 5), torch.tensor([1, 2]), mask), packed)


def test_tokens_without_a_task_are_ignored() -> None:
    expected = by_hand(LOGITS, [None] * 4 + [1, 1, 1, None])
    torch.testing.assert_close(term(LOGITS, (2, 4), torch.tensor([-1, 1])), expected)
    task = torch.tensor([[0, -1, 2, 2], [-1, 1, -1, -1]])
    expected = by_hand(LOGITS, [None, 2, 2, None, 1, None, None, None])
    torch.testing.assert_close(term(LOGITS, (2, 4), task), expected)


@pytest.mark.parametrize("filler", [0.0, 30.0])
def test_padding_is_ignored_on_either_side(filler: float) -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    logits = torch.where(mask.reshape(-1, 1) == 1, LOGITS, filler * torch.randn(8, 3).double())
    expected = by_hand(LOGITS, [2, 2, None, None, None, None, 1, None])
    torch.testing.assert_close(term(logits, (2, 4), torch.tensor([2, 1]), mask), expected)


def test_answers_counts_the_tokens_that_predict_one_the_last_included() -> None:
    # Labels at positions 2 and 3 of the first row and 1 and 2 of the second, which ends in padding.
    answers = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0]]).bool()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    view = tiny.view((2, 4), mask, task=torch.tensor([2, 0]), answers={"input": answers}).only("answers")
    expected = by_hand(LOGITS, [None, 2, 2, None, 0, 0, None, None])
    torch.testing.assert_close(ANSWERS(tiny.route(LOGITS, 1), view), expected)


def test_answers_stop_at_the_borders_of_packed_sequences() -> None:
    # A label at the start of the second sequence is no answer to the first.
    answers = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0]]).bool()
    tape = {"task": torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2]]), "positions": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])}
    view = tiny.view((1, 8), answers={"input": answers}, **tape).only("answers")
    expected = by_hand(LOGITS, [None, 1, None, 2, 2, None, None, None])
    torch.testing.assert_close(ANSWERS(tiny.route(LOGITS, 1), view), expected)


def test_a_stream_without_answers_keeps_all_its_tokens() -> None:
    mask, task = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), torch.tensor([2, 0])
    view = tiny.view((2, 4), mask, task=task, answers={"decoder": torch.ones(2, 3).bool()}).only("answers")
    torch.testing.assert_close(ANSWERS(tiny.route(LOGITS, 1), view), term(LOGITS, (2, 4), task, mask))


def test_confident_and_right_is_zero() -> None:
    """M5."""
    logits = torch.zeros(8, 3)
    logits[:4, 2] = logits[4:, 0] = 1e3
    assert term(logits, (2, 4), torch.tensor([2, 0])).item() == pytest.approx(0, abs=1e-12)
    assert term(-logits, (2, 4), torch.tensor([2, 0])).item() > 500


def test_one_state_per_sequence_is_not_shifted() -> None:
    # A pooled state has no next token.
    torch.testing.assert_close(term(LOGITS[:2], (2,), torch.tensor([2, 1])), by_hand(LOGITS[:2], [2, 1]))


def test_no_target_at_all_is_zero_with_a_graph() -> None:
    logits = torch.randn(8, 3, requires_grad=True)
    for task, mask in ((torch.tensor([-1, -1]), None), (torch.tensor([0, 1]), torch.zeros(2, 4))):
        nothing = term(logits, (2, 4), task, mask)
        assert nothing.item() == 0 and nothing.requires_grad


def test_missing_tasks() -> None:
    with pytest.raises(DataError, match=r"pass task_ids=\[B\] or \[B, S\]"):
        LOSS(tiny.route(LOGITS, 1), tiny.view((2, 4)))


def test_task_without_an_expert() -> None:
    with pytest.raises(DataError, match="task id 3 at site, but the router has 3 units"):
        term(LOGITS, (2, 4), torch.tensor([0, 3]))


def test_gradient_is_softmax_minus_one_hot() -> None:
    logits = LOGITS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(term(logits, (2, 4), torch.tensor([2, 0])), logits)
    expected = logits.softmax(-1).view(2, 4, 3).clone()
    expected[0, :, 2] -= 1
    expected[1, :, 0] -= 1
    expected[:, 3] = 0
    torch.testing.assert_close(grad.view(2, 4, 3), expected / 6)


def test_a_model_takes_task_ids() -> None:
    model = tiny.adapted("llama", "meteora", losses={"supervised_gate": 0.5})
    batch, routed = tiny.batch(), []
    with moelora.collect(model, lambda view, route: routed.append(route)) as collected:
        model(**batch, task_ids=torch.tensor([0, 1, 2]))
    keep = batch["attention_mask"]
    targets: list[int | None] = [
        row if keep[row, t] and t + 1 < 7 and keep[row, t + 1] else None for row in range(3) for t in range(7)
    ]
    expected = torch.stack([by_hand(route.logits, targets) for route in routed]).mean()
    torch.testing.assert_close(collected.terms[0]["supervised_gate"], expected)


@pytest.mark.parametrize("tokens", ["all", "answers"])
def test_a_packed_batch_gives_the_term_of_a_padded_one(tokens: str) -> None:
    losses = {"supervised_gate": {"weight": 0.5, "tokens": tokens}}
    model = tiny.adapted("llama", "meteora", losses=losses, dtype=torch.float64)
    batch, tasks = tiny.batch(), torch.tensor([2, 0, 1])
    batch["labels"][:, :2] = -100
    lengths = batch["attention_mask"].sum(1).tolist()
    real = batch["attention_mask"].bool()
    packed = {
        "input_ids": batch["input_ids"][real].unsqueeze(0),
        "labels": batch["labels"][real].unsqueeze(0),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
    }
    found = []
    for given, ids in ((batch, tasks), (packed, tasks.repeat_interleave(torch.tensor(lengths)).unsqueeze(0))):
        with moelora.collect(model) as collected:
            model(**given, task_ids=ids, use_cache=False)  # with a cache, transformers does not see the packing
        found.append(collected.terms[0]["supervised_gate"])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)


def test_a_model_without_task_ids_says_so() -> None:
    model = tiny.adapted("llama", "meteora", losses={"supervised_gate": 0.5})
    with pytest.raises(DataError, match="needs the task of every sequence"):
        model(**tiny.batch())
    model.eval()
    assert model(**tiny.batch()).loss.isfinite()  # outside training nobody asks


def test_top_1_gates_learn_from_it() -> None:
    # The language-model loss gives a top-1 gate no gradient, so this is what trains it.
    model = tiny.adapted("llama", "meteora", router={"name": "meteora", "top_k": 1}, losses={"supervised_gate": 1.0})
    before = after = None
    sgd = torch.optim.SGD([p for name, p in tiny.trainable(model).items() if "router" in name], lr=1.0)
    for _ in range(10):
        with moelora.collect(model) as collected:
            model(**tiny.batch(), task_ids=torch.tensor([0, 1, 2]))
        after = collected.terms[0]["supervised_gate"]
        before = after.item() if before is None else before
        sgd.zero_grad()
        after.backward()
        sgd.step()
    assert after.item() < 0.5 * before
