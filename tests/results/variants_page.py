"""docs/results/variants.md and its picture, from the runs in variants.json alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure

from tests.results.variants import BASELINES, BATCH, LADDER, SEEDS, STEPS, TASKS, VARIANTS

STUDENT = 4.303
"""t of 97.5 % at two degrees of freedom: three seeds."""
HEADS = {"usual": "As many parameters as LoRA of rank 8", "small": "As many parameters as LoRA of rank 1"}
BELOW, ABOVE, OPEN = "#3a9a68", "#c0504d", "#7f7f7f"


@dataclass(frozen=True)
class Row:
    """A variant at its best learning rate. losses, accuracies: by seed. rates: how many were tried."""

    name: str
    size: int
    parameters: int
    rate: float
    rates: int
    edge: bool
    losses: list[float]
    accuracies: list[float]

    def against(self, other: Row) -> tuple[float, float]:
        """Mean difference of the losses, seed by seed, and half its 95 % interval."""
        apart = [one - two for one, two in zip(self.losses, other.losses, strict=True)]
        return mean(apart), half(apart)


def half(values: list[float]) -> float:
    return STUDENT * stdev(values) / math.sqrt(len(values))


def row(name: str, entry: Mapping[str, Any]) -> Row | None:
    """None where some seeds are missing."""
    found: dict[str, dict[int, Any]] = {}
    for key, run in entry["runs"].items():
        rate, seed = key.split()
        found.setdefault(rate, {})[int(seed)] = run
    whole = {
        rate: runs for rate, runs in found.items() if all(s in runs and runs[s]["loss"] is not None for s in SEEDS)
    }
    if not whole:
        return None
    best = min(whole, key=lambda rate: mean(whole[rate][seed]["loss"] for seed in SEEDS))
    of_seeds = [whole[best][seed] for seed in SEEDS]
    edge = best in (min(found, key=float), max(found, key=float))
    return Row(
        name, entry["size"], of_seeds[0]["parameters"], float(best), len(found), edge,
        [run["loss"] for run in of_seeds], [run["token_accuracy"] for run in of_seeds],
    )  # fmt: skip


def write_page(found: Mapping[str, Any], out: Path) -> None:
    """Write variants.md and variants.png of what is there."""
    rows = {name: made for name in VARIANTS if name in found and (made := row(name, found[name])) is not None}
    parts = [INTRODUCTION]
    for group, head in HEADS.items():
        baseline = rows.get(BASELINES[group][0])
        own = [made for name, made in rows.items() if VARIANTS[name].group == group]
        if baseline is not None:
            parts += [f"## {head}\n", table(own, baseline), reading(own, baseline)]
    missing = [name for name in VARIANTS if name not in rows]
    if missing:
        parts.append(f"Not measured: {', '.join(missing)}.\n")
    (out / "variants.md").write_text("\n".join([*parts, CAVEATS]), encoding="utf-8")
    picture(rows, out / "variants.png")


def table(rows: list[Row], baseline: Row) -> str:
    lines = [
        "| variant | size | trained | learning rate | loss | against LoRA | token accuracy | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for made in sorted(rows, key=lambda one: mean(one.losses)):
        apart, width = made.against(baseline)
        size = {"": "", "r": f"r {made.size}"}.get(
            VARIANTS[made.name].sized, f"{VARIANTS[made.name].sized} {made.size}"
        )
        against = "" if made is baseline else f"{apart:+.3f} ± {width:.3f}"
        rate = f"{made.rate:.1e} of {made.rates}" + (" (at the end)" if made.edge else "")
        loss = f"{mean(made.losses):.3f} ± {half(made.losses):.3f}"
        lines.append(
            f"| {made.name} | {size} | {made.parameters:,} | {rate} | {loss} "
            f"| {against} | {100 * mean(made.accuracies):.1f} % | {VARIANTS[made.name].remark} |"
        )
    return "\n".join([*lines, ""])


def reading(rows: list[Row], baseline: Row) -> str:
    """Which differ from the baseline by more than their interval."""
    apart = {made.name: made.against(baseline) for made in rows if made is not baseline}
    better = [name for name, (difference, width) in apart.items() if difference + width < 0]
    worse = [name for name, (difference, width) in apart.items() if difference - width > 0]
    rest = [name for name in apart if name not in (*better, *worse)]

    def listed(names: list[str]) -> str:
        return ", ".join(names) if names else "none"

    return (
        f"Better than LoRA by more than the interval: {listed(better)}. Worse: {listed(worse)}. "
        f"Not told apart by three seeds: {listed(rest)}.\n"
    )


def picture(rows: Mapping[str, Row], file: Path) -> None:
    groups = [
        (head, rows[BASELINES[group][0]], [m for n, m in rows.items() if VARIANTS[n].group == group])
        for group, head in HEADS.items()
        if BASELINES[group][0] in rows
    ]
    if not groups:
        return
    figure = Figure(figsize=(8, 0.27 * sum(len(own) for _, _, own in groups) + 1.6), layout="constrained")
    axes = figure.subplots(len(groups), 1, height_ratios=[len(own) for _, _, own in groups], squeeze=False)[:, 0]
    for axis, (head, baseline, own) in zip(axes, groups, strict=True):
        for at, made in enumerate(sorted((m for m in own if m is not baseline), key=lambda m: -m.against(baseline)[0])):
            apart, width = made.against(baseline)
            colour = BELOW if apart + width < 0 else ABOVE if apart - width > 0 else OPEN
            axis.errorbar(apart, at, xerr=width, fmt="o", color=colour, capsize=2, markersize=4, linewidth=1)
            axis.text(-0.01, at, made.name, ha="right", va="center", transform=axis.get_yaxis_transform(), fontsize=8)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks([])
        axis.set_title(f"{head}: held-out loss, less LoRA's", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right", "left"]].set_visible(False)
    axes[-1].set_xlabel("nats per answer token; lower is better; bars: 95 % interval over three seeds", fontsize=8)
    figure.savefig(file, dpi=130)


INTRODUCTION = f"""# Variants of LoRA at equal trainable parameters

    python -m tests.results.variants --out docs/results

Held-out loss in nats per answer token, mean over the {len(TASKS)} built-in tasks (64 rows each), after {STEPS} steps of
{BATCH} rows on the embedded base of 1.3 million parameters, all linear layers adapted, AdamW with a cosine schedule.
Each variant has the rank that brings it nearest to its group's number of parameters. Learning rates are of one ladder,
{LADDER[0]:.1e} times 2.5 to the n: four at least with one seed, further ones while the best lies at an end; then the
best, and neighbours within 0.1 of it, with all three seeds, and of these the best by the mean. ±: half the 95 %
interval by Student's t over three seeds. Against LoRA: differences with the same seed, so the same rows in the same
order. All runs: [variants.json](variants.json).

![differences from LoRA](variants.png)
"""
CAVEATS = """## How to read it

- It shows that every variant trains, and what its file does at a tuned learning rate on short runs of a tiny model. It
  does not show which is best for a model of billions of parameters: initialisers that take the leading directions of W
  find other spectra there, and methods for long training (DyLoRA, SoRA, AdaLoRA, IncreLoRA) get a hundred steps here.
- The learning rate is chosen by the loss that is reported. That flatters all variants, those with a sharp optimum more.
- Many intervals at 95 %: of thirty variants that do nothing, one or two would be called better or worse.
- Three seeds make wide intervals (t is 4.3): not told apart does not mean equal.
- Other options than the learning rate are the defaults, which are those of larger models.
- Seconds in variants.json were taken beside other work, and compare nothing.
- LoftQ needs a quantised base, which is another baseline, and is left out.
"""
