"""Using what a run left: evaluate it again, or generate from it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moelora.core.errors import ConfigError, DataError
from moelora.core.validate import nearest
from moelora.data.config import DataConfig
from moelora.data.formats import Message
from moelora.data.load import load_tasks, task_names
from moelora.data.prompts import plain, uses_chat
from moelora.eval.evaluate import complete
from moelora.io.folder import read_manifest
from moelora.model.save import load
from moelora.recipe import check_recipe, read_recipe
from moelora.train.run import RECIPE, build_trainer, eval_rows, load_base, task_metrics


def evaluate_folder(
    folder: Path,
    overrides: Iterable[str] = (),
    base: str | None = None,
    plugins: Iterable[str | Path] = (),
    force: bool = False,
) -> dict[str, Any]:
    """Per-task metrics and routing of a trained folder, on its recipe's evaluation rows. Writes nothing there.

    overrides: changes to the recipe, for instance ``data.root=OTHER``. base: another place of the base model. force:
    do not compare its weights with those the adapter was trained beside.
    Returns ``{"tasks": {task: {loss, token_accuracy, accuracy}}, "routing": {...}}``. Raises MoeloraError.
    """
    read_manifest(folder)
    recipe = read_recipe(folder / RECIPE, [*overrides, *([f"base_model={base}"] if base else [])], plugins)
    tasks = load_tasks(recipe.data)
    model, tokenizer = load_base(recipe)
    rows = eval_rows(tasks, uses_chat(tokenizer, recipe.data.chat_template))
    if rows is None:
        raise DataError(f"{folder / RECIPE}: no task has evaluation rows; give eval_path, or a folder with test.*")
    load(model, folder, plugins=plugins, force=force)
    with tempfile.TemporaryDirectory() as scratch:
        training = {**recipe.training, "output_dir": scratch, "report_to": "none"}
        here = recipe.model_copy(update={"training": training})
        trainer = build_trainer(here, model, tokenizer, tasks, rows.select([0]), rows)
        metrics = trainer.measure()
    routing = trainer.routing.to_json() if trainer.routing is not None else {}
    return {"tasks": task_metrics(metrics, [task.name for task in tasks]), "routing": routing}


class Chat:
    """A conversation with a trained adapter; ``answer`` keeps the turns so far."""

    def __init__(
        self,
        folder: Path,
        base: str | None = None,
        plugins: Iterable[str | Path] = (),
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        task: str | None = None,
        force: bool = False,
    ) -> None:
        """temperature: 0 is greedy. task: name of the recipe's task that all turns belong to, for routers that route by
        it. force: do not compare the base model's weights. Raises AdapterError or ConfigError."""
        self.model, self.tokenizer, data = _open(folder, base, plugins, force)
        self.chat = uses_chat(self.tokenizer, data.chat_template)
        self.task_id = None if task is None else _task_id(task, data, folder)
        self.turns: list[Message] = []
        self.max_new_tokens = max_new_tokens
        self.sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {}
        torch.manual_seed(seed)

    def answer(self, line: str) -> str:
        """The model's reply to ``line``."""
        self.turns.append({"role": "user", "content": line})
        prompt = list(self.turns) if self.chat else plain(self.turns)
        [text] = complete(
            self.model, self.tokenizer, [prompt], self.max_new_tokens, task_id=self.task_id, **self.sampling
        )
        self.turns.append({"role": "assistant", "content": text.strip()})
        return text.strip()


def _open(
    folder: Path, base: str | None, plugins: Iterable[str | Path], force: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, DataConfig]:
    """Model, tokenizer and the recipe's data; without a recipe they are what the manifest and the defaults say."""
    manifest = read_manifest(folder)
    if (folder / RECIPE).is_file():
        recipe = read_recipe(folder / RECIPE, [f"base_model={base}"] if base else [], plugins)
    else:
        name = base or manifest.base.model
        recipe = check_recipe({"base_model": name, "revision": manifest.base.revision if base is None else None})
    model, tokenizer = load_base(recipe)
    load(model, folder, plugins=plugins, force=force)
    return model.eval(), tokenizer, recipe.data


def _task_id(task: str, data: DataConfig, folder: Path) -> int:
    names = task_names(data)
    if task not in names:
        raise ConfigError(f"{folder / RECIPE}: no task '{task}'{nearest(task, names)}")
    return names.index(task)
