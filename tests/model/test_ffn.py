"""Routed feed-forward blocks outside of what a language model does with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moelora
from moelora.core.errors import MoeloraError
from tests import tiny


class Block(nn.Module):
    """One block, as a base model that is a mixture itself calls it: with as many tokens as came."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({name: nn.Linear(*shape, dtype=torch.float64) for name, shape in SHAPES.items()})

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp["down_proj"](self.mlp["gate_proj"](x).sigmoid() * self.mlp["up_proj"](x))


SHAPES = {"gate_proj": (5, 6), "up_proj": (5, 6), "down_proj": (6, 5)}


def block() -> Block:
    config = {**tiny.METHODS["mixlora"], "target_modules": list(SHAPES)}
    return tiny.shake(tiny.adapt(Block(), config), 1.0)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 3, 5)])
def test_no_tokens(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    y = block()(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (2, 1, 3, 5)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    model, x = block(), torch.randn(shape, dtype=torch.float64)
    y = model(x)
    assert y.shape == shape
    torch.testing.assert_close(y.reshape(-1, 5), model(x.reshape(-1, 5)), rtol=1e-12, atol=1e-12)


def test_a_token_does_not_see_its_neighbours() -> None:
    model, x = block(), torch.randn(6, 5, dtype=torch.float64)
    whole = model(x)
    for t in range(6):
        torch.testing.assert_close(model(x[t : t + 1]), whole[t : t + 1], rtol=1e-12, atol=1e-12)


def test_a_part_of_the_model_cannot_run_and_says_so() -> None:
    model = tiny.adapted("llama", "mixlora").eval()
    with pytest.raises(MoeloraError, match=r"'model\.layers\.0\.mlp\.down_proj'.*call the whole model"):
        model.model(**tiny.unlabelled(tiny.batch()))
    with moelora.disabled(model):
        assert model.model(**tiny.unlabelled(tiny.batch())).last_hidden_state.isfinite().all()


def test_nothing_of_a_block_stays_on_the_tape() -> None:
    model, left = tiny.adapted("llama", "mixlora"), []
    with moelora.collect(model, lambda view, route: left.append(view.tape)):
        model(**tiny.batch())
    assert all(not tape.shared for tape in left)
