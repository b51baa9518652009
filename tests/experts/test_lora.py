"""LoRA experts: shapes, who owns which ranks, and what is saved."""

from __future__ import annotations

import torch

from moelora.core.factors import Factors
from moelora.core.route import Route
from moelora.core.tape import Site
from moelora.experts.lora import LoRA
from moelora.ops.project import Image

SITE = Site("layer", 0, 5, 7)


def experts(num_experts: int = 3, r: int = 2) -> LoRA:
    made = LoRA(SITE, num_experts, r).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def test_factors_stack_the_experts() -> None:
    made = experts()
    factors = made.factors()
    assert factors.A is made.lora_A and factors.A.shape == (6, 5)
    assert factors.B is made.lora_B and factors.B.shape == (7, 6)
    assert factors.scale.shape == (6,) and factors.core is None


def test_an_expert_owns_its_rows_and_columns() -> None:
    made, x = experts(), torch.randn(4, 5, dtype=torch.float64)
    made.scale.fill_(0.5)
    for e in range(3):
        gate = torch.zeros(4, 3, dtype=torch.float64)
        gate[:, e] = 1
        own = slice(2 * e, 2 * e + 2)
        expected = 0.5 * x @ made.lora_A[own].t() @ made.lora_B[:, own].t()
        route = Route(gate, 3)
        torch.testing.assert_close(made(x, lambda *_, route=route: route), expected, rtol=1e-12, atol=1e-12)


def test_ranks_have_their_own_scale() -> None:
    made, x = experts(1, 3), torch.randn(4, 5, dtype=torch.float64)
    made.scale.copy_(torch.tensor([1.0, 0.0, 4.0]))
    expected = x @ (made.lora_A * made.scale.double().unsqueeze(1)).t() @ made.lora_B.t()
    route = Route(torch.ones(4, 1).double(), 1)
    torch.testing.assert_close(made(x, lambda *_: route), expected, rtol=1e-12, atol=1e-12)


def test_the_decision_reads_the_factors_and_rank_space_only_when_asked() -> None:
    made, x = experts(), torch.randn(4, 5, dtype=torch.float64)
    route, seen = Route(torch.rand(4, 3, dtype=torch.float64), 3), []

    def decide(factors: Factors, image: Image) -> Route:
        assert image.x is x and image.known(made.lora_A) is None
        assert factors.A is made.lora_A and factors.anchors == ()
        return route

    def decide_by_h(factors: Factors, image: Image) -> Route:
        assert factors.A is not None
        seen.append(image.under(factors.A))
        return route

    torch.testing.assert_close(made(x, decide), made(x, decide_by_h), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen[0], x @ made.lora_A.t())


def test_experts_have_factors_of_their_own() -> None:
    assert LoRA.gives == ("own_A",)


def test_anchors_are_the_parameters_when_they_were_set() -> None:
    made, seen = experts(), []
    made.keep_anchors()
    made.set_anchors()
    start = made.lora_A.detach().clone()
    with torch.no_grad():
        made.lora_A += 1
    made(torch.randn(4, 5).double(), lambda factors, _: seen.append(factors) or Route(torch.ones(4, 3).double(), 3))
    pairs = dict(zip(["lora_A", "lora_B"], seen[0].anchors, strict=True))
    assert pairs["lora_A"][0] is made.lora_A and torch.equal(pairs["lora_A"][1], start)
    assert torch.equal(*pairs["lora_B"])
    assert list(made.state_dict()) == ["lora_A", "lora_B", "anchor_lora_A", "anchor_lora_B"]


def test_only_the_factors_are_parameters_and_saved() -> None:
    made = experts()
    assert list(made.state_dict()) == ["lora_A", "lora_B"]
    assert [name for name, p in made.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


def test_scale_keeps_its_precision_when_cast() -> None:
    made = experts()
    made.scale.fill_(1 / 3)
    made.to(torch.bfloat16)
    assert made.scale.dtype == torch.float32 and made.lora_A.dtype == torch.bfloat16
