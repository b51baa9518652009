"""Scaling curves: one quantity of a layer grows, everything else stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from tests.bench.layer import BOTH, measured
from tests.bench.measure import Clock, Row
from tests.bench.variants import Problem, Shape, variants


def suite(
    curves: Mapping[str, Sequence[Shape]],
    dtype: torch.dtype,
    names: Sequence[str],
    clock: Clock,
    limit: float = float("inf"),
) -> Iterator[Row]:
    """Rows of every point, the mixture alone, forward and backward; their suite is ``scaling NAME``.

    limit: seconds; a variant leaves a curve before a point that would take longer, if time doubles from point to point.
    """
    for name, shapes in curves.items():
        left = list(names)
        for s in shapes:
            p = Problem(s, dtype, clock.device, with_base=False)
            rows = list(measured(p, variants(p, left), clock, f"scaling {name}", (BOTH,)))
            yield from rows
            slow = {one["variant"] for one in rows if one["ms"] is not None and 2 * one["ms"] > 1e3 * limit}
            left = [one for one in left if one not in slow]
