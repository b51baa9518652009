"""AdapterConfig: what to add to a base model. The ``adapter:`` section of a recipe, and of a saved adapter."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import Field, field_validator
from torch import nn

from moelora.core.errors import ConfigError
from moelora.core.methods import Methods
from moelora.core.tape import Site
from moelora.core.validate import Strict, check, nearest
from moelora.experts.base import Experts
from moelora.init.base import Init
from moelora.losses.base import Loss
from moelora.model.saved import find_saved
from moelora.routers.base import Router
from moelora.targets.named import select


class ExpertsConfig(Strict):
    """``experts:``, in PEFT's words; keys beyond these belong to the parameterisation ``name``."""

    model_config = {**Strict.model_config, "extra": "allow"}

    name: str = "lora"
    num_experts: Annotated[int, Field(ge=1)] = 1
    r: Annotated[int, Field(ge=1)] = 8
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False

    def method(self) -> dict[str, Any]:
        """Name and own options of the parameterisation."""
        return {"name": self.name, **(self.model_extra or {})}


class AdapterConfig(Strict):
    """The whole adapter. A method is ``{name: ..., option: ...}``, or just its name.

    losses: name to weight, or to ``{weight: ..., option: ...}``. target_modules, exclude_modules, layers_to_transform
    and layers_pattern follow PEFT's rules (``moelora.targets.named``). modules_to_save: names of modules to train in
    full, such as a new classifier.
    """

    experts: ExpertsConfig = ExpertsConfig()
    router: dict[str, Any] = {"name": "single"}
    init: dict[str, Any] = {"name": "kaiming"}
    losses: dict[str, dict[str, Any]] = {}
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] = []

    @field_validator("router", "init", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        spec = {"name": value} if isinstance(value, str) else value
        if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
            raise ValueError(f"expected a method name or {{name: ..., option: ...}}, found {value!r}")
        return spec

    @field_validator("losses", mode="before")
    @classmethod
    def _weighted(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError(f"expected loss names with weights, found {value!r}")
        number = {k: v for k, v in value.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        return {**value, **{name: {"weight": float(weight)} for name, weight in number.items()}}


def resolve(config: AdapterConfig | Mapping[str, Any] | str | Path, methods: Methods) -> AdapterConfig:
    """The configuration checked down to every method's options, with defaults filled in.

    Nothing of a model is needed: methods are built once on the meta device. Raises ConfigError.
    """
    if isinstance(config, str | Path):
        config = _read(Path(config))
    if not isinstance(config, AdapterConfig):
        config = check(AdapterConfig, config, "adapter")
    experts = config.experts
    own = methods.options("experts", experts.name)
    for key in (experts.model_extra or {}).keys() - own.keys():
        raise ConfigError(
            f"experts.{experts.name}: unknown key '{key}'{nearest(key, {*ExpertsConfig.model_fields, *own})}"
        )
    filled = config.model_copy(
        update={
            "experts": ExpertsConfig(**{**experts.model_dump(), **methods.check("experts", experts.method())}),
            "router": methods.check("routers", config.router),
            "init": methods.check("init", config.init),
            "losses": {
                name: {
                    "weight": _weight(name, spec),
                    **_without_name(methods.check("losses", {"name": name, **_without_weight(spec)})),
                }
                for name, spec in config.losses.items()
            },
        }
    )
    with torch.device("meta"):
        router, _ = build_site(filled, methods, Site("check", 0, 8, 8))
    for loss in build_losses(filled, methods).items():
        _refuse_blind_loss(*loss, router, filled.router["name"])
    return filled


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; expected a YAML file with an adapter's keys") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None


def find_sites(model: nn.Module, config: AdapterConfig) -> list[Site]:
    """The layers of ``model`` that get experts. Raises TargetError."""
    exclude, saved = config.exclude_modules, find_saved(model, config.modules_to_save)
    if saved:
        inside = [path for path, _ in model.named_modules() if any(f"{path}.".startswith(f"{s}.") for s in saved)]
        if isinstance(exclude, str):
            exclude = "|".join([f"(?:{exclude})", *map(re.escape, inside)])
        else:
            exclude = [*(exclude or []), *inside]
    return select(model, config.target_modules, exclude, config.layers_to_transform, config.layers_pattern)


def build_site(config: AdapterConfig, methods: Methods, site: Site) -> tuple[Router, Experts]:
    """Router and experts of one site; the experts' parameters are still empty."""
    shape = (site, config.experts.num_experts, config.experts.r)
    router: Router = methods.build("routers", config.router, *shape)
    experts: Experts = methods.build("experts", config.experts.method(), *shape)
    rank = router.scale_rank
    experts.scale.fill_(config.experts.lora_alpha / (math.sqrt(rank) if config.experts.use_rslora else rank))
    return router, experts


def build_init(config: AdapterConfig, methods: Methods) -> Init:
    """The initialiser."""
    init: Init = methods.build("init", config.init)
    return init


def build_losses(config: AdapterConfig, methods: Methods) -> dict[str, Loss]:
    """The auxiliary terms by name."""
    return {
        name: methods.build("losses", {"name": name, **_without_weight(spec)}, spec["weight"])
        for name, spec in config.losses.items()
    }


def _refuse_blind_loss(name: str, loss: Loss, router: Router, router_name: str) -> None:
    missing = [need for need in loss.needs if need not in router.gives]
    if missing:
        raise ConfigError(
            f"losses.{name} reads the router's {' and '.join(missing)}, and router '{router_name}' has none; "
            "remove the loss or choose a router that scores its units"
        )


def _weight(name: str, spec: Mapping[str, Any]) -> float:
    weight = spec.get("weight")
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not weight >= 0:
        raise ConfigError(f"losses.{name}.weight: expected a number of at least 0, found {weight!r}")
    return float(weight)


def _without_weight(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key != "weight"}


def _without_name(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key != "name"}
