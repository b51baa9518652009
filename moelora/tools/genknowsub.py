"""General-knowledge subtraction: take what general adapters know out of the experts of an adapted model.

Paper: Bagherifard et al., "GenKnowSub", arXiv 2505.10939; the arithmetic is PEFT's, beside its Arrow router. With the
mean over all general experts, in every layer and for every expert e:

    A_e <- A_e - mean_g A_g,   B_e <- B_e - mean_g B_g

A and B are subtracted apart, so the update B_e A_e does not just lose the mean update: the cross terms change, too.
General experts are not routed to; they only need folders written by moelora, such as LoRAs trained on plain text.

    model = moelora.adapt(base, {"router": "arrow", "experts": {"train": "none", "adapters": [...], ...}})
    subtract_general(model, ["out/english", "out/french"])
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from moelora.core.errors import AdapterError, ConfigError
from moelora.model.record import adaptation, routed_layers
from moelora.model.sources import check_fit, open_sources


@torch.no_grad()
def subtract_general(model: nn.Module, general: Iterable[str | Path]) -> None:
    """Subtract the mean A and B of all experts in the folders ``general`` from every expert of ``model``, in place.

    Routers that derive something from the experts (Arrow's prototypes) do so again, and losses that hold experts near
    their start take this for it. A second call subtracts a second time. Raises ConfigError without folders,
    AdapterError unless all are plain LoRAs for the same layers, of one rank and scale, and MoeloraError for a model
    without experts; the model is then as it was.
    """
    folders = list(general)
    if not folders:
        raise ConfigError("subtract_general: expected at least one folder with general experts, found none")
    adaptation(model)
    sources = open_sources(folders)
    layers = {layer.site.name: layer for layer in routed_layers(model)}
    for source in sources:
        check_fit(source, model, {path: layer.site for path, layer in layers.items()})
    for path, layer in layers.items():
        names = {name for name, _ in layer.experts.named_parameters()}
        if names != {"lora_A", "lora_B"} or "own_A" not in layer.experts.gives:
            raise AdapterError(
                f"subtract_general: '{path}' has {type(layer.experts).__name__} experts, expected plain LoRAs; adapt "
                "the model with experts: lora"
            )
        r, scale = layer.experts.r, float(layer.experts.scale[0])
        if (layer.experts.scale != scale).any():
            raise AdapterError(
                f"subtract_general: the experts of the model have unlike scales at '{path}', expected one"
            )
        for source in sources:
            module = source.adapter.modules.get(path)
            own = 1.0 if module is None else module.scale
            if source.rank(path) != r or abs(own - scale) > 1e-6 * abs(scale) or not source.plain:
                raise AdapterError(
                    f"{source.folder}: rank {source.rank(path)} and scale {own:g} at '{path}', but the experts of the "
                    f"model have rank {r} and scale {scale:g}; only plain LoRAs of one rank and scale can be subtracted"
                )
    for path, layer in layers.items():
        loras = [source.read(path, layer.base_layer) for source in sources]
        A, B = (torch.stack([getattr(lora, half).float() for lora in loras]).mean(0) for half in ("A", "B"))
        held = dict(layer.experts.named_parameters())
        held["lora_A"].sub_(A.to(held["lora_A"]).repeat(layer.experts.num_experts, 1))
        held["lora_B"].sub_(B.to(held["lora_B"]).repeat(1, layer.experts.num_experts))
        layer.experts.set_anchors()
        layer.router.prepare(layer.experts.composed())
