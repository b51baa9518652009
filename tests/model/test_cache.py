"""What travels with a key-value cache: the twin of a first pass (X-LoRA), and what routers remember."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import moelora
from moelora.core.errors import MoeloraError
from moelora.model import routed
from moelora.model.cache import Companion
from moelora.model.record import routed_layers
from tests import tiny

PLUGIN = '''
"""Gates from the mean of all real tokens so far: a router with a memory."""
import torch
from moelora.core.route import Route
from moelora.routers.base import Router, linear_scores


class Running(Router):
    remembers = True

    def __init__(self, site, num_experts, r):
        super().__init__(site, num_experts, r)
        self.weight = torch.nn.Parameter(torch.randn(num_experts, site.in_features))

    def forward(self, x, view):
        rows = x.view(*view.shape, -1)
        real = torch.ones(view.shape, dtype=x.dtype) if view.mask is None else view.mask.view(view.shape).to(x.dtype)
        seen = torch.cat([rows * real.unsqueeze(-1), real.unsqueeze(-1)], -1).cumsum(1)
        if view.past is not None:
            seen = seen + view.past.unsqueeze(1)
        view.keep(seen[:, -1])
        mean = seen[..., :-1] / seen[..., -1:].clamp(min=1)
        return Route(linear_scores(self.weight, mean.reshape(x.shape)).softmax(-1), self.num_experts)
'''
IDS = torch.randint(3, tiny.VOCAB, (3, 9), generator=torch.Generator().manual_seed(8))
CACHES: dict[str, Callable[[Any], Any]] = {
    "none given": lambda model: None,
    "lazy": lambda model: DynamicCache(),
    "configured": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=16),
}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / "running.py"
    path.write_text(PLUGIN)
    return path


@pytest.fixture(params=["twin", "memory"])
def companion(request: pytest.FixtureRequest) -> str:
    """What the cache has to carry."""
    return request.param


@pytest.fixture
def make(companion: str, plugin: Path) -> Callable[..., Any]:
    """A float64 model in eval mode, whose router needs the companion."""

    def build(kind: str = "llama", seed: int = 0) -> Any:
        if companion == "twin":
            return tiny.adapted(kind, "xlora_layers", seed, noise=0.5, dtype=torch.float64).eval()
        config = {"router": "running", "experts": {"num_experts": 4, "r": 4}, "target_modules": tiny.TARGETS[kind]}
        base = tiny.MODELS[kind](seed, torch.float64)
        return tiny.shake(moelora.adapt(base, config, plugins=[plugin], verbose=False), 0.5, seed).eval()

    return build


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def whole(model: Any, ids: Tensor, **more: Any) -> Tensor:
    """Logits of one forward without any cache."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **more).logits


def prefill(model: Any, ids: Tensor, cache: Any = None) -> Any:
    """The cache after these tokens."""
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values


def step(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits of the tokens that follow."""
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


# Token by token


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("given", CACHES)
def test_a_plain_loop_equals_one_forward(make: Callable[..., Any], kind: str, given: str) -> None:
    model, found = make(kind), []
    cache = CACHES[given](model)
    with torch.no_grad():
        for ids in IDS.split([4, 1, 1, 2, 1], dim=1):
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    expected = whole(model, IDS)
    close(torch.cat(found, 1), expected)
    with moelora.disabled(model):
        assert (whole(model, IDS) - expected).abs().max() > 0.01  # the experts had a say
    assert int(cache.get_seq_length()) == 9


def test_a_plain_loop_with_left_padding(make: Callable[..., Any]) -> None:
    model, mask, cache, found = make(), torch.ones_like(IDS), None, []
    mask[1, :2], mask[2, :3] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 9)):
            given = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end]}
            out = model(input_ids=IDS[:, start:end], past_key_values=cache, use_cache=True, **given)
            cache = out.past_key_values
            found.append(out.logits)
    expected = whole(model, IDS, attention_mask=mask, position_ids=positions)
    close(torch.cat(found, 1)[mask.bool()], expected[mask.bool()])


def test_a_loop_over_tuples(make: Callable[..., Any]) -> None:
    model = make()
    with torch.no_grad():
        first = model(input_ids=IDS[:, :5], use_cache=True, return_dict=False)
        second = model(input_ids=IDS[:, 5:], past_key_values=first[1], use_cache=True, return_dict=False)
    close(torch.cat([first[0], second[0]], 1), whole(model, IDS))


@pytest.mark.parametrize("companion", ["memory"], indirect=True)
@pytest.mark.parametrize("encoder_again", [False, True])
def test_a_plain_loop_over_a_decoder(make: Callable[..., Any], encoder_again: bool) -> None:
    model, mask = make("t5"), torch.ones_like(IDS)
    mask[2, 6:] = 0
    given = {"input_ids": IDS, "attention_mask": mask}
    labels = IDS[:, :7].flip(1)
    with torch.no_grad():
        expected = model(**given, decoder_input_ids=labels, use_cache=False)
        found, cache, more = [], None, {}
        for ids in labels.split([3, 1, 2, 1], dim=1):
            out = model(**given, decoder_input_ids=ids, past_key_values=cache, use_cache=True, **more)
            cache = out.past_key_values
            found.append(out.logits)
            close(out.encoder_last_hidden_state, expected.encoder_last_hidden_state)  # it starts from its own beginning
            if not encoder_again:
                more = {"encoder_outputs": (out.encoder_last_hidden_state,)}
    close(torch.cat(found, 1), expected.logits)


def test_the_companion_stays_one(make: Callable[..., Any]) -> None:
    model = make()
    cache = prefill(model, IDS[:, :4])
    for position in range(4, 7):
        prefill(model, IDS[:, position : position + 1], cache)
        assert sum(isinstance(layer, Companion) for layer in cache.layers) == 1
    assert len(cache.layers) == model.config.num_hidden_layers + 1


def test_routers_without_a_memory_put_nothing_into_the_cache() -> None:
    model = tiny.adapted("llama", "smora").eval()
    assert len(prefill(model, IDS).layers) == model.config.num_hidden_layers


@pytest.mark.parametrize("training", [False, True])
def test_without_a_cache_nothing_is_left(make: Callable[..., Any], training: bool) -> None:
    model = make().train(training)
    out = model(input_ids=IDS, labels=IDS, use_cache=False)
    assert out.past_key_values is None and model.moelora.port.tape is None


# Caches of somebody else


REFUSAL = "this cache was filled by a model without this router"


def test_a_cache_of_the_disabled_model_is_refused(make: Callable[..., Any]) -> None:
    model = make()
    with moelora.disabled(model):
        cache = prefill(model, IDS[:, :4])
    with pytest.raises(MoeloraError, match=REFUSAL):
        step(model, IDS[:, 4:], cache)


def test_a_cache_that_the_disabled_model_went_on_with_is_refused(make: Callable[..., Any]) -> None:
    model = make()
    cache = prefill(model, IDS[:, :4])
    with moelora.disabled(model):
        prefill(model, IDS[:, 4:6], cache)
    with pytest.raises(MoeloraError, match=REFUSAL):
        step(model, IDS[:, 6:], cache)


@pytest.mark.parametrize("filler", ["base", "smora"])
def test_a_cache_of_another_model_is_refused(make: Callable[..., Any], filler: str) -> None:
    base = tiny.llama(dtype=torch.float64)
    other = base if filler == "base" else tiny.adapted("llama", filler, dtype=torch.float64)
    cache = prefill(other.eval(), IDS[:, :4])
    with pytest.raises(MoeloraError, match=REFUSAL):
        step(make(), IDS[:, 4:], cache)


@pytest.mark.parametrize("given", ["lazy", "configured", "static"])
def test_a_cache_that_was_reset_starts_anew(make: Callable[..., Any], given: str) -> None:
    model = make()
    cache = prefill(model, IDS.flip(1), CACHES[given](model))
    cache.reset()
    close(step(model, IDS, cache), whole(model, IDS))


# What is done to a cache is done to the companion


def test_a_copied_prefix_is_continued_twice(make: Callable[..., Any]) -> None:
    model = make()
    prefix = prefill(model, IDS[:, :5])
    for rest in (IDS[:, 5:], IDS[:, 5:].flip(1)):
        close(step(model, rest, copy.deepcopy(prefix)), whole(model, torch.cat([IDS[:, :5], rest], 1))[:, 5:])
    close(step(model, IDS[:, 5:], prefix), whole(model, IDS)[:, 5:])  # the original is as it was


def reordered(cache: Any) -> Tensor:
    rows = torch.tensor([2, 0, 0])
    cache.reorder_cache(rows)
    return rows


def selected(cache: Any) -> Tensor:
    rows = torch.tensor([1, 2])
    cache.batch_select_indices(rows)
    return rows


def repeated(cache: Any) -> Tensor:
    cache.batch_repeat_interleave(2)
    return torch.tensor([0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize("change", [reordered, selected, repeated])
def test_rows_move_together(make: Callable[..., Any], change: Callable[[Any], Tensor]) -> None:
    model = make()
    cache = prefill(model, IDS[:, :5])
    rows = change(cache)
    rest = torch.randint(3, tiny.VOCAB, (len(rows), 3))
    close(step(model, rest, cache), whole(model, torch.cat([IDS[rows, :5], rest], 1))[:, 5:])


@pytest.mark.parametrize("companion", ["twin"], indirect=True)
def test_dropped_tokens_are_dropped_from_the_twin(make: Callable[..., Any]) -> None:
    model = make()
    cache = prefill(model, IDS)
    cache.crop(-4)
    assert cache.is_croppable
    rest = IDS[:, 5:].flip(1)
    close(step(model, rest, cache), whole(model, torch.cat([IDS[:, :5], rest], 1))[:, 5:])


@pytest.mark.parametrize("companion", ["memory"], indirect=True)
def test_a_memory_cannot_drop_tokens_and_says_so(make: Callable[..., Any]) -> None:
    cache = prefill(make(), IDS)
    assert not cache.is_croppable
    with pytest.raises(MoeloraError, match="cannot forget tokens"):
        cache.crop(-4)


@pytest.mark.parametrize("companion", ["twin"], indirect=True)
def test_speculative_decoding_crops_both(make: Callable[..., Any]) -> None:
    model = make()
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])  # so that a look-up proposes something to reject
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    expected = model.generate(input_ids=ids, attention_mask=mask, **how, use_cache=False)
    found = model.generate(input_ids=ids, attention_mask=mask, **how, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)


def test_a_first_pass_beside_a_state_space_cache() -> None:
    """Mamba's cache has states and no keys."""
    config = {**tiny.METHODS["xlora"], "target_modules": ["in_proj", "x_proj", "out_proj"]}
    model, ids = tiny.shake(tiny.adapt(tiny.mamba(dtype=torch.float64), config), 0.5).eval(), IDS[:, :7]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        out = model(input_ids=ids[:, :4], use_cache=True)
        found = [out.logits]
        for t in range(4, ids.shape[1]):
            out = model(input_ids=ids[:, t : t + 1], cache_params=out.cache_params, use_cache=True)
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-5, atol=1e-5)
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for beams in (1, 2):
        cached = model.generate(**given, **how, num_beams=beams)
        assert torch.equal(cached, model.generate(**given, **how, num_beams=beams, use_cache=False))
    with moelora.disabled(model), torch.no_grad():
        foreign = model(input_ids=ids[:, :4], use_cache=True).cache_params
    with pytest.raises(MoeloraError, match=REFUSAL):
        model(input_ids=ids[:, 4:5], cache_params=foreign, use_cache=True)


# The pass without experts


def first_pass_of(model: Any, monkeypatch: pytest.MonkeyPatch, watch: Any) -> None:
    """Run every first pass inside the context that ``watch()`` gives."""
    original = routed.last_hidden

    def watched(*args: Any) -> Tensor:
        with watch():
            return original(*args)

    monkeypatch.setattr(routed, "last_hidden", watched)


def leaves(value: Tensor) -> set[int]:
    """Ids of the tensors that a graph ends in."""
    found, stack, seen = set(), [value.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_first_pass_keeps_no_activations(checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, saved, plans = tiny.adapted("llama", "xlora_layers"), [], []
    if checkpointed:
        tiny.checkpointing(model)
    pack = lambda tensor: saved.append(tensor) or tensor  # noqa: E731
    first_pass_of(model, monkeypatch, lambda: torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept))
    with moelora.collect(model, lambda view, route: plans.append(view.tape.plan)):
        model(**tiny.batch())
    assert saved == []
    head = {id(p) for p in routed_layers(model)[0].router.head.parameters()}
    assert plans[0].requires_grad and leaves(plans[0]) == head
    assert all(plan is plans[0] for plan in plans)


@pytest.mark.parametrize("grad", [False, True])
def test_the_first_pass_leaves_out_the_output_head(grad: bool) -> None:
    model = tiny.adapted("llama", "xlora").eval()
    calls = {"head": 0, "block": 0}
    model.lm_head.register_forward_hook(lambda *_: calls.__setitem__("head", calls["head"] + 1))
    model.model.layers[0].register_forward_hook(lambda *_: calls.__setitem__("block", calls["block"] + 1))
    with torch.set_grad_enabled(grad):
        model(**tiny.batch())
    assert calls == {"head": 1, "block": 2}


def test_the_plan_is_that_of_the_base_model() -> None:
    model, plans = tiny.adapted("llama", "xlora", noise=0.7).eval(), []
    given = tiny.unlabelled(tiny.batch())
    with moelora.collect(model, lambda view, route: plans.append(view.tape.plan)):
        model(**given)
    hidden = tiny.llama().eval().model(**given).last_hidden_state
    expected = routed_layers(model)[0].router.plan(hidden)
    torch.testing.assert_close(plans[0], expected, rtol=0, atol=1e-6)


def test_the_first_pass_is_not_counted_as_a_forward() -> None:
    """Neither loads nor terms nor observers see it."""
    model, seen = tiny.adapted("llama", "xlora", losses={"balance": 1.0}), []
    with moelora.collect(model, lambda view, route: seen.append(view.site.index)) as collected:
        model(**tiny.batch())
    assert seen == list(range(len(routed_layers(model)))) and len(collected.terms) == 1


def test_a_part_of_the_model_has_no_plan() -> None:
    model = tiny.adapted("llama", "xlora").eval()
    with pytest.raises(MoeloraError, match="routes by the model's last hidden state; call the whole model, not a part"):
        model.model(**tiny.unlabelled(tiny.batch()))


def test_states_that_are_not_the_models_tokens_are_refused() -> None:
    model = tiny.adapt(tiny.bert(), {**tiny.METHODS["xlora"], "target_modules": ["query", "pooler.dense"]}).eval()
    with pytest.raises(MoeloraError, match=r"'bert\.pooler\.dense' reads \(3,\) states and the model has \(3, 7\) tok"):
        model(**tiny.batch("bert"))
