"""The kinds of export, see the package. Each ends with a check of what was written against the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moelora.core.errors import AdapterError, ConfigError
from moelora.model.record import adaptation, routed_layers
from moelora.model.saved import saved_modules
from moelora.tools.export.condense import Batches, candidates
from moelora.tools.export.folder import REPORT, Export, new_folder, refuse_taken, source_of, write_lora, write_text
from moelora.tools.export.measure import measure
from moelora.tools.export.merge import deltas, merge_files, merge_weights
from moelora.tools.export.plain import (
    PlainLoRA,
    by_task,
    constant_gates,
    expert_error,
    fold,
    mixture_error,
    own_expert,
    refuse_more_than_lora,
    single_expert,
)
from moelora.tools.export.shards import Shards

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for max_lora_rank (besides 1)."""
TOLERANCE = 1e-5
"""Largest relative error of an exact export: float32 arithmetic."""


def export_peft(model: nn.Module, folder: str | Path) -> Export:
    """Write every expert as a PEFT LoRA folder ``expert_0``, ...: the model with its gates one-hot on that expert.

    An expert keeps its own rank and scale, what it was read with (DoRA, biases), and has the model's modules_to_save.
    Raises OutputError, ConfigError.
    """
    export = Export("peft", Path(folder), source_of(model))
    with evaluating(model), new_folder(export.folder) as into:
        for index, name in enumerate(_names(model)):
            _write_expert(into, name, model, index, _expert(model, index), export)
        export.notes.append("each folder is one expert, always on; the router is in none of them")
        _note_ranks(model, export)
        _finish(into, export)
    return export


def export_merged(model: nn.Module, folder: str | Path, base: str | Path, task: int | None = None) -> Export:
    """Write the base model of the folder ``base`` with the experts merged into its weights, file by file.

    Its weights are read from the files, so ``model`` may be empty (meta device) but for its experts. Raises ConfigError
    for a router that depends on the token; OutputError, AdapterError.
    """
    export = Export("merged", Path(folder), source_of(model), task)
    deltas(model, task)
    with evaluating(model), new_folder(export.folder) as into:
        export.errors = merge_files(model, Path(base), into, task)
        _note_task(model, export)
        _note_rounding(export)
        _finish(into, export, exact=False)  # merge_files has compared them, knowing the dtypes
    return export


def export_dense(model: Any, folder: str | Path, tokenizer: Any = None, task: int | None = None) -> Export:
    """``export_merged`` for a quantised base model: dequantise ``model`` as transformers does, merge in memory, write
    it unquantised. The model is changed, and has no experts any more. Raises ConfigError, AdapterError, OutputError.
    """
    export = Export("merged", Path(folder), source_of(model), task)
    refuse_taken(export.folder)
    deltas(model, task)
    _note_task(model, export)
    if getattr(model, "hf_quantizer", None) is not None:
        try:
            model = model.dequantize()
        except NotImplementedError as error:
            raise AdapterError(
                f"transformers cannot dequantise this base model: {error}; give an unquantised one"
            ) from None
    export.notes.append("the base model was dequantised; what is written is not quantised, and larger")
    with new_folder(export.folder) as into:
        export.errors = merge_weights(model, task)
        model.save_pretrained(into)
        if tokenizer is not None:
            tokenizer.save_pretrained(into)
        written = Shards(into, model)
        for path in export.errors:
            name = f"{path}.weight"
            if not torch.equal(written.read(name), written.parameters[name].cpu()):
                raise AdapterError(f"{folder}: '{name}' is not on the disk as it was merged; is the disk sound?")
        _note_rounding(export)
        _finish(into, export, exact=False)
    return export


def export_lora(
    model: nn.Module,
    folder: str | Path,
    task: int | None = None,
    rank: int | None = None,
    probe: tuple[Batches, Batches] | None = None,
    choice: str = "least_squares",
) -> Export:
    """Write one PEFT LoRA. rank: every layer's is cut down to it (by singular values).

    Where gates depend on nothing but the task it is exact, of a rank up to the sum of the experts'. Else ``probe`` is
    needed: batches to fit on and others to measure on, each a mapping of the model's inputs. ``choice`` says which of
    the two candidates of ``export.condense`` is written; ``figures`` hold what was measured of both. Raises
    ConfigError, DataError, OutputError.
    """
    export = Export("lora", Path(folder), source_of(model), task)
    refuse_more_than_lora(routed_layers(model), "--to lora")
    refuse_taken(export.folder)
    gates = constant_gates(model, task)
    with evaluating(model):
        if gates is None:
            loras = _nearest(model, probe, rank, choice, export)
        else:
            loras = _cut(_folded(model, gates), rank, "lora", export)
        with new_folder(export.folder) as into:
            written = write_lora(into, loras, model)
            if gates is not None:
                export.errors = _mixture_errors(model, task, written)
                _note_task(model, export)
            _finish(into, export, exact=gates is not None and rank is None)
    return export


def export_vllm(model: nn.Module, folder: str | Path, task: int | None = None, rank: int | None = None) -> Export:
    """Write LoRAs that vLLM serves: every expert, and, where gates depend on nothing but the task, ``mixture``.

    Scales are inside B (lora_alpha equals r), and all modules have one rank, filled up with zeros to one of
    ``VLLM_RANKS``. rank: cut down to it first. Raises ConfigError for what vLLM cannot load; OutputError.
    """
    export = Export("vllm", Path(folder), source_of(model), task)
    refuse_more_than_lora(routed_layers(model), "--to vllm")
    if saved_modules(model):
        raise ConfigError(
            f"--to vllm: the model has modules_to_save ({', '.join(saved_modules(model))}), and vLLM loads LoRA halves "
            "only; --to merged holds them where gates are constant"
        )
    gates = None if task is None and by_task(model) else constant_gates(model, task)
    loras = {name: _expert(model, index) for index, name in enumerate(_names(model))}
    if gates is not None:
        loras["mixture"] = _folded(model, gates)
    loras = {name: _padded(_cut(one, rank, name, export), name) for name, one in loras.items()}
    with evaluating(model), new_folder(export.folder) as into:
        for index, name in enumerate(_names(model)):
            _write_expert(into, name, model, index, loras[name], export)
        if gates is not None:
            errors = _mixture_errors(model, task, write_lora(into / "mixture", loras["mixture"], model))
            export.errors.update({f"mixture: {path}": error for path, error in errors.items()})
            export.notes.append("mixture is the whole model: its gates are constant, and inside its B")
            _note_task(model, export)
        else:
            what = (
                "--task NAME adds one with that task's gates"
                if by_task(model)
                else "routing token by token is NOT served there"
            )
            export.notes.append(f"vLLM takes one LoRA per request, and each of these is one expert, always on; {what}")
        _note_ranks(model, export)
        most = max(lora.rank for one in loras.values() for lora in one.values())
        export.figures["max_lora_rank"] = most
        export.notes.append(f"vllm serve BASE --enable-lora --max-lora-rank {most} --lora-modules NAME=FOLDER ...")
        _finish(into, export, exact=rank is None)
    return export


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every module's own mode again afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _nearest(
    model: nn.Module, probe: tuple[Batches, Batches] | None, rank: int | None, choice: str, export: Export
) -> dict[str, PlainLoRA]:
    """The chosen candidate; what was measured of both goes to the export."""
    router = adaptation(model).config.router["name"]
    if probe is None:
        raise ConfigError(
            f"router '{router}' decides token by token, so one LoRA can only come near it; give probe data to fit "
            "on and to measure on (--probe FILE)"
        )
    found = {name: _cut(one, rank, name, export) for name, one in candidates(model, probe[0]).items()}
    measured = measure(model, found, probe[1])
    export.errors = dict(measured[choice]["sites"])
    export.figures.update({"written": choice, "measured": measured})
    export.notes.append(
        f"an approximation: router '{router}' decides token by token, this LoRA does not; it is the {choice} fit"
    )
    return found[choice]


def _expert(model: nn.Module, index: int) -> dict[str, PlainLoRA]:
    here = ((layer, own_expert(layer, index)) for layer in routed_layers(model))
    return {layer.site.name: single_expert(layer.experts, own) for layer, own in here if own is not None}


def _folded(model: nn.Module, gates: Mapping[str, Tensor]) -> dict[str, PlainLoRA]:
    return {layer.site.name: fold(layer.experts, gates[layer.site.name]) for layer in routed_layers(model)}


def _cut(loras: dict[str, PlainLoRA], rank: int | None, name: str, export: Export) -> dict[str, PlainLoRA]:
    """Every layer's LoRA of at most ``rank``; what that loses goes to the export."""
    if rank is None:
        return loras
    cut = {path: lora.truncated(rank) for path, lora in loras.items()}
    lost = export.figures.setdefault("truncation", {"rank": rank, "relative_error": {}})
    lost["relative_error"][name] = {path: error for path, (_, error) in cut.items()}
    return {path: lora for path, (lora, _) in cut.items()}


def _padded(loras: dict[str, PlainLoRA], name: str) -> dict[str, PlainLoRA]:
    """Scales inside B, and one rank that vLLM knows for all layers. Raises ConfigError."""
    most = max((lora.rank for lora in loras.values()), default=0)
    rank = next((rank for rank in VLLM_RANKS if rank >= most), None)
    if rank is None:
        raise ConfigError(
            f"--to vllm: {name} has rank {most}, and vLLM takes {VLLM_RANKS[-1]} at most; --rank {VLLM_RANKS[-1]} cuts "
            "it down and says what is lost"
        )
    return {path: lora.folded().padded(rank) for path, lora in loras.items() if lora.rank}


def _write_expert(
    into: Path, name: str, model: nn.Module, index: int, loras: dict[str, PlainLoRA], export: Export
) -> None:
    written: dict[str, PlainLoRA] = {}
    masks = routed_layers(model)[0].experts.allocator is not None
    if not masks or any(lora.rank for lora in loras.values()):
        written = write_lora(into / name, loras, model)
    else:
        export.notes.append(f"{name} has no rank left in any layer, so it has no folder")
    for layer in routed_layers(model):
        own, path = own_expert(layer, index), layer.site.name
        if own is not None:
            export.errors[f"{name}: {path}"] = expert_error(layer, own, written.get(path))


def _mixture_errors(model: nn.Module, task: int | None, written: Mapping[str, PlainLoRA]) -> dict[str, float]:
    names = {layer.site.name: layer for layer in routed_layers(model)}
    return {path: mixture_error(layer, task, written.get(path)) for path, layer in names.items()}


def _names(model: nn.Module) -> list[str]:
    count = adaptation(model).config.experts.most
    return [f"expert_{index:0{len(str(count - 1))}d}" for index in range(count)]


def _note_ranks(model: nn.Module, export: Export) -> None:
    if any(getattr(layer.router, "units", 0) > layer.experts.num_experts for layer in routed_layers(model)):
        router = adaptation(model).config.router["name"]
        export.notes.append(f"router '{router}' chooses single ranks; here an expert has all its ranks on, ungated")


def _note_task(model: nn.Module, export: Export) -> None:
    if export.task is not None and not by_task(model):
        export.notes.append("the gates do not depend on the task, so --task made no difference")


def _note_rounding(export: Export) -> None:
    path, error = export.worst
    if error > 1e-4:
        export.notes.append(
            f"rounding to the dtype of the files changes the update of '{path}' by {100 * error:.2g} %, others less; "
            "an adapter beside the base model does not"
        )


def _finish(into: Path, export: Export, exact: bool = True) -> None:
    """The last check and the report. Raises AdapterError where an exact export is not."""
    name, error = export.worst
    if exact and not error <= TOLERANCE:
        raise AdapterError(
            f"{name}: what was written is {error:.3g} off the model (relative error of its update); its experts or "
            "router do more than their factors and gates say, so this model cannot be exported so"
        )
    write_text(into / REPORT, json.dumps(export.to_json(), indent=1) + "\n")
