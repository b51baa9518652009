"""The probe: gradients and inputs of a base model, as autograd and the model itself have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

import moelora
from moelora.core.errors import ConfigError
from moelora.model.base import load_model
from moelora.model.quantised import form, steady
from moelora.model.record import routed_layers
from moelora.model.sources import dense_weight
from tests import tiny

INIT = """
import torch
from moelora.init.base import Init


class Looks(Init):
    probes = "{what}"
    batches = {batches}
    tokens = "{tokens}"

    @torch.no_grad()
    def __call__(self, experts, start):
        experts.lora_A.zero_()
        experts.lora_B.zero_()
        experts.found = start.gradient() if "{what}" == "gradients" else start.seen

    def watch(self, experts):
        seen = []

        def take(x):
            seen.append(x)
            return len(seen) < {wanted}

        return seen, take
"""


@pytest.fixture
def plugin(tmp_path: Any) -> Any:
    def made(what: str = "gradients", batches: int = 8, tokens: str = "all", wanted: int = 99) -> list[Any]:
        file = tmp_path / "looks.py"
        file.write_text(INIT.format(what=what, batches=batches, tokens=tokens, wanted=wanted))
        return [file]

    return made


def probed(base: Any, plugins: list[Any], batches: Any, targets: list[str], kind: str = "single") -> dict[str, Any]:
    """What the initialiser was given, by layer."""
    config = {"init": "looks", "router": kind, "target_modules": targets, "experts": {"r": 2}}
    model = moelora.adapt(base, config, plugins=plugins, verbose=False, batches=batches)
    return {layer.site.name: layer.experts.found for layer in routed_layers(model)}


def batches(kind: str, count: int = 3) -> list[dict[str, Tensor]]:
    return [tiny.given(kind, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_gradients_are_autograds_of_the_base_weights(kind: str, plugin: Any) -> None:
    base, other = (tiny.MODELS[kind](dtype=torch.float64) for _ in range(2))
    other.eval()
    for given in batches(kind):
        other(**{key: value for key, value in given.items() if key != "task_ids"}).loss.backward()
    found = probed(base, plugin(), batches(kind), tiny.TARGETS[kind])
    assert len(found) >= 6
    for name, G in found.items():
        layer = other.get_submodule(name)
        expected = layer.weight.grad / 3
        expected = expected if isinstance(layer, nn.Linear) else expected.t()
        torch.testing.assert_close(G, expected, rtol=1e-9, atol=1e-12)


def test_gradients_of_a_block_that_is_called_twice_add_up(plugin: Any) -> None:
    base, other = (tiny.llama(dtype=torch.float64, use_cache=False) for _ in range(2))
    for model in (base, other):
        model.model.layers[1] = model.model.layers[0]
    other(**tiny.batch()).loss.backward()
    found = probed(base, plugin(), [tiny.batch()], ["q_proj", "down_proj"])
    for name, G in found.items():
        torch.testing.assert_close(G, other.get_submodule(name).weight.grad, rtol=1e-9, atol=1e-12)


def test_gradients_of_a_half_precision_base_are_float32(plugin: Any) -> None:
    found = probed(tiny.llama(dtype=torch.bfloat16), plugin(), batches("llama"), tiny.TARGETS["llama"])
    exact = probed(tiny.llama(), plugin(), batches("llama"), tiny.TARGETS["llama"])
    for name, G in found.items():
        assert G.dtype == torch.float32
        assert float((G - exact[name]).norm() / exact[name].norm()) < 0.05


def test_gradients_of_a_quantised_base_are_those_beside_its_rounded_weights(plugin: Any) -> None:
    pytest.importorskip("bitsandbytes")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    small = load_model("moelora/tiny", dtype=torch.float32, quantization_config=how, device_map={"": "cpu"})
    other, given = load_model("moelora/tiny", dtype=torch.float32), {"input_ids": torch.arange(5, 37).view(2, 16)}
    steady(small)
    for name, module in other.named_modules():
        if form(small.get_submodule(name).weight if isinstance(module, nn.Linear) else torch.empty(0)) is not None:
            module.weight.data = dense_weight(small.get_submodule(name))
    found = probed(small, plugin(), [{**given, "labels": given["input_ids"]}], ["q_proj", "down_proj"])
    expected = probed(other, plugin(), [{**given, "labels": given["input_ids"]}], ["q_proj", "down_proj"])
    for name, G in found.items():
        assert float((G - expected[name]).norm() / expected[name].norm()) < 1e-3


def test_the_base_model_is_left_as_it_was_and_one_gradient_is_held_at_a_time(plugin: Any, monkeypatch: Any) -> None:
    base = tiny.llama(attention_dropout=0.3)
    base.model.layers[0].eval()
    base.model.norm.weight.requires_grad_(False)
    before = {name: module.training for name, module in base.named_modules()}
    config = {"init": "looks", "target_modules": ["q_proj"], "experts": {"r": 2}}

    def fail(*_: Any, **__: Any) -> None:
        assert all(p.grad is None for p in base.parameters())
        assert {name: module.training for name, module in base.named_modules()} == before
        raise ConfigError("far enough")

    monkeypatch.setattr("moelora.model.adapt.share", fail)
    with pytest.raises(ConfigError, match="far enough"):
        moelora.adapt(base, config, plugins=plugin(), verbose=False, batches=batches("llama"))
    trained = {name for name, p in base.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in base.named_parameters()} - {"model.norm.weight"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_only_the_first_batches_are_taken(plugin: Any) -> None:
    asked = []

    def endless() -> Any:
        while True:
            asked.append(len(asked))
            yield tiny.given(seed=len(asked))

    found = probed(tiny.llama(), plugin(batches=2), endless(), ["q_proj"])
    assert len(asked) == 2
    for name, G in probed(tiny.llama(), plugin(), [tiny.batch(seed=1), tiny.batch(seed=2)], ["q_proj"]).items():
        assert torch.equal(G, found[name])


@pytest.mark.parametrize("tokens", ["all", "answers"])
def test_inputs_are_those_of_tokens_that_count(plugin: Any, tokens: str) -> None:
    given = tiny.batch()
    given["labels"][:, :3] = -100
    given["labels"][1, -1] = 5  # on padding
    kept = given["attention_mask"].bool()
    if tokens == "answers":
        kept[:, :3] = False
    base, states = tiny.llama(), {}
    names = [name for name, _ in base.named_modules() if name.endswith(("q_proj", "k_proj", "down_proj"))]
    for name in names:
        base.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: states.update({name: args[0]}))
    base.eval()(**given)
    found = probed(tiny.llama(), plugin("inputs", tokens=tokens), [given], ["q_proj", "k_proj", "down_proj"])
    assert set(found) == set(names)
    for name, seen in found.items():
        torch.testing.assert_close(seen[0], states[name][kept])


def test_layers_that_read_one_tensor_are_looked_at_once(plugin: Any) -> None:
    found = probed(tiny.llama(), plugin("inputs"), batches("llama"), ["q_proj", "k_proj", "v_proj", "o_proj"])
    first, second = (f"model.layers.{i}.self_attn." for i in range(2))
    assert found[f"{first}q_proj"] is found[f"{first}k_proj"] is found[f"{first}v_proj"]
    assert len({id(found[f"{at}{name}"]) for at in (first, second) for name in ("q_proj", "o_proj")}) == 4
    assert all(len(seen) == 3 for seen in found.values())


def test_an_initialiser_that_wants_no_more_is_given_no_more(plugin: Any) -> None:
    found = probed(tiny.llama(), plugin("inputs", wanted=2), batches("llama", 5), ["q_proj", "down_proj"])
    assert all(len(seen) == 2 for seen in found.values())


def test_an_encoder_and_a_decoder_have_masks_of_their_own(plugin: Any) -> None:
    given = tiny.batch("t5")
    found = probed(tiny.t5(), plugin("inputs", tokens="answers"), [given], ["q", "v"])
    for name, seen in found.items():
        decoder = name.startswith("decoder") and not (name.endswith("EncDecAttention.v"))
        tokens = given["labels"].ne(-100) if decoder else given["attention_mask"]
        assert len(seen[0]) == int(tokens.sum()), name


def test_what_cannot_be_probed_is_refused(plugin: Any) -> None:
    with pytest.raises(ConfigError, match=r"init looks looks at data: give moelora.adapt some batches="):
        probed(tiny.llama(), plugin(), None, ["q_proj"])
    with pytest.raises(ConfigError, match=r"there is none in what was given"):
        probed(tiny.llama(), plugin(), [], ["q_proj"])
    with pytest.raises(ConfigError, match=r"probes gradients, and the batches have no labels"):
        probed(tiny.llama(), plugin(), [tiny.unlabelled(tiny.batch())], ["q_proj"])
    base = tiny.llama()
    base.model.norm.weight.data.zero_()
    with pytest.raises(ConfigError, match=r"no finite gradient other than zero at 'model.layers.0.self_attn.q_proj'"):
        probed(base, plugin(), [tiny.batch()], ["q_proj"])
    base = tiny.llama()
    base.lm_head.weight.ds_id = 0
    with pytest.raises(ConfigError, match=r"ZeRO-3 has taken its weights apart; use deepspeed: zero2"):
        probed(base, plugin(), [tiny.batch()], ["q_proj"])
    config = {"init": "looks", "experts": {"adapters": ["out/none"]}, "target_modules": ["q_proj"]}
    with pytest.raises(ConfigError, match=r"experts.adapters fill A and B, and so would init looks"):
        moelora.adapt(tiny.llama(), config, plugins=plugin(), verbose=False)


def test_a_model_that_is_filled_from_a_checkpoint_is_not_probed(plugin: Any) -> None:
    config = {"init": "looks", "target_modules": ["q_proj"], "experts": {"r": 2}}
    model = moelora.adapt(tiny.llama(), config, plugins=plugin(), verbose=False, blank=True)
    assert all((layer.experts.lora_A == 0).all() for layer in routed_layers(model))
    assert not hasattr(routed_layers(model)[0].experts, "found")
