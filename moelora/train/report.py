"""The report: one self-contained HTML page about one run or several, pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from jinja2 import Environment, PackageLoader, select_autoescape

from moelora import __version__
from moelora.train import plots

RUN_FIGURES = {
    "load_entropy": "load entropy",
    "top_share": "busiest unit",
    "dead": "dead units",
    "specialisation": "specialisation",
    "agreement": "agreement",
}
LAYER_FIGURES = {
    "load_entropy": "load entropy",
    "top_share": "busiest unit",
    "top1": "top-1 share",
    "dead": "dead units",
    "token_entropy": "token entropy",
    "specialisation": "specialisation",
    "agreement": "agreement",
}


class Reported(Protocol):
    """What the page needs of a run: its summary.json, routing.json and history.json."""

    name: str
    summary: dict[str, Any]
    routing: dict[str, Any]
    history: list[dict[str, Any]]


def write_report(
    path: Path, runs: Sequence[Reported], recipe: str, base: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Write the page. recipe: text shown at its end. base: task metrics of the base model, compared with when given."""
    metrics = {**({"base": base} if base else {}), **{run.name: run.summary["tasks"] for run in runs}}
    tasks = list(dict.fromkeys(task for run in metrics.values() for task in run))
    measure = "accuracy" if any(v.get("accuracy") is not None for t in metrics.values() for v in t.values()) else None
    measure = measure or "token_accuracy"
    routed = {run.name: run.routing for run in runs if run.routing.get("sites")}
    colours = plots.colours(metrics)
    environment = Environment(loader=PackageLoader("moelora.train", "."), autoescape=select_autoescape(["j2", "html"]))
    page = environment.get_template("report.html.j2").render(
        title=", ".join(run.name for run in runs),
        version=__version__,
        runs=runs,
        run_figures=RUN_FIGURES,
        layer_figures=LAYER_FIGURES,
        tasks=tasks,
        metrics=metrics,
        best=_best(metrics, tasks, measure),
        measure=measure,
        measure_name=measure.replace("_", " "),
        loss_picture=_embed(plots.loss_curves({run.name: run.history for run in runs}, colours)),
        accuracy_picture=_embed(plots.bars(_values(metrics, measure), measure.replace("_", " "), colours))
        if tasks
        else None,
        routing=[
            {
                "name": name,
                "tasks_by_layer": _embed(plots.specialisation(content)),
                "units": _embed(plots.unit_loads(content)),
                "tasks": content["tasks"],
                "experts": content.get("experts", []),
                "shares": _shares(content),
                "layers": content["sites"],
                "summary": content["summary"],
            }
            for name, content in routed.items()
        ],
        layers_picture=_embed(plots.layer_figures(routed, colours)) if routed else None,
        recipe=recipe,
    )
    path.write_text(page, encoding="utf-8")


def _values(metrics: Mapping[str, Mapping[str, Mapping[str, Any]]], measure: str) -> dict[str, dict[str, float]]:
    return {
        name: {task: float(values[measure]) for task, values in tasks.items() if values.get(measure) is not None}
        for name, tasks in metrics.items()
    }


def _shares(routing: Mapping[str, Any]) -> list[list[float]]:
    """[tasks][experts], rows sum to 1: a task's load, mean over the layers that choose among experts with names."""
    loads = [site["load"] for site in routing["sites"].values() if site["units"] == len(routing.get("experts", []))]
    return [[sum(column) / len(column) for column in zip(*rows, strict=True)] for rows in zip(*loads, strict=True)]


def _best(metrics: Mapping[str, Any], tasks: Sequence[str], measure: str) -> dict[str, float]:
    best = {}
    for task in tasks:
        found = [run[task][measure] for run in metrics.values() if run.get(task, {}).get(measure) is not None]
        if found:
            best[task] = max(found)
    return best


def _embed(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
