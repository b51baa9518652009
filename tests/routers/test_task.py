"""Gates by task: the formula, exact merging, and tokens of no task."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moelora.core.errors import ConfigError, DataError
from moelora.model.record import routed_layers
from tests import tiny

ALPHA = 8.0
TASK = torch.tensor([0, 2, 1, 2, -1, 0])
TOKENS = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
KINDS = pytest.mark.parametrize("gate", ["embedding", "table"])


def config(num_experts: int = 4, r: int = 2, **options: Any) -> dict[str, Any]:
    return {
        "router": {"name": "task", "num_tasks": 3, "task_dim": 6, **options},
        "experts": {"num_experts": num_experts, "r": r, "lora_alpha": ALPHA},
    }


def trained(**options: Any) -> tuple[Any, Any]:
    """A layer whose tasks have gates that differ."""
    model, layer = tiny.toy(config(**options))
    if "table" in dict(layer.router.named_parameters()):
        layer.router.table.data.copy_(torch.randn(3, 4, generator=torch.Generator().manual_seed(9)))
    return model, layer


def oracle(layer: Any) -> tiny.Oracle:
    """Softmax of a linear map of the task's embedding, or of its row of the table."""
    r, E, kind = layer.experts.r, layer.experts.num_experts, layer.router.gate

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        for t in range(x.shape[0]):
            j = int(TASK[t])
            if j < 0:
                omega = x.new_full((E,), 1 / E)
            else:
                raised = (w["table"][j] if kind == "table" else w["Wg"] @ w["embedding"][j]).exp()
                omega = raised / raised.sum()
            y = w["W"] @ x[t] + w["b"]
            for e in range(E):
                own = slice(e * r, (e + 1) * r)
                y = y + omega[e] * (ALPHA / r) * (w["B"][:, own] @ (w["A"][own] @ x[t]))
            rows.append(y)
            gates.append(omega)
        return torch.stack(rows), torch.stack(gates)

    return formula


@KINDS
def test_equals_the_formula(gate: str) -> None:
    model, layer = trained(gate=gate)
    tiny.assert_layer_equals(model, layer, oracle(layer), task=TASK)


@KINDS
@pytest.mark.parametrize("task", [-1, 0, 1, 2])
def test_merging_for_a_task_is_exact(gate: str, task: int) -> None:
    model, layer = trained(gate=gate)
    gates = layer.router.gates_of(task)
    assert gates.shape == (4,) and not gates.requires_grad
    merged = layer.base_layer.weight.detach().clone()
    for e in range(4):
        own = slice(2 * e, 2 * e + 2)
        merged += gates[e] * (ALPHA / 2) * layer.experts.lora_B[:, own] @ layer.experts.lora_A[own]
    routed = model(TOKENS, task_ids=torch.full((6,), task))
    plain = torch.nn.functional.linear(TOKENS, merged, layer.base_layer.bias)
    torch.testing.assert_close(routed, plain, rtol=1e-13, atol=1e-13)
    route = tiny.routes(model, x=TOKENS, task_ids=torch.full((6,), task))[0]
    assert torch.equal(route.weight, gates.expand(6, 4))


@pytest.mark.parametrize("e", range(4))
def test_a_one_hot_task_is_that_expert_alone(e: int) -> None:
    model, layer = tiny.toy(config(gate="table"))
    layer.router.table.data[1, e] = 1e4
    own = slice(2 * e, 2 * e + 2)
    alone = ALPHA / 2 * TOKENS @ layer.experts.lora_A[own].t() @ layer.experts.lora_B[:, own].t()
    y = model(TOKENS, task_ids=torch.full((6,), 1))
    torch.testing.assert_close(y, layer.base_layer(TOKENS) + alone, rtol=1e-13, atol=1e-13)


def test_a_table_starts_uniform() -> None:
    layer = tiny.toy(config(gate="table"))[1]
    assert all(torch.equal(layer.router.gates_of(task), layer.router.gates_of(-1)) for task in range(3))


@KINDS
def test_a_task_trains_its_own_row_alone(gate: str) -> None:
    model, layer = trained(gate=gate)
    model(TOKENS, task_ids=torch.full((6,), 1)).square().sum().backward()
    grad = (layer.router.table if gate == "table" else layer.router.embedding).grad
    assert (grad[1] != 0).any() and (grad[[0, 2]] == 0).all()


def test_padding_and_unknown_tasks_are_uniform_and_train_no_gate() -> None:
    model, layer = trained(gate="table")
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    x, task = TOKENS.view(2, 3, 5), torch.tensor([2, -1])
    route = tiny.routes(model, x=x, attention_mask=mask, task_ids=task)[0]
    uniform = (route.weight == 0.25).all(1)
    assert uniform.tolist() == [False, False, True, True, True, True]
    model(x, attention_mask=mask, task_ids=task)[1].square().sum().backward()
    assert (layer.router.table.grad == 0).all()


def test_tokens_of_one_row_may_be_of_several_tasks() -> None:
    model, layer = trained()
    task = torch.tensor([[0, 0, 2], [1, 2, -1]])
    route = tiny.routes(model, x=TOKENS.view(2, 3, 5), task_ids=task)[0]
    assert torch.equal(route.weight, torch.stack([layer.router.gates_of(j) for j in task.flatten().tolist()]))


def test_one_gate_for_the_whole_model() -> None:
    single = tiny.adapted("llama", "task", router={"name": "task", "num_tasks": 3, "shared": True})
    several = tiny.adapted("llama", "task", router={"name": "task", "num_tasks": 3})
    for model, routers in ((single, 1), (several, 6)):
        assert len({id(layer.router) for layer in routed_layers(model)}) == routers
        gates = sum(p.numel() for name, p in tiny.trainable(model).items() if "router" in name)
        assert gates == routers * (3 * 64 + 4 * 64)
    single(**tiny.batch(), task_ids=torch.tensor([0, 1, 2])).loss.backward()
    assert all((grad != 0).any() for grad in tiny.gradients(single).values())


def test_generation_takes_the_task() -> None:
    model = tiny.adapted("llama", "task", dtype=torch.float64).eval()
    given = {k: v[:1, :4] for k, v in tiny.unlabelled(tiny.batch()).items()}
    for layer in routed_layers(model):
        layer.router.embedding.data *= 10
    out = [model.generate(**given, task_ids=torch.tensor([j]), max_new_tokens=6, do_sample=False) for j in (0, 1)]
    step = torch.cat([given["input_ids"], out[0][:, 4:-1]], 1)
    with torch.no_grad():  # the cache holds nothing of the task, so it must be right at every step
        expected = model(input_ids=step, task_ids=torch.tensor([0])).logits[:, 3:].argmax(-1)
    assert torch.equal(out[0][:, 4:], expected) and not torch.equal(out[0], out[1])


def test_no_tasks_and_too_many_are_refused() -> None:
    model, layer = trained()
    with pytest.raises(DataError, match=r"routers\.task routes by task.*pass task_ids"):
        model(TOKENS)
    with pytest.raises(DataError, match=r"routers\.task: task id 3 at 'lin', but num_tasks is 3"):
        model(TOKENS, task_ids=torch.tensor([0, 1, 2, 3, 0, 0]))
    for wrong in (3, -2):
        with pytest.raises(DataError, match=rf"expected a task id of -1 to 2, found {wrong}"):
            layer.router.gates_of(wrong)
    with pytest.raises(ConfigError, match=r"routers\.task\.num_tasks"):
        tiny.toy(config(num_tasks=0))


def test_gates_are_float32_in_a_bfloat16_model() -> None:
    model = tiny.adapted("llama", "task").to(torch.bfloat16)
    for route in tiny.routes(model, **tiny.unlabelled(tiny.batch()), task_ids=torch.tensor([0, 1, 2])):
        assert route.weight.dtype == torch.float32
