"""Pictures of a run, as PNG bytes. Figures are made without pyplot, so nothing global is touched."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

COLOURS = ("#9aa3ad", "#2f6fb0", "#d9722e", "#3a9a68", "#8a5fb3", "#c0504d", "#7a6a53")
"""The first is for the base model."""


def loss_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Training loss per step (lines) and evaluation loss (dots), one colour per run."""
    figure, axes = _figure(5.6, 3.2)
    for colour, (name, history) in zip(COLOURS[1:], histories.items(), strict=False):
        train = [(row["step"], float(row["loss"])) for row in history if "loss" in row]
        evaluated = [(row["step"], float(row["eval_loss"])) for row in history if "eval_loss" in row]
        if train:
            axes.plot(*zip(*train, strict=True), color=colour, label=name, linewidth=1.6)
        if evaluated:
            axes.plot(*zip(*evaluated, strict=True), "o", color=colour, markersize=5, markeredgecolor="white")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return _png(figure)


def bars(values: Mapping[str, Mapping[str, float]], label: str) -> bytes:
    """Grouped bars: ``{run: {task: value in 0..1}}``. A run named ``base`` is grey."""
    tasks = list(dict.fromkeys(task for run in values.values() for task in run))
    figure, axes = _figure(max(5.6, 0.68 * len(tasks)), 3.2)
    palette = iter(COLOURS[1:])
    colours = {name: COLOURS[0] if name == "base" else next(palette) for name in values}
    width = 0.82 / len(values)
    for position, (name, run) in enumerate(values.items()):
        left = np.arange(len(tasks)) - 0.41 + width * (position + 0.5)
        axes.bar(left, [run.get(task, 0.0) for task in tasks], width * 0.92, color=colours[name], label=name)
    axes.set_xticks(range(len(tasks)), tasks, rotation=0 if len(tasks) <= 5 else 30)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel(label)
    axes.legend(frameon=False, ncols=len(values), loc="lower left", bbox_to_anchor=(0, 1.0))
    return _png(figure)


def specialisation(routing: Mapping[str, Any]) -> bytes:
    """Task by layer: how far a task's load lies from the load of all tasks together, 0 to 1."""
    sites, tasks = routing["sites"], routing["tasks"]
    grid = np.array([_distances(site["load"]) for site in sites.values()]).T
    figure, axes = _figure(9.6, 0.3 * len(tasks) + 1.6)
    image = axes.imshow(grid, aspect="auto", cmap="magma_r", vmin=0)
    axes.set_yticks(range(len(tasks)), tasks)
    _site_ticks(axes, list(sites))
    figure.colorbar(image, ax=axes, pad=0.01, label="distance")
    return _png(figure)


def unit_loads(routing: Mapping[str, Any], shown: int = 4) -> bytes:
    """Share of each task's gate mass by unit, in the most specialised layer of each quarter of the depth."""
    sites, tasks = routing["sites"], routing["tasks"]
    names = list(sites)
    quarters = [list(part) for part in np.array_split(np.array(names), min(shown, len(names)))]
    chosen = [max(part, key=lambda name: sites[name]["specialisation"]) for part in quarters]
    figure = Figure(figsize=(9.6, 0.3 * len(tasks) + 1.5), layout="constrained")
    every = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    for axes, name in zip(every, chosen, strict=True):
        load = np.array(sites[name]["load"])
        image = axes.imshow(load * load.shape[1], aspect="auto", cmap="viridis", vmin=0)
        axes.set_title(short(name), fontsize=9)
        axes.set_xlabel("unit")
        axes.tick_params(labelsize=8)
        figure.colorbar(image, ax=axes, pad=0.02)
    every[0].set_yticks(range(len(tasks)), tasks, fontsize=9)
    return _png(figure)


def layer_figures(routings: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Evenness of the load and share of the busiest unit, layer by layer, for every routed run."""
    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    for colour, (name, routing) in zip(COLOURS[2:], routings.items(), strict=False):
        sites = routing["sites"]
        for axes, key in ((left, "load_entropy"), (right, "top_share")):
            axes.plot([site[key] for site in sites.values()], color=colour, marker=".", label=name)
    first = list(next(iter(routings.values()))["sites"])
    for axes, title in ((left, "load entropy (1 = even)"), (right, "share of the busiest unit")):
        axes.set_title(title, fontsize=10)
        axes.set_ylim(0, 1.02)
        _site_ticks(axes, first)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, loc="lower left")
    return _png(figure)


def short(site: str) -> str:
    """``model.layers.3.self_attn.q_proj`` as ``3 q_proj``."""
    numbers = re.findall(r"\.(\d+)\.", f".{site}")
    return f"{numbers[0]} {site.rsplit('.', 1)[-1]}" if numbers else site


def _distances(load: Sequence[Sequence[float]]) -> list[float]:
    rows = np.array(load)
    return [float(value) for value in np.abs(rows - rows.mean(0)).sum(1) / 2]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _site_ticks(axes: Axes, sites: list[str]) -> None:
    step = max(1, len(sites) // 32)
    axes.set_xticks(range(0, len(sites), step), [short(site) for site in sites[::step]], rotation=90, fontsize=7)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()
