"""SMEAR: the formula; what the running mean does is in test_running_mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moelora.core.errors import ConfigError
from moelora.core.methods import Methods
from tests import tiny

ALPHA, E, R, S = 6.0, 4, 2, 3  # the layer is given rows of three tokens


def config(experts: str, pool: str = "prefix") -> dict[str, Any]:
    own = {"name": experts, "num_experts": E, "r": R, "lora_alpha": ALPHA}
    return {"router": {"name": "smear", "pool": pool}, "experts": own}


def oracle(experts: str, pool: str) -> tiny.Oracle:
    """Softmax of the gate of the mean input; merged matrices, or every expert's output."""

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        for t in range(x.shape[0]):
            start = t - t % S
            seen = x[start : t + 1] if pool == "prefix" else x[start : start + S]
            raised = (w["Wg"] @ (sum(seen) / len(seen))).exp()
            gate = raised / raised.sum()
            A = [w["A"][e * R : (e + 1) * R] for e in range(E)]
            B = [w["B"][:, e * R : (e + 1) * R] for e in range(E)]
            if experts == "merged":
                update = sum(gate[e] * B[e] for e in range(E)) @ sum(gate[e] * A[e] for e in range(E)) @ x[t]
            else:
                update = sum(gate[e] * B[e] @ A[e] @ x[t] for e in range(E))
            rows.append(w["W"] @ x[t] + w["b"] + ALPHA / R * update)
            gates.append(gate)
        return torch.stack(rows), torch.stack(gates)

    return formula


@pytest.mark.parametrize("experts", ["merged", "lora"])
@pytest.mark.parametrize("pool", ["prefix", "sequence"])
def test_equals_the_formula(experts: str, pool: str) -> None:
    model, layer = tiny.toy(config(experts, pool))
    tiny.assert_layer_equals(model, layer, oracle(experts, pool), tokens=2 * S)


def test_the_last_token_of_a_row_sees_the_papers_mean() -> None:
    prefix, sequence = tiny.toy(config("merged"))[0], tiny.toy(config("merged", "sequence"))[0]
    x = torch.randn(2, S, 5, dtype=torch.float64)
    torch.testing.assert_close(prefix(x)[:, -1], sequence(x)[:, -1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(prefix(x)[:, 0], sequence(x)[:, 0])


def test_gates_sum_to_one_and_padding_has_finite_ones() -> None:
    model, given = tiny.adapted("llama", "smear"), tiny.unlabelled(tiny.batch())
    given["attention_mask"][0, :2] = 0
    for route in tiny.routes(model, **given):
        assert route.weight.dtype == torch.float32
        torch.testing.assert_close(route.weight.sum(1), torch.ones(len(route.weight)))


def test_other_pools_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"routers.smear.pool: .*'prefix' or 'sequence', found 'last'"):
        Methods().check("routers", {"name": "smear", "pool": "last"})
