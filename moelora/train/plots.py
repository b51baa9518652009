"""Pictures of a run, as PNG bytes. Figures are made without pyplot, so nothing global is touched."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

BASE, COLOURS = "#9aa3ad", ("#2f6fb0", "#d9722e", "#3a9a68", "#8a5fb3", "#c0504d", "#7a6a53", "#2aa6b0", "#c9a227")

LAYER_FIGURES = {
    "load_entropy": "load entropy (1 = even)",
    "top1": "largest share of first choices",
    "token_entropy": "token entropy (0 = one unit per token)",
    "agreement": "agreement with tasks (1 = tells the task)",
}


def colours(runs: Iterable[str]) -> dict[str, str]:
    """A colour for every run, the same on all pictures of a page; a run named ``base`` is grey."""
    palette = itertools.cycle(COLOURS)
    return {name: BASE if name == "base" else next(palette) for name in runs}


def loss_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], colour_of: Mapping[str, str]) -> bytes:
    """Training loss per step (lines) and evaluation loss (dots), one colour per run."""
    figure, axes = _figure(5.6, 3.2)
    for name, history in histories.items():
        colour = colour_of[name]
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


def bars(values: Mapping[str, Mapping[str, float]], label: str, colour_of: Mapping[str, str]) -> bytes:
    """Grouped bars: ``{run: {task: value in 0..1}}``."""
    tasks = list(dict.fromkeys(task for run in values.values() for task in run))
    wide = max(5.6, 0.68 * len(tasks))
    columns = _columns(values, wide)
    figure, axes = _figure(wide, 3.0 + 0.2 * -(-len(values) // columns))
    width = 0.82 / len(values)
    for position, (name, run) in enumerate(values.items()):
        left = np.arange(len(tasks)) - 0.41 + width * (position + 0.5)
        axes.bar(left, [run.get(task, 0.0) for task in tasks], width * 0.92, color=colour_of[name], label=name)
    axes.set_xticks(range(len(tasks)), tasks, rotation=0 if len(tasks) <= 5 else 30)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel(label)
    figure.legend(loc="outside upper left", ncols=columns, frameon=False)
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
    sites, tasks, experts = routing["sites"], routing["tasks"], routing.get("experts", [])
    names = list(sites)
    quarters = [list(part) for part in np.array_split(np.array(names), min(shown, len(names)))]
    chosen = [max(part, key=lambda name: sites[name]["specialisation"]) for part in quarters]
    figure = Figure(
        figsize=(9.6, 0.3 * len(tasks) + 1.5 + 0.07 * max(map(len, experts), default=0)), layout="constrained"
    )
    every = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    for axes, name in zip(every, chosen, strict=True):
        load = np.array(sites[name]["load"])
        image = axes.imshow(load * load.shape[1], aspect="auto", cmap="viridis", vmin=0)
        axes.set_title(short(name), fontsize=9)
        axes.tick_params(labelsize=8)
        if load.shape[1] == len(experts):
            axes.set_xticks(range(len(experts)), experts, rotation=90)
        else:
            axes.set_xlabel("unit")
        figure.colorbar(image, ax=axes, pad=0.02)
    every[0].set_yticks(range(len(tasks)), tasks, fontsize=9)
    return _png(figure)


def layer_figures(routings: Mapping[str, Mapping[str, Any]], colour_of: Mapping[str, str]) -> bytes:
    """The figures of LAYER_FIGURES, layer by layer, for every routed run."""
    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    sites = list(dict.fromkeys(site for routing in routings.values() for site in routing["sites"]))
    place = {site: position for position, site in enumerate(sites)}
    for axes, (key, title) in zip(panels.flat, LAYER_FIGURES.items(), strict=True):
        for name, routing in routings.items():
            own = [place[site] for site in routing["sites"]]
            values = [site[key] for site in routing["sites"].values()]
            axes.plot(own, values, color=colour_of[name], marker=".", linewidth=1.4, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[1]:
        _site_ticks(axes, sites)
    if len(routings) > 1:
        handles, names = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=_columns(names, 9.6), frameon=False)
    return _png(figure)


def short(site: str) -> str:
    """``model.layers.3.self_attn.q_proj`` as ``3 q_proj``."""
    numbers = re.findall(r"\.(\d+)\.", f".{site}")
    return f"{numbers[0]} {site.rsplit('.', 1)[-1]}" if numbers else site


def _distances(load: Sequence[Sequence[float]]) -> list[float]:
    rows = np.array(load)
    return [float(value) for value in np.abs(rows - rows.mean(0)).sum(1) / 2]


def _columns(names: Collection[str], width: float) -> int:
    """How many names of a legend fit beside each other in ``width`` inches."""
    return max(1, min(len(names), int(11 * width) // (max(map(len, names)) + 7)))


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
