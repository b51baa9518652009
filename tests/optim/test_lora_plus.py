"""LoRA+: lora_B has its own learning rate, in groups, schedules and checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file

from moelora.core.errors import ConfigError
from moelora.optim.lora_plus import LoRAPlus
from moelora.recipe import check_recipe
from moelora.train.engine import set_rates
from tests import tiny
from tests.optim.bench import Bench, full
from tests.train.test_trainer import METEORA, trainer


def test_the_step_of_b_is_ratio_times_as_long_and_that_of_a_stays() -> None:
    plain, plus = (Bench(spec, lr=0.1) for spec in ("plain", {"name": "lora_plus", "ratio": 4.0}))
    rates = {id(p): plus.method.rate(name) for name, p in plus.model.named_parameters()}
    set_rates(plus.optimizer, rates)
    A, B = plain.down, plain.up
    for bench in (plain, plus):
        bench.step(full())
    torch.testing.assert_close(plus.down, plain.down, rtol=1e-12, atol=0)
    torch.testing.assert_close(plus.up - B, 4 * (plain.up - B), rtol=1e-9, atol=1e-12)
    assert not torch.equal(plain.down, A)


def test_fast_are_those_that_peft_has_fast_for_the_same_lora() -> None:
    config = peft.LoraConfig(r=4, target_modules=tiny.TARGETS["llama"])
    theirs = peft.get_peft_model(tiny.llama(), config)
    made = create_loraplus_optimizer(theirs, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=16.0)
    fast = {id(p) for group in made.param_groups if group["lr"] > 0.2 for p in group["params"]}
    wanted = {name.split(".lora_")[0][17:] for name, p in theirs.named_parameters() if id(p) in fast}
    ours, method = tiny.adapted("llama", "single"), LoRAPlus(ratio=16.0)
    found = {name.split(".experts")[0] for name in tiny.trainable(ours) if method.rate(name) == 16.0}
    assert found == wanted and len(found) == len(tiny.trainable(ours)) / 2


def test_routers_keep_their_rate() -> None:
    model, method = tiny.adapted("llama", "meteora"), LoRAPlus()
    slow = [name for name in tiny.trainable(model) if method.rate(name) == 1.0]
    assert any(".router." in name for name in slow) and any(name.endswith("lora_A") for name in slow)


def test_groups_are_split_by_rate_and_none_is_empty() -> None:
    slow, fast, bare = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    groups = [{"params": [fast, slow], "weight_decay": 0.1}, {"params": []}, {"params": [bare], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    set_rates(optimizer, {id(slow): 1.0, id(fast): 8.0, id(bare): 1.0})
    found = [(group["lr"], group["weight_decay"], group["params"]) for group in optimizer.param_groups]
    assert [row[:2] for row in found] == [(0.01, 0.1), (0.01, 0.0), (0.08, 0.1)]
    assert [row[2][0] is p for row, p in zip(found, (slow, bare, fast), strict=True)] == [True] * 3


def run(out: Path, plus: bool = True, **training: Any) -> Any:
    made = trainer(out, METEORA, lr_scheduler_type="linear", weight_decay=0.01, **training)
    made.optim = LoRAPlus(ratio=5.0) if plus else None
    return made


def rates(made: Any) -> list[float]:
    return [group["lr"] for group in made.optimizer.param_groups]


def test_a_schedule_moves_both_rates_and_a_resumed_run_goes_on_with_them(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", max_steps=4, save_strategy="steps", save_steps=2)
    seen: list[list[float]] = []
    begin = whole.begin_step

    def begun() -> None:
        begin()
        seen.append(rates(whole))

    whole.begin_step = begun
    whole.train()
    first = seen[0]
    assert first == pytest.approx([1e-2, 5e-2])
    for step, row in enumerate(seen):
        assert row == pytest.approx([rate * (1 - step / 4) for rate in first])
    rest = run(tmp_path / "whole", max_steps=4, save_strategy="no")
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert rates(rest) == rates(whole)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(rest.model.get_parameter(name), parameter), name
    moments = load_file(tmp_path / "whole" / "checkpoint-2" / "optimizer.safetensors")
    assert sum(name.endswith("lora_B/exp_avg") for name in moments) == len(whole.stepping.engine.parameters) / 3


def test_without_it_the_groups_are_transformers_own(tmp_path: Path) -> None:
    made = run(tmp_path / "plain", plus=False, max_steps=1)
    made.create_optimizer()
    assert len(made.optimizer.param_groups) == 2 and set(rates(made)) == {1e-2}


def test_a_deepspeed_file_that_brings_its_own_optimiser_or_schedule_is_refused(tmp_path: Path) -> None:
    for key in ("optimizer", "scheduler"):
        file = tmp_path / f"{key}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": 2}, key: {"type": "any"}}))
        recipe = {"deepspeed": str(file), "training": {"output_dir": "out"}}
        check_recipe(recipe)
        with pytest.raises(ConfigError, match=rf"which deepspeed's {key} does not keep; leave {key} out"):
            check_recipe({**recipe, "optim": "lora_plus"})


def test_experts_without_a_trained_b_are_refused() -> None:
    adapter = {"router": "meteora", "experts": {"num_experts": 2, "train": "none"}}
    with pytest.raises(ConfigError, match=r"optim lora_plus acts on lora_B, .*do not train lora_B here"):
        check_recipe({"adapter": adapter, "optim": "lora_plus", "training": {"output_dir": "out"}})
