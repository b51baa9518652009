"""Tables on the terminal."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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
    """``task_table`` of several runs, with their size and training time."""
    print()
    task_table({name: run["tasks"] for name, run in variants.items()})
    table = Table("run", "trainable parameters", "training time")
    for name, run in variants.items():
        if run["trainable_parameters"]:
            table.add_row(name, f"{run['trainable_parameters']:,}", f"{run['seconds']:.1f} s")
    Console().print(table)


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
    for axis in AXES:
        console.print(f"\n[bold]{axis}[/]")
        for entry in (entry for entry in entries if entry["axis"] == axis):
            paper = re.search(r"arXiv \d{4}\.\d{5}", entry["paper"])
            what = f"{entry['summary'].rstrip('.')}{f' ({paper.group()})' if paper else ''}"
            for label, text in ((entry["name"], what), ("", entry["recipe"].replace("`", "")), ("", entry["file"])):
                for line in textwrap.wrap(text, max(40, console.width - 20)):
                    console.print(f"  {label:18}{line}", markup=False, style=None if label else "dim")
                    label = ""
