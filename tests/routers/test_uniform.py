"""Every expert at 1/E: the formula and what follows from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moelora.core.errors import ConfigError
from tests import tiny

ALPHA = 8.0
TOKENS = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def config(num_experts: int, r: int = 2) -> dict[str, Any]:
    return {"router": "uniform", "experts": {"num_experts": num_experts, "r": r, "lora_alpha": ALPHA}}


@pytest.mark.parametrize("num_experts", [1, 3, 4])
def test_equals_the_formula(num_experts: int) -> None:
    model, layer = tiny.toy(config(num_experts))

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows = []
        for t in range(x.shape[0]):
            y = w["W"] @ x[t] + w["b"]
            for e in range(num_experts):
                own = slice(2 * e, 2 * e + 2)
                y = y + (ALPHA / 2) * (w["B"][:, own] @ (w["A"][own] @ x[t])) / num_experts
            rows.append(y)
        return torch.stack(rows), x.new_full((x.shape[0], num_experts), 1 / num_experts)

    tiny.assert_layer_equals(model, layer, formula)


def test_is_one_plain_lora_of_all_ranks() -> None:
    mixture, layer = tiny.toy(config(4, r=2))
    plain, other = tiny.toy({"router": "single", "experts": {"r": 8, "lora_alpha": 8 * ALPHA / 2 / 4}})
    other.experts.load_state_dict(layer.experts.state_dict())
    torch.testing.assert_close(mixture(TOKENS), plain(TOKENS), rtol=1e-13, atol=1e-13)


def test_has_nothing_to_train_or_save() -> None:
    model, layer = tiny.toy(config(4))
    assert not layer.router.state_dict()
    assert tiny.routes(model.to(torch.bfloat16), x=TOKENS.bfloat16())[0].weight.dtype == torch.float32


def test_takes_no_option() -> None:
    with pytest.raises(ConfigError, match=r"routers\.uniform: unknown key 'top_k'"):
        tiny.toy({**config(4), "router": {"name": "uniform", "top_k": 2}})
