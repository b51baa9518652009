"""Arrow: prototypes against a full decomposition, the layer against its formula, and PEFT's layer beside it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moelora
from moelora.core.errors import ConfigError
from moelora.core.factors import Factors
from moelora.core.tape import Site
from moelora.model.record import routed_layers
from moelora.routers.arrow import Arrow
from tests import tiny

ALPHA, E, R = 6.0, 5, 2
TOKENS = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def config(**options: Any) -> dict[str, Any]:
    router = {"name": "arrow", **options}
    return {"router": router, "experts": {"num_experts": E, "r": R, "lora_alpha": ALPHA}}


def toy(**options: Any) -> tuple[Any, Any]:
    """A layer whose prototypes are those of its random experts."""
    model, layer = tiny.toy(config(**options))
    layer.router.prepare(layer.experts.factors())
    return model, layer


def factors(num_experts: int, r: int, wide: int, out: int) -> Factors:
    made = torch.Generator().manual_seed(1)
    A = torch.randn(num_experts * r, wide, generator=made, dtype=torch.float64)
    B = torch.randn(out, num_experts * r, generator=made, dtype=torch.float64)
    return Factors(A, B, torch.full((num_experts * r,), 0.5))


def router(num_experts: int, r: int, wide: int, out: int, top_k: int = 1) -> Arrow:
    return Arrow(Site("site", 0, wide, out), num_experts, r, top_k=top_k)


@pytest.mark.parametrize(("r", "wide", "out"), [(1, 6, 4), (3, 9, 11), (4, 3, 9), (4, 9, 3), (2, 40, 30)])
def test_prototypes_are_the_first_right_singular_vectors(r: int, wide: int, out: int) -> None:
    made, given = router(3, r, wide, out), factors(3, r, wide, out)
    made.prepare(given)
    for e in range(3):
        own = slice(e * r, (e + 1) * r)
        v = torch.linalg.svd(given.B[:, own] @ given.A[own])[2][0]
        v = v * v[v.abs().argmax()].sign()
        torch.testing.assert_close(made.prototypes[e].double(), v, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(made.prototypes.norm(dim=1), torch.ones(3))


def test_the_sign_of_the_factors_does_not_matter() -> None:
    one, two, given = router(3, 2, 6, 4), router(3, 2, 6, 4), factors(3, 2, 6, 4)
    one.prepare(given)
    two.prepare(Factors(-given.A, given.B, given.scale))
    assert torch.equal(one.prototypes, two.prototypes)
    assert (one.prototypes.gather(1, one.prototypes.abs().argmax(1, keepdim=True)) > 0).all()


def test_an_expert_of_zeros_has_no_direction() -> None:
    made, given = router(3, 2, 6, 4, top_k=3), factors(3, 2, 6, 4)
    given.B[:, :2] = 0
    given.A[4:] = 0
    made.prepare(given)
    assert (made.prototypes[[0, 2]] == 0).all() and made.prototypes[1].norm() > 0.99
    route = made(torch.randn(4, 6), tiny.view((4,)))
    assert route.weight.isfinite().all()


def oracle(layer: Any) -> tiny.Oracle:
    """Softmax over the k largest |x . v| divided by the temperature."""
    arrow, r = layer.router, layer.experts.r
    v = arrow.prototypes.double()

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        for t in range(x.shape[0]):
            scores = [(x[t] @ v[e]).abs() for e in range(E)]
            chosen = sorted(range(E), key=lambda e, scores=scores: (-scores[e].item(), e))[: arrow.top_k]
            total = sum((scores[e] / arrow.temperature).exp() for e in chosen)
            y, gate = w["W"] @ x[t] + w["b"], [x.new_zeros(())] * E
            for e in chosen:
                own = slice(e * r, (e + 1) * r)
                gate[e] = (scores[e] / arrow.temperature).exp() / total
                y = y + gate[e] * (ALPHA / r) * (w["B"][:, own] @ (w["A"][own] @ x[t]))
            rows.append(y)
            gates.append(torch.stack(gate))
        return torch.stack(rows), torch.stack(gates)

    return formula


@pytest.mark.parametrize("top_k", [1, 3, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_equals_the_formula(top_k: int, temperature: float) -> None:
    model, layer = toy(top_k=top_k, temperature=temperature)
    tiny.assert_layer_equals(model, layer, oracle(layer))


def test_the_direction_of_an_expert_goes_to_that_expert() -> None:
    model, layer = toy(top_k=1)
    x = layer.router.prototypes.double()
    assert tiny.routes(model, x=x)[0].index[:, 0].tolist() == tiny.routes(model, x=-x)[0].index[:, 0].tolist()
    assert tiny.routes(model, x=x)[0].index[:, 0].tolist() == list(range(E))


def test_a_recomputation_takes_the_choice_of_the_first_pass() -> None:
    _, layer = toy(top_k=2)
    view, choices = tiny.view((9,)), list[Tensor]()
    with view.tape.remember(choices):
        first = layer.router(TOKENS, view).index
    with view.tape.replay(choices):
        assert torch.equal(layer.router(TOKENS.flip(0), view).index, first)
    assert not torch.equal(layer.router(TOKENS.flip(0), view).index, first)


def test_nothing_to_learn_in_it_and_a_saved_buffer(tmp_path: Path) -> None:
    model = tiny.adapted("llama", "arrow")
    for layer in routed_layers(model):
        assert not list(layer.router.parameters())
        layer.router.prepare(layer.experts.factors())
    moelora.save(model, tmp_path)
    again = moelora.load(tiny.llama(), tmp_path)
    for one, two in zip(routed_layers(model), routed_layers(again), strict=True):
        assert torch.equal(one.router.prototypes, two.router.prototypes)
        assert (one.router.prototypes.norm(dim=1) > 0.99).all()
    model.to(torch.bfloat16)
    assert all(layer.router.prototypes.dtype == torch.float32 for layer in routed_layers(model))


def test_trained_adapters_give_their_prototypes_at_once(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    config = {**tiny.METHODS["meteora"], "target_modules": tiny.TARGETS["llama"]}
    trained = [tiny.shake(tiny.adapt(tiny.llama(), config, seed), seed=seed) for seed in (3, 4)]
    for model, folder in zip(trained, folders, strict=True):
        moelora.save(model, folder)
    own = {"num_experts": 6, "r": 4, "lora_alpha": 8, "train": "none", "adapters": [str(f) for f in folders]}
    library = tiny.adapt(tiny.llama(), {"router": "arrow", "experts": own, "target_modules": tiny.TARGETS["llama"]})
    assert not tiny.trainable(library)
    for layer in routed_layers(library):
        B, A = layer.experts.lora_B[:, 20:].double(), layer.experts.lora_A[20:].double()
        v = torch.linalg.svd(B @ A)[2][0]
        torch.testing.assert_close((layer.router.prototypes[5].double() @ v).abs().item(), 1.0, rtol=1e-6, atol=0)


def test_adapts_a_model_without_memory() -> None:
    with torch.device("meta"):
        model = tiny.llama()
    tiny.adapt(model, {**config(), "target_modules": ["q_proj"]})
    assert all(layer.router.prototypes.is_meta for layer in routed_layers(model))


def test_more_choices_than_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"routers\.arrow: top_k 6 is more than the 5 experts"):
        toy(top_k=6)
    with pytest.raises(ConfigError, match="top_k 3 is more than the 2 experts"):
        tiny.toy({"router": "arrow", "experts": {"num_experts": 2}})
    with pytest.raises(ConfigError, match="router 'arrow' is for experts with an A of their own"):
        tiny.toy({"router": "arrow", "experts": {"name": "hydra", "num_experts": 4}})


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_agrees_with_peft_where_its_power_iteration_has_arrived(temperature: float) -> None:
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer

    names = [f"task_{e}" for e in range(E)]
    how = {"top_k": 3, "router_temperature": temperature, "rng_seed": 0, "task_adapter_names": names}
    theirs = ArrowLoraLinearLayer(8, SimpleNamespace(**how, gks_adapter_names=[], use_gks=False))
    made, given = Arrow(Site("site", 0, 8, 6), E, R, top_k=3, temperature=temperature), factors(E, R, 8, 6)
    given.B[:, 1::R] *= 0.01  # the second singular value far below the first
    A, B = nn.ModuleDict(), nn.ModuleDict()
    for e, name in enumerate(names):
        own = slice(e * R, (e + 1) * R)
        A[name], B[name] = nn.Linear(8, R, bias=False), nn.Linear(R, 6, bias=False)
        A[name].weight.data, B[name].weight.data = given.A[own].float(), given.B[:, own].float()
    theirs.build_prototypes(A, B)
    made.prepare(given)
    cosine = (made.prototypes * theirs.prototypes).sum(1).abs()
    torch.testing.assert_close(cosine, torch.ones(E), rtol=0, atol=1e-6)

    x = torch.randn(1, 7, 8)
    gate = made(x.view(7, 8), tiny.view((7,))).dense().double()
    update = x.view(7, 8).double() @ given.A.t() * gate.repeat_interleave(R, 1) * 3.0 @ given.B.t()
    found = theirs(x, A, B, nn.Identity(), dict.fromkeys(names, 3.0))
    torch.testing.assert_close(found.view(7, 6).double(), update, rtol=1e-4, atol=1e-5)
