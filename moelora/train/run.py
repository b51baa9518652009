"""A run from recipe to report: one function, read top to bottom."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging
from trl import SFTConfig

from moelora.core.errors import ConfigError, OutputError
from moelora.core.methods import Methods
from moelora.data.load import Task, load_tasks
from moelora.data.mixture import mix
from moelora.data.prompts import as_trl, uses_chat
from moelora.io.folder import write_file
from moelora.model.adapt import adapt, parameter_counts
from moelora.model.base import TINY, base_source
from moelora.model.config import build_init
from moelora.model.quantised import steady
from moelora.model.record import adaptation, main_process
from moelora.model.routed import disabled
from moelora.model.sites import batches_needed
from moelora.model.write import write
from moelora.recipe import Recipe, deepspeed_options
from moelora.train.checkpoint import newest
from moelora.train.guard import naming_dead_workers
from moelora.train.processes import agreed, join
from moelora.train.report import write_report
from moelora.train.trainer import MoeLoraTrainer, Preparation

RECIPE, SUMMARY, ROUTING, HISTORY = "recipe.yaml", "summary.json", "routing.json", "history.json"


@dataclass
class Result:
    """What a run gives back. summary: the content of summary.json. routing: of routing.json. history: logged numbers.

    base: task metrics of the base model, when asked for.
    """

    name: str
    out: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    summary: dict[str, Any]
    routing: dict[str, Any]
    history: list[dict[str, Any]]
    base: dict[str, dict[str, Any]] | None = None


def train(
    recipe: Recipe, plugins: Iterable[str | Path] = (), resume: bool = False, evaluate_base: bool = False
) -> Result:
    """Train as the recipe says, evaluate, save the adapter, and write summary.json and report.html to its output_dir.

    resume: go on from the newest complete checkpoint. evaluate_base: measure the base model first. Nothing is written
    until recipe, data and model are all found good. Raises MoeloraError.
    """
    out = recipe.output_dir
    arguments = sft_config(recipe)
    join(arguments)
    checkpoint = agreed(lambda: _checkpoint(out, resume))
    if resume:
        recipe = _as_chosen(recipe, agreed(lambda: _targets_of(out)))
    set_seed(arguments.seed)
    tasks = load_tasks(recipe.data)
    names = [task.name for task in tasks]
    _report_skipped(tasks)
    model, tokenizer = load_base(recipe)
    chat = uses_chat(tokenizer, recipe.data.chat_template)
    rows = as_trl(mix(tasks, recipe.data.temperature, arguments.seed), chat)
    held_out = eval_rows(tasks, chat)
    known = {} if checkpoint else to_probe(recipe, model, tokenizer, rows, plugins)
    adapt(model, recipe.adapter, plugins=plugins, blank=checkpoint is not None, **known)
    recipe = recipe.model_copy(update={"adapter": adaptation(model).config})  # hub ids are pinned now
    _check_tasks(model, tasks)

    agreed(lambda: _begin(out, recipe))
    trainer = build_trainer(recipe, model, tokenizer, tasks, rows, held_out, plugins)
    base = None
    if evaluate_base and held_out is not None:
        with disabled(model):
            base = task_metrics(trainer.measure(), names)
    began = time.perf_counter()
    trainer.train_guarded(checkpoint)
    seconds = time.perf_counter() - began
    write(model, out)  # before anything else can go wrong
    with naming_dead_workers(out):
        metrics = trainer.evaluate() if held_out is not None else {}

    trainable, total = parameter_counts(model)
    summary = {
        "trainable_parameters": trainable,
        "total_parameters": total,
        "seconds": round(seconds, 2),
        "steps": trainer.state.global_step,
        "tasks": task_metrics(metrics, names),
        "routing": {key.removeprefix("eval_routing/"): v for key, v in metrics.items() if "_routing/" in key},
        "skipped_rows": sum(len(task.skipped) for task in tasks),
        "skipped_steps": trainer.guard.skipped if trainer.guard is not None else 0,
    }
    routing = trainer.routing.to_json() if trainer.routing is not None else {}
    result = Result(out.name, out, model, tokenizer, summary, routing, trainer.state.log_history, base)
    if main_process():
        with _using(out):
            for name, content in ((SUMMARY, summary), (ROUTING, routing), (HISTORY, result.history)):
                (out / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            write_report(out / "report.html", [result], (out / RECIPE).read_text(encoding="utf-8"), base)
    return result


def to_probe(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    plugins: Iterable[str | Path] = (),
) -> dict[str, Any]:
    """What methods look at besides the base's weights, for ``adapt``: the first training rows in batches, the same in
    all processes, and the base unquantised, in the first process.

    A model that such a method runs is put where it is trained.
    """
    methods = Methods(plugins)
    known: dict[str, Any] = {}
    if build_init(recipe.adapter, methods).probes == "weights" and main_process():
        known["full"] = load_base(recipe.model_copy(update={"quantization_config": None}))[0]
    count, size = batches_needed(recipe.adapter, methods)
    if count:
        arguments = sft_config(recipe)
        if not getattr(model, "is_quantized", False):  # which is there already
            model.to(arguments.device)  # type: ignore[arg-type]
        known["batches"] = Preparation(tokenizer, arguments).batches(rows, count, size)
    return known


def sft_config(recipe: Recipe) -> SFTConfig:
    """The recipe's ``training`` section, with defaults that fit the machine."""
    gpu = torch.cuda.is_available()
    fitting = {
        "report_to": "tensorboard",
        "logging_steps": 10,
        "save_total_limit": 3,
        "bf16": gpu and torch.cuda.is_bf16_supported(),
        "dataloader_pin_memory": gpu,
        "use_cpu": not torch.accelerator.is_available(),
        "gradient_checkpointing": gpu,
        "ddp_broadcast_buffers": False,  # all processes have the same, and some are large
        "ddp_find_unused_parameters": False,  # experts of a layer are one tensor, which always takes part
    }
    given = {**fitting, **recipe.training}
    if recipe.deepspeed is not None:
        given["deepspeed"] = deepspeed_options(recipe.deepspeed)
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):  # renamed within transformers 5
        new = old.replace("gradient", "activation")
        if old in given and new in {field.name for field in dataclasses.fields(SFTConfig)}:
            given.setdefault(new, given.pop(old))
    try:
        return SFTConfig(**given)
    except ValueError as error:
        raise ConfigError(f"training: {error}") from error


def build_trainer(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Task],
    rows: datasets.Dataset,
    held_out: datasets.Dataset | None,
    plugins: Iterable[str | Path] = (),
) -> MoeLoraTrainer:
    """A trainer for an adapted model on loaded tasks."""
    return MoeLoraTrainer(
        model,
        sft_config(recipe),
        rows,
        held_out,
        tokenizer,
        tasks=[task.name for task in tasks],
        exact_match=[task.name for task in tasks if task.config.metric == "exact_match"],
        max_skipped_steps=recipe.max_skipped_steps,
        optim=Methods(plugins).build("optim", recipe.optim),
    )


def load_base(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Base model and tokenizer of a recipe. Raises ConfigError when neither disk nor hub has them."""
    name = recipe.base_model
    source, options = base_source(name), revision_of(recipe)
    dtype = "float32" if source != name and recipe.dtype == "auto" else recipe.dtype
    more: dict[str, Any] = {}
    if recipe.attn_implementation is not None:
        more["attn_implementation"] = recipe.attn_implementation
    if recipe.quantization_config is not None:
        more["quantization_config"] = recipe.quantization_config.for_transformers()
        if recipe.training.get("use_cpu"):
            more["device_map"] = {"": "cpu"}  # such a model is not moved afterwards
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        with _quiet_loading(name == TINY):
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options, **more)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"base_model '{name}': {str(error).strip().splitlines()[0]}") from error
    steady(model)
    model.config._name_or_path = name
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def revision_of(recipe: Recipe) -> dict[str, Any]:
    """The revision of a recipe's base model as an option of ``from_pretrained``; none for the package's own."""
    return {"revision": recipe.revision} if base_source(recipe.base_model) == recipe.base_model else {}


def task_metrics(metrics: dict[str, float], tasks: list[str], prefix: str = "eval") -> dict[str, dict[str, Any]]:
    """``{task: {loss, token_accuracy, accuracy}}``; accuracy is None for tasks without generated answers."""
    found = {}
    for task in tasks:
        values = {key: metrics.get(f"{prefix}_{task}_{key}") for key in ("loss", "token_accuracy", "accuracy")}
        if values["loss"] is not None:
            found[task] = {key: None if value is None else round(value, 6) for key, value in values.items()}
    return found


def _checkpoint(out: Path, resume: bool) -> str | None:
    """The checkpoint to resume from. Raises OutputError when the folder is not one this run may write to."""
    with _using(out):
        if out.exists() and not out.is_dir():
            raise OutputError(f"training.output_dir {out}: a file; expected a folder")
        names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
        if names in ([], [f".{RECIPE}.partial"]):  # a run that was killed as it began leaves the second
            if resume:
                raise OutputError(f"training.output_dir {out}: nothing to resume; run without --resume first")
            return None
        if RECIPE not in names:
            raise OutputError(
                f"training.output_dir {out}: holds files that no run wrote ({', '.join(names[:5])}); choose another "
                "folder"
            )
        if not resume:
            raise OutputError(
                f"training.output_dir {out}: holds a run already; add --resume to go on from its last checkpoint, or "
                "choose another folder (training.output_dir=...)"
            )
        complete = newest(out)
    if complete is None:
        print(f"{out}: no complete checkpoint yet, starting from the beginning")
        return None
    return str(complete)


def _targets_of(out: Path) -> dict[str, Any]:
    """The targets of the run in a folder, as it has written them down."""
    with _using(out):
        written = yaml.safe_load((out / RECIPE).read_text(encoding="utf-8"))
    targets: dict[str, Any] = written["adapter"].get("targets", {})
    return targets


def _as_chosen(recipe: Recipe, written: dict[str, Any]) -> Recipe:
    """A recipe that is resumed: what its targets leave open, the run has chosen as it began."""
    given = recipe.adapter.targets
    if any(written.get(key) != value for key, value in given.items() if value is not None):
        return recipe  # with other targets, which the checkpoint will refuse
    return recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"targets": written})})


def _begin(out: Path, recipe: Recipe) -> None:
    """Write the recipe, whole or not at all. Raises OutputError where the run could not write its results either."""
    with _using(out):
        write_file(out / RECIPE, yaml.safe_dump(recipe.model_dump(), sort_keys=False))


@contextmanager
def _using(out: Path) -> Iterator[None]:
    """Inside, what the disk refuses is an OutputError."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise OutputError(f"training.output_dir {out}: cannot be used: {why}; choose another folder") from error


def _check_tasks(model: PreTrainedModel, tasks: list[Task]) -> None:
    record = adaptation(model)
    experts = record.config.experts.most
    for name, loss in record.losses.items():
        if loss.expert_per_task and len(tasks) > experts:
            raise ConfigError(
                f"losses.{name} gives every task an expert: {len(tasks)} tasks, but num_experts is {experts}"
            )


@contextmanager
def _quiet_loading(quiet: bool) -> Iterator[None]:
    """No progress bar for weights that load in an instant."""
    shown = logging.is_progress_bar_enabled()
    if quiet:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _report_skipped(tasks: list[Task]) -> None:
    for task in tasks:
        if task.skipped and main_process():
            print(f"{task.name}: skipped {len(task.skipped)} bad rows; the first: {task.skipped[0]}")


def eval_rows(tasks: list[Task], chat: bool) -> datasets.Dataset | None:
    """The evaluation rows of all tasks that have some, in TRL's columns."""
    parts = [task.eval for task in tasks if task.eval is not None]
    return as_trl(datasets.concatenate_datasets(parts), chat) if parts else None
