"""Exporting the folder of a run: its base model, tasks and rows come from the recipe beside the adapter."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from moelora.core.errors import AdapterError, ConfigError, DataError
from moelora.core.validate import nearest
from moelora.data.config import DataConfig, TaskConfig
from moelora.data.load import Task, load_tasks, task_names
from moelora.data.prompts import as_trl, uses_chat
from moelora.io.folder import read_manifest
from moelora.model.base import base_source
from moelora.model.save import load
from moelora.recipe import Recipe, check_recipe, read_recipe
from moelora.tools.export import export_dense, export_lora, export_merged, export_peft, export_vllm
from moelora.tools.export.condense import FITS, Batches
from moelora.tools.export.folder import Export, refuse_taken
from moelora.tools.export.hollow import hollow_base
from moelora.tools.export.plain import constant_gates
from moelora.tools.export.shards import base_folder
from moelora.tools.truncate import truncate
from moelora.train.run import RECIPE, build_trainer, load_base, revision_of

TARGETS = ("peft", "merged", "lora", "vllm")
FIT_ROWS, HELD_OUT_ROWS = 256, 128


def export_folder(
    folder: Path,
    dest: Path,
    to: str,
    *,
    base: str | None = None,
    task: str | None = None,
    rank: int | None = None,
    probe: Path | None = None,
    choice: str = "least_squares",
    dequantize: bool = False,
    truncated: int | None = None,
    force: bool = False,
    plugins: Iterable[str | Path] = (),
) -> Export:
    """Export a folder written by ``moelora train`` or ``moelora.save`` to the new folder ``dest``. to: one of TARGETS.

    base: another place of the base model. task: name of one of the recipe's tasks, or its number. rank, choice: see
    ``moelora.tools.export``. probe: a text file (a row per line) or one of the formats of ``data``, in place of the
    recipe's rows, for a router that decides token by token. dequantize: merge a quantised base model in memory and
    write it unquantised. truncated: every expert at its first so many ranks (``moelora.tools.truncate``). force: do not
    compare the base model's weights with those the adapter was trained beside. Raises MoeloraError.
    """
    refuse_taken(dest)
    _refuse_useless(to, choice, rank, probe, dequantize)
    recipe = _recipe(folder, base, plugins)
    number = None if task is None else _task_number(task, recipe.data, folder)

    def put_into(model: PreTrainedModel) -> PreTrainedModel:
        load(model, folder, plugins=plugins, force=force)
        if truncated is not None:
            truncate(model, truncated)
        return model

    source, options = base_source(recipe.base_model), revision_of(recipe)
    if to == "merged" and _quantised(recipe, source, options, dequantize):
        model, tokenizer = load_base(recipe)
        return export_dense(put_into(model), dest, tokenizer, number)
    if recipe.quantization_config is not None:
        model = load_base(recipe)[0]
    else:
        weights = base_folder(source, options.get("revision"))
        try:
            model = hollow_base(folder, weights, recipe.base_model, plugins)
        except AdapterError:
            if to == "merged":
                raise
            model = load_base(recipe)[0]  # no safetensors, or quantised ones
    put_into(model)
    if to == "peft":
        return export_peft(model, dest)
    if to == "merged":
        return export_merged(model, dest, weights, number)
    if to == "vllm":
        return export_vllm(model, dest, number, rank)
    if constant_gates(model, number) is not None:
        return export_lora(model, dest, number, rank)
    if probe is None and not task_names(recipe.data):
        raise ConfigError(f"{folder}: no {RECIPE} with data to measure on; give rows with --probe FILE")
    model, tokenizer = load_base(recipe)
    batches = probe_batches(recipe, put_into(model), tokenizer, probe, number)
    return export_lora(model, dest, number, rank, batches, choice)


def probe_batches(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probe: Path | None, task: int | None
) -> tuple[Batches, Batches]:
    """Batches to fit on and others to measure on: training and evaluation rows of the recipe, or the rows of a file,
    every fourth of which is held out. task: that task's rows alone; a file's rows are all of it. Raises DataError.
    """
    chat = uses_chat(tokenizer, recipe.data.chat_template)
    with tempfile.TemporaryDirectory() as scratch:
        if probe is None:
            tasks = load_tasks(recipe.data)
            rows, held_out = _recipe_rows(tasks, task)
        else:
            tasks = [_file_task(probe, recipe.data, Path(scratch))]
            rows, held_out = _every_fourth(_some(tasks[0].train, FIT_ROWS + HELD_OUT_ROWS))
            rows, held_out = (_of_task(part, -1 if task is None else task) for part in (rows, held_out))
        plain = {"packing": False, "eval_packing": False, "padding_free": False, "per_device_eval_batch_size": 8}
        training = {**recipe.training, **plain, "output_dir": scratch, "report_to": "none"}
        here = recipe.model_copy(update={"training": training})
        trainer = build_trainer(here, model, tokenizer, tasks, as_trl(rows, chat), as_trl(held_out, chat))
        return list(trainer.get_eval_dataloader(trainer.train_dataset)), list(trainer.get_eval_dataloader())


def _recipe(folder: Path, base: str | None, plugins: Iterable[str | Path]) -> Recipe:
    """The run's recipe; without one, what the manifest and the defaults say."""
    manifest = read_manifest(folder)
    if (folder / RECIPE).is_file():
        return read_recipe(folder / RECIPE, [f"base_model={base}", "revision=null"] if base else [], plugins)
    revision = manifest.base.revision if base is None else None
    output = {"training": {"output_dir": "out"}}
    return check_recipe({"base_model": base or manifest.base.model, "revision": revision, **output}, plugins=plugins)


def _task_number(task: str, data: DataConfig, folder: Path) -> int:
    """A task's number: its place in the recipe's list. Raises ConfigError."""
    names = task_names(data)
    if task in names:
        return names.index(task)
    if not task.isdigit():
        raise ConfigError(f"{folder / RECIPE}: no task '{task}', and no number{nearest(task, names)}")
    return int(task)


def _refuse_useless(to: str, choice: str, rank: int | None, probe: Path | None, dequantize: bool) -> None:
    """Raise ConfigError for an unknown target, and for an option that it does not look at."""
    for option, value, known in (("--to", to, TARGETS), ("--fit", choice, FITS)):
        if value not in known:
            raise ConfigError(f"{option}: expected one of {', '.join(known)}, found '{value}'")
    for option, given, targets in (
        ("--rank", rank is not None, ("lora", "vllm")),
        ("--probe", probe is not None, ("lora",)),
        ("--dequantize", dequantize, ("merged",)),
    ):
        if given and to not in targets:
            raise ConfigError(f"{option} is for --to {' or '.join(targets)}, and this is --to {to}; leave it out")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank: expected a number of at least 1, found {rank}")


def _quantised(recipe: Recipe, source: str, options: dict[str, Any], dequantize: bool) -> bool:
    """Whether the base model is quantised. Raises ConfigError where that is not what was asked for."""
    name, given = recipe.base_model, recipe.quantization_config
    try:
        config = AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base_model '{name}': {str(error).strip().splitlines()[0]}") from error
    how: Any = getattr(config, "quantization_config", None) if given is None else {"quant_method": "bitsandbytes"}
    if how is not None and not dequantize:
        method = how.get("quant_method", "?") if isinstance(how, dict) else how
        raise ConfigError(
            f"base_model '{name}' is quantised ({method}), so its weights cannot take the experts in exactly; "
            "--dequantize merges into dequantised weights and writes them unquantised, --to lora leaves the base alone"
        )
    if how is None and dequantize:
        raise ConfigError(f"--dequantize: base_model '{name}' is not quantised; leave it out")
    return how is not None


def _recipe_rows(tasks: Sequence[Task], task: int | None) -> tuple[Dataset, Dataset]:
    """Training rows and evaluation rows, of all tasks in equal parts or of one. Raises DataError."""
    if task is not None and task >= len(tasks):
        raise DataError(f"the recipe has {len(tasks)} tasks, so no rows of task {task}; give others with --probe FILE")
    chosen = tasks if task is None else [tasks[task]]
    fit = concatenate_datasets([_some(one.train, FIT_ROWS // len(chosen)) for one in chosen])
    measured = [_some(one.eval, HELD_OUT_ROWS // len(chosen)) for one in chosen if one.eval is not None]
    return (fit, concatenate_datasets(measured)) if measured else _every_fourth(fit)


def _file_task(probe: Path, data: DataConfig, scratch: Path) -> Task:
    """The rows of a probe file; those of a text file are its lines. Raises DataError."""
    if probe.suffix == ".txt":
        if not probe.is_file():
            raise DataError(f"--probe: no file {probe} (seen from {Path.cwd()})")
        lines = [line for line in probe.read_text(encoding="utf-8").splitlines() if line.strip()]
        probe = scratch / "probe.jsonl"
        probe.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    tasks = {"probe": TaskConfig(path=str(probe))}
    return load_tasks(DataConfig(tasks=tasks, chat_template=data.chat_template, on_bad_row=data.on_bad_row))[0]


def _every_fourth(rows: Dataset) -> tuple[Dataset, Dataset]:
    """All rows but every fourth, and these. Raises DataError for fewer than four."""
    if len(rows) < 4:
        raise DataError(f"{len(rows)} probe rows: expected at least 4, to fit on three and measure on the fourth")
    return tuple(rows.select([i for i in range(len(rows)) if (i % 4 == 3) == held]) for held in (False, True))


def _some(rows: Dataset, count: int) -> Dataset:
    """``count`` rows by chance, the same ones every time; at least one."""
    return rows if len(rows) <= count else rows.shuffle(seed=0).select(range(max(1, count)))


def _of_task(rows: Dataset, task: int) -> Dataset:
    return rows.remove_columns("task_id").add_column("task_id", [task] * len(rows))
