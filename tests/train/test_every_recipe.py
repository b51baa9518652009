"""Every shipped recipe learns, moves its router, comes back bit for bit, and resumes bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import set_seed

import moelora
from moelora.data.load import Task, load_tasks
from moelora.data.mixture import mix
from moelora.data.prompts import as_trl
from moelora.model.write import adapter_tensors
from moelora.recipe import read_recipe, shipped_recipes
from moelora.train.run import build_trainer, load_base, to_probe
from tests import tiny

MADE_FIRST = ("local_tasks", "hub_experts_meteora", "hub_experts_smear", "hub_experts_xlora")
"""Recipes that need task folders of the user's, or adapters (tests/train/test_hub_experts.py makes them)."""
RECIPES = [
    name for name, path in shipped_recipes().items() if name not in MADE_FIRST and "recipes:" not in path.read_text()
]
SMALL = [
    "data.max_rows=110",
    "training.per_device_train_batch_size=8",
    "training.logging_steps=10",
    "training.disable_tqdm=true",
    "training.report_to=none",
    "adapter.layers_to_transform=[2, 3]",
]


@pytest.fixture(scope="module")
def data() -> tuple[list[Task], Any, Any]:
    """The built-in tasks, their rows, and these as tokens."""
    recipe = read_recipe("single", SMALL)
    tasks = load_tasks(recipe.data)
    model, tokenizer = load_base(recipe)
    rows = as_trl(mix(tasks, 1.0, 0), chat=True)
    return tasks, rows, build_trainer(recipe, model, tokenizer, tasks, rows, None).train_dataset


def run(
    name: str, data: tuple[list[Task], Any, Any], out: Path, steps: int, *more: str, resume: Path | None = None
) -> tuple[Any, Any, dict[str, Tensor]]:
    """The trained model, its trainer, and the adapter's tensors before the first step."""
    recipe = read_recipe(name, [*SMALL, f"training.max_steps={steps}", f"training.output_dir={out}", *more])
    set_seed(1)
    model, tokenizer = load_base(recipe)
    moelora.adapt(model, recipe.adapter, verbose=False, **to_probe(recipe, model, tokenizer, data[1]))
    start = tensors(model)
    trainer = build_trainer(recipe, model, tokenizer, data[0], data[2], None)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model, trainer, start


def tensors(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in adapter_tensors(model).items()}


@pytest.mark.parametrize("name", RECIPES)
def test_a_hundred_steps(name: str, data: Any, tmp_path: Path) -> None:
    model, trainer, start = run(name, data, tmp_path / "out", 100, "training.save_strategy=no")
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])

    end, trained = tensors(model), tiny.trainable(model)
    for key, value in end.items():
        moved = bool((value != start[key]).any())
        assert moved == (key in trained or key.endswith(("router.bias", "allocator.b"))), (
            f"{key} {'moved' if moved else 'stayed'}"
        )

    moelora.save(model, tmp_path / "saved")
    again = moelora.load(load_base(read_recipe(name))[0], tmp_path / "saved")
    tiny.assert_same(tensors(again), end)


@pytest.mark.parametrize("name", RECIPES)
def test_resuming_is_going_on(name: str, data: Any, tmp_path: Path) -> None:
    whole, *_ = run(name, data, tmp_path, 4, "training.save_steps=2")
    resumed, trainer, _ = run(name, data, tmp_path, 4, "training.save_strategy=no", resume=tmp_path / "checkpoint-2")
    assert trainer.state.global_step == 4
    tiny.assert_same(tensors(resumed), tensors(whole))
