"""Methods between backward and step, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from moelora.train.pairs import Pair, PairTransform


class Rescale(PairTransform):
    """Each half's gradient by the other half's norm, and by a mean over steps that it keeps: no sum of parts."""

    def __call__(self, pair: Pair) -> tuple[Tensor, Tensor]:
        mean = pair.state.get("mean", torch.zeros(1))
        pair.state["mean"] = 0.5 * mean + 0.5 * pair.gradients[1].norm().reshape(1).cpu()
        factor = 1 / (1 + pair.state["mean"].to(pair.A.device))
        return pair.gradients[0] * pair.A.norm() * factor, pair.gradients[1] * (1 + pair.B.norm()) * factor


TRANSFORMS = {"rescale": Rescale}
