"""What a run would do, before it is started: its parameters, memory, batches, tokens and steps.

No weight of the base model is read, and nothing is written but what the libraries cache of the data. The model is built
on the meta device; the data is loaded, mixed and tokenised as in training.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig

from moelora.core.errors import ConfigError
from moelora.core.methods import Methods
from moelora.data.load import load_tasks
from moelora.data.mixture import mix
from moelora.data.prompts import as_trl, uses_chat
from moelora.model.adapt import attach
from moelora.model.adapters import is_lora
from moelora.model.base import base_source
from moelora.model.config import build_init, resolve
from moelora.model.layer import RoutedLinear
from moelora.model.quantised import empty, form, size_of
from moelora.model.record import adaptation, routed_layers
from moelora.model.sites import batches_needed, build_targets
from moelora.model.sources import check_fit, open_sources
from moelora.recipe import Recipe, deepspeed_options
from moelora.train.activations import kept, loss_buffer
from moelora.train.memory import Part, engine_of, held, standing
from moelora.train.run import revision_of, sft_config
from moelora.train.trainer import Preparation

UNCOUNTED: Final = "not counted: the CUDA context, communication and kernel workspaces, fragmentation of the allocator"


def plan(recipe: Recipe, plugins: Iterable[str | Path] = (), processes: int = 1) -> dict[str, Any]:
    """What ``train`` would do with so many processes; plain values, as JSON has them. Raises MoeloraError.

    parameters: how many. memory: bytes of one process by part, on its GPU and in the host's memory; ``missing`` says
    what is not predicted, and why. batch, epoch, steps: arithmetic of batches. tasks: rows and tokens of one epoch.
    """
    if processes < 1:
        raise ConfigError(f"--num-processes: expected at least 1, found {processes}")
    notes = [UNCOUNTED]
    half = _half(recipe, notes)
    arguments = sft_config(
        recipe.model_copy(
            update={"deepspeed": None, "training": {**recipe.training, "bf16": False, "fp16": False}}  # started nowhere
        )
    )
    options = None if recipe.deepspeed is None else deepspeed_options(recipe.deepspeed)
    stage = None if options is None else options.get("zero_optimization", {}).get("stage", 0)
    if stage not in (None, 1, 2, 3):
        raise ConfigError(f"deepspeed: zero_optimization.stage is {stage}; expected 1, 2 or 3")
    model, tokenizer = _base(recipe, notes)
    _adapted(model, recipe, plugins)
    rows, counted = _rows(recipe, tokenizer, arguments)
    longest, size = max(map(len, rows["input_ids"])), arguments.per_device_train_batch_size
    longest += -longest % int(arguments.pad_to_multiple_of or 1)
    batch = {
        "per_device": size,
        "accumulation": arguments.gradient_accumulation_steps,
        "processes": processes,
        "global": size * arguments.gradient_accumulation_steps * processes,
        "longest_row": longest,
        "tokens_at_most": min(size, len(rows)) * longest,
    }
    steps = _steps_per_epoch(len(rows), arguments, processes)
    tokens = sum(task["tokens"] for task in counted.values())
    every = math.ceil(arguments.num_train_epochs * steps)
    total = arguments.max_steps if arguments.max_steps > 0 else every
    return {
        "base_model": recipe.base_model,
        "router": recipe.adapter.router["name"],
        "parameters": _parameters(model),
        "memory": _memory(model, arguments, options, half, batch, notes),
        "batch": batch,
        "tasks": counted,
        "epoch": {
            "rows": sum(task["rows"] for task in counted.values()),
            "sequences": len(rows),
            "packing": bool(arguments.packing),
            "tokens": tokens,
            "steps": steps,
            "tokens_per_step": round(tokens / steps),
        },
        "steps": total,
        "epochs": round(total / steps, 3),
        "notes": notes,
    }


def _half(recipe: Recipe, notes: list[str]) -> bool:
    gpu = torch.cuda.is_available()
    if not gpu and not recipe.training.get("use_cpu"):
        notes.append(
            "this machine has no GPU: on one that has, bf16 and gradient_checkpointing are on unless the recipe says "
            "otherwise; to plan for that, add training.bf16=true training.gradient_checkpointing=true"
        )
    default = gpu and torch.cuda.is_bf16_supported()
    return bool(recipe.training.get("bf16", default) or recipe.training.get("fp16"))


def _base(recipe: Recipe, notes: list[str]) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The base model on the meta device, and its tokenizer."""
    name = recipe.base_model
    source, options = base_source(name), revision_of(recipe)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        config = AutoConfig.from_pretrained(source, **options)
        stated = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
        if recipe.dtype != "auto":
            dtype = getattr(torch, recipe.dtype)
        elif source != name or stated is None:
            dtype = torch.float32
        else:
            dtype = stated
        if recipe.dtype == "auto" and stated is None:
            notes.append("the base model's config states no dtype, and float32 is assumed; set dtype in the recipe")
        more = {} if recipe.attn_implementation is None else {"attn_implementation": recipe.attn_implementation}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **more)
    except (OSError, ValueError) as error:
        raise ConfigError(f"base_model '{name}': {str(error).strip().splitlines()[0]}") from error
    if recipe.quantization_config is not None:
        empty(model, recipe.quantization_config.for_transformers(), dtype)
    model.config._name_or_path = name
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.train(), tokenizer


def _adapted(model: nn.Module, recipe: Recipe, plugins: Iterable[str | Path]) -> None:
    """``adapt`` on the meta device. Of adapters that experts start from, configurations and headers are read."""
    methods = Methods(plugins)
    config = resolve(recipe.adapter, methods)
    sources = open_sources(config.experts.adapters)

    def start(layers: dict[str, RoutedLinear]) -> None:
        sites = {path: layer.site for path, layer in layers.items()}
        for source in sources:
            if source.plain:
                check_fit(source, model, sites)
            source.adapter.file.close()
        for path, layer in layers.items():
            experts = layer.experts
            kinds = [kind for source in sources if (kind := source.dtype(path)) is not None]
            if kinds and is_lora(experts) and config.experts.train == "none":  # frozen, they keep their files' dtype
                dtype = functools.reduce(torch.promote_types, kinds)
                for parameter in experts.parameters():
                    parameter.data = torch.empty(parameter.shape, dtype=dtype, device="meta")
            if not all(source.plain for source in sources):
                shape = (experts.num_experts, layer.out_features)
                experts.stretch, experts.shift = (torch.empty(shape, device="meta") for _ in range(2))

    attach(model, config, methods, start)


def _rows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, arguments: SFTConfig
) -> tuple[Dataset, dict[str, dict[str, int]]]:
    """The training rows of one epoch as token ids, and rows and tokens of each task."""
    tasks = load_tasks(recipe.data)
    mixed = mix(tasks, recipe.data.temperature, arguments.seed)
    written = as_trl(mixed, uses_chat(tokenizer, recipe.data.chat_template))
    prepare = Preparation(tokenizer, arguments)
    rows = prepare._prepare_dataset(written, tokenizer, arguments, bool(arguments.packing), None, "train")
    if not len(rows):
        raise ConfigError(f"training.max_length {arguments.max_length}: no row has an answer within so many tokens")
    mixed_rows = Counter(mixed["task_id"])
    tokens: Counter[int] = Counter()
    for ids in rows["task_ids"]:
        tokens.update(ids)
    found = {task.name: {"rows": mixed_rows[i], "tokens": tokens[i]} for i, task in enumerate(tasks)}
    return rows, found


def _steps_per_epoch(rows: int, arguments: SFTConfig, processes: int) -> int:
    """Optimiser steps, as the trainer's data loader and accelerate share rows out to processes."""
    size, last = arguments.per_device_train_batch_size, arguments.dataloader_drop_last
    batches = rows // size if last else -(-rows // size)
    own = batches // processes if last else -(-batches // processes)
    return max(1, -(-own // arguments.gradient_accumulation_steps))


def _parameters(model: nn.Module) -> dict[str, Any]:
    found = [one for one in held(model) if not one.buffer]
    count = {part: sum(one.numbers for one in found if one.part == part) for part in ("base", "experts", "router")}
    saved = sum(one.numbers for one in found if one.part == "modules_to_save")
    trainable, total = sum(one.numbers for one in found if one.trains), sum(one.numbers for one in found)
    more = {"modules_to_save": saved} if saved else {}
    sites = len(routed_layers(model))
    share = round(100 * trainable / total, 4)
    return {**count, **more, "trainable": trainable, "total": total, "percent": share, "layers": sites}


def _memory(
    model: nn.Module,
    arguments: SFTConfig,
    options: dict[str, Any] | None,
    half: bool,
    batch: dict[str, int],
    notes: list[str],
) -> dict[str, Any]:
    missing: list[str] = []
    config: Any = model.config
    width = getattr(config.get_text_config(), "hidden_size", None)
    named: Any = arguments.optim
    optimizer = (options or {}).get("optimizer", {}).get("type", named.value).lower()
    engine = engine_of(options, batch["processes"], half, width, optimizer)
    known = engine or engine_of(options, batch["processes"], half, width, "adamw")
    assert known is not None
    parts = standing(held(model), known)
    if engine is None:
        parts = [part for part in parts if part.part != "optimiser states"]
        missing.append(f"optimiser states: those of {optimizer} are not known here")
    if getattr(model, "is_quantized", False):
        parts.append(_dequantised(model, known.half))
    elif getattr(config, "quantization_config", None) is not None:
        parts = [part for part in parts if part.part not in ("base", "gathered parameters")]
        missing.append("base: its weights are quantised, and their size depends on how they are loaded")
    cast = known.stage == 0
    dtype = "half" if known.half else str(next(model.parameters()).dtype).removeprefix("torch.")
    checkpointing = bool(getattr(arguments, "activation_checkpointing", arguments.gradient_checkpointing))
    most = kept(model, batch["tokens_at_most"], batch["longest_row"], known.half, cast)
    if isinstance(most, str):
        missing.append(f"activations: {most}")
    else:
        how = f"{batch['tokens_at_most']:,} tokens{', checkpointed' if checkpointing else ''}"
        parts.append(Part("activations", most.most(checkpointing), 0, dtype, how))
    record = adaptation(model)
    if build_init(record.config, record.methods).probes == "weights":
        missing.append(f"base: init {record.config.init['name']} reads it unquantised, too, in the first process")
    if batches_needed(record.config, record.methods)[0]:
        missing.append("probing: what looks at batches before training runs the base model, and keeps some gradients")
    if build_targets(record.config, record.methods).batches:
        missing.append(f"layers: targets {record.config.targets['name']} chooses some by data; all it may are counted")
    if arguments.label_smoothing_factor:
        missing.append("loss: label smoothing has all logits at once")
    elif any(loss.reads == "logits" for loss in record.losses.values()):
        missing.append("loss: an auxiliary one reads all logits, those of the base model too")
    else:
        size = loss_buffer(model, batch["tokens_at_most"], known.half)
        parts.append(Part("loss", size, 0, dtype, "logits of one tile at a time"))
    name = f"ZeRO-{known.stage}" if known.stage else "DDP" if batch["processes"] > 1 else "plain"
    words = "autocast: parameters keep their dtype" if cast else "parameters cast, float32 copies in the optimiser"
    return {
        "engine": name,
        "precision": f"half, {words}" if known.half else "as parameters are",
        "checkpointing": checkpointing,
        "parts": [dataclasses.asdict(part) for part in parts],
        "gpu": sum(part.gpu for part in parts),
        "host": sum(part.host for part in parts),
        "missing": missing,
    }


def _dequantised(model: nn.Module, half: bool) -> Part:
    """What a quantised layer makes of its weight to compute gradients: it, as it was, and in the dtype of products."""
    most = 0
    for module in model.modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and form(weight) is not None:
            state: Any = getattr(weight, "quant_state", None)
            products = torch.float16 if half else torch.float32
            dtypes = {products} if state is None else {state.dtype, module.compute_dtype}
            most = max(most, size_of(weight) * sum(dtype.itemsize for dtype in dtypes))
    return Part("dequantised weight", most, 0, "half" if half else "float32", "of one layer at a time")
