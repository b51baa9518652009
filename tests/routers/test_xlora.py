"""X-LoRA: the formula, PEFT as a witness, its invariants, and decoding with two caches."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import XLoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.pytorch_utils import Conv1D

import moelora
from moelora.core.errors import ConfigError, MoeloraError
from moelora.model.record import routed_layers
from tests import tiny

pytestmark = [pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")]  # PEFT, on transformers' names
ALPHA, E, R = 4.0, 4, 2
TOKENS = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def config(num_experts: int = E, **options: Any) -> dict[str, Any]:
    return {
        "router": {"name": "xlora", "xlora_dropout_p": 0.0, "xlora_size": 6, **options},
        "experts": {"num_experts": num_experts, "r": R, "lora_alpha": ALPHA},
    }


def llama(seed: int = 0, num_experts: int = E, train: str = "all", **options: Any) -> Any:
    """A float64 Llama with experts that matter."""
    made = config(num_experts, **options)
    made["experts"]["train"] = train
    return tiny.adapted("llama", "xlora", seed, dtype=torch.float64, **made)


def head(model: Any) -> nn.Sequential:
    """The one head of a model."""
    return routed_layers(model)[0].router.head


@torch.no_grad()
def always(model: Any, e: int) -> None:
    """Make the head certain of one expert, whatever it reads."""
    last = head(model)[-1]
    last.weight.zero_()
    last.bias.zero_()
    last.bias[e::E] = 1e4


def logits(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**tiny.unlabelled(tiny.batch()), **more).logits


def only(model: Any, e: int) -> Any:
    """A plain LoRA model that holds expert e of ``model``."""
    experts = {"r": R, "lora_alpha": ALPHA}
    plain = tiny.adapted("llama", "single", experts=experts, dtype=torch.float64)
    own = slice(e * R, (e + 1) * R)
    with torch.no_grad():
        for mine, theirs in zip(routed_layers(plain), routed_layers(model), strict=True):
            mine.experts.lora_A.copy_(theirs.experts.lora_A[own])
            mine.experts.lora_B.copy_(theirs.experts.lora_B[:, own])
    return plain


# The formula


def oracle(layer: Any) -> tiny.Oracle:
    """The head reads the layer's own output before experts, which is the toy's last hidden state."""
    router = layer.router

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        for t in range(x.shape[0]):
            hidden = (w["W"] @ x[t] + w["b"]).detach()
            names = [name.removesuffix(".weight") for name in w if name.startswith("head") and "weight" in name]
            for depth, name in enumerate(names):
                hidden = w[f"{name}.weight"] @ (hidden.clamp(min=0) if depth else hidden) + w[f"{name}.bias"]
            raised = (hidden / router.temperature).exp()
            scores = raised / raised.sum() if router.softmax else hidden
            ranked = sorted(range(len(scores)), key=lambda e, scores=scores: (-scores[e].item(), e))
            chosen = ranked[: router.top_k or len(scores)]
            kept = {e: scores[e] for e in chosen}
            if router.softmax_topk:
                kept = {e: scores[e].exp() / sum(scores[i].exp() for i in chosen) for e in chosen}
            y, gate = w["W"] @ x[t] + w["b"], [x.new_zeros(())] * len(scores)
            for e, scaling in kept.items():
                own = slice(e * R, (e + 1) * R)
                gate[e] = router.global_scaling_weight * scaling
                y = y + gate[e] * (ALPHA / R) * (w["B"][:, own] @ (w["A"][own] @ x[t]))
            rows.append(y)
            gates.append(torch.stack(gate))
        return torch.stack(rows), torch.stack(gates)

    return formula


OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "temperature": {"softmax_temperature": 0.3},
    "raw": {"enable_softmax": False},
    "raw has no temperature": {"enable_softmax": False, "softmax_temperature": 0.3},
    "top_k": {"top_k": 2},
    "softmax of top_k": {"top_k": 2, "enable_softmax": False, "enable_softmax_topk": True},
    "softmax of top_k of softmax": {"top_k": 3, "enable_softmax_topk": True},
    "weight": {"global_scaling_weight": -0.7, "top_k": 1},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("layerwise", [False, True])
def test_equals_the_formula(name: str, depth: int, layerwise: bool) -> None:
    model, layer = tiny.toy(config(xlora_depth=depth, layerwise_scalings=layerwise, **OPTIONS[name]))
    assert sum(isinstance(part, nn.Linear) for part in layer.router.head) == depth
    tiny.assert_layer_equals(model, layer, oracle(layer))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.filterwarnings("ignore:.*enable_softmax.*:UserWarning")
def test_equals_peft(tmp_path: Path, name: str, depth: int, layerwise: bool) -> None:
    model = llama(xlora_depth=depth, layerwise_scalings=layerwise, **OPTIONS[name]).eval()
    moelora.save(model, tmp_path)
    base = tiny.llama(dtype=torch.float64)
    base.config.use_cache = False
    theirs = dict(OPTIONS[name])
    made = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=tiny.HIDDEN,
        adapters={str(e): str(tmp_path / f"experts/expert_{e}") for e in range(E)},
        xlora_depth=depth,
        xlora_size=6,
        xlora_dropout_p=0.0,
        layerwise_scalings=layerwise,
        top_k_lora=theirs.pop("top_k", None),
        **theirs,
    )
    peft = get_peft_model(base, made).double().eval()
    linear = [part for part in peft.base_model.internal_xlora_classifier.layers if isinstance(part, nn.Linear)]
    for mine, copied in zip([p for p in head(model) if isinstance(p, nn.Linear)], linear, strict=True):
        copied.load_state_dict(mine.state_dict())
    given = tiny.unlabelled(tiny.batch())
    with torch.no_grad():
        found, expected = model(**given, use_cache=False).logits, peft(**given, use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        with moelora.disabled(model):
            assert not torch.allclose(model(**given).logits, expected, atol=0.01)


# Invariants


@pytest.mark.parametrize("options", [{"global_scaling_weight": 0.0}, {"enable_softmax": False}])
def test_scalings_of_zero_are_the_base(options: dict[str, Any]) -> None:
    """X1."""
    model = llama(**options)
    if "enable_softmax" in options:
        assert not torch.equal(logits(model), logits(tiny.llama(dtype=torch.float64)))
        for parameter in head(model).parameters():
            nn.init.zeros_(parameter)
    assert torch.equal(logits(model), logits(tiny.llama(dtype=torch.float64)))


def test_one_expert_is_that_adapter() -> None:
    """X2."""
    model = llama(num_experts=1)
    assert torch.equal(logits(model), logits(only(model, 0)))


@pytest.mark.parametrize("e", range(E))
@pytest.mark.parametrize("layerwise", [False, True])
def test_a_certain_head_is_one_adapter(e: int, layerwise: bool) -> None:
    """X3."""
    model = llama(layerwise_scalings=layerwise)
    always(model, e)
    torch.testing.assert_close(logits(model), logits(only(model, e)), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("softmax", [True, False])
def test_every_expert_chosen_is_dense(softmax: bool) -> None:
    """X4."""
    dense, all_chosen = (llama(enable_softmax=softmax, top_k=k) for k in (None, E))
    torch.testing.assert_close(logits(dense), logits(all_chosen), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_mass_of_kept_scalings(k: int) -> None:
    """X5: a softmax of those kept sums to one for every token; without it their mass is what it was."""
    given = tiny.unlabelled(tiny.batch())
    (one, *_), (two, *_) = (tiny.routes(llama(top_k=k, enable_softmax_topk=on), **given) for on in (True, False))
    assert torch.equal(one.index, two.index) and one.weight.shape == (21, k)
    torch.testing.assert_close(one.weight.sum(1), torch.ones(21, dtype=torch.float64))
    assert torch.equal(two.weight, two.probs.gather(1, two.index)) and (two.weight.sum(1) < 0.999).all()


def test_equal_scores_keep_the_first_experts() -> None:
    model = llama(top_k=2)
    for parameter in head(model).parameters():
        nn.init.zeros_(parameter)
    assert all((route.index == torch.tensor([0, 1])).all() for route in tiny.routes(model, **tiny.batch()))


def test_one_head_gives_every_layer_the_same_gates_a_layerwise_one_its_own() -> None:
    """X7."""
    given = tiny.unlabelled(tiny.batch())
    shared, layerwise = llama(), llama(layerwise_scalings=True)
    routes = tiny.routes(shared, **given)
    assert len(routes) == 6 and all(torch.equal(route.weight, routes[0].weight) for route in routes)
    base = tiny.llama(dtype=torch.float64).eval()
    with torch.no_grad():
        hidden = base.model(**given).last_hidden_state
        scores = head(layerwise)(hidden).view(21, 6, E).softmax(-1)  # layer by layer, as PEFT lays them out
    for site, route in enumerate(tiny.routes(layerwise.eval(), **given)):
        torch.testing.assert_close(route.weight, scores[:, site], rtol=1e-12, atol=1e-12)


def test_there_is_one_head_for_all_layers() -> None:
    model = llama(xlora_depth=2, layerwise_scalings=True)
    layers = routed_layers(model)
    assert len(layers) == 6 and len({id(layer.router) for layer in layers}) == 1
    own = sum(p.numel() for p in head(model).parameters())
    assert own == (tiny.HIDDEN + 1) * 6 + 7 * E * len(layers)
    experts = sum(p.numel() for layer in layers for p in layer.experts.parameters())
    assert sum(p.numel() for p in tiny.trainable(model).values()) == own + experts


def test_a_scaling_on_the_input_is_a_scaling_in_rank_space() -> None:
    """X8: under one dropout mask too, since it is one number per token."""
    made = config()
    model, layer = tiny.toy({**made, "experts": {**made["experts"], "lora_dropout": 0.5}})
    seen: list[Tensor] = []
    layer.experts.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    y = model(TOKENS)
    gate, experts, expected = tiny.routes(model, x=TOKENS)[0].weight, layer.experts, layer.base_layer(TOKENS)
    assert (seen[0] == 0).any()
    for e in range(E):
        own, scaled = slice(e * R, (e + 1) * R), gate[:, e : e + 1] * seen[0]
        expected = expected + ALPHA / R * scaled @ experts.lora_A[own].t() @ experts.lora_B[:, own].t()
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_forward_and_generate_leave_flags_as_they_were(training: bool) -> None:
    """X9."""
    model = llama(train="none").train(training)
    model.model.layers[0].eval()
    trains, flags = set(tiny.trainable(model)), {name: m.training for name, m in model.named_modules()}
    names = {name for name, _ in head(model).named_parameters()}
    assert {name.rpartition("head.")[2] for name in trains} == names and len(trains) == len(names)
    model(**tiny.batch()).loss.backward()
    model.generate(**tiny.unlabelled(tiny.batch(padded=False)), max_new_tokens=3)
    assert set(tiny.trainable(model)) == trains
    assert {name: m.training for name, m in model.named_modules()} == flags
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trains)
    assert all((grad != 0).any() for grad in tiny.gradients(model).values())


def test_disabled_is_the_base_bit_for_bit() -> None:
    """X10: with a cache of its own, too."""
    model, base = llama().eval(), tiny.llama(dtype=torch.float64).eval()
    given = tiny.unlabelled(tiny.batch(padded=False))
    with moelora.disabled(model):
        assert torch.equal(logits(model), logits(base))
        assert torch.equal(model.generate(**given, max_new_tokens=9), base.generate(**given, max_new_tokens=9))
    assert not torch.allclose(logits(model), logits(base), atol=0.01)


def test_a_token_does_not_see_later_ones_nor_other_rows() -> None:
    model, ids = llama(layerwise_scalings=True, top_k=2).eval(), tiny.batch(padded=False)["input_ids"]
    changed = ids.clone()
    changed[1:] = 5
    changed[0, 4:] = 6
    with torch.no_grad():
        one, two = (model(input_ids=given).logits[0, :4] for given in (ids, changed))
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
        alone = model(input_ids=ids[:1, :4]).logits[0]
    torch.testing.assert_close(one, alone, rtol=1e-10, atol=1e-10)


# Training


def test_the_pass_without_experts_has_no_graph() -> None:
    model, seen = llama(), []
    model.enable_input_require_grads()  # without it, a frozen base would have none anyway
    head(model).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**tiny.batch())
    assert len(seen) == 1 and not seen[0].requires_grad
    with torch.no_grad(), moelora.disabled(model):
        expected = model.model(**tiny.unlabelled(tiny.batch())).last_hidden_state
    assert torch.equal(seen[0], expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["xlora", "xlora_layers"])
def test_gradient_checkpointing_changes_no_gradient(kind: str, method: str) -> None:
    found = []
    for on in (False, True):
        model = tiny.adapted(kind, method)
        if on:
            tiny.checkpointing(model)
        loss = model(**tiny.batch(kind)).loss
        loss.backward()
        found.append({"loss": loss.detach(), **tiny.gradients(model)})
    tiny.assert_same(*found)


def test_head_dropout_is_for_training_only() -> None:
    model = llama(xlora_depth=2, xlora_dropout_p=0.5)
    given = tiny.unlabelled(tiny.batch())
    one, two = (tiny.routes(model, **given)[0].weight for _ in range(2))
    assert not torch.equal(one, two)
    assert torch.equal(logits(model), logits(model))


def test_the_head_computes_in_float32_in_a_bfloat16_model() -> None:
    model = tiny.adapted("llama", "xlora_layers").to(torch.bfloat16)
    hidden, plan = [], []
    head(model).register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    head(model).register_forward_hook(lambda module, args, out: plan.append(out))
    model(**tiny.batch()).loss.backward()
    assert hidden[0].dtype == torch.bfloat16 and plan[0].dtype == torch.float32
    expected = copy.deepcopy(head(model)).float()(hidden[0].float())
    assert torch.equal(plan[0], expected) and not torch.equal(expected, expected.bfloat16().float())
    assert all(torch.isfinite(grad).all() for grad in tiny.gradients(model).values())
    for route in tiny.routes(model, **tiny.unlabelled(tiny.batch())):
        assert route.weight.dtype == route.logits.dtype == route.probs.dtype == torch.float32


def test_the_head_learns_with_frozen_experts_of_a_first_stage(tmp_path: Path) -> None:
    moelora.save(tiny.adapted("llama", "meteora", experts={"num_experts": E, "r": R, "lora_alpha": ALPHA}), tmp_path)
    experts = {**config()["experts"], "train": "none", "adapters": [str(tmp_path)]}
    model = tiny.adapt(tiny.llama(), {**config(), "experts": experts, "target_modules": tiny.TARGETS["llama"]})
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert any("lora_B" in name and (p != 0).any() for name, p in before.items())
    losses = []
    for _ in range(20):
        optimizer = torch.optim.SGD(tiny.trainable(model).values(), lr=0.5)
        losses.append(model(**tiny.batch()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


# What it cannot serve


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "routers.xlora: top_k 5 is more than the 4 experts"),
        ({"enable_softmax_topk": True}, "routers.xlora: enable_softmax_topk is a softmax of the top_k scalings; set"),
        ({"softmax_temperature": 0.0}, "softmax_temperature"),
        ({"xlora_depth": 0}, "xlora_depth"),
    ],
)
def test_wrong_options_leave_the_model_untouched(options: dict[str, Any], message: str) -> None:
    model = tiny.llama()
    keys, cls = list(model.state_dict()), type(model)
    with pytest.raises(ConfigError, match=message):
        tiny.adapt(model, config(**options))
    assert type(model) is cls and list(model.state_dict()) == keys


def test_experts_that_differ_in_number_between_layers_are_refused() -> None:
    made = config()
    made["experts"]["num_experts"] = [2, 4]
    with pytest.raises(ConfigError, match="router 'xlora' is one for several layers, which need as many experts each"):
        tiny.adapt(tiny.llama(), made)


def test_an_encoder_decoder_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"routers\.xlora .* T5ForConditionalGeneration has two"):
        tiny.adapt(tiny.t5(), {**config(), "target_modules": tiny.TARGETS["t5"]})


def test_a_model_without_hidden_size_is_refused_by_name() -> None:
    base = tiny.Toy()
    base.config = SimpleNamespace()
    with pytest.raises(ConfigError, match=r"routers\.xlora .* has no hidden_size"):
        tiny.adapt(base, {**config(), "target_modules": ["lin"]})


def test_a_layer_that_sees_no_tokens_is_refused_by_name() -> None:
    model = tiny.adapted("bert", "xlora")
    with pytest.raises(MoeloraError, match=r"'bert\.pooler\.dense' reads \(3,\) states .* leave it out with exclude_"):
        model(**tiny.batch("bert"))


def test_an_encoder_works_without_its_pooler() -> None:
    model = tiny.adapted("bert", "xlora", exclude_modules=["pooler.dense"])
    model(**tiny.batch("bert")).loss.backward()
    assert all(torch.isfinite(grad).all() for grad in tiny.gradients(model).values())
    model.eval()
    with torch.no_grad():
        together = model(**tiny.unlabelled(tiny.batch("bert"))).logits[2]
        alone = model(input_ids=tiny.batch("bert")["input_ids"][2:, :4]).logits[0]  # its padding left out
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


# Decoding: two caches

NEW = 64
LONG: dict[str, dict[str, Any]] = {"llama": {"max_position_embeddings": 96}, "gpt2": {"n_positions": 96}}


def mamba(**options: Any) -> MambaForCausalLM:
    """Two state-space blocks; their cache is ``cache_params``."""
    shape = {"vocab_size": tiny.VOCAB, "hidden_size": tiny.HIDDEN, "num_hidden_layers": 2, "state_size": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    made = MambaConfig(**shape, **ids, expand=2, time_step_rank=4, **tiny.SMALL_INIT, **options)
    return tiny._seeded(MambaForCausalLM, made, 0, torch.float64)


def model_for(kind: str, method: str = "xlora_layers") -> Any:
    """float64, so that two orders of summation never decide a token."""
    if kind == "mamba":
        base, targets = mamba(), ["in_proj", "out_proj"]
    else:
        base, targets = tiny.MODELS[kind](0, torch.float64, **LONG[kind]), tiny.TARGETS[kind]
    return tiny.shake(tiny.adapt(base, {**tiny.METHODS[method], "target_modules": targets}), 0.5).eval()


def prompts(rows: int = 3) -> dict[str, Tensor]:
    """Rows padded on the left by 0, 2 and 4 tokens."""
    given = tiny.unlabelled(tiny.batch(rows=rows, length=6, padded=False))
    for row, cut in zip(range(rows), [0, 2, 4], strict=False):
        given["attention_mask"][row, :cut] = 0
        given["input_ids"][row, :cut] = 0
    return given


def generated(model: Any, given: dict[str, Tensor], new: int = NEW, **how: Any) -> Tensor:
    torch.manual_seed(4)
    return model.generate(**given, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, **how)


@functools.cache
def without_cache(kind: str) -> Tensor:
    """What one row becomes, greedily."""
    return generated(model_for(kind), prompts(1), use_cache=False)


STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 10},
    "beams": {"do_sample": False, "num_beams": 3},
}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_64_tokens_with_a_cache_are_those_without(kind: str, strategy: str) -> None:
    """X6."""
    model, given, how = model_for(kind), prompts(), STRATEGIES[strategy]
    cached = generated(model, given, use_cache=True, **how)
    assert cached.shape == (3, 6 + NEW)
    assert torch.equal(cached, generated(model, given, use_cache=False, **how))
    with moelora.disabled(model):
        assert not torch.equal(cached[:, :18], generated(model, given, new=12, **how))  # the experts had a say
    if strategy == "greedy":  # a padded row continues as it does alone
        alone = generated(model, {key: value[2:, 4:] for key, value in given.items()})
        assert torch.equal(cached[2, 6:], alone[0, 2:])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("how", ["assistant", "assistant_sampled", "itself", "prompt_lookup", "static", "chunks"])
def test_other_ways_to_decode(kind: str, how: str) -> None:
    model, given = model_for(kind), prompts(1)
    drafts = tiny.llama(3, torch.float64, **LONG["llama"]).eval()
    options: dict[str, dict[str, Any]] = {
        "assistant": {"assistant_model": drafts},
        "assistant_sampled": {"assistant_model": drafts, "do_sample": True},
        "itself": {"assistant_model": model},
        "prompt_lookup": {"prompt_lookup_num_tokens": 3},
        "static": {"cache_implementation": "static"},
        "chunks": {"prefill_chunk_size": 2},
    }
    out = generated(model, given, return_dict_in_generate=True, output_logits=True, **options[how])
    with torch.no_grad():
        whole = model(input_ids=out.sequences, use_cache=False).logits[:, 5:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole.float(), rtol=1e-5, atol=1e-5)
    if how != "assistant_sampled":
        assert torch.equal(out.sequences, without_cache(kind))


def test_assisted_decoding_in_a_sliding_window() -> None:
    shape = {"vocab_size": tiny.VOCAB, "hidden_size": tiny.HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"intermediate_size": 40, "num_key_value_heads": 2, "sliding_window": 5, **tiny.SMALL_INIT}
    base = tiny._seeded(MistralForCausalLM, MistralConfig(**shape, **more), 0, torch.float64)
    adapter = {**tiny.METHODS["xlora_layers"], "target_modules": tiny.TARGETS["llama"]}
    model, given = tiny.shake(tiny.adapt(base, adapter), 0.5).eval(), prompts(1)
    expected = generated(model, given, use_cache=False)
    assert torch.equal(generated(model, given), expected)
    assert torch.equal(generated(model, given, prompt_lookup_num_tokens=3), expected)
    begun = generated(model, given, new=8, return_dict_in_generate=True)  # a cache that did not record its past
    given = {"input_ids": begun.sequences, "past_key_values": begun.past_key_values}
    assert torch.equal(generated(model, given, new=NEW - 8, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("how", [{"assistant_model": None}, {"prompt_lookup_num_tokens": 3}])
def test_a_state_space_model_refuses_assistants_by_name(how: dict[str, Any]) -> None:
    if "assistant_model" in how:
        how = {"assistant_model": tiny.llama(3, torch.float64).eval()}
    with pytest.raises(ValueError, match="not supported with stateful models, such as MambaForCausalLM"):
        generated(model_for("mamba"), prompts(1), **how)


def test_training_a_state_space_model() -> None:
    model = model_for("mamba").train()
    model(**tiny.batch()).loss.backward()
    assert all(torch.isfinite(grad).all() and (grad != 0).any() for grad in tiny.gradients(model).values())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba"])
def test_every_step_sees_one_token_per_row_in_both_passes(kind: str) -> None:
    """What makes the time of a token independent of its prefix."""
    model, given, seen = model_for(kind), prompts(), []
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and name != "lm_head"}
    uncalled = (".router.", ".dt_proj")  # the head runs once per step; Mamba reads this layer's weight itself
    layers = [module for name, module in linear.items() if not any(part in name for part in uncalled)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[:2])))

    def steps(**how: Any) -> list[set[Any]]:
        seen.clear()
        generated(model, given, new=9, **how)
        size = 2 * len(layers)
        return [set(seen[start : start + size]) for start in range(0, len(seen), size)]

    assert len(layers) >= 6
    assert steps() == [{(3, 6)}] + [{(3, 1)}] * 8
    assert steps(use_cache=False) == [{(3, 6 + step)} for step in range(9)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba"])
def test_a_conversation_goes_on_in_its_cache(kind: str) -> None:
    model, ids = model_for(kind), prompts(1)["input_ids"]
    name = "cache_params" if kind == "mamba" else "past_key_values"
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        first = model(input_ids=ids[:, :4], use_cache=True)
        kept = copy.deepcopy(first[name])
        for cache in (first[name], kept):  # the copy starts where the original was copied
            parts = [model(input_ids=ids[:, t : t + 1], use_cache=True, **{name: cache}).logits for t in (4, 5)]
            near = 1e-6 if kind == "mamba" else 1e-10  # its recurrence is in float32
            torch.testing.assert_close(torch.cat(parts, 1), whole[:, 4:], rtol=near, atol=near)


def test_the_cache_is_cropped_reordered_repeated_and_selected_as_one() -> None:
    model, ids = model_for("llama"), prompts(2)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cache = model(input_ids=ids, use_cache=True).past_key_values
        cache.crop(-2)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)  # rows 1, 1, 0, 0
        cache.batch_select_indices(torch.tensor([1, 2, 3]))
        out = model(input_ids=ids[[1, 0, 0], 4:], past_key_values=cache).logits
    torch.testing.assert_close(out, whole[[1, 0, 0], 4:], rtol=1e-10, atol=1e-10)


def test_tuples_carry_the_cache_too() -> None:
    model, ids = model_for("llama"), prompts(1)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :4], use_cache=True, return_dict=False)[1]
        last = model(input_ids=ids[:, 4:], past_key_values=cache, return_dict=False)[0]
        torch.testing.assert_close(last, model(input_ids=ids).logits[:, 4:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_cache_that_the_base_model_filled_is_refused(when: str) -> None:
    model, ids = model_for("llama"), prompts(1)["input_ids"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        if when == "between":
            model(input_ids=ids[:, :2], past_key_values=cache)
        with moelora.disabled(model):
            model(input_ids=ids[:, 2:4], past_key_values=cache)
        for _ in range(2):  # the first refusal repairs nothing
            with pytest.raises(MoeloraError, match="this cache was filled by a model without this router"):
                model(input_ids=ids[:, 4:], past_key_values=cache)


# Quantised base models


class Packed(nn.Linear):
    """A stand-in for a 4-bit layer: two weights per byte in one column, made whole again in forward."""

    def __init__(self, whole: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = whole.in_features, whole.out_features, None
        self.scale = whole.weight.detach().abs().max() / 7
        levels = (whole.weight.detach() / self.scale).round().add(8).to(torch.uint8).view(-1, 2)
        self.weight = nn.Parameter((16 * levels[:, :1] + levels[:, 1:]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        levels = torch.cat([self.weight // 16, self.weight % 16], 1).view(self.out_features, -1)
        return x @ (levels.to(x.dtype) - 8).t() * self.scale.to(x.dtype)


def quantise(model: Any, make: Any) -> Any:
    """Every linear layer but the output head replaced."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not model.lm_head:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(module))
    return model


def assert_trains_its_head_and_decodes(base: Any, atol: float) -> None:
    adapter = {**tiny.METHODS["xlora"], "target_modules": tiny.TARGETS["llama"]}
    adapter["experts"] = {**adapter["experts"], "train": "none"}
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    model = tiny.shake(tiny.adapt(base, adapter), 0.5)
    optimizer, losses = torch.optim.SGD(tiny.trainable(model).values(), lr=0.5), []
    for _ in range(10):
        losses.append(model(**tiny.batch()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all("router.head" in name for name in tiny.trainable(model)) and losses[-1] < losses[0] - 0.02
    held = {name.replace("base_layer.", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(held[name], value) for name, value in frozen.items())
    model.eval()
    given = prompts()
    out = generated(model, given, return_dict_in_generate=True, output_logits=True)
    mask = nn.functional.pad(given["attention_mask"], (0, NEW), value=1)
    with torch.no_grad():
        whole = model(input_ids=out.sequences, attention_mask=mask, use_cache=False).logits[:, 5:-1]
        with moelora.disabled(model):
            assert not torch.allclose(
                model(input_ids=out.sequences, attention_mask=mask).logits[:, 5:-1], whole, atol=1
            )
    torch.testing.assert_close(torch.stack(out.logits, 1), whole.float(), rtol=0, atol=atol)


def test_a_packed_base_trains_the_head_and_decodes() -> None:
    base = quantise(tiny.llama(dtype=torch.float64, **LONG["llama"]), Packed)
    assert base.model.layers[0].self_attn.q_proj.weight.shape == (512, 1)
    assert_trains_its_head_and_decodes(base, atol=1e-5)


def test_a_4_bit_base_trains_the_head_and_decodes() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def make(whole: nn.Linear) -> nn.Module:
        made = bitsandbytes.nn.Linear4bit(
            whole.in_features, whole.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        made.load_state_dict(whole.state_dict())
        return made.to("cpu")

    base = quantise(tiny.llama(hidden_size=64, intermediate_size=128, **LONG["llama"]), make)
    assert base.model.layers[0].self_attn.q_proj.weight.dtype == torch.uint8
    assert isinstance(base.model.layers[0].self_attn.q_proj, nn.Linear)
    assert_trains_its_head_and_decodes(base, atol=1e-4)
