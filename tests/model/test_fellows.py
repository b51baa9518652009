"""q, k and v read their tokens once: the same numbers, fewer reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from moelora.core.tape import Tape
from moelora.model.record import routed_layers
from moelora.ops import project
from tests import tiny
from tests.ops.test_cpp import built

# float64 is computed by plain PyTorch on every machine, which maps all tokens first.
DTYPE = torch.float64
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """How many rows the factors had of every read of tokens."""
    found: list[tuple[int, ...]] = []
    original = project._project

    def spy(x: Tensor, weights: list[Tensor]) -> Tensor:
        found.append(tuple(weight.shape[0] for weight in weights))
        return original(x, weights)

    monkeypatch.setattr(project, "_project", spy)
    return found


def adapted(router: Any = "meteora", **more: Any) -> torch.nn.Module:
    config = {"router": router, "experts": {"num_experts": 3, "r": 2}, "target_modules": ALL, **more}
    return tiny.shake(tiny.adapt(tiny.llama(dtype=DTYPE), config))


def alone(model: torch.nn.Module) -> torch.nn.Module:
    """Every layer by itself."""
    for layer in routed_layers(model):
        layer.fellows = ()
    return model


def results(model: torch.nn.Module, **more: Any) -> dict[str, Tensor]:
    model.zero_grad()
    out = model(**tiny.batch(), **more)
    out.loss.backward()
    return {
        "logits": out.logits.detach(),
        **{n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad},
    }


@pytest.mark.parametrize("router", ["meteora", {"name": "smora", "top_k": 2}, "softmax", "comol", "smear", "uniform"])
def test_together_and_alone_are_the_same(router: Any) -> None:
    core = {"experts": {"name": "core", "num_experts": 3, "r": 2}} if router == "comol" else {}
    model = adapted(router, **core)
    together, apart = results(model), results(alone(model))
    assert together.keys() == apart.keys()
    for key, value in together.items():
        torch.testing.assert_close(value, apart[key], rtol=1e-10, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


def test_three_projections_read_their_tokens_once(reads: list[tuple[int, ...]]) -> None:
    model = adapted()
    layers = routed_layers(model)
    groups = sum(len(layer.fellows) > 1 for layer in layers)
    assert groups == 2 * model.config.num_hidden_layers  # q, k, v; gate, up
    results(model)
    assert len(reads) == len(layers) - sum(len(layer.fellows) - 1 for layer in layers if layer.fellows)
    assert reads[0] == (6, 3, 6, 3, 6, 3)  # h and scores of q, k and v
    reads.clear()
    results(alone(model))
    assert len(reads) == len(layers) and set(reads) == {(6, 3)}


def test_dropout_keeps_layers_apart(reads: list[tuple[int, ...]]) -> None:
    model = adapted(experts={"num_experts": 3, "r": 2, "lora_dropout": 0.3})
    model.train()
    results(model)
    assert set(reads) == {(3,)}  # scores of the tokens as they are; h of others comes with the update
    reads.clear()
    model.eval()
    model(**tiny.batch())
    assert reads[0] == (6, 3, 6, 3, 6, 3)


def test_other_tokens_than_the_first_fellows_are_read_anew() -> None:
    model = adapted()
    layer = next(layer for layer in routed_layers(model) if layer.fellows)
    second = next(other for other in routed_layers(model) if other.site.index == layer.fellows[1].index)
    one, two = (torch.randn(1, 4, tiny.HIDDEN, dtype=DTYPE) for _ in range(2))
    expected = second(two)
    with model.moelora.port.on(Tape()):
        layer(one)
        torch.testing.assert_close(second(two), expected, rtol=1e-12, atol=1e-12)


def test_gradient_checkpointing_reads_once_in_each_pass(reads: list[tuple[int, ...]]) -> None:
    model = adapted()
    plain = results(model)
    first = len(reads)
    model.train()
    model.gradient_checkpointing_enable()
    reads.clear()
    again = results(model)
    assert len(reads) == 2 * first
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, rtol=1e-10, atol=1e-12)


def test_the_fellows_of_a_copy_are_the_copys() -> None:
    model = adapted()
    other = copy.deepcopy(model)
    experts = {id(layer.experts) for layer in routed_layers(other)}
    assert all(id(fellow.experts) in experts for layer in routed_layers(other) for fellow in layer.fellows)
    with torch.no_grad():
        for layer in routed_layers(other):
            layer.experts.lora_A += 1
    assert not torch.allclose(other(**tiny.batch()).logits, model(**tiny.batch()).logits)
    torch.testing.assert_close(other(**tiny.batch()).logits, alone(other)(**tiny.batch()).logits)


@built
@pytest.mark.parametrize(("k", "tokens", "first"), [(None, 100, True), (None, 10, False), (2, 100, False)])
def test_nothing_is_mapped_first_where_chosen_units_are_computed_alone(k: int | None, tokens: int, first: bool) -> None:
    router = {"name": "softmax", **({} if k is None else {"top_k": k})}
    model = tiny.adapt(tiny.llama(), {"router": router, "experts": {"num_experts": 8, "r": 8}, "target_modules": ALL})
    reader = routed_layers(model)[0].reader
    assert reader.router.chosen == k
    assert reader.maps_first(torch.randn(tokens, tiny.HIDDEN)) == first
    assert reader.maps_first(torch.randn(tokens, tiny.HIDDEN, dtype=DTYPE))


@built
def test_dense_gates_in_float32_are_read_together_too(reads: list[tuple[int, ...]]) -> None:
    config = {"router": "softmax", "experts": {"num_experts": 8, "r": 8}, "target_modules": ALL}
    model = tiny.shake(tiny.adapt(tiny.llama(), config))
    batch = {key: value.repeat(8, 1) for key, value in tiny.batch().items()}
    together = model(**batch).logits
    assert reads[0] == (64, 8, 64, 8, 64, 8)
    torch.testing.assert_close(together, alone(model)(**batch).logits, rtol=1e-5, atol=1e-5)
