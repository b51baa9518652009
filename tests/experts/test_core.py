"""Core experts: shapes, what is saved, and how trained LoRAs enter one core space."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import AdapterError
from moelora.core.factors import Factors
from moelora.core.route import Route
from moelora.core.tape import Site
from moelora.experts.core import Core, joint_core_space
from moelora.model.record import routed_layers
from tests import tiny

SITE = Site("layer", 0, 5, 7)
Lora = tuple[Tensor, Tensor]


def experts(num_experts: int = 3, r: int = 2) -> Core:
    made = Core(SITE, num_experts, r).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def one_hot(e: int, num_experts: int = 3) -> Any:
    def decide(factors: Factors, h: Tensor | None) -> Route:
        gate = torch.zeros(4, num_experts, dtype=torch.float64)
        gate[:, e] = 1
        return Route(gate, num_experts)

    return decide


def test_factors_are_one_pair_and_a_core_per_expert() -> None:
    made = experts()
    factors = made.factors()
    assert factors.A is made.lora_A and factors.A.shape == (2, 5)
    assert factors.B is made.lora_B and factors.B.shape == (7, 2)
    assert factors.core is made.core and factors.core.shape == (3, 2, 2)
    assert factors.scale.shape == (2,)


@pytest.mark.parametrize("e", range(3))
def test_an_expert_is_its_core_between_the_shared_factors(e: int) -> None:
    made, x = experts(), torch.randn(4, 5, dtype=torch.float64)
    made.scale.fill_(0.5)
    expected = 0.5 * x @ (made.lora_B @ made.core[e] @ made.lora_A).t()
    torch.testing.assert_close(made(x, one_hot(e)), expected, rtol=1e-12, atol=1e-12)


def test_factors_and_cores_are_parameters_and_saved_the_scale_is_not() -> None:
    assert list(experts().state_dict()) == ["lora_A", "core", "lora_B"]


def test_scale_keeps_its_precision_when_cast() -> None:
    made = experts()
    made.scale.fill_(1 / 3)
    made.to(torch.bfloat16)
    assert made.scale.dtype == torch.float32 and made.core.dtype == torch.bfloat16


# The joint core space


def loras(*ranks: int, wide: int = 9, out: int = 11) -> list[Lora]:
    made = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    return [(normal(r, wide), normal(out, r)) for r in ranks]


def rebuilt(A: Tensor, core: Tensor, B: Tensor) -> Tensor:
    """[E, O, D] the experts of a core space."""
    return B @ core @ A


def products(given: list[Lora]) -> Tensor:
    return torch.stack([B @ A for A, B in given])


def test_a_single_lora_is_reproduced() -> None:
    """C7."""
    given = loras(3)
    A, core, B, error = joint_core_space(given, 3)
    assert A.shape == (3, 9) and core.shape == (1, 3, 3) and B.shape == (11, 3)
    torch.testing.assert_close(rebuilt(A, core, B), products(given), rtol=1e-12, atol=1e-12)
    assert error < 1e-14


@pytest.mark.parametrize(("ranks", "q"), [((2, 2, 2), 6), ((1, 3, 2), 6), ((2, 2), 7), ((4, 4, 4), 12), ((5, 5), 10)])
def test_several_loras_are_exact_from_the_sum_of_their_ranks_on(ranks: tuple[int, ...], q: int) -> None:
    given = loras(*ranks)
    A, core, B, error = joint_core_space(given, q)
    assert A.shape[0] == min(sum(ranks), 9) and B.shape[1] == min(sum(ranks), 11)
    torch.testing.assert_close(rebuilt(A, core, B), products(given), rtol=1e-12, atol=1e-12)
    assert error < 1e-14


def test_loras_of_one_subspace_need_no_more_room_than_that() -> None:
    (A, B), *_ = loras(3)
    given = [(mix @ A, B @ mix.t()) for mix in torch.randn(4, 3, 3, dtype=torch.float64)]
    found = joint_core_space(given, 3)
    torch.testing.assert_close(rebuilt(*found[:3]), products(given), rtol=1e-11, atol=1e-11)
    assert found[3] < 1e-13


@pytest.mark.parametrize("q", [1, 2, 4, 5])
def test_a_smaller_space_loses_what_it_says(q: int) -> None:
    given = loras(2, 1, 3)
    A, core, B, error = joint_core_space(given, q)
    whole = products(given)
    assert core.shape == (3, q, q)
    assert error == pytest.approx(float((rebuilt(A, core, B) - whole).norm() / whole.norm()), rel=1e-10)
    assert error > 0.01


@pytest.mark.parametrize("q", [1, 2, 4])
def test_a_smaller_space_is_within_the_bound_of_the_best(q: int) -> None:
    # Truncated higher-order SVD: the squared error is at most what the two unfoldings lose.
    given = loras(2, 1, 3)
    whole = products(given)
    error = joint_core_space(given, q)[3] * whole.norm()
    side = torch.linalg.svdvals(whole.transpose(0, 1).flatten(1))[q:].square().sum()
    stack = torch.linalg.svdvals(whole.flatten(0, 1))[q:].square().sum()
    assert max(side, stack) <= error**2 * (1 + 1e-12) and error**2 <= side + stack


@pytest.mark.parametrize("q", [2, 6])
def test_the_order_of_experts_is_the_order_of_cores(q: int) -> None:
    given, order = loras(2, 1, 3), [2, 0, 1]
    one = rebuilt(*joint_core_space(given, q)[:3])
    two = rebuilt(*joint_core_space([given[e] for e in order], q)[:3])
    torch.testing.assert_close(two, one[order], rtol=1e-10, atol=1e-10)


def test_how_a_product_is_split_into_factors_makes_no_difference() -> None:
    given = loras(2, 1, 3)
    same = [(A * 10.0**e, B / 10.0**e) for e, (A, B) in enumerate(given)]
    one, two = (rebuilt(*joint_core_space(of, 2)[:3]) for of in (given, same))
    torch.testing.assert_close(two, one, rtol=1e-10, atol=1e-10)


def test_untrained_loras_are_no_error() -> None:
    A, core, B, error = joint_core_space([(A, torch.zeros_like(B)) for A, B in loras(2, 2)], 4)
    assert error == 0 and (rebuilt(A, core, B) == 0).all()


# Through a recipe


def base() -> Any:
    return tiny.llama(dtype=torch.float64)


def stage1(folder: Path, r: int = 3, alpha: float = 6.0, num_experts: int = 2, seed: int = 0) -> Path:
    """A saved adapter as a first stage leaves it."""
    router = "meteora" if num_experts > 1 else "single"
    experts = {"num_experts": num_experts, "r": r, "lora_alpha": alpha}
    config = {"router": router, "experts": experts, "target_modules": tiny.TARGETS["llama"]}
    moelora.save(tiny.shake(tiny.adapt(base(), config, seed), seed=seed), folder)
    return folder


def comol(folders: list[Path], num_experts: int, r: int, alpha: float = 4.0, **more: Any) -> Any:
    experts = {"name": "core", "num_experts": num_experts, "r": r, "lora_alpha": alpha}
    config = {
        "experts": {**experts, "adapters": [str(folder) for folder in folders]},
        "router": "comol",
        "target_modules": tiny.TARGETS["llama"],
        **more,
    }
    return tiny.adapt(base(), config)


def deltas(model: Any) -> dict[str, Tensor]:
    """[E, O, D] what each expert adds to each weight."""
    found = {}
    for layer in routed_layers(model):
        part, scale = layer.experts, float(layer.experts.scale[0])
        if hasattr(part, "core"):
            found[layer.site.name] = scale * rebuilt(part.lora_A, part.core, part.lora_B).detach()
        else:
            A, B = part.lora_A.split(part.r), part.lora_B.split(part.r, dim=1)
            found[layer.site.name] = scale * products(list(zip(A, B, strict=True))).detach()
    return found


@pytest.mark.parametrize("room", [0, 3])
def test_experts_of_any_rank_and_scale_start_a_core_space(tmp_path: Path, room: int) -> None:
    folders = [stage1(tmp_path / "a"), stage1(tmp_path / "b", r=2, alpha=5.0, num_experts=1, seed=3)]
    model = comol(folders, 3, 8 + room)
    one, two = (deltas(moelora.load(base(), folder)) for folder in folders)
    for name, found in deltas(model).items():
        torch.testing.assert_close(found, torch.cat([one[name], two[name]]), rtol=1e-6, atol=1e-6)
    model(**tiny.batch()).loss.backward()
    for name, grad in tiny.gradients(model).items():  # what is left of the space can learn
        if name.endswith("lora_B"):
            assert (grad.abs().sum(0) > 0).all(), name


@pytest.mark.parametrize("e", range(2))
def test_a_certain_router_makes_the_model_that_expert_was_trained_as(tmp_path: Path, e: int) -> None:
    folder = stage1(tmp_path / "a")
    model, given = comol([folder], 2, 6).eval(), tiny.unlabelled(tiny.batch())
    lora = moelora.load(base(), folder).eval()
    for layer in routed_layers(model):
        layer.router.forward = lambda h, view: one_hot_route(e, h)
    for layer in routed_layers(lora):
        layer.router.forward = lambda x, view: one_hot_route(e, x)
    with torch.no_grad():
        expected = lora(**given).logits
        torch.testing.assert_close(model(**given).logits, expected, rtol=1e-6, atol=1e-6)
        with moelora.disabled(model):
            assert not torch.allclose(model(**given).logits, expected, atol=0.1)


def one_hot_route(e: int, x: Tensor) -> Route:
    gate = x.new_zeros(x.shape[0], 2)
    gate[:, e] = 1
    return Route(gate, 2)


def test_a_core_space_that_is_too_small_says_what_it_loses(tmp_path: Path) -> None:
    folder = stage1(tmp_path / "a")
    with pytest.warns(UserWarning, match="rank 4 does not hold all of these LoRAs.*r: 6 is exact") as caught:
        model = comol([folder], 2, 4)
    before = deltas(moelora.load(base(), folder))
    lost = {name: float((now - before[name]).norm() / before[name].norm()) for name, now in deltas(model).items()}
    worst = max(lost, key=lost.__getitem__)
    (message,) = [str(warning.message) for warning in caught]
    said = re.search(r"at '(.*)' ([\d.]+) % of them", message)
    assert said is not None and said[1] == worst
    assert float(said[2]) == pytest.approx(100 * lost[worst], rel=1e-2)


def test_an_imported_core_space_is_saved_and_loaded(tmp_path: Path) -> None:
    model, given = comol([stage1(tmp_path / "a")], 2, 6).eval(), tiny.unlabelled(tiny.batch())
    moelora.save(model, tmp_path / "c")
    again = moelora.load(base(), tmp_path / "c").eval()
    with torch.no_grad():
        assert torch.equal(model(**given).logits, again(**given).logits)


def test_plain_experts_start_from_adapters_of_their_own_rank_and_scale(tmp_path: Path) -> None:
    folder = stage1(tmp_path / "a")
    config = {"num_experts": 2, "r": 3, "lora_alpha": 6.0, "adapters": [str(folder)]}
    fresh = {"router": "meteora", "target_modules": tiny.TARGETS["llama"]}
    model = tiny.adapt(base(), {**fresh, "experts": config})
    before = deltas(moelora.load(base(), folder))
    assert all(torch.equal(found, before[name]) for name, found in deltas(model).items())
    with pytest.raises(AdapterError, match=r"expert_0: rank 3, but r is 2 here; set experts\.r to 3"):
        tiny.adapt(tiny.llama(), {**fresh, "experts": {**config, "r": 2}})


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = stage1(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"2 experts in .*, but num_experts is 3"):
        comol([folder], 3, 6)
    with pytest.raises(AdapterError, match="which is not an adapted layer here"):
        comol([folder], 2, 6, target_modules=["q_proj"])
    moelora.save(comol([folder], 2, 6), tmp_path / "c")
    with pytest.raises(AdapterError, match="its experts are not plain LoRAs"):
        comol([tmp_path / "c"], 2, 6)
