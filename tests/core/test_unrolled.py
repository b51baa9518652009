"""Gradients through training, against hand-made ones and differences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moelora.core.unrolled import unrolled

RATE = 0.3


def omega(alpha: Tensor) -> Tensor:
    return len(alpha) * alpha.softmax(0)


def quadratic(theta: Any, weights: Tensor, goal: Tensor) -> Tensor:
    return 0.5 * (weights * theta["x"] - goal).square().sum()


def bent(theta: Any, weights: Tensor, batch: Tensor) -> Tensor:
    return (torch.tanh(batch @ (weights * theta["x"])) - theta["y"]).square().mean()


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_step_on_a_quadratic_by_hand() -> None:
    theta, alpha, goal, wanted = ({"x": made(3)}, made(3, seed=1), made(3, seed=2), made(3, seed=3))
    moved, gradient = unrolled(quadratic, theta, alpha, omega, [goal], [wanted], RATE)
    w, x = omega(alpha), theta["x"]
    end = x - RATE * w * (w * x - goal)
    torch.testing.assert_close(moved["x"], end)
    through = -RATE * (2 * w * x - goal)  # d end / d w
    slope = (w * end - wanted) * (end + w * through)
    jacobian = torch.diag(w) - w.outer(w) / 3  # d omega / d alpha
    torch.testing.assert_close(gradient, jacobian @ slope)


def test_without_steps_theta_is_where_it_was_and_has_no_say() -> None:
    theta, alpha, wanted = {"x": made(3)}, made(3, seed=1), [made(3, seed=2), made(3, seed=3)]
    moved, gradient = unrolled(quadratic, theta, alpha, omega, [], wanted, RATE)
    w = omega(alpha)
    slope = sum((w * theta["x"] - goal) * theta["x"] for goal in wanted) / 2
    torch.testing.assert_close(gradient, (torch.diag(w) - w.outer(w) / 3) @ slope)
    assert torch.equal(moved["x"], theta["x"]) and not moved["x"].requires_grad and theta["x"].grad is None


def test_several_steps_agree_with_differences_and_differ_from_the_first_order_form() -> None:
    theta, alpha = {"x": made(4), "y": made(1, seed=5)}, made(4, seed=1)
    train, held_out = [made(6, 4, seed=seed) for seed in (6, 7, 8)], [made(5, 4, seed=seed) for seed in (9, 10)]

    def after(alpha: Tensor) -> Tensor:
        moved = {name: value.clone() for name, value in theta.items()}
        for batch in train:
            held = {name: value.requires_grad_() for name, value in moved.items()}
            slopes = torch.autograd.grad(bent(held, omega(alpha), batch), list(held.values()))
            moved = {n: v.detach() - RATE * slope for (n, v), slope in zip(held.items(), slopes, strict=True)}
        return torch.stack([bent(moved, omega(alpha), batch) for batch in held_out]).mean()

    moved, gradient = unrolled(bent, theta, alpha, omega, train, held_out, RATE)
    step = 1e-6
    each = [step * row for row in torch.eye(4, dtype=torch.float64)]
    wanted = torch.stack([(after(alpha + e) - after(alpha - e)) / (2 * step) for e in each])
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)
    first_order = unrolled(bent, moved, alpha, omega, [], held_out, RATE)[1]
    assert (gradient - first_order).norm() > 0.1 * gradient.norm()
    assert abs(float(gradient.sum())) < 1e-12  # a constant more in alpha changes nothing


def test_what_a_loss_does_not_look_at_has_no_gradient_and_stays() -> None:
    theta = {"x": made(3), "unused": made(2, seed=4)}
    moved, gradient = unrolled(quadratic, theta, made(3, seed=1), omega, [made(3, seed=2)], [made(3, seed=3)], RATE)
    assert torch.equal(moved["unused"], theta["unused"]) and gradient.abs().min() > 0
