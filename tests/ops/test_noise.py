"""Noise on a weight, seen in the output."""

from __future__ import annotations

import pytest
import torch

from moelora.ops.noise import noisy, sample

DEVIATION = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)


def test_a_seed_gives_one_matrix_and_another_seed_another() -> None:
    assert torch.equal(sample(DEVIATION, 8, 3), sample(DEVIATION, 8, 3))
    assert not torch.equal(sample(DEVIATION, 8, 3), sample(DEVIATION, 8, 4))
    state = torch.get_rng_state()
    sample(DEVIATION, 8, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_deviate_as_much_as_they_are_told_to() -> None:
    drawn = sample(DEVIATION, 20000, 0)
    assert drawn.std(1).tolist() == pytest.approx(DEVIATION.tolist(), rel=0.02)
    assert drawn.mean(1).abs().max() < 0.05


def test_it_is_a_product_with_that_matrix_in_both_directions() -> None:
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    E = sample(DEVIATION, 8, 7).double()
    y = noisy(x, DEVIATION, 7)
    assert torch.equal(y, x @ E.t())
    upstream = torch.randn_like(y)
    y.backward(upstream)
    assert torch.equal(x.grad, upstream @ E)


def test_the_matrix_itself_is_not_kept_for_backward() -> None:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        noisy(torch.randn(2, 8, requires_grad=True), DEVIATION.float(), 7)
    assert kept == [3]
