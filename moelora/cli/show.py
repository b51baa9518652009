"""Tables on the terminal."""

from __future__ import annotations

import itertools
import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from moelora.cli.catalogue import catalogue
from moelora.core.methods import AXES


def task_table(runs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """task x run, accuracy where answers were generated, token accuracy (~) elsewhere, the loss beside it."""
    tasks = list(dict.fromkeys(task for run in runs.values() for task in run))
    table = Table("task", *runs)
    for task in tasks:
        table.add_row(task, *(_cell(run.get(task)) for run in runs.values()))
    means = []
    for run in runs.values():
        values = [v["accuracy"] for v in run.values() if v.get("accuracy") is not None]
        means.append(f"{100 * sum(values) / len(values):.1f} %" if values else "")
    if any(means):
        table.add_section()
        table.add_row("mean", *means)
    Console().print(table)
    print("accuracy of whole answers (~: of single tokens), and the loss")


def comparison_table(variants: Mapping[str, Mapping[str, Any]]) -> None:
    """One row per run: its size, training time, mean and tasks; accuracy where answers were generated, else loss."""
    tasks = list(dict.fromkeys(task for run in variants.values() for task in run["tasks"]))
    table = Table("run", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("trainable", "seconds", "mean", *tasks):
        table.add_column(column, justify="right", no_wrap=True)
    for name, run in variants.items():
        accuracies = [100 * v["accuracy"] for v in run["tasks"].values() if v.get("accuracy") is not None]
        mean = f"{sum(accuracies) / len(accuracies):.1f} %" if accuracies else ""
        size = (
            (f"{run['trainable_parameters']:,}", f"{run['seconds']:.1f}") if run["trainable_parameters"] else ("", "")
        )
        table.add_row(name, *size, mean, *(_figure(run["tasks"].get(task)) for task in tasks))
    _wide_console().print(table)
    print("per task: accuracy of whole answers in %, or the loss where none was generated")


def _wide_console() -> Console:
    """For tables of many columns: a log file has no width, and a terminal folds lines."""
    console = Console()
    console.width = max(console.width, 150)
    return console


def _figure(values: Mapping[str, Any] | None) -> str:
    if values is None:
        return ""
    exact = values.get("accuracy")
    return f"{100 * exact:.1f}" if exact is not None else f"loss {values['loss']:.3f}"


def routing_table(routing: Mapping[str, Any]) -> None:
    """layer x figure of a run's routing.json, and their means."""
    if not routing.get("sites"):
        print("no layer has units to choose between, so there is no routing to show")
        return
    shown = {
        "load\nentropy": "load_entropy",
        "top-1\nshare": "top1",
        "dead": "dead",
        "token\nentropy": "token_entropy",
        "agreement": "agreement",
    }
    names = [site.split(".") for site in routing["sites"]]
    levels = zip(*(name[:-1] for name in names), strict=False)
    common = [level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels)]
    table = Table(title=f"routing, layers of {'.'.join(common)}" if common else "routing")
    table.add_column("layer", overflow="fold")
    for column in ("units", *shown):
        table.add_column(column, justify="right", no_wrap=True)
    for name, layer in zip(names, routing["sites"].values(), strict=True):
        figures = [f"{layer[key]:.2f}" for key in shown.values()]
        table.add_row(".".join(name[len(common) :]), str(layer["units"]), *figures)
    table.add_section()
    table.add_row("mean", "", *(f"{routing['summary'][key]:.2f}" for key in shown.values()))
    Console().print(table)
    print(
        "load entropy: 1 is even. top-1 share: tokens whose first choice is the favourite unit.\n"
        "dead: units with under a tenth of an even load. token entropy: 0 is one unit per token.\n"
        "agreement: 1 where the first choice tells the task"
    )
    collapsed = int(routing["summary"]["collapsed"])
    if collapsed:
        print(f"collapsed layers: {collapsed}; try losses: {{balance: 0.01}} or a lower learning rate")


def adapter_table(entries: Iterable[Mapping[str, Any]]) -> None:
    """One row per adapter, then why some cannot be experts, and whether the rest fit one model."""
    good = [entry for entry in entries if not entry["error"]]
    table = Table("adapter", "base model", "rank", "scale", "modules", "targets", box=box.SIMPLE_HEAD)
    for column in ("parameters", "dtype", "norm", "zero"):
        table.add_column(column, justify="right")
    for entry in good:
        several = [", ".join(f"{value:g}" for value in entry[key]) for key in ("ranks", "scales")]
        what = (*several, str(entry["modules"]), ", ".join(sorted(entry["targets"])))
        figures = (f"{entry['parameters']:,}", ", ".join(entry["dtypes"]), f"{entry['norm']:.3g}", str(entry["zero"]))
        table.add_row(entry["folder"], entry["base_model"] or "?", *what, *figures)
    if good:
        _wide_console().print(table)
        print("norm: of all updates together. zero: modules whose update is zero")
    for entry in entries:
        if entry["error"]:
            print(f"cannot be an expert: {entry['error']}")
    bases = sorted({entry["base_model"] or "?" for entry in good})
    if len(bases) > 1:
        print(f"made for {len(bases)} base models, so not all can be experts of one: {', '.join(bases)}")


def _cell(values: Mapping[str, Any] | None) -> str:
    if values is None:
        return ""
    exact = values.get("accuracy")
    share = f"{100 * exact:.1f} %" if exact is not None else f"~{100 * values['token_accuracy']:.1f} %"
    return f"{share} ({values['loss']:.3f})"


def methods_table(plugins: Iterable[Path], as_json: bool) -> None:
    """Print the catalogue."""
    entries = catalogue(plugins)
    if as_json:
        print(json.dumps(entries, indent=1))
        return
    console = Console(highlight=False)
    wide = max(len(entry["name"]) for entry in entries) + 2
    for axis in AXES:
        console.print(f"\n[bold]{axis}[/]")
        for entry in (entry for entry in entries if entry["axis"] == axis):
            paper = re.search(r"arXiv \d{4}\.\d{5}", entry["paper"])
            what = f"{entry['summary'].rstrip('.')}{f' ({paper.group()})' if paper else ''}"
            for label, text in ((entry["name"], what), ("", entry["recipe"].replace("`", "")), ("", entry["file"])):
                for line in textwrap.wrap(text, max(40, console.width - wide - 2)):
                    console.print(f"  {label:{wide}}{line}", markup=False, style=None if label else "dim")
                    label = ""
