"""Which layers of a model get experts, and which of these are for the router."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moelora.core.errors import ConfigError, TargetError
from moelora.core.methods import Methods
from moelora.core.tape import Site
from moelora.model.config import AdapterConfig, build_init
from moelora.model.probe import Batch, frozen, on_device, refuse_parts
from moelora.model.saved import find_saved
from moelora.routers.base import Router
from moelora.targets.base import Targets
from moelora.targets.named import select


def build_targets(config: AdapterConfig, methods: Methods) -> Targets:
    """What chooses among the layers that are named."""
    targets: Targets = methods.build("targets", config.targets)
    return targets


def batches_needed(config: AdapterConfig, methods: Methods) -> tuple[int, int]:
    """How many batches methods look at before training begins, at most, and of how many rows."""
    init, targets = build_init(config, methods), build_targets(config, methods)
    looks = init.probes in ("gradients", "inputs")
    return max(init.batches if looks else 0, targets.batches), (init if looks else targets).batch_size


def find_sites(model: nn.Module, config: AdapterConfig, methods: Methods) -> list[Site]:
    """The layers of ``model`` that get experts. Raises TargetError."""
    exclude, saved = config.exclude_modules, find_saved(model, config.modules_to_save)
    if saved:
        inside = [path for path, _ in model.named_modules() if any(f"{path}.".startswith(f"{s}.") for s in saved)]
        if isinstance(exclude, str):
            exclude = "|".join([f"(?:{exclude})", *map(re.escape, inside)])
        else:
            exclude = [*(exclude or []), *inside]
    named = select(model, config.target_modules, exclude, config.layers_to_transform, config.layers_pattern)
    chosen = build_targets(config, methods)(named)
    if not chosen:
        raise TargetError(
            f"targets {config.targets['name']} leaves none of {len(named)} layers, such as '{named[0].name}' in block "
            f"{named[0].block} of {named[0].blocks}; change its options or target_modules"
        )
    return [replace(site, index=index, count=len(chosen)) for index, site in enumerate(chosen)]


def routed_sites(config: AdapterConfig, methods: Methods, sites: Sequence[Site]) -> list[Site]:
    """The sites that the router is for: all but those it leaves to a plain LoRA. Raises TargetError for none."""
    router_class: type[Router] = methods.find("routers", config.router["name"])
    options = {key: value for key, value in config.router.items() if key != "name"}
    routed = [site for site in sites if not router_class.plain(site, options)]
    if not routed:
        raise TargetError(
            f"router '{config.router['name']}' leaves all {len(sites)} targets to plain LoRAs, such as "
            f"'{sites[0].name}', and has none for its experts; target other layers too, or take router: single"
        )
    return routed


def decided(
    model: nn.Module, config: AdapterConfig, methods: Methods, batches: Sequence[Batch] | None
) -> AdapterConfig:
    """The configuration with its targets chosen, by looking at batches where they ask for it.

    All processes of a run go by the first one's choice. Raises ConfigError without batches.
    """
    targets, name = build_targets(config, methods), config.targets["name"]
    if targets.batches == 0:
        return config
    if batches is None:
        raise ConfigError(
            f"targets {name} looks at data to choose layers: moelora train does it before the run; give moelora.adapt "
            "some batches=[...] of the model's inputs, with labels, or write down what was chosen"
        )
    refuse_parts(model, f"targets {name}")
    given = [on_device(model, batch) for batch in batches[: targets.batches]]
    with frozen(model):
        found: list[Any] = [targets.choose(model, find_sites(model, config, methods), given)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found)
    chosen: Mapping[str, Any] = found[0]
    return config.model_copy(update={"targets": {**config.targets, **chosen}})
