"""Methods between backward and step, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from moelora.core.step import Now
from moelora.optim.base import Pair, PairOptim


class Rescale(PairOptim):
    """Each half's gradient by the other half's norm, and by a mean over steps that it keeps: no sum of parts."""

    def change(self, pair: Pair, now: Now) -> tuple[Tensor, Tensor]:
        norms = {
            key: value.flatten(1).norm(dim=1).view(-1, 1, 1)
            for key, value in vars(pair).items()
            if key in ("A", "B", "dB")
        }
        mean = pair.state.get("mean", torch.zeros_like(norms["dB"]))
        pair.state["mean"] = 0.5 * mean + 0.5 * norms["dB"]
        factor = 1 / (1 + pair.state["mean"])
        return pair.dA * norms["A"] * factor, pair.dB * (1 + norms["B"]) * factor


TRANSFORMS = {"rescale": Rescale}
