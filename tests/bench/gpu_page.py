"""docs/bench/gpu.md: what was asked of the GPU, what was found, the share of the roofline reached, and every table."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.measure import Row
from tests.bench.page import (
    BOTH,
    COLOURS,
    FORWARD,
    Rows,
    Target,
    figure,
    layer_table,
    logarithmic,
    model_table,
    opening,
    paragraph,
    scaling_picture,
    sizes,
    target_table,
)
from tests.bench.variants import BASE, LOOP, OURS, OURS_DENSE, OURS_SORTED, Shape

MAIN, MANY = str(Shape(16384, 4096, 8, 16, 2)), str(Shape(16384, 4096, 64, 64, 4))
COPY = 3.0e12
"""Bytes a second that an H100 copies."""
LEGEND = f"""
Medians (p10 to p90) in milliseconds by CUDA events, all variants of a case interleaved in one process, L2 cache flushed
before each. *of ours*: a variant's time over ours. *kept*: what autograd keeps for the backward pass besides inputs and
parameters. *peak*: the most that was allocated at once beyond them. *error*: the largest deviation of output and
gradients from float64, relative to the largest value. *roofline*: the time in which x, y and their gradients can be
moved at {COPY / 1e12:g} TB/s, over a variant's time beyond the base layer's: 1 is the best there is. It is of forward
and backward, where both were measured.
"""
ESTIMATED = {1: "533 (320)", 2: "933 (560)", 4: "1733 (1040)"}
"""Ranks of all experts where the sorted path should overtake, by products at full (at 60 % of) speed."""


def floor(case: str, what: str) -> float:
    """Milliseconds in which a GPU can at best add a mixture to a base layer: x and y (2 bytes) moved, nothing else.

    Forward: x read, y read and written. Backward: dy read twice, x read, dx read and written.
    """
    s = sizes(case)
    elements = 2 * s["d"] + 4 * s["n"] + (6 * s["d"] + 4 * s["n"] if what == BOTH else 0)
    return 1e3 * s["T"] * elements / COPY


def overhead(rows: Rows, row: Row) -> float | None:
    """Milliseconds of a variant beyond the base layer alone."""
    base = rows.value("ms", suite=row["suite"], case=row["case"], dtype=row["dtype"], what=row["pass"], variant=BASE)
    return None if base is None or row["ms"] is None or row["variant"] == BASE else row["ms"] - base


def page(head: dict[str, Any], rows: Rows, out: Path) -> None:
    """Write OUT.md and the pictures OUT_scaling.png and OUT_crossover.png."""
    lines = [*opening("Timings on a GPU", head, out), *paragraph(LEGEND)]
    lines += ["", "## Targets", *target_table(targets(rows))]
    layers = Rows(rows.of(suite="layer"))

    def share(row: Row) -> str:
        beyond = overhead(layers, row)
        return "" if beyond is None or beyond <= 0 else f"{floor(row['case'], row['pass']) / beyond:.2f}"

    lines += _tables("One layer with its base layer", layers, share)
    lines += _tables("Few tokens, forward", Rows(rows.of(suite="decode")))
    for (case, what), group in Rows(rows.of(suite="model")).groups("case", "pass").items():
        lines += ["", f"## {case}; {what}, {group.rows[0]['dtype']}", "", *model_table(group)]
    lines += crossover(Rows(rows.of(suite="crossover")), out.with_name(out.name + "_crossover.png"))
    if scaling_picture(rows, out.with_name(out.name + "_scaling.png")):
        lines += ["", "## Scaling", "", f"![time against experts, tokens and rank]({out.name}_scaling.png)"]
    differing = [f"{row['variant']}, {row['case']}" for row in rows.of(suite="repeatable") if row["refused"]]
    if rows.of(suite="repeatable"):
        runs = rows.of(suite="repeatable")[0]["pass"]
        found = "; ".join(differing) or "none of them"
        lines += ["", "## Repeated", "", f"Cases whose output or gradients differ between {runs}: {found}."]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _tables(title: str, rows: Rows, share: Callable[[Row], str] | None = None) -> list[str]:
    lines = ["", f"## {title}"] if rows.rows else []
    for (case, dtype), group in rows.groups("case", "dtype").items():
        lines += ["", f"### {case}, {dtype}", "", *layer_table(group, share, "roofline")]
    return lines


def targets(rows: Rows) -> list[Target]:
    """What was asked of an H100."""
    main = {"suite": "layer", "case": MAIN, "dtype": "bfloat16"}
    many = {**main, "case": MANY}
    ours, loop = {**main, "variant": OURS}, {**main, "variant": LOOP}
    row = next(iter(rows.of(**ours, what=BOTH)), None)
    beyond = None if row is None else overhead(rows, row)
    times = None if beyond is None else beyond / floor(MAIN, BOTH)
    kept = rows.quotient({**ours, "what": BOTH}, {**loop, "what": BOTH}, "saved_bytes")
    found = [
        Target.most(f"{MAIN}: overhead over its roofline", 1.25, times),
        Target.least(f"{MAIN}: PEFT's X-LoRA over ours, forward", 4, _over(rows, loop, ours, FORWARD)),
        Target.least(f"{MAIN}: PEFT's X-LoRA over ours, {BOTH}", 3, _over(rows, loop, ours, BOTH)),
        Target.most(f"{MAIN}: memory kept over PEFT's X-LoRA", round(1 / 6, 3), kept),
    ]
    fast = {**many, "variant": OURS_SORTED}
    found.append(Target.least(f"{MANY}: loop over sorted", 5, _over(rows, {**many, "variant": LOOP}, fast, BOTH)))
    dense = _over(rows, {**many, "variant": OURS_DENSE}, fast, BOTH)
    found.append(Target.least(f"{MANY}: dense over sorted", 1, dense))
    for (case,), group in Rows(rows.of(suite="model")).groups("case").items():
        names = [one["variant"] for one in group.rows]
        smora = next((name for name in names if "SMoRA" in name), "")
        for lora in (name for name in names if name.startswith("PEFT LoRA")):
            step = group.quotient({"variant": smora}, {"variant": lora})
            found.append(Target.most(f"{case}: SMoRA over {lora}", 1.15, step))
    return found


def _over(rows: Rows, above: dict[str, str], below: dict[str, str], what: str) -> float | None:
    return rows.quotient({**above, "what": what}, {**below, "what": what})


def crossover(rows: Rows, path: Path) -> list[str]:
    """Where the sorted path overtakes the dense one; with a picture of both passes."""
    if not rows.of(variant=OURS_SORTED):
        return []
    made, axes = figure(2)
    lines = ["", "## Crossover of the dense and the sorted path", "", f"![sorted over dense]({path.name})", ""]
    lines += ["Ranks of all experts, E r, from which the sorted path is the faster one.", ""]
    lines += [f"| k | {FORWARD} | {BOTH} | estimated, {FORWARD} |", "|---|---|---|---|"]
    curves: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for (case, what), group in rows.groups("case", "pass").items():
        quotient = group.quotient({"variant": OURS_SORTED}, {"variant": OURS_DENSE})
        if quotient is not None:
            s = sizes(case)
            curves.setdefault((int(s["k"]), what), []).append((s["E"] * s["r"], quotient))
    for colour, k in zip(COLOURS, sorted({k for k, _ in curves}), strict=False):
        cells = [_crossing(sorted(curves.get((k, what), []))) for what in (FORWARD, BOTH)]
        lines.append(f"| {k} | {cells[0]} | {cells[1]} | {ESTIMATED.get(k, '')} |")
        for one, what in zip(axes, (FORWARD, BOTH), strict=True):
            points = sorted(curves.get((k, what), []))
            one.plot(*zip(*points, strict=True), "o-", color=colour, label=f"k={k}", markersize=4)
    for one, what in zip(axes, (FORWARD, BOTH), strict=True):
        one.axhline(1, color="#9aa3ad", linewidth=1)
        one.set(xlabel="E r", title=what)
        logarithmic(one)
    axes[0].set_ylabel("time, sorted over dense")
    axes[0].legend(frameon=False)
    made.savefig(path)
    return lines


def _crossing(points: list[tuple[float, float]]) -> str:
    """Where a curve through (ranks, quotient) falls below 1 for good, on a logarithmic axis."""
    above = [number for number, (_, quotient) in enumerate(points) if quotient > 1]
    if not above:
        return f"below {points[0][0]:g}" if points else ""
    if above[-1] == len(points) - 1:
        return f"beyond {points[-1][0]:g}"
    (x0, y0), (x1, y1) = points[above[-1]], points[above[-1] + 1]
    part = math.log(y0) / (math.log(y0) - math.log(y1))
    return f"{math.exp(math.log(x0) + part * (math.log(x1) - math.log(x0))):.0f}"
