"""AltLoRA: one factor at a time, by its least squares, with a momentum that follows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moelora.core.errors import ConfigError
from moelora.recipe import check_recipe
from tests.optim.bench import EXPERTS, OUT, RANK, SCALE, WIDE, Bench, full, unused

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
ONE = torch.eye(OUT, dtype=torch.float64)


def bench(spec: dict[str, Any] | None = None, **more: Any) -> Bench:
    return Bench({"name": "altlora", "ridge": 0.0, "period": 1, **(spec or {})}, **more)


def momentum(G: Tensor, old: Tensor, basis: Tensor, beta: float) -> Tensor:
    """The oracle for one pair, in the weight: old momentum [O, D] and G, projected onto the columns of ``basis``."""
    return torch.linalg.lstsq(basis, beta * old + (1 - beta) * G).solution / SCALE


@pytest.mark.parametrize("period", [1, 2])
def test_steps_are_those_of_the_weights_momentum_projected_anew(period: int) -> None:
    made = bench({"period": period}, optimizer=torch.optim.AdamW, lr=0.3, decay=0.2)
    weight = {"A": torch.zeros(EXPERTS, OUT, WIDE).double(), "B": torch.zeros(EXPERTS, OUT, WIDE).double()}
    count = {"A": 0, "B": 0}
    for turn in range(7):
        A, B, G = made.down, made.up, full(turn)
        made.step(G)
        on = "AB"[(turn // period) % 2 == 0]
        count[on] += 1
        for e in range(EXPERTS):
            if on == "B":
                M = momentum(G[e].mT, weight["B"][e].mT, A[e].mT, 0.9).mT
                weight["B"][e] = SCALE * M @ A[e]
                B[e] -= 0.3 * (M / (1 - 0.9 ** count["B"]) + 0.2 * B[e])
            else:
                M = momentum(G[e], weight["A"][e], B[e], 0.9)
                weight["A"][e] = SCALE * B[e] @ M
                A[e] -= 0.3 * (M / (1 - 0.9 ** count["A"]) + 0.2 * A[e])
        torch.testing.assert_close(made.down, A, **CLOSE)
        torch.testing.assert_close(made.up, B, **CLOSE)


def test_the_factor_that_is_not_on_stays_bit_for_bit_with_weight_decay_too() -> None:
    made = bench({"period": 2}, decay=0.5)
    for turn, on in enumerate("BBAAB"):
        A, B = made.down, made.up
        made.step(full(turn))
        assert torch.equal(made.down, A) == (on == "B") and torch.equal(made.up, B) == (on == "A")


def test_a_turn_moves_the_update_by_the_projected_gradient() -> None:
    made, G = bench({"beta1": 0.0}, lr=1.0), full()
    before, A = made.delta, made.down
    made.step(G)
    torch.testing.assert_close(before - made.delta, G @ torch.linalg.pinv(A) @ A, **CLOSE)
    before, B = made.delta, made.up
    made.step(G)
    torch.testing.assert_close(before - made.delta, B @ torch.linalg.pinv(B) @ G, **CLOSE)


def test_both_turns_on_one_gradient_reach_what_lora_pro_reaches() -> None:
    made, G = bench({"beta1": 0.0}, lr=1.0), full()
    A, B = made.down, made.up
    made.step(G)
    left = G - SCALE * (B - made.up) @ A
    made.put(A, B)
    made.step(left)
    left = left - SCALE * B @ (A - made.down)
    PB, PA = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    expected = (ONE - PB) @ G @ (torch.eye(WIDE, dtype=torch.float64) - PA)
    torch.testing.assert_close(left, expected, **CLOSE)


def test_how_an_update_is_split_into_factors_makes_no_difference_to_its_path() -> None:
    one, two = bench(decay=0.1), bench(decay=0.1)
    R = torch.randn(EXPERTS, RANK, RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    two.put(torch.linalg.inv(R) @ one.down, one.up @ R)
    for turn in range(6):
        one.step(full(turn))
        two.step(full(turn))
        torch.testing.assert_close(two.delta, one.delta, **CLOSE)


def test_a_momentum_whose_basis_has_not_changed_is_the_usual_one() -> None:
    made = bench({"period": 3}, lr=1.0)  # three turns of B, while A stands still
    A, M = made.down, 0.0
    for turn in range(1, 4):
        G, B = full(turn), made.up
        made.step(G)
        M = 0.9 * M + 0.1 * G @ torch.linalg.pinv(A) / SCALE
        torch.testing.assert_close(made.up, B - M / (1 - 0.9**turn), **CLOSE)


def test_from_b_zero_b_moves_first_and_a_after_it() -> None:
    made = bench({"ridge": 1e-5}, zero=True)
    A = made.down
    made.step(full(0))
    assert torch.equal(made.down, A) and made.up.any()
    made.step(full(1))
    assert not torch.equal(made.down, A) and made.delta.isfinite().all()


def test_a_rare_expert_has_both_turns_and_keeps_all_while_unused() -> None:
    made, often = bench(decay=0.3), bench(decay=0.3)
    used = iter(range(2))
    for turn in range(4):
        A, B, state = made.down, made.up, {key: value.clone() for key, value in made.state.items()}
        made.step(full(turn) if turn % 2 == 0 else unused(full(turn)))
        if turn % 2:
            assert torch.equal(made.down[1], A[1]) and torch.equal(made.up[1], B[1])
            assert all(torch.equal(value[1], state[key][1]) for key, value in made.state.items())
        else:
            often.step(full(2 * next(used)))
            torch.testing.assert_close(made.delta[1], often.delta[1], **CLOSE)
    assert made.state["turns"].tolist() == [4, 2, 4] and made.state["count_A"].flatten().tolist() == [2, 1, 2]


def test_a_rank_at_rest_keeps_its_momentum_and_leaves_the_pair_of_the_others() -> None:
    more = {"r": 3, "lora_alpha": 3 * SCALE}
    made, less = bench(experts=more), bench()
    less.put(made.down[:, :2], made.up[:, :, :2])
    resting = torch.tensor([2])
    for turn in range(4):
        G = full(turn)
        dA, dB = made.gradients(G)
        made.give(dA.index_fill(1, resting, 0), dB.index_fill(2, resting, 0))
        made.stepping.before(made.now)
        made.optimizer.step()
        made.steps += 1
        less.step(G)
        torch.testing.assert_close(made.down[:, :2], less.down, **CLOSE)
        torch.testing.assert_close(made.up[:, :, :2], less.up, **CLOSE)
    start = bench(experts=more)
    assert torch.equal(made.down[:, 2], start.down[:, 2]) and torch.equal(made.up[:, :, 2], start.up[:, :, 2])
    assert not made.state["M_A"][:, 2].any() and not made.state["old_A"][:, :, 2].any()


def test_scale_is_reckoned_with() -> None:
    made, twice = bench(lr=1.0), bench(lr=1.0, experts={"lora_alpha": 2 * SCALE * RANK})
    B, G = made.up, full()
    twice.put(made.down, B / 2)
    made.step(G)
    twice.give(2 * SCALE * twice.up.mT @ G, 2 * SCALE * G @ twice.down.mT)
    twice.stepping.before(twice.now)
    torch.testing.assert_close(2 * twice.up, made.up, **CLOSE)


def test_its_state_is_as_large_as_the_factors() -> None:
    made = bench()
    made.step(full())
    pair = EXPERTS * RANK * (WIDE + OUT)
    assert sum(value.numel() for value in made.state.values()) == 2 * pair + 3 * EXPERTS


def test_what_it_keeps_lies_as_a_checkpoint_gives_it_back() -> None:
    made = bench()
    for turn in range(2):
        made.step(full(turn))
    assert all(value.is_contiguous() for value in made.state.values())


def test_experts_that_are_no_pairs_are_refused() -> None:
    adapter = {"router": "softmax", "experts": {"num_experts": 2, "name": "hydra"}}
    with pytest.raises(ConfigError, match=r"optim altlora reckons with experts that are pairs B A .*'hydra'"):
        check_recipe({"adapter": adapter, "optim": "altlora", "training": {"output_dir": "out"}})
