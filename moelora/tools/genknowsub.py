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
from moelora.model.adapters import experts_of
from moelora.model.record import adaptation, routed_layers


@torch.no_grad()
def subtract_general(model: nn.Module, general: Iterable[str | Path]) -> None:
    """Subtract the mean A and B of all experts in the folders ``general`` from every expert of ``model``, in place.

    Routers that derive something from the experts (Arrow's prototypes) do so again, and losses that hold experts near
    their start take this for it. A second call subtracts a second time. Raises ConfigError without folders,
    AdapterError unless all are plain LoRAs for the same layers, of one rank and scale, and MoeloraError for a model
    without experts; the model is then as it was.
    """
    folders = [Path(folder) for folder in general]
    if not folders:
        raise ConfigError("subtract_general: expected at least one folder with general experts, found none")
    adaptation(model)
    layers = {layer.site.name: layer for layer in routed_layers(model)}
    parts = [experts_of(folder, layers) for folder in folders]
    found = {path: [lora for part in parts for lora in part[path]] for path in layers}
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
        for lora in found[path]:
            if lora.A.shape[0] != r or abs(lora.scale - scale) > 1e-6 * abs(scale):
                raise AdapterError(
                    f"{lora.folder}: rank {lora.A.shape[0]} and scale {lora.scale:g}, but the experts of the model "
                    f"have rank {r} and scale {scale:g}; only LoRAs of one rank and scale can be subtracted"
                )
    for path, layer in layers.items():
        A, B = (torch.stack([getattr(lora, half) for lora in found[path]]).mean(0) for half in ("A", "B"))
        held = dict(layer.experts.named_parameters())
        held["lora_A"].sub_(A.to(held["lora_A"]).repeat(layer.experts.num_experts, 1))
        held["lora_B"].sub_(B.to(held["lora_B"]).repeat(1, layer.experts.num_experts))
        layer.experts.set_anchors()
        layer.router.prepare(layer.experts.factors())
