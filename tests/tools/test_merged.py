"""Merged for a while: the same outputs at the cost of the base model, and everything as before afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import moelora
from moelora.core.errors import AdapterError, ConfigError, MoeloraError
from moelora.model.record import routed_layers
from moelora.model.routed import RoutedModel
from tests import tiny
from tests.experts import usual

EXPERTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "core": {},
    "hydra": {},
    "dora": {},
    "kasa": {},
    "slora": {},
    "loraxs": {},
    "vera": {"r": 16},
    "nola": {"bases": 8},
    "unilora": {"theta_d_length": 64},
    "lamda": {"start": "spectral"},
}


def state(model: Any) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_outputs_are_the_same_inside_and_all_is_as_before_after(experts: str, mode: str, tmp_path: Path) -> None:
    config = {"name": experts, "num_experts": 3, "r": 4, **EXPERTS[experts]}
    model = usual.disturbed(usual.llama(config, "uniform"), 0.1).train(mode == "train")
    given, cls = tiny.unlabelled(tiny.batch()), type(model)
    before, trains = state(model), set(tiny.trainable(model))
    with torch.no_grad():
        expected = model.eval()(**given).logits
        model.train(mode == "train")
        with moelora.merged(model) as inside:
            assert inside is model and not isinstance(model, RoutedModel) and not routed_layers(model)
            assert not tiny.trainable(model)
            torch.testing.assert_close(model(**given).logits, expected, rtol=0, atol=2e-5)
            with pytest.raises(MoeloraError):
                moelora.save(model, tmp_path / "out")
    assert type(model) is cls and set(tiny.trainable(model)) == trains
    tiny.assert_same(state(model), before)
    with torch.no_grad():
        assert torch.equal(model.eval()(**given).logits, expected)


def test_trained_copies_are_in_their_places_and_come_back() -> None:
    model = tiny.adapted("bert", "static", modules_to_save=["classifier"])
    model.classifier.trained.weight.data.add_(1)
    given, before = tiny.unlabelled(tiny.given("bert")), state(model)
    with torch.no_grad():
        expected = model.eval()(**given).logits
        with moelora.merged(model):
            torch.testing.assert_close(model(**given).logits, expected, rtol=0, atol=2e-5)
        assert torch.equal(model(**given).logits, expected)
    tiny.assert_same(state(model), before)
    assert "classifier.trained.weight" in tiny.trainable(model)


def test_generation_is_that_of_the_model() -> None:
    model = tiny.adapted("llama", "static").eval()
    prompt = tiny.unlabelled(tiny.batch(padded=False))
    expected = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    with moelora.merged(model):
        assert torch.equal(model.generate(**prompt, max_new_tokens=5, do_sample=False), expected)


def test_an_error_inside_or_half_way_leaves_the_model_as_it_was() -> None:
    model = tiny.adapted("llama", "static")
    before = state(model)
    with pytest.raises(KeyError), moelora.merged(model):
        raise KeyError
    tiny.assert_same(state(model), before)
    layer = routed_layers(model)[3]
    real = layer.router.constant_gates(None)
    layer.router.constant_gates = lambda task: real + 0.1
    with pytest.raises(AdapterError, match=r"the merged layer is .* off"), moelora.merged(model):
        pass
    tiny.assert_same(state(model), before)
    assert len(routed_layers(model)) == 6 and isinstance(model, RoutedModel)


def test_what_looks_at_tokens_is_refused() -> None:
    model = tiny.adapted("llama", "meteora")
    with pytest.raises(ConfigError, match="decides token by token"), moelora.merged(model):
        pass
    assert isinstance(model, RoutedModel)
