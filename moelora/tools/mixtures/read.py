"""import_mixture: which format a folder has, and its mixture put into a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from moelora.core.errors import AdapterError, ConfigError
from moelora.io.files import fail, read_object, short
from moelora.io.folder import MANIFEST
from moelora.io.peft import CONFIG
from moelora.io.tensors import TensorFile
from moelora.model.adapt import print_table
from moelora.model.record import main_process
from moelora.model.routed import RoutedModel
from moelora.tools.mixtures import meteora, mixlora, peft_xlora, xlora
from moelora.tools.mixtures.base import Mixture, put

Base = TypeVar("Base", bound=nn.Module)
KINDS = "PEFT X-LoRA, xlora (xlora_config.json), MixLoRA or MoE-PEFT, MeteoRA (model.safetensors with gates)"


def import_mixture(
    base_model: Base,
    folder: str | Path,
    experts: Iterable[str | Path] = (),
    *,
    router: Mapping[str, Any] | None = None,
    verbose: bool = True,
) -> Base:
    """Put a mixture that another project saved into its base model: the same object, with experts and routers.

    folder: what that project wrote. experts: folders or hub ids of PEFT LoRAs, in the order of the router's columns,
    for formats that keep them apart; no other path is opened, whatever a configuration says. router: options that the
    folder does not record (MeteoRA's top_k and temperature). Gates and heads are copied as they are, experts keep their
    own scale; ``moelora.save`` writes the result as its own. Raises AdapterError, or ConfigError for wrong options, and
    then the model is as it was.
    """
    if isinstance(base_model, RoutedModel):
        raise ConfigError("this model has experts already; start from a fresh base model")
    mixture = _read(Path(folder), list(experts), base_model, dict(router or {}))
    put(base_model, mixture)
    if verbose and main_process():
        print_table(base_model)
        for note in mixture.notes:
            print(f"note: {note}")
    return base_model


def _read(folder: Path, experts: list[str | Path], model: nn.Module, router: dict[str, Any]) -> Mixture:
    if not folder.is_dir():
        fail(folder, "folder", "nothing" if not folder.exists() else "a file", f"a folder of {KINDS}", "check the path")
    if _has(folder, meteora.WEIGHTS) and not _has(folder, CONFIG):
        with closing(TensorFile(folder, meteora.WEIGHTS)) as file:
            gated = any(name.endswith(meteora.GATE) for name in file.entries)
        if gated:
            return meteora.read(folder, experts, model, router)
    if router:
        raise ConfigError(f"{folder}: it records all options of its router; leave {', '.join(sorted(router))} out")
    if _has(folder, xlora.CONFIG):
        return xlora.read(folder, experts, model)
    if _has(folder, CONFIG):
        kind = read_object(folder, CONFIG).get("peft_type")
        if kind == "XLORA":
            return peft_xlora.read(folder, experts, model)
        if kind in mixlora.KINDS:
            if experts:
                raise ConfigError(f"{folder}: it holds its own experts; leave the folders of experts out")
            return mixlora.read(folder, model)
        use = "one LoRA is an expert, and no mixture: use it with experts: {adapters: [...]}"
        what = use if kind == "LORA" else f"moelora reads {KINDS}"
        fail(folder / CONFIG, "peft_type", short(kind), f"XLORA, {', '.join(mixlora.KINDS)}", what)
    if _has(folder, MANIFEST):
        raise AdapterError(f"{folder}: moelora wrote this; load it with moelora.load")
    meteora.refuse_pickles(folder)
    fail(folder, "files", "none of a mixture", f"those of {KINDS}", "check the path")


def _has(folder: Path, name: str) -> bool:
    return (folder / name).exists() or (folder / name).is_symlink()
