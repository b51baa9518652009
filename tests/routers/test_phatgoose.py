"""PHATGOOSE: the formulas of training and of inference, and that experts and gates train apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moelora.core.errors import ConfigError, DataError
from tests import tiny

ALPHA = 8.0
TASK = torch.tensor([0, 2, 1, 3, -1, 2])
TOKENS = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def config(num_experts: int = 4, r: int = 2, **options: Any) -> dict[str, Any]:
    return {
        "router": {"name": "phatgoose", **options},
        "experts": {"num_experts": num_experts, "r": r, "lora_alpha": ALPHA},
    }


def trained(**options: Any) -> tuple[Any, Any]:
    """A layer whose gates are not zero any more."""
    model, layer = tiny.toy(config(**options))
    made = torch.Generator().manual_seed(9)
    layer.router.weight.data.copy_(torch.randn(layer.router.weight.shape, generator=made))
    return model, layer


def standard(z: Tensor) -> Tensor:
    return (z - z.mean()) / ((z - z.mean()).square().mean() + 1e-5).sqrt()


def oracle(layer: Any) -> tiny.Oracle:
    """The sigmoid of the token's own gate in training; the best affinities of standardised vectors in eval."""
    router, r, E = layer.router, layer.experts.r, layer.experts.num_experts

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        for t in range(x.shape[0]):
            gate = [x.new_zeros(())] * E
            if router.training:
                if TASK[t] >= 0:
                    gate[int(TASK[t])] = 1 / (1 + (-(w["Wg"][TASK[t]] @ x[t])).exp())
            else:
                scaled = [standard(w["Wg"][e]) @ standard(x[t]) / x.shape[1] ** 0.5 for e in range(E)]
                kept = sorted(range(E), key=lambda e, scaled=scaled: (-scaled[e].item(), e))[: router.top_k]
                for e in kept:
                    gate[e] = scaled[e].exp() / sum(scaled[j].exp() for j in kept)
            y = w["W"] @ x[t] + w["b"]
            for e in range(E):
                own = slice(e * r, (e + 1) * r)
                y = y + gate[e] * (ALPHA / r) * (w["B"][:, own] @ (w["A"][own] @ x[t]))
            rows.append(y)
            gates.append(torch.stack(gate))
        return torch.stack(rows), torch.stack(gates)

    return formula


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_equals_the_formula(training: bool, top_k: int) -> None:
    model, layer = trained(top_k=top_k)
    model.train(training)
    tiny.assert_layer_equals(model, layer, oracle(layer), task=TASK)


@pytest.mark.parametrize("e", range(4))
def test_a_task_trains_its_own_expert_and_gate_alone(e: int) -> None:
    model, layer = trained()
    model(TOKENS, task_ids=torch.full((6,), e)).square().sum().backward()
    experts, own = layer.experts, slice(2 * e, 2 * e + 2)
    for grad in (layer.router.weight.grad[e], experts.lora_A.grad[own], experts.lora_B.grad[:, own]):
        assert (grad != 0).all()
        grad.zero_()
    for grad in (layer.router.weight.grad, experts.lora_A.grad, experts.lora_B.grad):
        assert (grad == 0).all()


def test_a_mixed_batch_trains_as_separate_runs_would() -> None:
    together, one = trained()
    together(TOKENS, task_ids=TASK).square().sum().backward()
    apart, other = trained()
    for task in range(4):
        rows = task == TASK
        apart(TOKENS[rows], task_ids=TASK[rows]).square().sum().backward()
    torch.testing.assert_close(one.router.weight.grad, other.router.weight.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.experts.lora_A.grad, other.experts.lora_A.grad, rtol=1e-12, atol=1e-12)


def test_a_token_of_no_task_is_left_to_the_base_and_trains_nothing() -> None:
    model, layer = trained()
    y = model(TOKENS, task_ids=torch.full((6,), -1))
    assert torch.equal(y, layer.base_layer(TOKENS))
    y.square().sum().backward()
    assert all((p.grad == 0).all() for p in [*layer.router.parameters(), *layer.experts.parameters()])


def test_frozen_experts_leave_the_gates_to_train() -> None:
    experts = {"num_experts": 4, "r": 2, "lora_alpha": ALPHA, "train": "none"}
    model = tiny.adapted("llama", "phatgoose", experts=experts)
    assert all(name.endswith("router.weight") for name in tiny.trainable(model))
    model(**tiny.batch(), task_ids=torch.tensor([0, 1, 1])).loss.backward()
    for grad in tiny.gradients(model).values():
        assert (grad[:2] != 0).any(1).all() and (grad[2:] == 0).all()


def test_gates_start_at_one_half() -> None:
    route = tiny.routes(tiny.toy(config())[0], x=TOKENS, task_ids=TASK)[0]
    own = torch.nn.functional.one_hot(TASK.clamp(min=0), 4) * (TASK >= 0).unsqueeze(1)
    assert torch.equal(route.weight, 0.5 * own)


def test_inference_asks_for_no_task_and_differs_from_training() -> None:
    model, _ = trained()
    training = tiny.routes(model, x=TOKENS, task_ids=TASK)[0]
    model.eval()
    route = tiny.routes(model, x=TOKENS)[0]
    assert torch.equal(tiny.routes(model, x=TOKENS, task_ids=TASK)[0].dense(), route.dense())
    torch.testing.assert_close(route.weight.sum(1), torch.ones(6, dtype=torch.float64))
    assert ((route.dense() != 0).sum(1) == 2).all() and ((training.dense() != 0).sum(1) <= 1).all()


def test_length_and_offset_of_a_gate_do_not_matter_in_inference() -> None:
    model, layer = trained()
    model.eval()
    before = tiny.routes(model, x=TOKENS)[0].dense()
    layer.router.weight.data.mul_(torch.tensor([[3.0], [50.0], [7.0], [20.0]])).add_(2.0)
    torch.testing.assert_close(tiny.routes(model, x=TOKENS)[0].dense(), before, rtol=0, atol=1e-4)  # the 1e-5 remains
    layer.router.weight.data[0] *= -1
    assert (tiny.routes(model, x=TOKENS)[0].dense() - before).abs().max() > 0.1


def test_vectors_without_variance_are_safe() -> None:
    model, _ = tiny.toy(config())  # all gates are zero
    model.eval()
    flat = torch.ones(6, 5, dtype=torch.float64, requires_grad=True)
    route = tiny.routes(model, x=flat)[0]
    assert (route.index == torch.tensor([0, 1])).all() and (route.weight == 0.5).all()
    model(flat).square().sum().backward()
    assert torch.isfinite(flat.grad).all()


def test_an_untrained_gate_loses_to_a_gate_that_points_the_tokens_way() -> None:
    model, layer = tiny.toy(config(top_k=1))
    layer.router.weight.data[3] = TOKENS[0]
    model.eval()
    assert tiny.routes(model, x=TOKENS[:1])[0].index.item() == 3


def test_one_expert_in_inference_is_plain_lora() -> None:
    mixture, layer = tiny.toy(config(num_experts=1, r=4, top_k=1))
    plain, other = tiny.toy({"router": "single", "experts": {"r": 4, "lora_alpha": ALPHA}})
    other.experts.load_state_dict(layer.experts.state_dict())
    assert torch.equal(mixture.eval()(TOKENS), plain.eval()(TOKENS))


def test_what_is_refused() -> None:
    model, _ = trained()
    with pytest.raises(DataError, match=r"routers\.phatgoose routes by task.*pass task_ids"):
        model(TOKENS)
    with pytest.raises(DataError, match=r"routers\.phatgoose: task id 4 at 'lin', but there are 4 experts"):
        model(TOKENS, task_ids=torch.tensor([0, 1, 2, 3, 4, 0]))
    with pytest.raises(ConfigError, match=r"routers\.phatgoose: top_k 2 is more than the 1 experts"):
        tiny.toy(config(num_experts=1))
    with pytest.raises(ConfigError, match=r"losses\.supervised_gate reads logits"):
        tiny.toy({**config(), "losses": {"supervised_gate": 0.1}})


def test_gates_are_float32_in_a_bfloat16_model() -> None:
    model = tiny.adapted("llama", "phatgoose").to(torch.bfloat16)
    given = {**tiny.unlabelled(tiny.batch()), "task_ids": torch.tensor([0, 1, 2])}
    for route in (*tiny.routes(model, **given), *tiny.routes(model.eval(), **given)):
        assert route.weight.dtype == torch.float32
