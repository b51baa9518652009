"""docs/bench/cpu.md: what was asked of the CPU, what was found, and every table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.bench.models import GENERATE, OURS, PEFT, TRAIN
from tests.bench.page import (
    BOTH,
    Rows,
    Target,
    layer_table,
    model_table,
    opening,
    paragraph,
    scaling_picture,
    target_table,
)
from tests.bench.variants import EAGER, GROUPED, INDEX_ADD, LOOP, Shape
from tests.bench.variants import OURS as LAYER

LEGEND = """
Medians (p10 to p90) in milliseconds, all variants of a case interleaved in one process. *of ours*: a variant's time
over ours. *kept*: what autograd keeps for the backward pass besides inputs and parameters. *peak*: the most that was
allocated at once beyond inputs and parameters, by PyTorch's own count; for whole models, beyond the base model's
weights. *error*: the largest deviation of output and gradients from float64, relative to the largest value; a variant
beyond its bound is refused, not timed.
"""
ON_TARGETS = f"""
The loop is PEFT's own X-LoRA layer with as many adapters as there are experts. Best eager: the best of *{INDEX_ADD}*,
*{GROUPED}* and *{EAGER}*. Layers in this table are measured without their base layer, which costs the same for all.
PEFT's X-LoRA freezes the experts unless asked to train them; both are here, the same in both libraries.
"""
FEW, MANY = str(Shape(1024, 1024, 8, 8, 2)), str(Shape(1024, 1024, 64, 8, 2))


def page(head: dict[str, Any], rows: Rows, out: Path) -> None:
    """Write OUT.md and OUT_scaling.png."""
    lines = [*opening("Timings on a CPU", head, out), *paragraph(LEGEND)]
    lines += ["", "## Targets", *target_table(targets(rows)), *paragraph(ON_TARGETS)]
    if scaling_picture(rows, out.with_name(out.name + "_scaling.png")):
        lines += ["", "## Scaling", "", f"Of one layer without its base layer, {BOTH}, float32.", ""]
        lines.append(f"![time against experts, tokens and rank]({out.name}_scaling.png)")
    for suite, title in (("mixture", "One layer, without its base layer"), ("layer", "One layer with its base layer")):
        groups = Rows(rows.of(suite=suite)).groups("case", "dtype")
        lines += ["", f"## {title}"] if groups else []
        for (case, dtype), group in groups.items():
            lines += ["", f"### {case}, {dtype}", "", *layer_table(group)]
    models = Rows(rows.of(suite="model")).groups("case", "pass")
    lines += ["", "## Whole models"] if models else []
    for (case, what), group in models.items():
        lines += ["", f"### {case}; {what}, {group.rows[0]['dtype']}", "", *model_table(group)]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def targets(rows: Rows) -> list[Target]:
    """What was asked of the CPU, forward and backward."""
    found = []
    for case, dtype, loop, eager in ((FEW, "float32", 4, 1), (MANY, "float32", 20, 3), (FEW, "bfloat16", 10, None)):
        at = {"suite": "mixture", "case": case, "dtype": dtype, "what": BOTH}
        ours = {**at, "variant": LAYER}
        title = f"{case}, {dtype}: "
        found.append(Target.least(title + "loop over ours", loop, rows.quotient({**at, "variant": LOOP}, ours)))
        if eager is not None:
            others = [rows.quotient({**at, "variant": name}, ours) for name in (INDEX_ADD, GROUPED, EAGER)]
            known = [value for value in others if value is not None]
            found.append(Target.least(title + "best eager over ours", eager, min(known, default=None)))
    ours = {"suite": "mixture", "dtype": "float32", "what": BOTH, "variant": LAYER}
    growth = rows.quotient({**ours, "case": MANY}, {**ours, "case": FEW})
    found.append(Target.most("E=64 over E=8, ours, float32", 1.5, growth))
    return found + model_targets(rows)


def model_targets(rows: Rows) -> list[Target]:
    found = []
    for (case, what), group in Rows(rows.of(suite="model")).groups("case", "pass").items():
        ours, theirs = {"variant": OURS}, {"variant": PEFT}
        if not group.of(**theirs):
            continue
        if what == GENERATE:
            tokens = case.rpartition(": ")[2]
            found.append(Target.least(f"{tokens}: PEFT over ours", 10, group.quotient(theirs, ours)))
        if what == TRAIN:
            title = f"training step, {case.rpartition(': ')[2]}: "
            found.append(Target.least(title + "PEFT over ours", 2.5, group.quotient(theirs, ours)))
            found.append(
                Target.most(title + "peak memory over PEFT's", 0.6, group.quotient(ours, theirs, "peak_bytes"))
            )
    return found
