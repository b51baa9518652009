"""What methods beside the optimiser share: which experts they take, and inverses of small matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moelora.core.errors import ConfigError
from moelora.optim.base import inverse
from moelora.optim.lora_plus import LoRAPlus
from moelora.optim.lora_pro import LoRAPro
from moelora.recipe import check_recipe
from tests.optim.bench import Bench


def gram(*singular: float) -> Tensor:
    """[1, 2, 2] with these eigenvalues."""
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(0)).double())[0]
    return (turn * torch.tensor(singular).double() @ turn.t()).unsqueeze(0)


def test_an_inverse_is_one_and_its_ridge_goes_by_the_matrix() -> None:
    G = gram(3.0, 0.5)
    torch.testing.assert_close(inverse(G, 0.0) @ G, torch.eye(2).double().unsqueeze(0))
    expected = torch.linalg.inv(G + 0.1 * 1.75 * torch.eye(2).double())
    torch.testing.assert_close(inverse(G, 0.1), expected)
    torch.testing.assert_close(inverse(1e-12 * G, 0.1), 1e12 * expected)


def test_directions_in_which_nothing_is_stay_zero() -> None:
    assert not inverse(torch.zeros(3, 4, 4), 1e-6).any()
    torch.testing.assert_close(inverse(gram(2.0, 0.0), 0.0), torch.linalg.pinv(gram(2.0, 0.0)))
    padded = torch.zeros(1, 3, 3).double()
    padded[:, :2, :2] = gram(3.0, 0.5)
    torch.testing.assert_close(inverse(padded, 0.1)[:, :2, :2], inverse(gram(3.0, 0.5), 0.1))


def test_a_float32_matrix_is_inverted_in_float64() -> None:
    G = gram(1.0, 1e-6).float()
    assert inverse(G, 0.0).dtype == torch.float32
    torch.testing.assert_close(inverse(G, 0.0), torch.linalg.inv(G.double()).float(), rtol=1e-5, atol=0)


def test_scaled_gradients_are_refused() -> None:
    recipe = {"optim": "lora_pro", "adapter": {"router": "meteora", "experts": {"num_experts": 2}}}
    training = {"output_dir": "out", "fp16": True}
    check_recipe({**recipe, "training": training})
    with pytest.raises(ConfigError, match=r"optim lora_pro reads gradients, which training.fp16 scales"):
        check_recipe({**recipe, "training": {**training, "max_grad_norm": 0.0}})


def test_ranks_with_trained_gates_are_refused_by_methods_that_reckon_with_pairs_alone() -> None:
    experts = Bench("plain").experts
    LoRAPro().check(experts)
    experts.allocator = nn.ParameterDict({"gate": torch.ones(6)})
    with pytest.raises(ConfigError, match=r"lora_pro reckons .* and found allocator.gate between A and B"):
        LoRAPro().check(experts)
    LoRAPlus().check(experts)
    experts.allocator.requires_grad_(False)  # a mask
    LoRAPro().check(experts)
