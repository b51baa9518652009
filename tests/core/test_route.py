"""Route: dense gates, loads, and the order of ties."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from moelora.core.route import Route, dense_gates, top_k

INDEX = torch.tensor([[2, 0], [1, 2]])
WEIGHT = torch.tensor([[0.7, 0.3], [0.0, 1.0]])


def test_dense_places_the_gates_and_zeroes_the_rest() -> None:
    dense = Route(WEIGHT, 4, INDEX).dense()
    assert dense.tolist() == [[WEIGHT[0, 1], 0, WEIGHT[0, 0], 0], [0, 0, 1, 0]]


def test_dense_of_a_dense_route_is_its_weight() -> None:
    assert Route(WEIGHT, 2).dense() is WEIGHT


def test_dense_passes_gradients_to_the_chosen_gates() -> None:
    weight = WEIGHT.clone().requires_grad_()
    upstream = torch.arange(8.0).view(2, 4)
    dense_gates(weight, INDEX, 4).backward(upstream)
    assert torch.equal(weight.grad, upstream.gather(1, INDEX))


def test_chosen_counts_a_choice_with_gate_zero() -> None:
    chosen = Route(WEIGHT.requires_grad_(False), 4, INDEX).chosen()
    assert chosen.tolist() == [[1, 0, 1, 0], [0, 1, 1, 0]]


def test_chosen_has_no_gradient() -> None:
    assert not Route(WEIGHT.clone().requires_grad_(), 4, INDEX).chosen().requires_grad


def test_load_counts_tokens_per_unit() -> None:
    route = Route(WEIGHT, 4, INDEX)
    assert route.load().tolist() == [1, 1, 2, 0]
    assert route.load(torch.tensor([True, False])).tolist() == [1, 0, 1, 0]
    assert route.load(torch.tensor([False, False])).tolist() == [0, 0, 0, 0]


def test_load_of_a_dense_route_counts_every_unit() -> None:
    assert Route(torch.rand(3, 4), 4).load().tolist() == [3, 3, 3, 3]


def test_ties_go_to_the_lowest_index() -> None:
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 1.0, 2.0], [3.0, 3.0, 5.0, 3.0]])
    assert top_k(scores, 2).tolist() == [[0, 1], [1, 3], [2, 0]]
    assert top_k(scores, 4).tolist() == [[0, 1, 2, 3], [1, 3, 2, 0], [2, 0, 1, 3]]


def test_ties_in_long_rows_go_to_the_lowest_index() -> None:
    # Unstable sorts give themselves away only in rows longer than their insertion-sort threshold.
    scores = torch.zeros(3, 1000)
    assert torch.equal(top_k(scores, 8), torch.arange(8).expand(3, 8))
    assert torch.equal(top_k(scores, 1000), torch.arange(1000).expand(3, 1000))


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=5), st.integers(1, 6))
def test_top_k_equals_sorting_in_python(rows: list[list[int]], k: int) -> None:
    expected = [sorted(range(6), key=lambda i, row=row: (-row[i], i))[:k] for row in rows]
    assert top_k(torch.tensor(rows, dtype=torch.float32), k).tolist() == expected


def test_top_k_of_no_tokens() -> None:
    assert top_k(torch.zeros(0, 5), 2).shape == (0, 2)


def test_engines_find_the_tensors_of_a_route() -> None:
    # DeepSpeed hooks what modules give back where it is a tensor, or a tuple of them, and refuses other values.
    route = Route(torch.ones(2, 3), 3, probs=torch.ones(2, 3))
    assert isinstance(route, tuple) and type(route)(*route) == route
    assert [type(part).__name__ for part in route] == ["Tensor", "int", "NoneType", "NoneType", "Tensor", "NoneType"]
