"""GenKnowSub: the mean of general experts is taken out of every expert, factor by factor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import AdapterError, ConfigError, MoeloraError
from moelora.model.record import routed_layers
from moelora.model.write import adapter_tensors
from moelora.tools.genknowsub import subtract_general
from tests import tiny


def general(folder: Path, seed: int, num_experts: int = 1, **more: Any) -> tuple[Path, Any]:
    """A folder of general experts, and the model they are from."""
    experts = {"num_experts": num_experts, "r": 4, "lora_alpha": 8, **more.pop("experts", {})}
    config = {"router": "uniform", "target_modules": tiny.TARGETS["llama"], **more, "experts": experts}
    model = tiny.shake(tiny.adapt(tiny.llama(), config, seed), seed=seed)
    moelora.save(model, folder)
    return folder, model


def copies(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in adapter_tensors(model).items()}


def test_the_mean_of_all_general_experts_goes_from_every_expert(tmp_path: Path) -> None:
    one, first = general(tmp_path / "one", 5)
    two, second = general(tmp_path / "two", 6, num_experts=2)
    model = tiny.adapted("llama", "arrow")
    before = copies(model)
    subtract_general(model, [one, str(two)])
    for layer, g, h in zip(*map(routed_layers, (model, first, second)), strict=True):
        A = (g.experts.lora_A + h.experts.lora_A[:4] + h.experts.lora_A[4:]) / 3
        B = (g.experts.lora_B + h.experts.lora_B[:, :4] + h.experts.lora_B[:, 4:]) / 3
        for e in range(4):
            own, start = slice(4 * e, 4 * e + 4), f"{layer.site.name}.experts.lora_"
            torch.testing.assert_close(layer.experts.lora_A[own], before[f"{start}A"][own] - A)
            torch.testing.assert_close(layer.experts.lora_B[:, own], before[f"{start}B"][:, own] - B)


def test_prototypes_are_those_of_what_is_left(tmp_path: Path) -> None:
    folder, _ = general(tmp_path / "g", 5)
    model = tiny.adapted("llama", "arrow")
    subtract_general(model, [folder])
    for layer in routed_layers(model):
        v = torch.linalg.svd((layer.experts.lora_B[:, :4] @ layer.experts.lora_A[:4]).double())[2][0]
        cosine = (layer.router.prototypes[0].double() @ v).abs().item()
        assert cosine == pytest.approx(1, abs=1e-5)


def test_an_expert_that_was_all_general_is_gone(tmp_path: Path) -> None:
    folder, model = general(tmp_path / "g", 5)
    batch = tiny.batch()
    subtract_general(model, [folder])
    assert torch.equal(model(**batch).logits, tiny.llama()(**batch).logits)


def test_losses_take_what_is_left_for_the_start(tmp_path: Path) -> None:
    folder, _ = general(tmp_path / "g", 5)
    model = tiny.adapted("llama", "softmax", losses={"l2_preservation": 1.0})
    subtract_general(model, [folder])
    with moelora.collect(model) as collected:
        model(**tiny.batch())
    assert collected.terms[0]["l2_preservation"] == 0


def test_what_is_left_trains_on(tmp_path: Path) -> None:
    folder, _ = general(tmp_path / "g", 5)
    model = tiny.adapted("llama", "meteora", experts={"num_experts": 3, "r": 4, "lora_alpha": 8})
    names = set(tiny.trainable(model))
    subtract_general(model, [folder])
    model(**tiny.batch()).loss.backward()
    assert set(tiny.gradients(model)) == names


@pytest.mark.parametrize(
    ("own", "theirs", "message"),
    [
        ({}, {"experts": {"r": 2}}, "rank 2 and scale 4 at .*, but the experts of the model have rank 4 and scale 2"),
        ({}, {"experts": {"lora_alpha": 4}}, "rank 4 and scale 1 at .*, but"),
        ({}, {"target_modules": ["q_proj"]}, "rank 0 and scale 1 at 'model.layers.0.self_attn.v_proj', but"),
        ({}, {"experts": {"name": "hydra"}}, "its experts are not plain LoRAs"),
        ({"router": "softmax", "experts": {"name": "hydra", "num_experts": 4, "r": 4}}, {}, "has Hydra experts"),
    ],
)
def test_others_are_refused_and_the_model_left_alone(
    tmp_path: Path, own: dict[str, Any], theirs: dict[str, Any], message: str
) -> None:
    good, _ = general(tmp_path / "good", 4)
    bad, _ = general(tmp_path / "bad", 5, **theirs)
    model = tiny.adapted("llama", "arrow", **own)
    before = copies(model)
    with pytest.raises(AdapterError, match=message):
        subtract_general(model, [good, bad])
    tiny.assert_same(copies(model), before)


def test_experts_of_unlike_scales_are_refused(tmp_path: Path) -> None:
    good, _ = general(tmp_path / "good", 4)
    model = tiny.adapted("llama", "arrow")
    routed_layers(model)[0].experts.scale[4:8] = 3
    with pytest.raises(AdapterError, match="unlike scales at 'model"):
        subtract_general(model, [good])


def test_nothing_to_subtract_and_nothing_to_subtract_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one folder"):
        subtract_general(tiny.adapted("llama", "arrow"), [])
    with pytest.raises(MoeloraError, match="has no experts"):
        subtract_general(tiny.llama(), [tmp_path])
    with pytest.raises(AdapterError, match="nowhere"):
        subtract_general(tiny.adapted("llama", "arrow"), [tmp_path / "nowhere"])
