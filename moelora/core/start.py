"""Start: what the experts of a site may start from besides chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Start:
    """The base layer under some experts, at their start.

    weight: gives W [O, D], float32 at least, dequantised where the layer is quantised; a copy. gradient: where the
    initialiser ``probes`` gradients, gives that of the loss in W [O, D], the mean over the probe's batches. seen: where
    it probes inputs, what its ``watch`` gave for this site. full: where it probes weights, gives W as it was before the
    layer was quantised.
    """

    weight: Callable[[], Tensor]
    gradient: Callable[[], Tensor] | None = None
    seen: Any = None
    full: Callable[[], Tensor] | None = None
