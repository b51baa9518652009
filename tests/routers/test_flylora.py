"""FlyLoRA: the formula, what the choice may and may not do, and the balance bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moelora
from moelora.core.errors import ConfigError
from moelora.model.record import routed_layers
from tests import tiny

ALPHA, R, RATE = 6.0, 8, 0.01
TOKENS = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def config(train: str = "B", r: int = R, num_experts: int = 1, **options: Any) -> dict[str, Any]:
    return {
        "router": {"name": "flylora", "top_k": 3, **options},
        "experts": {"r": r, "num_experts": num_experts, "lora_alpha": ALPHA, "train": train},
        "init": {"name": "sparse", "density": 0.6},
    }


def oracle(layer: Any) -> tiny.Oracle:
    """Ranks sorted by |h + d| or h + d; the values are h itself."""
    router, ranks = layer.router, layer.experts.num_experts * layer.experts.r

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        for t in range(x.shape[0]):
            h = w["A"] @ x[t]
            score = [h[i].item() + router.bias[i].item() for i in range(ranks)]
            score = [abs(s) for s in score] if router.select == "abs" else score
            chosen = sorted(range(ranks), key=lambda i, score=score: (-score[i], i))[: router.top_k]
            y = w["W"] @ x[t] + w["b"]
            for i in chosen:
                y = y + ALPHA / layer.experts.r * w["B"][:, i] * h[i]
            rows.append(y)
            gates.append(torch.tensor([float(i in chosen) for i in range(ranks)], dtype=torch.float64))
        return torch.stack(rows), torch.stack(gates)

    return formula


def biased(layer: Any, spread: float = 0.2) -> None:
    """A balance bias as training may leave it."""
    layer.router.bias.copy_(spread * torch.randn(layer.router.bias.shape))


@pytest.mark.parametrize("select", ["abs", "signed"])
@pytest.mark.parametrize("train", ["B", "all"])
@pytest.mark.parametrize(("top_k", "num_experts"), [(1, 1), (3, 1), (8, 1), (5, 2)])
def test_equals_the_formula(select: str, train: str, top_k: int, num_experts: int) -> None:
    """With A frozen, x still has its gradient; with A trained, it has none through the choice."""
    model, layer = tiny.toy(config(train, R // num_experts, num_experts, top_k=top_k, select=select))
    tiny.assert_layer_equals(model, layer, oracle(layer))
    model.zero_grad()
    biased(layer)
    tiny.assert_layer_equals(model, layer, oracle(layer))


def test_only_chosen_ranks_learn() -> None:
    model, layer = tiny.toy(config(top_k=2))
    x = TOKENS[:2]
    chosen = tiny.routes(model, x=x)[0].chosen().any(0)
    assert 0 < chosen.sum() <= 4 and layer.experts.lora_A.grad is None
    model(x).square().sum().backward()
    assert ((layer.experts.lora_B.grad != 0).any(0) == chosen).all()


def test_abs_and_signed_choose_differently() -> None:
    both = [tiny.routes(tiny.toy(config(select=select))[0], x=TOKENS)[0] for select in ("abs", "signed")]
    assert not torch.equal(both[0].index, both[1].index)
    flipped = tiny.routes(tiny.toy(config())[0], x=-TOKENS)[0]
    assert torch.equal(flipped.index, both[0].index)  # |h| asks for no sign


def test_bias_decides_the_choice_and_not_the_values() -> None:
    model, layer = tiny.toy(config(top_k=2))
    layer.router.bias[[3, 6]] = 1e3
    route = tiny.routes(model, x=TOKENS)[0]
    assert route.chosen()[:, [3, 6]].all() and (route.weight == 1).all()
    own = [3, 6]
    update = ALPHA / R * TOKENS @ layer.experts.lora_A[own].t() @ layer.experts.lora_B[:, own].t()
    torch.testing.assert_close(model(TOKENS), layer.base_layer(TOKENS) + update, rtol=1e-12, atol=1e-12)


def test_all_ranks_are_plain_lora() -> None:
    model, _ = tiny.toy(config(top_k=R))
    plain, layer = tiny.toy({"router": "single", "experts": {"r": R, "lora_alpha": ALPHA}})
    layer.experts.load_state_dict(model.lin.experts.state_dict())
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), rtol=1e-13, atol=1e-13)


def test_gates_are_float32_in_a_bfloat16_model_and_the_bias_stays_exact() -> None:
    model = tiny.adapted("llama", "flylora").to(torch.bfloat16)
    assert all(route.weight.dtype == torch.float32 for route in tiny.routes(model, **tiny.batch()))
    assert all(bias.dtype == torch.float32 for bias in tiny.biases(model).values())


def test_the_router_has_no_parameters_and_saves_its_bias(tmp_path: Any) -> None:
    model = tiny.adapted("llama", "flylora")
    for layer in routed_layers(model):
        assert not list(layer.router.parameters())
        biased(layer)
    moelora.save(model, tmp_path)
    tiny.assert_same(tiny.biases(moelora.load(tiny.llama(), tmp_path)), tiny.biases(model))


# The balance bias: once per optimiser step, on valid tokens


def balanced(**options: Any) -> Any:
    more = {"router": {"name": "flylora", "top_k": 3, "bias_update_rate": RATE, **options}, "experts": {"r": R}}
    return tiny.adapted("llama", "flylora", **more)


def loads(model: Any, *batches: dict[str, Tensor]) -> list[Tensor]:
    """Tokens per rank that a pass over the batches should count, in site order."""
    keep = [batch["attention_mask"].reshape(-1).bool() for batch in batches]
    found = [tiny.routes(model, **batch) for batch in batches]
    sites = range(len(found[0]))
    return [sum(routes[i].chosen()[k].sum(0) for routes, k in zip(found, keep, strict=True)) for i in sites]


def test_bias_moves_once_per_step_away_from_the_mean_load() -> None:
    model, batches = balanced(), [tiny.batch(seed=seed) for seed in range(4)]
    sgd = torch.optim.SGD(list(tiny.trainable(model).values()), lr=0.1)
    for pair in (batches[:2], batches[2:]):
        before, counted = tiny.biases(model), loads(model, *pair)
        for batch in pair:
            model(**batch).loss.backward()
            tiny.assert_same(tiny.biases(model), before)  # not in the forward, not in the backward
        sgd.step()
        sgd.zero_grad()
        pairs = zip(before.items(), counted, strict=True)
        expected = {name: bias + RATE * torch.sign(load.mean() - load) for (name, bias), load in pairs}
        tiny.assert_same(tiny.biases(model), expected)
        assert counted[0].sum() == 3 * sum(batch["attention_mask"].sum() for batch in pair)


def test_recomputation_counts_nothing_and_repeats_the_choice() -> None:
    plain, saving = balanced(), tiny.checkpointing(balanced())
    for model in (plain, saving):
        sgd = torch.optim.SGD(list(tiny.trainable(model).values()), lr=0.1)
        for seed in range(3):
            sgd.zero_grad()
            model(**tiny.batch(seed=seed)).loss.backward()
            sgd.step()
    tiny.assert_same(tiny.biases(plain), tiny.biases(saving))
    tiny.assert_same(tiny.gradients(plain), tiny.gradients(saving))


def test_a_recomputation_takes_the_choice_of_the_first_pass() -> None:
    _, layer = tiny.toy(config())
    view, choices = tiny.view((9,)), list[Tensor]()
    one, two = torch.randn(2, 9, R, dtype=torch.float64)
    with view.tape.remember(choices):
        first = layer.router(one, view).index
    with view.tape.replay(choices):
        assert torch.equal(layer.router(two, view).index, first)
    assert not torch.equal(layer.router(two, view).index, first)


def test_a_layer_in_eval_mode_counts_nothing() -> None:
    model = balanced()
    frozen, *others = routed_layers(model)
    frozen.eval()
    model(**tiny.batch()).loss.backward()
    assert set(model.moelora.port.load) == {layer.site.index for layer in others}


@pytest.mark.parametrize("rate", [0.0, RATE])
def test_bias_stands_still_in_evaluation_and_at_rate_zero(rate: float) -> None:
    model = balanced(bias_update_rate=rate).train(rate == 0)
    sgd = torch.optim.SGD(list(tiny.trainable(model).values()), lr=0.1)
    model(**tiny.batch()).loss.backward()
    sgd.step()
    assert all((bias == 0).all() for bias in tiny.biases(model).values())


def test_more_choices_than_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="top_k 9 is more than the 8 ranks"):
        tiny.toy(config(top_k=9))
    with pytest.raises(ConfigError, match="router 'flylora' is for experts with an A of their own"):
        tiny.toy({"router": "flylora", "experts": {"name": "core", "num_experts": 2, "r": 8}})
