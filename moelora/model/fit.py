"""Whether the methods of a configuration go together: said before anything is built, one line for each that do not."""

from __future__ import annotations

from typing import Any, Protocol

from moelora.core.errors import ConfigError
from moelora.experts.base import Experts
from moelora.losses.base import Loss
from moelora.routers.base import Router


class Config(Protocol):
    """What is read of an ``AdapterConfig``."""

    experts: Any
    router: dict[str, Any]
    init: dict[str, Any]
    ranks: dict[str, Any]


def refuse_unfit_experts(router: Router, experts: Experts, config: Config) -> None:
    """Raise ConfigError for experts that the router, the initialiser or the ranks are not for."""
    missing = [need for need in router.needs if need not in experts.gives]
    said = {"own_A": "an A of their own", "shared_A": "one A for all", "core": "cores"}
    if missing:
        raise ConfigError(
            f"router '{config.router['name']}' is for experts with {' and '.join(said[need] for need in missing)}; "
            f"experts '{config.experts.name}' have {' and '.join(said[has] for has in experts.gives) or 'neither'}"
        )
    if router.around == "ffn" and not experts.apart:
        raise ConfigError(
            f"router '{config.router['name']}' asks for the output of every expert apart, and experts "
            f"'{config.experts.name}' have one between them; use experts: lora"
        )
    if experts.whole and router.around == "ffn":
        raise ConfigError(
            f"experts '{config.experts.name}' change the base layer's output, and those of a feed-forward block share "
            f"it; choose another router than '{config.router['name']}', or experts: lora"
        )
    if experts.whole and router.units != experts.num_experts:
        raise ConfigError(
            f"experts '{config.experts.name}' change the base layer's output, which takes the gate of a whole expert; "
            f"router '{config.router['name']}' has {router.units} gates for {experts.num_experts} of them"
        )
    init, ranks = config.init["name"], config.ranks["name"]
    if experts.start_A is not None and ("own_A" not in experts.gives or router.reads == "h"):
        raise ConfigError(
            f"init {init} subtracts every expert's start, which needs experts with an A of their own and a router that "
            f"does not read A x; found experts '{config.experts.name}' and router '{config.router['name']}'"
        )
    if experts.start_A is not None and experts.allocator is not None:
        raise ConfigError(
            f"ranks {ranks} starts from an update of zero and init {init} does not; choose init: kaiming, or no ranks"
        )
    if experts.allocator is not None and any(need not in experts.gives for need in experts.allocator.needs):
        needs = " and ".join(said[need] for need in experts.allocator.needs)
        raise ConfigError(f"ranks {ranks} is for experts with {needs}, not for experts '{config.experts.name}'")
    if experts.allocator is not None:
        if config.experts.adapters:
            raise ConfigError(f"ranks {ranks} is for experts that start anew; leave out experts.adapters, or ranks")
        experts.allocator.refuse(ranks, experts, config.experts.name, init, config.experts.train)
    parts = {"B": ("lora_B", "a lora_B"), "middle": ("middle", "a matrix between A and B (slora, loraxs)")}
    part = parts.get(config.experts.train)
    if part is not None and part[0] not in dict(experts.named_parameters()):
        raise ConfigError(
            f"experts.train: {config.experts.train} is for experts with {part[1]}; experts '{config.experts.name}' "
            "have none"
        )
    if config.experts.train == "middle" and init == "kaiming" and "lora_B" in dict(experts.named_parameters()):
        raise ConfigError(
            "experts.train: middle trains nothing with init kaiming: B starts at zero and stays there, and what is "
            "before it has no gradient; choose an init that sets B, such as nystrom"
        )


def refuse_blind_loss(name: str, loss: Loss, router: Router, experts: Experts, config: Config) -> None:
    """Raise ConfigError for a loss that reads what neither router nor experts have."""
    here = {*router.gives, *experts.gives, *(name for name, _ in experts.named_parameters(recurse=False))}
    missing = [need for need in loss.needs if need not in here]
    if missing:
        raise ConfigError(
            f"losses.{name} reads {' and '.join(missing)}, which neither router '{config.router['name']}' nor experts "
            f"'{config.experts.name}' have; remove the loss or choose others"
        )
    if router.around == "ffn" and loss.of_tokens == "none":
        raise ConfigError(
            f"losses.{name} reads the experts of every layer, and with router '{config.router['name']}' only the first "
            "layer of a feed-forward block has terms; remove the loss or choose another router"
        )
