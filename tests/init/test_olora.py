"""OLoRA: columns of the base weight's QR decomposition."""

from __future__ import annotations

import pytest
import torch

from moelora.core.errors import ConfigError
from moelora.init.olora import OLoRA
from tests.init.steps import assert_one_step_alike, layer_of, ours, parts, peft, weight_of


@pytest.mark.parametrize(("out", "wide"), [(12, 9), (9, 12)])
def test_all_slices_together_are_the_weight(out: int, wide: int) -> None:
    W = weight_of(out, wide)
    experts, start = layer_of(W, num_experts=3, r=3)
    OLoRA()(experts, start)
    torch.testing.assert_close(parts(experts, scaled=False).sum(0), W, rtol=1e-12, atol=1e-12)
    B = experts.lora_B
    torch.testing.assert_close(B.t() @ B, torch.eye(9, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert torch.equal(experts.lora_A[:, : min(9, wide)], experts.lora_A[:, : min(9, wide)].triu())


def test_an_expert_spans_the_next_columns_of_the_weight() -> None:
    W = weight_of(12, 9)
    experts, start = layer_of(W, num_experts=2, r=3)
    OLoRA()(experts, start)
    first, second = experts.lora_B.split(3, 1)
    columns = W[:, :3]
    torch.testing.assert_close(first @ (first.t() @ columns), columns, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second.t() @ columns, torch.zeros(3, 3, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_all_experts_may_start_from_the_same_columns() -> None:
    W = weight_of(6, 5)
    experts, start = layer_of(W, num_experts=4, r=3)
    OLoRA(experts="same")(experts, start)
    Q, R = torch.linalg.qr(W)
    for part in parts(experts, scaled=False):
        torch.testing.assert_close(part, Q[:, :3] @ R[:3], rtol=1e-12, atol=1e-12)


def test_it_starts_and_trains_as_pefts() -> None:
    assert_one_step_alike(ours("olora"), peft("olora"))


def test_too_many_experts_are_refused() -> None:
    experts, start = layer_of(weight_of(7, 30), num_experts=4, r=2)
    with pytest.raises(ConfigError, match=r"init olora takes 8 directions .* 'layer' has 7; choose init.experts: same"):
        OLoRA()(experts, start)
