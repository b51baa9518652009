"""ALLoRA: a row's rate goes by its length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.optim.bench import EXPERTS, OUT, RANK, WIDE, Bench, full, unused


def bench(
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, spec: dict[str, Any] | None = None, **more: Any
) -> Bench:
    return Bench({"name": "allora", **(spec or {})}, optimizer, **more)


def f(rows: Tensor, eta: float = 2.0) -> Tensor:
    """The formula for rows [..., n]."""
    return 1 / (rows.pow(2).sum(-1, keepdim=True).sqrt() + 1 / eta**2).sqrt()


def test_a_row_of_zeros_has_eta_and_longer_rows_less() -> None:
    made = bench(spec={"eta": 3.0, "exponent": 0.7})
    lengths = torch.tensor([0.0, 0.1, 1.0, 50.0, 1e6], dtype=torch.float64)
    rows = torch.nn.functional.one_hot(torch.zeros(5, dtype=torch.long), WIDE) * lengths.unsqueeze(1)
    factors = made.method.factors(made.stepping.layers["optim"][0], "lora_A", rows)[:, 0]
    assert factors[0] == pytest.approx(3.0, rel=1e-12)
    assert (factors.diff() < 0).all()
    assert factors[4] == pytest.approx(1e6**-0.7, rel=1e-5)


def test_rows_of_b_are_those_of_each_expert() -> None:
    made = bench()
    factors = made.method.factors(made.stepping.layers["optim"][0], "lora_B", made.experts.lora_B.detach())
    found = factors.unflatten(1, (EXPERTS, RANK)).transpose(0, 1)
    torch.testing.assert_close(found, f(made.up).expand(-1, OUT, RANK), rtol=1e-12, atol=0)


def test_adamw_takes_its_own_step_with_a_rate_for_every_row_for_several_steps() -> None:
    made = bench(torch.optim.AdamW, lr=0.05, decay=0.3)
    A, B = made.down, made.up
    moments = {"A": [torch.zeros_like(A)] * 2, "B": [torch.zeros_like(B)] * 2}
    for step in range(1, 4):
        G = full(step)
        dA, dB = made.gradients(G)
        made.step(G)
        found = {}
        for name, value, gradient in (("A", A, dA), ("B", B, dB)):
            m, v = moments[name]
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            moments[name] = [m, v]
            adam = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            found[name] = value - 0.05 * f(value) * (adam + 0.3 * value)
        A, B = found["A"], found["B"]
        torch.testing.assert_close(made.down, A, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(made.up, B, rtol=1e-9, atol=1e-9)
    assert not made.stepping.tensors(), "a checkpoint would hold what is only there within a step"


def test_with_sgd_scaling_the_step_is_scaling_the_gradient() -> None:
    one, two = bench(spec={"mode": "lr"}), bench(spec={"mode": "grad"})
    for seed in range(3):
        one.step(full(seed))
        two.step(full(seed))
    torch.testing.assert_close(two.down, one.down, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(two.up, one.up, rtol=1e-10, atol=1e-10)
    assert not torch.equal(one.down, bench().down)


def test_a_itself_can_be_left_out() -> None:
    made, plain = bench(spec={"targets": "B"}), Bench("plain")
    B = made.up
    for m in (made, plain):
        m.step(full())
    torch.testing.assert_close(made.down, plain.down, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.up - B, f(B) * (plain.up - B), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["lr", "grad"])
def test_an_unused_expert_stays_bit_for_bit(mode: str) -> None:
    made = bench(torch.optim.AdamW, {"mode": mode}, decay=0.3)
    made.step(full(0))
    A, B = made.down, made.up
    made.step(unused(full(1)))
    assert torch.equal(made.down[1], A[1]) and torch.equal(made.up[1], B[1])
    assert not torch.equal(made.down[2], A[2])


def test_a_skipped_step_leaves_everything_as_it_is() -> None:
    made = bench()
    made.give(*made.gradients(full()))
    A = made.down
    made.stepping.begin(made.now)
    made.stepping.skip(made.now)
    assert torch.equal(made.down, A) and not made.stepping.tensors()


@pytest.mark.parametrize("name", ["hydra", "core"])
def test_other_experts_with_a_b_take_it_too(name: str) -> None:
    router = "comol" if name == "core" else "softmax"
    made = Bench("allora", router=router, experts={"name": name})
    plain = Bench("plain", router=router, experts={"name": name})
    B = made.experts.lora_B.detach().clone()
    for m in (made, plain):
        for p in m.engine.parameters.values():
            p.grad = torch.ones_like(p)
        m.stepping.before(m.now)
        m.optimizer.step()
        m.stepping.after(m.now)
    rows = B.unflatten(1, (-1, RANK))
    expected = B + (f(rows) * (plain.experts.lora_B - B).unflatten(1, (-1, RANK))).flatten(1)
    torch.testing.assert_close(made.experts.lora_B.detach(), expected, rtol=1e-10, atol=1e-10)
