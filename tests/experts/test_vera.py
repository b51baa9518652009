"""VeRA experts: one frozen pair for the whole model, vectors per expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VeraConfig, get_peft_model
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError
from moelora.model.adapt import parameter_counts
from moelora.model.record import routed_layers
from moelora.model.write import adapter_tensors
from tests import tiny
from tests.experts import usual

ALPHA, R = 6.0, 4


def experts(num_experts: int = 3, **more: Any) -> dict[str, Any]:
    return {"name": "vera", "num_experts": num_experts, "r": R, "lora_alpha": ALPHA, **more}


@pytest.mark.parametrize(("router", "E"), [("softmax", 3), ({"name": "meteora", "top_k": 2}, 4), ("single", 1)])
def test_equals_the_formula(router: Any, E: int) -> None:
    model, layer = usual.toy(experts(E), router)
    A, B = layer.experts.bases.A.double(), layer.experts.bases.B.double()

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        for t in range(len(x)):
            scores = w["Wg"] @ x[t] if E > 1 else x.new_zeros(1)
            gate = usual.best(scores, 2 if E == 4 else E)
            y = w["W"] @ x[t] + w["b"]
            for e in range(E):
                y = y + gate[e] * (ALPHA / R) * w["lambda_b"][e] * (B @ (w["lambda_d"][e] * (A @ x[t])))
            rows.append(y)
            gates.append(torch.stack(gate))
        return torch.stack(rows), torch.stack(gates)

    tiny.assert_layer_equals(model, layer, formula)


def test_equals_peft_bases_included() -> None:
    model = usual.disturbed(usual.llama(experts(1, lora_alpha=R, seed=7), "single"))
    config = VeraConfig(r=R, target_modules=tiny.TARGETS["llama"], projection_prng_key=7, save_projection=True)
    peft = get_peft_model(tiny.llama(), config).eval()
    for layer in routed_layers(model):
        twin, own = peft.base_model.model.get_submodule(layer.site.name), layer.experts
        assert torch.equal(twin.vera_A["default"], own.bases.A) and torch.equal(twin.vera_B["default"], own.bases.B)
        twin.vera_lambda_b["default"].data.copy_(own.lambda_b[0])
        twin.vera_lambda_d["default"].data.copy_(own.lambda_d[0])
    torch.testing.assert_close(usual.logits(model), usual.logits(peft), rtol=1e-5, atol=1e-5)
    assert (usual.logits(peft) - usual.logits(tiny.llama())).abs().max() > 0.1


def test_starts_as_the_base_model_with_the_vectors_of_the_paper() -> None:
    model = usual.llama(experts(d_initial=0.25))
    usual.assert_starts_as_the_base_model(model)
    for layer in routed_layers(model):
        assert not layer.experts.lambda_b.any() and (layer.experts.lambda_d == 0.25).all()


def test_one_pair_serves_all_layers_and_is_not_saved() -> None:
    model = usual.llama(experts()).to(torch.bfloat16)
    bases = {layer.experts.bases for layer in routed_layers(model)}
    (pair,) = bases
    sites = model.moelora.sites
    assert pair.A.shape == (R, max(s.in_features for s in sites)) == (R, 40) and pair.B.shape == (32, R)
    assert pair.A.dtype == pair.B.dtype == torch.float32
    names = {name.rpartition(".")[2] for name in adapter_tensors(model) if ".experts." in name}
    assert names == {"lambda_b", "lambda_d"}
    own = sum(3 * (R + s.out_features) for s in sites)
    gates = sum(3 * s.in_features for s in sites)
    assert parameter_counts(model)[0] == own + gates


def test_the_pair_is_the_same_numbers_everywhere() -> None:
    """What a later version of torch draws has to be these, or saved adapters mean something else."""
    near = {"rtol": 0, "atol": 1e-6}
    pair = routed_layers(usual.llama(experts(seed=0)))[0].experts.bases
    torch.testing.assert_close(pair.A[0, :3], torch.tensor([-0.0028996, 0.2077637, -0.3187640]), **near)
    torch.testing.assert_close(pair.B[0, :3], torch.tensor([-0.2359046, -0.2404697, -1.0990248]), **near)
    other = routed_layers(usual.llama(experts(seed=1)))[0].experts.bases
    assert not torch.equal(pair.A, other.A)


def test_trains_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    usual.assert_comes_back(usual.trained(usual.llama(experts())), tmp_path)


def test_checkpointing_changes_no_gradient() -> None:
    usual.assert_checkpointing_changes_nothing(usual.disturbed(usual.llama(experts())))


def test_every_expert_is_a_plain_lora(tmp_path: Path) -> None:
    usual.assert_exports_exactly(usual.disturbed(usual.llama(experts()), 0.3), tmp_path / "out")


def test_constant_gates_are_one_plain_lora(tmp_path: Path) -> None:
    usual.assert_mixture_exports_exactly(usual.disturbed(usual.llama(experts(), "uniform")), tmp_path / "out")


def test_what_it_cannot_be_with_is_refused() -> None:
    with pytest.raises(ConfigError, match="router 'smora' is for experts with an A of their own; experts 'vera'"):
        usual.llama(experts(), "smora")
    with pytest.raises(ConfigError, match=r"experts\.train: B is for experts with a lora_B"):
        usual.llama(experts(train="B"))
    with pytest.raises(ConfigError, match=r"experts\.vera\.seed: .*found -1"):
        moelora.adapt(tiny.llama(), {"experts": experts(seed=-1)}, verbose=False)
