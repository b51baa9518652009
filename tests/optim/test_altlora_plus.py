"""AltLoRA+: AltLoRA's momentum by the size of its steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.optim.bench import EXPERTS, RANK, SCALE, Bench, full, unused

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def bench(spec: dict[str, Any] | None = None, **more: Any) -> Bench:
    return Bench({"name": "altlora_plus", "ridge": 0.0, "period": 2, **(spec or {})}, **more)


@pytest.mark.parametrize("compat", [False, True])
def test_steps_are_those_of_the_formula(compat: bool) -> None:
    made = bench({"compat": compat}, optimizer=torch.optim.AdamW, lr=0.01, decay=0.2)
    kept: dict[str, Any] = {"A": [0.0, 0.0, None, 0], "B": [0.0, 0.0, None, 0]}
    for turn in range(7):
        A, B, G = made.down, made.up, full(turn)
        made.step(G)
        on = "AB"[(turn // 2) % 2 == 0]
        M, v, old, count = kept[on]
        if on == "A":
            best, other = torch.linalg.pinv(B) @ G / SCALE, B
            aligned = torch.linalg.pinv(B) @ old @ M if old is not None else 0.0
        else:
            best, other = G @ torch.linalg.pinv(A) / SCALE, A
            aligned = M @ old @ torch.linalg.pinv(A) if old is not None else 0.0
        v, new = 0.999 * v + 0.001 * best**2, 0.9 * aligned + 0.1 * best
        step = new / (1 - 0.9 ** (count + 1)) / (v.sqrt() + 1e-4)
        kept[on] = [0.9 * M + 0.1 * best if compat else new, v, other, count + 1]
        if on == "A":
            A = A - 0.01 * (step + 0.2 * A)
        else:
            B = B - 0.01 * (step + 0.2 * B)
        torch.testing.assert_close(made.down, A, **CLOSE)
        torch.testing.assert_close(made.up, B, **CLOSE)


def test_the_two_memories_part_when_the_other_factor_has_moved() -> None:
    one, two = bench({"compat": False}), bench({"compat": True})
    parted = []
    for turn in range(7):
        one.step(full(turn))
        two.step(full(turn))
        parted.append(not torch.allclose(one.delta, two.delta, rtol=1e-12, atol=1e-12))
    assert parted == [False] * 5 + [True] * 2  # B's second round is the first that looks back over A's


def test_unlike_altlora_it_depends_on_how_the_update_is_split() -> None:
    one, two = bench(), bench()
    R = torch.randn(EXPERTS, RANK, RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    two.put(torch.linalg.inv(R) @ one.down, one.up @ R)
    for made in (one, two):
        made.step(full())
    assert not torch.allclose(one.delta, two.delta, rtol=1e-3)


def test_an_unused_expert_keeps_all() -> None:
    made = bench(decay=0.3)
    for turn in range(3):
        made.step(full(turn))
    A, B, state = made.down, made.up, {key: value.clone() for key, value in made.state.items()}
    made.step(unused(full(3)))
    assert torch.equal(made.down[1], A[1]) and torch.equal(made.up[1], B[1]) and not torch.equal(made.down[0], A[0])
    assert all(torch.equal(value[1], state[key][1]) for key, value in made.state.items())
    assert {"v_A", "v_B", "M_A", "old_B"} <= state.keys()
