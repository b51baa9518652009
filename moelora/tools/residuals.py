"""Model arithmetic: what models have learned beside their base, added up, as of a language (LayRA) and of a chat model.

    theta = theta_base + sum_i weight_i (theta_i - theta_base)

Paper: Owodunni and Kumar, "Continually Adding New Languages to Multilingual Language Models" (LayRA), arXiv 2509.11414,
where no instructions in the new language are needed: theta_1 is the base with the language's experts merged into it
(``moelora export --to merged``), theta_2 the base's public chat model.

    add_residuals("base", {"out/merged": 1.0, "chat": 0.7}, "out/both")

The models are folders of safetensors and of one architecture. One tensor of each is looked at at a time, in pieces,
added in float64 and rounded once to the dtype of the base's file: a single residual of weight 1 gives that model again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moelora.core.errors import AdapterError, ConfigError
from moelora.tools.export.folder import new_folder, write_text
from moelora.tools.export.shards import PLAIN, Shards

REPORT: Final = "residuals.json"
PIECE: Final = 1 << 22
"""Numbers that are added at a time."""


def add_residuals(
    base: str | Path, residuals: Mapping[str | Path, float], dest: str | Path, exclude: Sequence[str] = ()
) -> None:
    """Write the sum to the new folder ``dest``, with the base's texts. residuals: folder to weight.

    exclude: parameters that stay the base's, by the end of their module's path (``embed_tokens``, ``lm_head``, where a
    chat model has more tokens). Raises AdapterError for models that do not fit, ConfigError for none, OutputError where
    something is in the place of ``dest``.
    """
    if not residuals:
        raise ConfigError("add_residuals: expected at least one folder with a weight, found none")
    try:
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{base}: no base model: {str(error).strip().splitlines()[0]}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    own = Shards(Path(base), model)
    others = [(Shards(Path(folder), model), weight) for folder, weight in residuals.items()]
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    for name in own.found:
        module = name.rpartition(".")[0]
        if name in own.parameters and not any(module == end or module.endswith(f".{end}") for end in exclude):
            _check(name, own, others)
            changes[name] = _Sum(name, others)
    unknown = [
        end for end in exclude if not any(f".{name}".rpartition(".")[0].endswith(f".{end}") for name in own.found)
    ]
    if unknown:
        raise ConfigError(f"add_residuals: exclude {unknown}: no parameter of {base} is in such a module")
    with new_folder(Path(dest)) as into:
        own.copy(into, changes)
        said = {"base": str(base), "residuals": {str(k): v for k, v in residuals.items()}, "exclude": list(exclude)}
        write_text(into / REPORT, json.dumps(said, indent=1) + "\n")


def _check(name: str, own: Shards, others: Sequence[tuple[Shards, float]]) -> None:
    entry = own.entry(name)
    if entry.dtype not in PLAIN:
        raise AdapterError(f"{own.folder}: '{name}' is {entry.dtype}; only weights that are not quantised can be added")
    for shards, _ in others:
        found = shards.entry(name)
        if found.shape != entry.shape or found.dtype not in PLAIN:
            raise AdapterError(
                f"{shards.folder}: '{name}' is {found.dtype} {tuple(found.shape)}, the base's {entry.dtype} "
                f"{tuple(entry.shape)}; leave it the base's with exclude, or give models of one architecture"
            )


class _Sum:
    """From a tensor of the base to the sum."""

    def __init__(self, name: str, others: Sequence[tuple[Shards, float]]) -> None:
        self.name, self.others = name, others

    def __call__(self, old: Tensor) -> Tensor:
        new, flat = torch.empty_like(old).reshape(-1), old.reshape(-1)
        theirs = [(shards.mapped(self.name).reshape(-1), weight) for shards, weight in self.others]
        for at in range(0, len(flat), PIECE):
            part = flat[at : at + PIECE].double()
            total = part + sum(weight * (their[at : at + PIECE].double() - part) for their, weight in theirs)
            new[at : at + PIECE] = total.to(new.dtype)
        return new.view(old.shape)
