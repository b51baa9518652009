"""Runs whose experts start from what the base model does on the training rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import moelora
from moelora.core.errors import ConfigError
from moelora.data.load import load_tasks
from moelora.data.mixture import mix
from moelora.data.prompts import as_trl, uses_chat
from moelora.model.base import load_model
from moelora.model.record import routed_layers
from moelora.recipe import read_recipe
from moelora.train.compare import trainable_parameters
from moelora.train.run import build_trainer, load_base, sft_config, to_probe, train
from tests import tiny

FAST = [
    "data.builtin=false",
    "data.tasks={reverse: {path: builtin/reverse}, count: {path: builtin/count}}",
    "data.max_rows=60", "data.max_eval_rows=2", "training.per_device_train_batch_size=4", "training.logging_steps=1",
    "training.disable_tqdm=true", "adapter.target_modules=[q_proj, v_proj]", "training.report_to=none",
    "training.eval_strategy=no", "training.save_steps=1",
]  # fmt: skip
INITS = {
    "lora_ga": "adapter.init={name: lora_ga, experts: same, batches: 2, batch_size: 3}",
    "eva": "adapter.init={name: eva, experts: same, batches: 2, batch_size: 8, tokens: all}",
}


def recipe(out: Path, init: str, *more: str) -> Any:
    return read_recipe("meteora", [*FAST, INITS[init], f"training.output_dir={out}", "training.max_steps=2", *more])


def test_probed_batches_are_the_trainers_first_rows(tmp_path: Path) -> None:
    made = recipe(tmp_path, "lora_ga", "training.packing=true", "training.max_length=64", "training.seed=5")
    tasks = load_tasks(made.data)
    model, tokenizer = load_base(made)
    rows = as_trl(mix(tasks, 1.0, 5), uses_chat(tokenizer, made.data.chat_template))
    batches = to_probe(made, model, tokenizer, rows)["batches"]
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3]
    moelora.adapt(model, made.adapter, batches=batches, verbose=False)
    plain = read_recipe("meteora", [*FAST, f"training.output_dir={tmp_path}", "training.seed=5"])
    prepared = build_trainer(plain, model, tokenizer, tasks, rows, None).train_dataset
    found = [
        (row["input_ids"][kept.bool()].tolist(), row["labels"][kept.bool()].tolist())
        for batch in batches
        for row, kept in (
            ({key: value[i] for key, value in batch.items()}, batch["attention_mask"][i]) for i in range(3)
        )
    ]
    assert found == [(row["input_ids"], row["labels"]) for row in prepared.select(range(6))]
    assert any(-100 in labels for _, labels in found)
    assert sft_config(made).packing


def test_a_run_starts_from_its_rows_and_is_not_probed_again_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = "lora_ga"
    whole = train(recipe(tmp_path / "whole", init))
    saved = json.loads((tmp_path / "whole" / "moelora.json").read_text())
    assert saved["adapter"]["init"]["name"] == init

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("probed again")

    monkeypatch.setattr("moelora.model.adapt.Probe", fail)
    monkeypatch.setattr("moelora.train.run.to_probe", fail)
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "last")
    resumed = train(recipe(tmp_path / "whole", init), resume=True)
    assert resumed.summary["steps"] == 2
    again = moelora.load(load_model("moelora/tiny", dtype=torch.float32), tmp_path / "whole")
    for one, two, three in zip(*(routed_layers(m) for m in (whole.model, resumed.model, again)), strict=True):
        tiny.assert_same(dict(one.experts.state_dict()), dict(two.experts.state_dict()))
        tiny.assert_same(dict(one.experts.state_dict()), dict(three.experts.state_dict()))


def test_zero3_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"init lora_ga runs the base model before training begins, .* zero2"):
        recipe(tmp_path, "lora_ga", "deepspeed=zero3")
    assert recipe(tmp_path, "lora_ga", "deepspeed=zero2").deepspeed == "zero2"


@pytest.mark.parametrize("init", INITS)
def test_parameters_are_counted_without_data_or_weights(tmp_path: Path, init: str) -> None:
    assert trainable_parameters(recipe(tmp_path, init), ()) > 0
