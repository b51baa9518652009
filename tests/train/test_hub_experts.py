"""The recipes over eight unlike adapters: prepared as their first lines say, gates learn the task, experts stay."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from moelora.recipes import hub_adapters
from torch import Tensor
from transformers import set_seed

import moelora
from moelora.data.load import load_tasks
from moelora.data.mixture import mix
from moelora.data.prompts import as_trl
from moelora.io.peft import read_peft
from moelora.model.write import adapter_tensors
from moelora.recipe import read_recipe, shipped_recipes
from moelora.train.run import build_trainer, eval_rows, load_base
from tests import tiny

RECIPES = [name for name in shipped_recipes() if name.startswith("hub_experts")]
SMALL = [
    "data.max_rows=110",
    "data.max_eval_rows=8",
    "training.per_device_train_batch_size=16",
    "training.max_steps=30",
    "training.save_strategy=no",
    "training.report_to=none",
    "training.disable_tqdm=true",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All eight adapters, trained for two steps."""
    out = tmp_path_factory.mktemp("adapters")
    for task in load_tasks(read_recipe("single", SMALL).data):
        hub_adapters.train_adapter(task, out / task.name, steps=2, show=False)
    return out


def recipe_in(name: str, folder: Path, out: Path) -> Any:
    """A recipe whose adapters lie in ``folder``."""
    shipped = read_recipe(name).adapter.experts.adapters
    here = json.dumps([str(folder / Path(entry).name) for entry in shipped])
    return read_recipe(name, [*SMALL, f"adapter.experts.adapters={here}", f"training.output_dir={out}"])


def shares(routing: Any) -> Tensor:
    """[tasks, experts]: how much of a task's gates each expert gets, mean over layers."""
    return torch.stack([layer.load for layer in routing.layers.values()]).mean(0)


def test_no_two_adapters_are_alike(folder: Path) -> None:
    adapters = [read_peft(folder / task) for task in hub_adapters.ADAPTERS]
    ranks = [max(module.rank for module in adapter.modules.values()) for adapter in adapters]
    assert sorted(ranks) == [2, 4, 8, 12, 16, 24, 32, 64]
    targets = {frozenset(path.rpartition(".")[2] for path in adapter.modules) for adapter in adapters}
    assert len(targets) == 4
    assert {adapter.config["use_rslora"] for adapter in adapters} == {True, False}
    assert len({adapter.config["lora_alpha"] for adapter in adapters}) >= 4
    assert [adapter.config["use_dora"] for adapter in adapters].count(True) == 1
    assert {module.rank for module in adapters[-1].modules.values()} == {3, 6, 32}
    assert {adapter.base_model for adapter in adapters} == {"moelora/tiny"}


@pytest.mark.parametrize("name", RECIPES)
def test_gates_learn_which_adapter_is_for_which_task(name: str, folder: Path, tmp_path: Path) -> None:
    recipe = recipe_in(name, folder, tmp_path / "run")
    set_seed(0)
    model, tokenizer = load_base(recipe)
    moelora.adapt(model, recipe.adapter, verbose=False)
    start = {key: value.detach().clone() for key, value in adapter_tensors(model).items()}
    tasks = load_tasks(recipe.data)
    assert [task.name for task in tasks] == model.moelora.config.experts.labels
    trainer = build_trainer(
        recipe, model, tokenizer, tasks, as_trl(mix(tasks, 1.0, 0), chat=True), eval_rows(tasks, chat=True)
    )
    trainer.exact_match = []
    trainer.measure()
    before = trainer.routing
    trainer.train()
    trainer.measure()
    after = trainer.routing

    assert after.summary()["agreement"] > before.summary()["agreement"] + 0.1
    assert shares(after).argmax(1).tolist() == list(range(8))
    assert shares(after).diagonal().mean() > 0.25 > 1.5 * shares(before).diagonal().mean()

    end = adapter_tensors(model)
    moved = {key for key in end if not torch.equal(end[key], start[key])}
    assert moved == {key for key in end if ".router." in key}
    moelora.save(model, tmp_path / "saved")
    again = moelora.load(load_base(recipe)[0], tmp_path / "saved")
    tiny.assert_same(adapter_tensors(again), end)
    batch = tokenizer("<|user|>reverse: 1 2 3<|end|><|assistant|>", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


def test_adapters_that_are_there_are_left_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(sys, "argv", ["hub_adapters", "--out", str(folder)])
    hub_adapters.main()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert capsys.readouterr().out.count("there already") == 8


def test_without_peft_there_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    task = load_tasks(read_recipe("single", SMALL).data)[0]
    with pytest.raises(SystemExit, match="pip install 'peft"):
        hub_adapters.train_adapter(task, tmp_path / "out", steps=1)
    assert list(tmp_path.iterdir()) == []
