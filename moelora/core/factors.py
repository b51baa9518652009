"""Factors: all that an expert parameterisation may say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Factors:
    """The stacked low-rank factors of one layer's experts.

    The update of a token with gates g is ``B diag(scale) mix(A x; g)``. The shapes say which mix:

    - blocks: A [R, D], B [O, R]; unit u gates ranks u*R/G to (u+1)*R/G.
    - shared A: A [r, D], B [O, G*r]; every unit gates its own copy of A x.
    - routed core: core [G, r, r], A [r, D], B [O, r]; the gates mix cores, ``sum_u g_u core_u A x``.

    ranks: [G] int32, of blocks: how many of each unit's ranks are in use, the rest being zero; None where all are.
    scale: [columns of B] float32, for instance lora_alpha / r. A is None where the tokens are h = A x already.
    stretch, shift: [E, O] or None, what experts make of the base layer's output y besides: g (stretch y + shift).
    num_experts: E. parts: the experts' own parameters by name, as they are trained, for losses.
    anchors: pairs of a parameter and its value at the start, for losses that hold experts near it.
    """

    A: Tensor | None
    B: Tensor
    scale: Tensor
    core: Tensor | None = None
    ranks: Tensor | None = None
    stretch: Tensor | None = None
    shift: Tensor | None = None
    num_experts: int = 1
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    anchors: tuple[tuple[Tensor, Tensor], ...] = ()
