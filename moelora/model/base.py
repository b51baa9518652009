"""Base models by name: a hub id, a local folder, or the tiny one that comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedModel

from moelora.core.errors import ConfigError

TINY = "moelora/tiny"
"""The base model that comes with the package."""


def base_source(name: str) -> str:
    """Where transformers reads a base model from: the name itself, but for the package's own."""
    return str(Path(__file__).parents[1] / "assets" / "tiny") if name == TINY and not Path(name).exists() else name


def load_model(name: str, **options: Any) -> PreTrainedModel:
    """A base model as the class its configuration names first, in evaluation mode.

    options: those of ``from_pretrained``, such as dtype and revision. Raises ConfigError when neither disk nor hub has
    it, or transformers has no such class.
    """
    source = base_source(name)
    try:
        config = AutoConfig.from_pretrained(
            source, **({"revision": options["revision"]} if "revision" in options else {})
        )
        kind = next(iter(config.architectures or []), None)
        cls = getattr(transformers, kind, None) if kind else None
        if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
            raise ConfigError(
                f"base model '{name}': its config.json names the class {kind}, which transformers has not"
            )
        model: PreTrainedModel = cls.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"base model '{name}': {str(error).strip().splitlines()[0]}") from error
    model.config._name_or_path = name
    return model.eval()
