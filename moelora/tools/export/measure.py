"""How far LoRAs are from the mixture they stand for, on tokens they were not fitted on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moelora.core.errors import DataError
from moelora.model.layer import RoutedLinear
from moelora.model.routed import disabled
from moelora.tools.export.condense import Batches, Seen, predictions, replaced, watching
from moelora.tools.export.plain import PlainLoRA

NOTHING = "no_adapter"


class _Distance:
    """Sums over predictions: KL divergence to them, equal first choices, their number."""

    def __init__(self) -> None:
        self.divergence, self.same, self.count = 0.0, 0, 0

    def add(self, wanted: Tensor, found: Tensor) -> None:
        self.divergence += float((wanted.exp() * (wanted - found)).sum())
        self.same += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        self.count += len(wanted)

    def figures(self) -> dict[str, float]:
        return {"kl": self.divergence / self.count, "top1_agreement": self.same / self.count}


@torch.no_grad()
def measure(
    model: nn.Module, candidates: Mapping[str, Mapping[str, PlainLoRA]], batches: Batches
) -> dict[str, dict[str, Any]]:
    """Figures of every candidate, and of the base model without experts as ``no_adapter``, against the routed model.

    kl: mean KL divergence in nats of next-token predictions from the routed model's. top1_agreement: share of equal
    most likely tokens. update_error: ||difference|| / ||update|| over all layers and tokens, each layer given what it
    is given in the routed model; sites: the same by module path. Raises DataError without tokens.
    """
    square: dict[str, float] = {}
    off: dict[str, dict[str, float]] = {name: {} for name in candidates}
    distances = {name: _Distance() for name in (*candidates, NOTHING)}

    def see(layer: RoutedLinear, seen: Seen) -> None:
        path, update = layer.site.name, seen.update.double()
        square[path] = square.get(path, 0.0) + float(update.square().sum())
        for name, loras in candidates.items():
            difference = loras[path](seen.x.double()) - update
            off[name][path] = off[name].get(path, 0.0) + float(difference.square().sum())

    for batch in batches:
        with watching(model, batch, see):
            wanted = predictions(model, batch)
        for name, loras in candidates.items():
            with replaced(model, loras):
                distances[name].add(wanted, predictions(model, batch))
        with disabled(model):
            distances[NOTHING].add(wanted, predictions(model, batch))
    if not distances[NOTHING].count:
        raise DataError("no held-out probe token to measure on; give other probe data (--probe FILE)")
    found: dict[str, dict[str, Any]] = {}
    for name, sums in off.items():
        sites = {path: _ratio(value, square[path]) for path, value in sums.items()}
        total = _ratio(sum(sums.values()), sum(square.values()))
        found[name] = {**distances[name].figures(), "update_error": total, "sites": sites}
    found[NOTHING] = {**distances[NOTHING].figures(), "update_error": 1.0, "sites": dict.fromkeys(square, 1.0)}
    return found


def _ratio(square: float, whole: float) -> float:
    return (square / whole) ** 0.5 if whole > 0 else square**0.5
