"""AdapterConfig: what to add to a base model. The ``adapter:`` section of a recipe, and of a saved adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Field, field_validator

from moelora.core.errors import ConfigError
from moelora.core.methods import Methods
from moelora.core.tape import Site
from moelora.core.validate import Strict, check, nearest
from moelora.experts.base import Experts
from moelora.init.base import Init
from moelora.losses.base import Loss
from moelora.model.fit import refuse_blind_loss, refuse_unfit_experts
from moelora.routers.base import Router


class ExpertsConfig(Strict):
    """``experts:``, in PEFT's words; keys beyond these belong to the parameterisation ``name``.

    num_experts: one number, or a list over the depth of the model: as many equal groups of blocks as it has entries
    (MoLA, arXiv 2402.08562). train: ``all``, ``B`` (nothing but B, as in LoRA-FA), ``middle`` (nothing but
    the matrix between A and B, of experts that have one) or ``none`` (the router alone).
    adapters: folders or hub ids (``org/name[/subfolder][@revision]``) whose experts, in order, are the experts to start
    from: each written by moelora (all its experts) or a PEFT LoRA (one). They keep their own rank, up to r, and scale;
    lora_alpha is for experts that start anew. absent: an expert whose adapter lacks a layer adds nothing there, and
    its gate is kept (``keep``) or spread over the experts that have it (``redistribute``). modules_from: whose modules
    trained in full (PEFT's modules_to_save) fill ``adapter.modules_to_save``: all adapters' if they ``agree``, none
    (``ignore``), or those of one entry of adapters.
    """

    model_config = {**Strict.model_config, "extra": "allow"}

    name: str = "lora"
    num_experts: Annotated[int, Field(ge=1)] | Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = 1
    r: Annotated[int, Field(ge=1)] = 8
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    train: Literal["all", "B", "middle", "none"] = "all"
    adapters: list[str] = []
    absent: Literal["keep", "redistribute"] = "keep"
    modules_from: str = "agree"

    @property
    def most(self) -> int:
        """The number of experts of the layer that has most."""
        return self.num_experts if isinstance(self.num_experts, int) else max(self.num_experts)

    @property
    def labels(self) -> list[str]:
        """What to call the experts in a report: the last part of the folder or hub id that each starts from.

        None where experts start anew, an adapter gives several, or two would be called the same.
        """
        names = [entry.rstrip("/").rpartition("/")[2].partition("@")[0] for entry in self.adapters]
        return names if len(names) == len(set(names)) == self.most else []

    def at(self, site: Site) -> int:
        """The number of experts at a site. Raises ConfigError when a list does not fit the model's depth."""
        if isinstance(self.num_experts, int):
            return self.num_experts
        groups = len(self.num_experts)
        if site.block is None or site.blocks % groups:
            where = f"'{site.name}' lies in no block" if site.block is None else f"the model has {site.blocks} blocks"
            raise ConfigError(f"experts.num_experts: {groups} numbers for equal groups of blocks, but {where}")
        return self.num_experts[site.block * groups // site.blocks]

    def method(self) -> dict[str, Any]:
        """Name and own options of the parameterisation."""
        return {"name": self.name, **(self.model_extra or {})}


def named_method(value: Any) -> Any:
    """A method by its name alone, as ``{name: ...}``."""
    spec = {"name": value} if isinstance(value, str) else value
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        raise ValueError(f"expected a method name or {{name: ..., option: ...}}, found {value!r}")
    return spec


class AdapterConfig(Strict):
    """The whole adapter. A method is ``{name: ..., option: ...}``, or just its name.

    ranks: how many ranks each expert uses, found while training; ``full`` leaves all in use. losses: name to weight, or
    to ``{weight: ..., tokens: all | answers, option: ...}``. target_modules, exclude_modules, layers_to_transform and
    layers_pattern follow PEFT's rules (``moelora.targets.named``); targets: which of these layers get experts.
    modules_to_save: names of modules to train in full, such as a new classifier.
    """

    experts: ExpertsConfig = ExpertsConfig()
    router: dict[str, Any] = {"name": "single"}
    init: dict[str, Any] = {"name": "kaiming"}
    ranks: dict[str, Any] = {"name": "full"}
    losses: dict[str, dict[str, Any]] = {}
    targets: dict[str, Any] = {"name": "named"}
    target_modules: list[str] | str = "all-linear"
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] = []

    _named = field_validator("router", "init", "ranks", "targets", mode="before")(named_method)

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
            "ranks": methods.check("ranks", config.ranks),
            "targets": methods.check("targets", config.targets),
            "losses": {
                name: {**_common(name, spec), **_without(methods.check("losses", {"name": name, **_own(spec)}), "name")}
                for name, spec in config.losses.items()
            },
        }
    )
    init = build_init(filled, methods)
    init.refuse(config.init["name"], config.router["name"])
    if experts.adapters and (init.moves or init.probes is not None):
        raise ConfigError(f"experts.adapters fill A and B, and so would init {config.init['name']}; leave one out")
    built = sketch(filled, methods)
    refuse_unfit_experts(*built[0], filled)
    for name, loss in build_losses(filled, methods).items():
        refuse_blind_loss(name, loss, *built[0], filled)
        for router, _ in built:
            loss.admit(router.units)
    return filled


def sketch(config: AdapterConfig, methods: Methods) -> list[tuple[Router, Experts]]:
    """Router and experts as layers of a model would have them, one for each number of experts, without values."""
    numbers = config.experts.num_experts
    blocks = 1 if isinstance(numbers, int) else len(numbers)
    sites = [Site(f"{block}.layer", 0, 8, 8, block=block, blocks=blocks, hidden_size=8) for block in range(blocks)]
    with torch.device("meta"):
        built = list(build_sites(config, methods, sites))
    return [(router, experts) for _, router, experts in built]


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; expected a YAML file with an adapter's keys") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None


def build_sites(
    config: AdapterConfig, methods: Methods, sites: Sequence[Site], devices: Sequence[torch.device] | None = None
) -> Iterator[tuple[Site, Router, Experts]]:
    """Router and experts of every site; the experts' parameters are still empty. Sites of a group share a router."""
    routers: dict[str, Router] = {}
    router_class: type[Router] = methods.find("routers", config.router["name"])
    options = _without(config.router, "name")
    anchored = any(methods.find("losses", name).anchored for name in config.losses)  # type: ignore[attr-defined]
    moves = build_init(config, methods).moves
    allocates = config.ranks["name"] != "full"
    met: list[Experts] = []
    for position, site in enumerate(sites):
        plain = router_class.plain(site, options)
        shape = (site, 1 if plain else config.experts.at(site), config.experts.r)
        group = None if plain else router_class.group(site, options)
        with nullcontext() if devices is None else torch.device(devices[position]):
            router = routers.get(group) if group is not None else None
            if router is None:
                router = methods.build("routers", {"name": "single"} if plain else config.router, *shape)
            experts: Experts = methods.build("experts", config.experts.method(), *shape)
            if router.num_experts != experts.num_experts:
                raise ConfigError(
                    f"router '{config.router['name']}' is one for several layers, which need as many experts each; "
                    f"'{site.name}' has {experts.num_experts}, '{router.site.name}' {router.num_experts}; give "
                    "experts.num_experts one number"
                )
            if group is not None:
                routers[group] = router
            experts.scale.fill_(_scale(config.experts, router.scale_rank))
            for name, parameter in experts.named_parameters():
                parameter.requires_grad_(config.experts.train in ("all", name.removeprefix("lora_")))
            if allocates:
                experts.allocator = methods.build("ranks", config.ranks, *shape)
                experts.allocator.power = 0.5 if config.experts.use_rslora else 1.0
                experts.allocator.requires_grad_(config.experts.train != "none")
            if moves:
                experts.keep_start()
            if anchored:
                experts.keep_anchors()
        met.append(experts)
        yield site, router, experts
    if met:
        met[0].meet(met)


def _scale(experts: ExpertsConfig, rank: int) -> float:
    return experts.lora_alpha / (math.sqrt(rank) if experts.use_rslora else rank)


def build_init(config: AdapterConfig, methods: Methods) -> Init:
    """The initialiser."""
    init: Init = methods.build("init", config.init)
    return init


def build_losses(config: AdapterConfig, methods: Methods) -> dict[str, Loss]:
    """The auxiliary terms by name."""
    return {
        name: methods.build("losses", {"name": name, **_own(spec)}, *_common(name, spec).values())
        for name, spec in config.losses.items()
    }


def _common(name: str, spec: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that every loss has."""
    weight, tokens = spec.get("weight"), spec.get("tokens", "all")
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not weight >= 0:
        raise ConfigError(f"losses.{name}.weight: expected a number of at least 0, found {weight!r}")
    if tokens not in ("all", "answers"):
        raise ConfigError(f"losses.{name}.tokens: expected all or answers, found {tokens!r}")
    return {"weight": float(weight), "tokens": tokens}


def _own(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a loss that are its own."""
    return _without(spec, "weight", "tokens")


def _without(spec: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key not in keys}
