"""Orthogonality: how far rows of A and columns of B are from orthonormal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError
from moelora.core.factors import Factors
from moelora.core.route import Route
from moelora.losses.orthogonality import Orthogonality
from moelora.model.record import routed_layers
from tests import tiny

E, R, WIDE, OUT = 3, 2, 5, 7


def factors(seed: int = 0) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    A = torch.randn(E * R, WIDE, dtype=torch.float64, generator=made)
    return A.requires_grad_(), torch.randn(OUT, E * R, dtype=torch.float64, generator=made).requires_grad_()


def term(A: Tensor, B: Tensor, squared: bool = False) -> Tensor:
    given = Factors(A, B, torch.ones(E * R), num_experts=E, parts={"lora_A": A, "lora_B": B})
    return Orthogonality(1.0, squared=squared)(Route(torch.ones(2, E), E), replace(tiny.view((2,)), factors=given))


def by_hand(A: Tensor, B: Tensor, squared: bool) -> Tensor:
    """Expert by expert, entry by entry."""
    total = A.new_zeros(())
    for e in range(E):
        rows, columns = [A[e * R + i] for i in range(R)], [B[:, e * R + i] for i in range(R)]
        for vectors in (rows, columns):
            square = A.new_zeros(())
            for i in range(R):
                for j in range(R):
                    square = square + ((vectors[i] * vectors[j]).sum() - (1.0 if i == j else 0.0)) ** 2
            total = total + (square if squared else square.sqrt())
    return total


@pytest.mark.parametrize("squared", [False, True])
def test_value_and_gradient_are_those_of_the_formula(squared: bool) -> None:
    mine, theirs = factors(), factors()
    found, expected = term(*mine, squared), by_hand(*theirs, squared)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.backward()
    expected.backward()
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("squared", [False, True])
def test_orthonormal_is_zero_and_stays(squared: bool) -> None:
    A = torch.eye(R, WIDE, dtype=torch.float64).repeat(E, 1).requires_grad_()
    B = torch.eye(OUT, R, dtype=torch.float64).repeat(1, E).requires_grad_()
    term(A, B, squared).backward()
    assert term(A, B, squared).item() == 0 and not A.grad.any() and not B.grad.any()


def test_zeros_are_the_root_of_r_away_and_driven_on_once_they_have_moved() -> None:
    A = torch.eye(R, WIDE, dtype=torch.float64).repeat(E, 1)
    B = torch.zeros(OUT, E * R, dtype=torch.float64, requires_grad=True)
    found = term(A, B)
    found.backward()
    assert found.item() == pytest.approx(E * R**0.5) and not B.grad.any()
    moved = torch.full_like(B, 1e-3).requires_grad_()
    term(A, moved).backward()
    assert (moved.grad < 0).all()


def test_experts_do_not_meet() -> None:
    A, B = (value.detach() for value in factors())
    same = A[:R].repeat(E, 1), B[:, :R].repeat(1, E)
    alone = Factors(A[:R], B[:, :R], torch.ones(R), num_experts=1, parts={"lora_A": A[:R], "lora_B": B[:, :R]})
    one = Orthogonality(1.0)(Route(torch.ones(2, 1), 1), replace(tiny.view((2,)), factors=alone))
    assert term(*same).item() == pytest.approx(E * float(one))


@pytest.mark.parametrize("experts", ["lora", "kasa", "dora"])
def test_it_reads_what_is_trained(experts: str) -> None:
    model = tiny.adapted("llama", "meteora", experts={"name": experts, "num_experts": E, "r": R}, **weighted())
    with moelora.collect(model) as collected:
        model(**tiny.batch())
    layers = routed_layers(model)
    each = [by_hand(layer.experts.lora_A, layer.experts.lora_B, False) for layer in layers]
    torch.testing.assert_close(collected.terms[0]["orthogonality"], torch.stack(each).mean(), rtol=1e-5, atol=1e-5)


def weighted(**more: Any) -> dict[str, Any]:
    return {"losses": {"orthogonality": {"weight": 0.1, **more}}}


def test_a_start_that_is_subtracted_is_not_read(tmp_path: Any) -> None:
    from tests.init.test_base import AWAY

    (tmp_path / "away.py").write_text(AWAY)
    config = {**tiny.METHODS["meteora"], "init": "away", "target_modules": ["q_proj"], **weighted()}
    with torch.random.fork_rng(devices=[]):
        model = moelora.adapt(tiny.llama(), config, plugins=[tmp_path / "away.py"], verbose=False)
    with moelora.collect(model) as collected:
        model(**tiny.batch())
    each = []
    for layer in routed_layers(model):
        A, B = layer.experts.lora_A.unflatten(0, (3, 4)), layer.experts.lora_B.t().unflatten(0, (3, 4))
        each.append(sum((rows @ rows.mT - torch.eye(4)).norm(dim=(1, 2)).sum() for rows in (A, B)))
    torch.testing.assert_close(collected.terms[0]["orthogonality"], torch.stack(each).mean())


@pytest.mark.parametrize("method", ["hydra", "comol"])
def test_experts_that_share_a_factor_are_refused(method: str) -> None:
    with pytest.raises(ConfigError, match=r"losses\.orthogonality reads own_A, which neither"):
        tiny.adapted("llama", method, **weighted())


def test_it_counts_no_tokens() -> None:
    with pytest.raises(ConfigError, match=r"losses\.orthogonality is about the experts and counts no tokens"):
        tiny.adapted("llama", "meteora", **weighted(tokens="answers"))
