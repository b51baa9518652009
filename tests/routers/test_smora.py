"""SMoRA: the formula, its invariants, and the balance bias that follows the optimiser, not the forwards."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import moelora
from moelora.core.errors import ConfigError
from moelora.model.record import routed_layers
from moelora.routers.smora import SMoRA
from tests import tiny

RATE = 0.01  # of the configuration "smora"


def oracle(layer: Any) -> tiny.Oracle:
    """The formula of the paper's code, token by token, blocks routed whole."""
    router, ranks = layer.router, layer.experts.num_experts * layer.experts.r
    k, p, alpha = router.top_k, router.block_size, float(layer.experts.scale[0]) * router.top_k

    def formula(w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        rows, gates = [], []
        for t in range(x.shape[0]):
            logits = w["Wg"] @ x[t]
            q = 1 / (1 + (-logits).exp()) if router.score_fn == "sigmoid" else logits.exp() / logits.exp().sum()
            v = q + router.bias.double()
            chosen = sorted(range(ranks // p), key=lambda i, v=v: (-v[i].item(), i))[: k // p]
            value = v if router.bias_in_gate else q
            total = sum(value[u] for u in chosen for _ in range(p))
            y, gate = w["W"] @ x[t] + w["b"], [x.new_zeros(())] * (ranks // p)
            for u in chosen:
                gate[u] = k * value[u] / total
                for i in range(u * p, (u + 1) * p):
                    y = y + (alpha / k) * gate[u] * w["B"][:, i] * (w["A"][i] @ x[t])
            rows.append(y)
            gates.append(torch.stack(gate))
        return torch.stack(rows), torch.stack(gates)

    return formula


def config(num_experts: int = 1, r: int = 8, alpha: float = 8, **options: Any) -> dict[str, Any]:
    return {
        "router": {"name": "smora", "top_k": 4, **options},
        "experts": {"num_experts": num_experts, "r": r, "lora_alpha": alpha},
    }


def biased(layer: Any, spread: float = 0.2) -> None:
    """A balance bias as training may leave it."""
    layer.router.bias.copy_(spread * torch.randn(layer.router.bias.shape))


def gates(model: nn.Module, x: Tensor) -> Tensor:
    """[T, G]."""
    return tiny.routes(model, x=x)[0].dense()


@pytest.mark.parametrize("score_fn", ["sigmoid", "softmax"])
@pytest.mark.parametrize("bias_in_gate", [True, False])
@pytest.mark.parametrize(("top_k", "block_size"), [(1, 1), (3, 1), (8, 1), (4, 2), (8, 4)])
def test_equals_the_formula(score_fn: str, bias_in_gate: bool, top_k: int, block_size: int) -> None:
    options = {"score_fn": score_fn, "bias_in_gate": bias_in_gate, "top_k": top_k, "block_size": block_size}
    model, layer = tiny.toy(config(alpha=2.0 * top_k, **options))
    tiny.assert_layer_equals(model, layer, oracle(layer))  # with the bias at zero
    model.zero_grad()
    biased(layer)
    tiny.assert_layer_equals(model, layer, oracle(layer))


def test_all_ranks_with_equal_scores_are_plain_lora() -> None:
    """S1."""
    model, layer = tiny.toy(config(top_k=8, alpha=16))
    nn.init.zeros_(layer.router.weight)
    x = torch.randn(6, 5, dtype=torch.float64)
    lora = layer.base_layer(x) + 16 / 8 * x @ layer.experts.lora_A.t() @ layer.experts.lora_B.t()
    torch.testing.assert_close(model(x), lora, rtol=1e-13, atol=1e-13)
    assert (gates(model, x) == 1).all()


@pytest.mark.parametrize(("top_k", "block_size"), [(8, 1), (4, 1), (1, 1), (4, 4)])
@pytest.mark.parametrize("score_fn", ["sigmoid", "softmax"])
def test_gates_sum_to_k(top_k: int, block_size: int, score_fn: str) -> None:
    """S2 and S4: counted per rank, the gates of a token sum to k."""
    model, layer = tiny.toy(config(top_k=top_k, block_size=block_size, score_fn=score_fn))
    biased(layer)
    found = gates(model, torch.randn(20, 5, dtype=torch.float64))
    torch.testing.assert_close(found.sum(1) * block_size, torch.full((20,), float(top_k), dtype=torch.float64))
    assert ((found != 0).sum(1) == top_k // block_size).all()


def test_blocks_of_r_ranks_are_a_mixture_of_loras() -> None:
    """S3."""
    model, layer = tiny.toy(config(num_experts=4, r=2, top_k=4, block_size=2, alpha=8))
    x = torch.randn(6, 5, dtype=torch.float64)
    gate = gates(model, x)
    assert gate.shape == (6, 4)
    expected = layer.base_layer(x)
    for e in range(4):
        rows = slice(2 * e, 2 * e + 2)
        expert = x @ layer.experts.lora_A[rows].t() @ layer.experts.lora_B[:, rows].t()
        expected = expected + 8 / 4 * gate[:, e : e + 1] * expert
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_bias_moves_by_the_rate_away_from_the_mean_load() -> None:
    """S5."""
    _, layer = tiny.toy(config(bias_update_rate=RATE))
    load = torch.tensor([9.0, 0, 4, 4, 5, 3, 4, 3])  # mean 4
    layer.router.after_step(load)
    expected = RATE * torch.tensor([-1.0, 1, 0, 0, -1, 1, 0, 1])
    assert torch.equal(layer.router.bias, expected)


def test_shifting_every_bias_changes_the_gates_and_not_the_choice() -> None:
    """S6."""
    x = torch.randn(10, 5, dtype=torch.float64)
    for in_gate in (True, False):
        model, layer = tiny.toy(config(bias_in_gate=in_gate))
        before = tiny.routes(model, x=x)[0]
        layer.router.bias += 0.5
        after = tiny.routes(model, x=x)[0]
        assert torch.equal(before.index, after.index)
        assert torch.equal(before.weight, after.weight) != in_gate


def test_bias_decides_the_choice() -> None:
    model, layer = tiny.toy(config(top_k=2))
    layer.router.bias[[3, 6]] = 2.0  # more than any sigmoid
    assert tiny.routes(model, x=torch.randn(10, 5, dtype=torch.float64))[0].chosen()[:, [3, 6]].all()


def test_bias_is_a_saved_float32_buffer_without_gradient() -> None:
    model = tiny.adapted("llama", "smora")
    for name, bias in tiny.biases(model).items():
        assert bias.dtype == torch.float32 and not bias.requires_grad and name in model.state_dict()
    assert not any(name.endswith("bias") for name in tiny.trainable(model))


def test_unchosen_ranks_get_no_gradient() -> None:
    model, layer = tiny.toy(config(top_k=2))
    x = torch.randn(1, 5, dtype=torch.float64)
    chosen = tiny.routes(model, x=x)[0].chosen()[0].bool()
    model(x).square().sum().backward()
    for grad in (layer.router.weight.grad, layer.experts.lora_A.grad, layer.experts.lora_B.grad.t()):
        assert (grad[~chosen] == 0).all() and (grad[chosen] != 0).any(1).all()


def test_router_and_experts_see_the_same_dropout() -> None:
    model, layer = tiny.toy({**config(top_k=8), "experts": {"r": 8, "lora_alpha": 8, "lora_dropout": 0.5}})
    seen: list[Tensor] = []
    layer.router.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    layer.experts.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.randn(4, 5, dtype=torch.float64))
    assert seen[0] is seen[1] and (seen[0] == 0).any()


@pytest.mark.parametrize(
    ("router", "experts", "message"),
    [
        ({"top_k": 9}, {"r": 8}, "top_k 9 is more than the 8 ranks"),
        ({"top_k": 17}, {"r": 8, "num_experts": 2}, "top_k 17 is more than the 16 ranks"),
        ({"top_k": 4, "block_size": 3}, {"r": 9}, "block_size 3 must divide top_k 4"),
        ({"top_k": 4, "block_size": 4}, {"r": 6}, "must divide top_k 4 and the 6 ranks"),
    ],
)
def test_impossible_options_leave_the_model_untouched(
    router: dict[str, Any], experts: dict[str, Any], message: str
) -> None:
    model = tiny.llama()
    keys, cls = list(model.state_dict()), type(model)
    with pytest.raises(ConfigError, match=message):
        moelora.adapt(model, {"router": {"name": "smora", **router}, "experts": experts})
    assert type(model) is cls and list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


# The balance bias during training


def loads(model: nn.Module, *batches: dict[str, Tensor]) -> list[Tensor]:
    """Tokens per unit that a pass over the batches should count, in site order, from the routes and the masks."""
    total: list[Tensor] = []
    for batch in batches:
        keep = batch["attention_mask"].reshape(-1).bool()
        counts = [route.chosen()[keep].sum(0) for route in tiny.routes(model, **batch)]
        total = [a + b for a, b in zip(total, counts, strict=True)] if total else counts
    return total


def expected_bias(before: dict[str, Tensor], counted: list[Tensor]) -> dict[str, Tensor]:
    """The biases after one optimiser step."""
    return {
        name: bias + RATE * torch.sign(load.mean() - load)
        for (name, bias), load in zip(before.items(), counted, strict=True)
    }


def optimizer(model: nn.Module, rate: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(tiny.trainable(model).values()), lr=rate)


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The site of every call of ``after_step``."""
    calls: list[int] = []
    original = SMoRA.after_step

    def spy(self: SMoRA, load: Tensor) -> None:
        calls.append(self.site.index)
        original(self, load)

    monkeypatch.setattr(SMoRA, "after_step", spy)
    return calls


BATCHES = [tiny.batch(seed=seed) for seed in range(4)]


def test_bias_moves_once_per_step_under_accumulation(updates: list[int]) -> None:
    model = tiny.adapted("llama", "smora")
    sgd, sites = optimizer(model), list(range(len(routed_layers(model))))
    for pair in (BATCHES[:2], BATCHES[2:]):
        before, counted = tiny.biases(model), loads(model, *pair)
        for batch in pair:
            model(**batch).loss.backward()
            tiny.assert_same(tiny.biases(model), before)  # not in the forward, not in the backward
        sgd.step()
        tiny.assert_same(tiny.biases(model), expected_bias(before, counted))
        sgd.zero_grad()
    assert updates == sites * 2


def test_bias_counts_two_forwards_before_one_backward() -> None:
    model = tiny.adapted("llama", "smora")
    before, counted, sgd = tiny.biases(model), loads(model, *BATCHES[:2]), optimizer(model)
    (model(**BATCHES[0]).loss + model(**BATCHES[1]).loss).backward()
    sgd.step()
    tiny.assert_same(tiny.biases(model), expected_bias(before, counted))


def test_bias_does_not_count_a_recomputation(updates: list[int]) -> None:
    plain, saving = tiny.adapted("llama", "smora"), tiny.checkpointing(tiny.adapted("llama", "smora"))
    for model in (plain, saving):
        sgd = optimizer(model)
        for batch in BATCHES:
            model(**batch).loss.backward()
            sgd.step()
            sgd.zero_grad()
    tiny.assert_same(tiny.biases(plain), tiny.biases(saving))
    assert len(updates) == 2 * len(BATCHES) * len(routed_layers(plain))
    assert all((bias != 0).any() for bias in tiny.biases(plain).values())


def test_bias_moves_once_with_two_optimizers(updates: list[int]) -> None:
    model = tiny.adapted("llama", "smora")
    before, counted = tiny.biases(model), loads(model, BATCHES[0])
    own = tiny.trainable(model)
    both = [
        torch.optim.SGD([p for name, p in own.items() if ("router" in name) == router], lr=0.1)
        for router in (True, False)
    ]
    model(**BATCHES[0]).loss.backward()
    for one in both:
        one.step()
    tiny.assert_same(tiny.biases(model), expected_bias(before, counted))
    assert len(updates) == len(before)


def test_bias_ignores_the_steps_of_other_models(updates: list[int]) -> None:
    model, other = tiny.adapted("llama", "smora"), nn.Linear(2, 2)
    model(**BATCHES[0]).loss.backward()
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    torch.optim.SGD([p for p in model.parameters() if not p.requires_grad], lr=0.1).step()
    assert updates == []


def test_a_deep_copy_has_its_own_bias() -> None:
    model = tiny.adapted("llama", "smora")
    model(**BATCHES[0]).loss.backward()
    optimizer(model).step()
    twin, before = copy.deepcopy(model), tiny.biases(model)
    counted = loads(twin, BATCHES[1])
    twin.zero_grad()
    twin(**BATCHES[1]).loss.backward()
    optimizer(twin).step()
    tiny.assert_same(tiny.biases(twin), expected_bias(before, counted))
    tiny.assert_same(tiny.biases(model), before)
    moved = tiny.biases(twin)
    counted = loads(model, BATCHES[2])
    model.zero_grad()
    model(**BATCHES[2]).loss.backward()
    optimizer(model).step()
    tiny.assert_same(tiny.biases(model), expected_bias(before, counted))
    tiny.assert_same(tiny.biases(twin), moved)


def test_watching_the_optimizers_keeps_no_model_alive() -> None:
    model = tiny.adapted("llama", "smora")
    model(**BATCHES[0]).loss.backward()
    optimizer(model).step()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    one = nn.Linear(2, 2)
    one(torch.ones(1, 2)).sum().backward()
    optimizer(one).step()  # the orphaned hook takes itself away quietly


def test_bias_does_not_count_padding() -> None:
    moved = []
    for filler in (0, 17):
        model = tiny.adapted("llama", "smora")
        batch = {**BATCHES[0], "input_ids": BATCHES[0]["input_ids"].clone()}
        batch["input_ids"][batch["attention_mask"] == 0] = filler
        before, counted = tiny.biases(model), loads(model, batch)
        assert counted[0].sum() == 4 * batch["attention_mask"].sum()
        model(**batch).loss.backward()
        optimizer(model).step()
        moved.append(tiny.biases(model))
        tiny.assert_same(moved[-1], expected_bias(before, counted))
    tiny.assert_same(*moved)


def forward_in_eval(model: Any) -> None:
    model.eval()
    model(**BATCHES[0]).loss.backward()
    model.train()


def forward_without_grad(model: Any) -> None:
    with torch.no_grad():
        model(**BATCHES[0])


def forward_disabled(model: Any) -> None:
    with moelora.disabled(model):
        model(**BATCHES[0])


@pytest.mark.parametrize("forward", [forward_in_eval, forward_without_grad, forward_disabled])
def test_bias_stands_still_outside_training(forward: Callable[[Any], None]) -> None:
    model = tiny.adapted("llama", "smora")
    forward(model)
    sgd = optimizer(model)
    for p in tiny.trainable(model).values():
        p.grad = torch.zeros_like(p)
    sgd.step()
    assert all((bias == 0).all() for bias in tiny.biases(model).values())


def test_a_layer_in_eval_mode_counts_nothing() -> None:
    model = tiny.adapted("llama", "smora")
    frozen, *others = routed_layers(model)
    frozen.eval()
    model(**BATCHES[0]).loss.backward()
    assert set(model.moelora.port.load) == {layer.site.index for layer in others}


def test_rate_zero_turns_balancing_off(updates: list[int]) -> None:
    model = tiny.adapted("llama", "smora", router={"name": "smora", "top_k": 4, "bias_update_rate": 0})
    model(**BATCHES[0]).loss.backward()
    optimizer(model).step()
    assert updates == [] and all((bias == 0).all() for bias in tiny.biases(model).values())


def test_bias_keeps_float32_in_a_bfloat16_model() -> None:
    # A step of 1e-5 is lost in bfloat16 as soon as the bias has passed 4e-3.
    model = tiny.adapted("llama", "smora", router={"name": "smora", "top_k": 4, "bias_update_rate": 1e-5})
    for layer in routed_layers(model):
        layer.router.bias += 0.5
    model.to(torch.bfloat16)
    model(**BATCHES[0]).loss.backward()
    optimizer(model).step()
    for bias in tiny.biases(model).values():
        assert bias.dtype == torch.float32
        assert ((bias - 0.5).abs() > 0).any() and ((bias - 0.5).abs() < 2e-5).all()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_and_plain_loop_leave_the_same_bias(checkpointing: bool, tmp_path: Path, updates: list[int]) -> None:
    rows = [{key: value[0] for key, value in tiny.batch(seed=seed, rows=1).items()} for seed in range(12)]
    plain = tiny.adapted("llama", "smora")
    sgd = optimizer(plain, 0.05)
    for step in range(3):
        pairs = [rows[4 * step + i : 4 * step + i + 2] for i in (0, 2)]
        batches = [{key: torch.stack([row[key] for row in pair]) for key in pair[0]} for pair in pairs]
        for batch in batches:
            (plain(**batch).loss / 2).backward()
        sgd.step()
        sgd.zero_grad()
    calls = len(updates)
    assert calls == 3 * len(routed_layers(plain))

    trained = tiny.adapted("llama", "smora")
    own = optimizer(trained, 0.05)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        gradient_checkpointing=checkpointing,
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    constant = torch.optim.lr_scheduler.LambdaLR(own, lambda step: 1.0)
    Trainer(model=trained, args=args, train_dataset=rows, optimizers=(own, constant)).train()
    assert len(updates) == 2 * calls
    tiny.assert_same(tiny.biases(trained), tiny.biases(plain))
    for name, p in tiny.trainable(plain).items():
        torch.testing.assert_close(trained.get_parameter(name), p, rtol=1e-5, atol=1e-6)
