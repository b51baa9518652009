"""LoRA-FA: B's gradient is corrected by the frozen A."""

from __future__ import annotations

from typing import Any

import peft
import peft.optimizers.lorafa
import pytest
import torch
from torch import Tensor

from moelora.core.errors import ConfigError
from moelora.core.step import Now
from moelora.optim.lora_fa import LoRAFA
from moelora.recipe import check_recipe
from moelora.train.engine import Engine
from moelora.train.stepping import Stepping
from tests import tiny
from tests.optim.bench import OUT, RANK, SCALE, WIDE, Bench, full, unused

FROZEN_A = {"experts": {"train": "B"}}


def bench(ridge: float = 0.0, **more: Any) -> Bench:
    return Bench({"name": "lora_fa", "ridge": ridge}, **{**FROZEN_A, **more})


def solved(G: Tensor, A: Tensor) -> Tensor:
    """b of min ||s b A - G||, by a solver of least squares."""
    return torch.linalg.lstsq(A.mT, G.mT).solution.mT / SCALE


def test_the_step_of_b_is_the_least_squares_one_for_several_steps() -> None:
    made = bench(lr=0.2, decay=0.1)
    A = made.down
    for seed in range(3):
        G, B = full(seed), made.up
        made.step(G)
        torch.testing.assert_close(made.up, B - 0.2 * (solved(G, A) + 0.1 * B), rtol=1e-10, atol=1e-10)
    assert torch.equal(made.down, A)


def test_the_update_moves_by_the_gradient_projected_onto_the_rows_of_a() -> None:
    made, G = bench(lr=1.0), full()
    A, before = made.down, made.delta
    made.step(G)
    projector = A.mT @ torch.linalg.inv(A @ A.mT) @ A
    torch.testing.assert_close(made.delta - before, -G @ projector, rtol=1e-10, atol=1e-10)


def test_how_long_and_how_skewed_a_is_does_not_matter() -> None:
    one, two = bench(), bench()
    R = torch.randn(3, RANK, RANK, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 5
    two.put(R @ one.down, one.up @ torch.linalg.inv(R))
    for seed in range(3):
        one.step(full(seed))
        two.step(full(seed))
        torch.testing.assert_close(two.delta, one.delta, rtol=1e-9, atol=1e-9)


def test_the_ridge_is_relative_to_the_size_of_a() -> None:
    small, large = bench(ridge=0.5), bench(ridge=0.5)
    large.put(100 * small.down, small.up / 100)
    for made in (small, large):
        made.step(full())
    torch.testing.assert_close(large.delta, small.delta, rtol=1e-10, atol=1e-10)
    A = small.down[0] @ small.down[0].mT
    weak = A + 0.5 * A.trace() / RANK * torch.eye(RANK, dtype=A.dtype)
    expected = bench(ridge=0.5).up[0] - 0.1 / SCALE * full()[0] @ small.down[0].mT @ torch.linalg.inv(weak)
    torch.testing.assert_close(small.up[0], expected, rtol=1e-10, atol=1e-10)


def test_an_unused_expert_keeps_value_and_moments() -> None:
    made = bench(optimizer=torch.optim.AdamW, decay=0.1)
    made.step(full(0))
    B, state = made.up, made.optimizer.state[made.experts.lora_B]["exp_avg"].clone()
    made.step(unused(full(1)))
    moments = made.optimizer.state[made.experts.lora_B]["exp_avg"]
    columns = slice(RANK, 2 * RANK)
    assert torch.equal(made.up[1], B[1]) and torch.equal(moments[:, columns], state[:, columns])
    assert not torch.equal(made.up[0], B[0])


def test_ranks_of_smora_are_corrected_one_by_one() -> None:
    experts = {"num_experts": 1, "r": 4, "lora_alpha": 2 * SCALE, "train": "B"}
    made = Bench({"name": "lora_fa", "ridge": 0.0}, router={"name": "smora", "top_k": 2}, lr=1.0, experts=experts)
    A, B, G = made.down, made.up, full(experts=4)
    assert A.shape == (4, 1, WIDE) and B.shape == (4, OUT, 1)
    made.step(G)
    expected = B - G @ A.mT / (SCALE * (A * A).sum((1, 2)).view(4, 1, 1))
    torch.testing.assert_close(made.up, expected, rtol=1e-10, atol=1e-10)


def test_it_takes_the_steps_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)  # which would round to 8 bits
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=tiny.TARGETS["llama"], lora_dropout=0.0)
    theirs = peft.get_peft_model(tiny.llama(), config)
    made = peft.optimizers.lorafa.create_lorafa_optimizer(theirs, r=4, lora_alpha=12, lr=1e-2)
    made.param_groups[0]["eps"] = 1e-20  # it is added before the second moment is corrected there
    adapter = {"experts": {"r": 4, "lora_alpha": 12, "train": "B"}, "target_modules": tiny.TARGETS["llama"]}
    ours = tiny.adapt(tiny.llama(), adapter)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if ".experts.lora_" in name:
                p.copy_(theirs.get_parameter(f"base_model.model.{name.replace('experts.', '')}.default.weight"))
    optimizer = torch.optim.AdamW(tiny.trainable(ours).values(), lr=1e-2, weight_decay=0.0, eps=1e-20)
    stepping = Stepping(ours, Engine(ours, ours, optimizer), LoRAFA())
    for seed in range(3):
        losses = []
        for model, step in ((theirs, made), (ours, optimizer)):
            model.zero_grad()
            loss = model(**tiny.batch(seed=seed)).loss
            loss.backward()
            losses.append(loss.item())
            if model is ours:
                stepping.before(Now(seed, 3, 1e-2))
            step.step()
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    name = "model.layers.1.self_attn.q_proj"
    found = ours.get_parameter(f"{name}.experts.lora_B")
    wanted = theirs.get_parameter(f"base_model.model.{name}.lora_B.default.weight")
    torch.testing.assert_close(found.data, wanted.data, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"num_experts": 2}, r"lora_fa keeps A as it is, and experts.train trains it; set experts: {train: B}"),
        (
            {"name": "hydra", "num_experts": 2, "train": "B"},
            r"pairs B A and nothing else, and found experts 'hydra'",
        ),
        ({"num_experts": 2, "train": "none"}, r"do not train lora_B here"),
    ],
)
def test_what_it_cannot_train_is_refused_before_anything_is_read(experts: dict[str, Any], message: str) -> None:
    adapter = {"router": "softmax", "experts": experts}
    with pytest.raises(ConfigError, match=message):
        check_recipe({"adapter": adapter, "optim": "lora_fa", "training": {"output_dir": "out"}})
