"""Route: all that a router may say.

Letters used throughout: T tokens, D input features, O output features, E experts, r ranks per
expert, R = E*r stacked ranks, G units that a router chooses between (experts, or blocks of ranks
down to single ranks), k chosen units.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Route(NamedTuple):
    """What each token mixes. A tuple, since that is what engines look for tensors in when a module gives it back.

    weight: [T, k] gates of the chosen units, or [T, G] gates of all units when ``index`` is None; float32
        (float64 in a float64 model), differentiable.
    units: G. The stacked ranks are cut into G equal blocks, one per unit.
    index: [T, k] int64, the chosen units, distinct per token; None means dense.
    logits: [T, G] scores before any normalisation, for auxiliary losses; None if the router has none.
    probs: [T, G] scores normalised to sum to 1 per token, for auxiliary losses and statistics.
    margin: [T, G] probs less a threshold that the router chooses by, which a balance loss then acts on; None without.
    """

    weight: Tensor
    units: int
    index: Tensor | None = None  # type: ignore[assignment]
    logits: Tensor | None = None
    probs: Tensor | None = None
    margin: Tensor | None = None

    def dense(self) -> Tensor:
        """Gates as [T, G], zero for units not chosen."""
        return dense_gates(self.weight, self.index, self.units)

    def chosen(self) -> Tensor:
        """[T, G] of 1 where a token chose a unit (dense: where its gate is not zero), else 0; no gradient."""
        if self.index is None:
            return (self.weight.detach() != 0).to(self.weight.dtype)
        return dense_gates(torch.ones_like(self.weight), self.index, self.units)

    def load(self, mask: Tensor | None = None) -> Tensor:
        """How many tokens chose each unit: [G], no gradient. mask: [T] bool, True for tokens that count."""
        chosen = self.chosen()
        return chosen.sum(0) if mask is None else mask.to(chosen.dtype) @ chosen


def dense_gates(weight: Tensor, index: Tensor | None, units: int) -> Tensor:
    """[T, k] gates and indices as [T, G]; ``weight`` itself when ``index`` is None."""
    if index is None:
        return weight
    return weight.new_zeros(weight.shape[0], units).scatter(1, index, weight)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices [T, k] of the k largest scores [T, G], best first; equal scores go to the lowest index."""
    indices = scores.detach().sort(dim=-1, descending=True, stable=True).indices
    return indices[:, :k].contiguous()  # a view would keep all of them
