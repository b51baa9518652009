"""One layer: every way to compute it, held against float64, timed and weighed; alone and with its base layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from tests.bench.measure import BOUNDS, Clock, Row, peak_bytes, row, saved_bytes, timed
from tests.bench.variants import OURS, Problem, Shape, Variant, variants

FORWARD, BOTH = "forward", "forward and backward"
ALONE, WITH_BASE = "mixture", "layer"


def measured(
    p: Problem, found: dict[str, Variant], clock: Clock, suite_name: str, passes: tuple[str, ...]
) -> Iterator[Row]:
    """Rows of one problem. A variant that deviates is refused in every pass."""
    given = [p.x, p.weight, p.index, p.upstream, p.scale, p.layer.weight]
    errors = {name: variant.error(p.upstream) for name, variant in found.items()}
    steps = {
        FORWARD: {name: variant.forward for name, variant in found.items()},
        BOTH: {name: lambda v=variant: v.both(p.upstream) for name, variant in found.items()},
    }
    for what in passes:
        rows = []
        for name, variant in found.items():
            refused = not errors[name] <= BOUNDS[p.dtype]
            one = row(suite_name, p.s, p.dtype, what, name, error=errors[name], refused=refused)
            if not refused:
                one["peak_bytes"] = peak_bytes(steps[what][name], p.device)
            if not refused and what == BOTH:
                one["saved_bytes"] = saved_bytes(variant.run, [*given, *variant.leaves])
            rows.append(one)
        timed(rows, steps[what], OURS, clock)
        yield from rows


def suite(
    cases: list[Shape],
    dtypes: list[torch.dtype],
    names: list[str],
    clock: Clock,
    suites: Mapping[str, bool],
    passes: tuple[str, ...] = (FORWARD, BOTH),
) -> Iterator[Row]:
    """Rows of every case. suites: names, and whether the base layer takes part."""
    for s in cases:
        for dtype in dtypes:
            for name, with_base in suites.items():
                p = Problem(s, dtype, clock.device, with_base)
                yield from measured(p, variants(p, names), clock, name, passes)
