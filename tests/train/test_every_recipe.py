"""Every shipped recipe learns, moves its router, comes back bit for bit, and resumes bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moelora
from moelora.model.write import adapter_tensors
from moelora.recipe import read_recipe, shipped_recipes
from moelora.train.run import Result, load_base, train
from tests import tiny

RECIPES = [
    name for name, path in shipped_recipes().items() if name != "local_tasks" and "recipes:" not in path.read_text()
]
SMALL = [
    "training.per_device_train_batch_size=8",
    "training.per_device_eval_batch_size=8",
    "training.logging_steps=10",
    "training.disable_tqdm=true",
    "training.report_to=none",
    "data.max_eval_rows=1",
    "adapter.layers_to_transform=[2, 3]",
]


def run(name: str, out: Path, steps: int, *more: str, resume: bool = False) -> Result:
    changes = [*SMALL, f"training.max_steps={steps}", f"training.output_dir={out}", *more]
    return train(read_recipe(name, changes), resume=resume)


def tensors(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in adapter_tensors(model).items()}


@pytest.mark.parametrize("name", RECIPES)
def test_a_hundred_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start: dict[str, Tensor] = {}

    def adapt(*args: Any, **kwargs: Any) -> Any:
        model = moelora.adapt(*args, verbose=False, **kwargs)
        start.update(tensors(model))
        return model

    monkeypatch.setattr("moelora.train.run.adapt", adapt)
    result = run(name, tmp_path / "out", 100, "training.save_strategy=no", "data.max_rows=110")
    losses = [row["loss"] for row in result.history if "loss" in row]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])

    end, trained = tensors(result.model), tiny.trainable(result.model)
    for key, value in end.items():
        moved = not torch.equal(value, start[key])
        assert moved == (key in trained or key.endswith("router.bias")), f"{key} {'moved' if moved else 'stayed'}"

    again = moelora.load(load_base(read_recipe(name))[0], tmp_path / "out")
    tiny.assert_same(tensors(again), end)


@pytest.mark.parametrize("name", RECIPES)
def test_resuming_is_going_on(name: str, tmp_path: Path) -> None:
    steps = ["training.save_steps=2", "training.eval_strategy=no", "data.max_rows=8"]
    whole = run(name, tmp_path / "whole", 4, *steps)
    (tmp_path / "cut").mkdir()
    for part in ("recipe.yaml", "checkpoint-2"):
        source = tmp_path / "whole" / part
        copy: Any = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / "cut" / part)
    resumed = run(name, tmp_path / "cut", 4, *steps, resume=True)
    assert resumed.summary["steps"] == 4
    tiny.assert_same(tensors(resumed.model), tensors(whole.model))
