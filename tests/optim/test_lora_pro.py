"""LoRA-Pro: the step of a pair that is closest to the full gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moelora.core.errors import ConfigError
from moelora.recipe import check_recipe
from tests.optim.bench import EXPERTS, OUT, RANK, SCALE, WIDE, Bench, full, unused

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
WAYS = ["sylvester", "balanced", "zero", "symmetry"]
ONE = torch.eye(OUT, dtype=torch.float64)


def bench(spec: dict[str, Any] | None = None, **more: Any) -> Bench:
    return Bench({"name": "lora_pro", "ridge": 0.0, **(spec or {})}, **more)


def changed(made: Bench, G: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) for the gradient of the updates."""
    made.give(*made.gradients(G))
    made.stepping.before(made.now)
    return made.given()


def moved(made: Bench, a: Tensor, b: Tensor) -> Tensor:
    """How a step (a, b) moves the updates, to first order."""
    return SCALE * (made.up @ a + b @ made.down)


def projectors(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A


def nearest(A: Tensor, B: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle: min ||s B a + s b A - G||^2 + tiny |(a, b) - (dA, dB)|^2, of one pair, by normal equations."""
    out, wide, r = len(B), A.shape[1], len(A)
    down = SCALE * torch.kron(B, torch.eye(wide, dtype=B.dtype))  # rows of a after each other
    up = SCALE * torch.kron(torch.eye(out, dtype=B.dtype), A.mT.contiguous())
    M = torch.cat([down, up], 1)
    raw = torch.cat([(SCALE * B.mT @ G).flatten(), (SCALE * G @ A.mT).flatten()])
    least = torch.linalg.lstsq(M, (G.flatten() - M @ raw).unsqueeze(1), driver="gelsd").solution[:, 0]
    found = raw + least  # of all minimisers the one closest to raw: least has no part in the null space
    return found[: r * wide].view(r, wide), found[r * wide :].view(out, r)


def test_the_default_is_the_closest_step_that_is_closest_to_loras() -> None:
    made, G = bench(), full()
    a, b = changed(made, G)
    for e in range(EXPERTS):
        wanted = nearest(made.down[e], made.up[e], G[e])
        torch.testing.assert_close(a[e], wanted[0], **CLOSE)
        torch.testing.assert_close(b[e], wanted[1], **CLOSE)


@pytest.mark.parametrize("x", WAYS)
def test_every_way_moves_the_update_by_the_projected_gradient(x: str) -> None:
    made, G = bench({"x": x}), full()
    a, b = changed(made, G)
    PB, PA = projectors(made.down, made.up)
    torch.testing.assert_close(moved(made, a, b), PB @ G + (ONE - PB) @ G @ PA, **CLOSE)


def test_no_multiple_of_loras_step_is_closer_to_the_gradient() -> None:
    made, G = bench(), full()
    dA, dB = made.gradients(G)
    lora = moved(made, dA, dB)
    a, b = changed(made, G)
    far = (moved(made, a, b) - G).flatten(1).norm(dim=1)
    best = (lora * G).flatten(1).sum(1) / lora.flatten(1).square().sum(1)
    for c in (*torch.linspace(-2, 2, 41).tolist(), 1.0):
        assert (far <= (c * lora - G).flatten(1).norm(dim=1)).all()
    assert (far < (best.view(-1, 1, 1) * lora - G).flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("x", WAYS)
def test_it_descends(x: str) -> None:
    made, G = bench({"x": x}), full()
    dA, dB = made.gradients(G)
    a, b = changed(made, G)
    PB, PA = projectors(made.down, made.up)
    along = (dA * a).flatten(1).sum(1) + (dB * b).flatten(1).sum(1)
    expected = (PB @ G).flatten(1).square().sum(1) + ((ONE - PB) @ G @ PA).flatten(1).square().sum(1)
    torch.testing.assert_close(along, expected, **CLOSE)


def test_x_solves_sylvesters_equation_and_is_closer_to_loras_gradients_than_the_others() -> None:
    made, G = bench(), full()
    A, B = made.down, made.up
    dA, dB = made.gradients(G)
    a, _ = changed(made, G)
    inverse = torch.linalg.inv(B.mT @ B)
    X = (a - inverse @ dA / SCALE**2) @ torch.linalg.pinv(A)
    right = -inverse @ dA @ A.mT / SCALE**2
    residual = B.mT @ B @ X + X @ A @ A.mT - right
    assert residual.norm() < 1e-9 * right.norm()

    def off(x: str) -> Tensor:
        other = bench({"x": x})
        a, b = changed(other, G)
        return (a - dA).flatten(1).square().sum(1) + (b - dB).flatten(1).square().sum(1)

    assert all((off("sylvester") < off(x)).all() for x in WAYS[1:])


@pytest.mark.parametrize(("x", "even"), [("balanced", True), ("symmetry", False)])
def test_balanced_gives_half_to_either_factor_and_the_released_symmetry_does_not(x: str, even: bool) -> None:
    made, G = bench({"x": x}), full()
    a, b = changed(made, G)
    PB, PA = projectors(made.down, made.up)
    by_a, by_b = (PB @ part @ PA for part in (SCALE * made.up @ a, SCALE * b @ made.down))
    torch.testing.assert_close(by_a + by_b, PB @ G @ PA, **CLOSE)
    assert torch.allclose(by_a, by_b, **CLOSE) == even


def test_an_invertible_b_reaches_the_whole_gradient() -> None:
    made, G = bench(experts={"r": OUT, "lora_alpha": SCALE * OUT}), full()
    torch.testing.assert_close(moved(made, *changed(made, G)), G, rtol=1e-6, atol=1e-6)


def test_a_small_step_moves_the_update_as_it_says() -> None:
    made, G = bench(lr=1e-7), full()
    before = made.delta
    A, B = made.down, made.up
    a, b = changed(made, G)
    expected = SCALE * (B @ a + b @ A)
    made.optimizer.step()
    torch.testing.assert_close((before - made.delta) / 1e-7, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("moments", ["lora", "full"])
def test_how_an_update_is_split_into_factors_makes_no_difference(moments: str) -> None:
    """To first order for (a, b); full moments see nothing but the update, for every step anew."""
    G = full()
    one, two = bench({"moments": moments}, lr=1.0), bench({"moments": moments}, lr=1.0)
    R = torch.randn(EXPERTS, RANK, RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    two.put(torch.linalg.inv(R) @ one.down, one.up @ R)
    first = []
    for made in (one, two):
        A, B = made.down, made.up
        made.step(G)
        first.append(SCALE * (B @ (A - made.down) + (B - made.up) @ A))
    torch.testing.assert_close(first[1], first[0], **CLOSE)


def test_a_b_a_thousand_times_smaller_has_an_a_as_much_longer_and_the_update_moves_alike() -> None:
    made, small, G = bench({"x": "zero"}), bench({"x": "zero"}), full()
    small.put(made.down, 1e-3 * made.up)
    a, _ = changed(made, G)
    tiny_a, _ = changed(small, G)
    torch.testing.assert_close(tiny_a, 1e3 * a, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("first", ["formula", "rule"])
@pytest.mark.parametrize("moments", ["lora", "full"])
def test_from_b_zero_the_first_step_is_that_of_b_alone(first: str, moments: str) -> None:
    made, G = bench({"first": first, "moments": moments}, zero=True, lr=1.0), full()
    A = made.down
    made.step(G)
    assert torch.equal(made.down, A)
    if moments == "lora":
        expected = -G @ A.mT @ torch.linalg.inv(A @ A.mT) / SCALE
        torch.testing.assert_close(made.up, expected, **CLOSE)
    assert made.up.any()


def test_the_rule_for_the_first_step_leaves_a_as_lora_has_it_once() -> None:
    made, plain = bench({"first": "rule"}), bench()
    G, A = full(), made.down
    dA, dB = made.gradients(G)
    a, b = changed(made, G)
    torch.testing.assert_close(a, dA, **CLOSE)
    torch.testing.assert_close(b, dB @ torch.linalg.inv(A @ A.mT) / SCALE**2, **CLOSE)
    for one, two in zip(changed(made, G), changed(plain, G), strict=True):
        torch.testing.assert_close(one, two, **CLOSE)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("x", ["sylvester", "zero"])
def test_full_moments_are_those_of_the_weight_for_several_steps(x: str, late: bool) -> None:
    made = bench({"moments": "full", "x": x, "late": late}, optimizer=torch.optim.AdamW, lr=0.05, decay=0.2)
    M = V = torch.zeros(EXPERTS, OUT, WIDE, dtype=torch.float64)
    for t in range(1, 5):
        A, B, G = made.down, made.up, full(t)
        made.step(G)
        PB, PA = projectors(A, B)
        near = PB @ G + (ONE - PB) @ G @ PA
        M, V = 0.9 * M + 0.1 * near, 0.999 * V + 0.001 * near**2
        power = t + late
        N = (M / (1 - 0.9**power)) / ((V / (1 - 0.999**power)).sqrt() + 1e-8)
        if x == "sylvester":
            steps = [nearest(A[e], B[e], N[e]) for e in range(EXPERTS)]
            a, b = (torch.stack(part) for part in zip(*steps, strict=True))
        else:
            a = torch.linalg.pinv(B) @ N / SCALE
            b = (ONE - PB) @ N @ torch.linalg.pinv(A) / SCALE
        keep = (1 - 0.05 * 0.2) ** 0.5
        torch.testing.assert_close(made.down, keep * A - 0.05 * a, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(made.up, keep * B - 0.05 * b, rtol=1e-7, atol=1e-7)
    assert made.state["M"].shape == (EXPERTS, OUT, WIDE)


def test_torchs_adamw_has_its_moments_of_a_and_b() -> None:
    made = bench(None, optimizer=torch.optim.AdamW, lr=0.05, decay=0.2)
    A, m, v = made.down, 0.0, 0.0
    for t in range(1, 4):
        G, other = full(t), bench()
        other.put(made.down, made.up)
        a, _ = changed(other, G)
        made.step(G)
        m, v = 0.9 * m + 0.1 * a, 0.999 * v + 0.001 * a**2
        A = A * (1 - 0.05 * 0.2) - 0.05 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        torch.testing.assert_close(made.down, A, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("moments", ["lora", "full"])
def test_an_unused_expert_keeps_weights_moments_and_count(moments: str) -> None:
    made = bench({"moments": moments}, optimizer=torch.optim.AdamW, decay=0.2)
    made.step(full(0))
    A, B, state = made.down, made.up, {key: value.clone() for key, value in made.state.items()}
    made.step(unused(full(1)))
    assert torch.equal(made.down[1], A[1]) and torch.equal(made.up[1], B[1])
    assert not torch.equal(made.down[0], A[0]) and state.keys() == made.state.keys()
    for key, value in made.state.items():
        assert torch.equal(value[1], state[key][1]) and not torch.equal(value[0], state[key][0])


def test_a_rank_at_rest_leaves_the_pair_of_the_others() -> None:
    more = {"r": 3, "lora_alpha": 3 * SCALE}
    made, less, G = bench(experts=more), bench(), full()
    less.put(made.down[:, :2], made.up[:, :, :2])
    dA, dB = made.gradients(G)
    dA[:, 2], dB[:, :, 2] = 0, 0
    made.give(dA, dB)
    made.stepping.before(made.now)
    a, b = made.given()
    wanted = changed(less, G)
    torch.testing.assert_close(a[:, :2], wanted[0], **CLOSE)
    torch.testing.assert_close(b[:, :, :2], wanted[1], **CLOSE)
    assert not a[:, 2].any() and not b[:, :, 2].any()


def test_the_usual_ridge_is_felt_little_whatever_the_size_of_b() -> None:
    for size in (1.0, 1e-5):
        exact, usual, G = bench(), bench({"ridge": 1e-6}), full()
        for made in (exact, usual):
            made.put(made.down, size * made.up)
        for one, two in zip(changed(exact, G), changed(usual, G), strict=True):
            assert (one - two).norm() < 1e-4 * one.norm()


@pytest.mark.parametrize(
    ("experts", "router", "message"),
    [
        (
            {"num_experts": 2, "name": "merged"},
            "smear",
            r"pairs B A and nothing else, and found experts 'merged';",
        ),
        ({"num_experts": 2, "name": "core"}, "comol", r"pairs B A and nothing else, and found experts 'core';"),
        ({"num_experts": 2, "train": "B"}, "meteora", r"experts 'lora' do not train lora_A here"),
    ],
)
def test_experts_that_are_no_pairs_are_refused(experts: dict[str, Any], router: str, message: str) -> None:
    recipe = {"adapter": {"router": router, "experts": experts}, "optim": "lora_pro", "training": {"output_dir": "out"}}
    with pytest.raises(ConfigError, match=message):
        check_recipe(recipe)
