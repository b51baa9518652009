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
from rich.filesize import decimal
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


def adapter_table(found: Mapping[str, Any]) -> None:
    """One row per adapter, then why some cannot be experts, and the lines of a recipe that mixes the rest."""
    good = [entry for entry in found["adapters"] if "ranks" in entry]
    columns = ("adapter", "base model", "rank", "alpha", "scale", "layers", "targets", "dtype", "also")
    table = Table(*columns, box=box.SIMPLE_HEAD)
    proven = any("difference" in entry for entry in good)
    for column in ("size", "norm", "zero", *(["difference"] if proven else []), "group"):
        table.add_column(column, justify="right")
    for entry in good:
        several = [", ".join(f"{value:g}" for value in entry[key]) for key in ("ranks", "alphas", "scales")]
        words = [", ".join(entry[key]) for key in ("targets", "dtypes", "kinds")]
        what = (*several, str(entry["modules"]), *words)
        figures = [decimal(entry["bytes"]), f"{entry['norm']:.3g}", str(entry["zero"])]
        if proven:
            figures.append(f"{entry['difference']:.1e}" if "difference" in entry else "")
        table.add_row(
            entry["adapter"],
            entry["base_model"] or "?",
            *what,
            *figures,
            "" if entry["group"] is None else chr(65 + entry["group"] % 26),
        )
    if good:
        _wide_console().print(table)
        print("norm: of all updates together. zero: layers whose update is zero. Experts of one group go together")
        if proven:
            print("difference: expert alone against adapter alone, logits on a probe, relative to the adapter's effect")
    for entry in found["adapters"]:
        if entry["error"]:
            print(f"cannot be an expert: {entry['error']}")
    for index, group in enumerate(found["groups"]):
        if group["experts"]["num_experts"] > 1:
            keys = ", ".join(f"{key}: {_yaml(value)}" for key, value in group["experts"].items())
            print(f"\n{chr(65 + index % 26)}: experts: {{{keys}}}\n   target_modules: {_yaml(group['target_modules'])}")


def _yaml(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


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


def export_table(export: Any) -> None:
    """What was written, how far it is from the model, and what the user must know."""
    measured = export.figures.get("measured")
    if measured:
        table = Table("on held-out tokens", box=box.SIMPLE_HEAD)
        for column in ("KL divergence", "same top-1", "update error", "worst layer"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, row in measured.items():
            said = f"{name} (written)" if name == export.figures["written"] else name
            figures = (f"{row['kl']:.4g}", f"{100 * row['top1_agreement']:.1f} %", f"{100 * row['update_error']:.1f} %")
            table.add_row(said, *figures, f"{100 * max(row['sites'].values()):.1f} %")
        Console().print(table)
        print("against the routed model: KL of next-token predictions in nats; error of the layers' updates, relative")
    cut = export.figures.get("truncation", {"relative_error": {}})
    for name, errors in cut["relative_error"].items():
        worst = max(errors, key=errors.__getitem__)
        if errors[worst]:
            print(f"rank {cut['rank']}: {name} loses up to {100 * errors[worst]:.3g} % of an update ({worst})")
    module, error = export.worst
    if not measured:
        read = f"{len(export.errors)} modules read again and compared with the model"
        print(f"{read}; largest relative error of an update: {error:.2g} ({module})")
    for note in export.notes:
        print(f"note: {note}")
    print(f"{export.kind}: {export.folder}")


def plan_table(found: Mapping[str, Any]) -> None:
    """What a run would do: its parameters, memory by part, tasks, batches and steps."""
    count, memory, batch, epoch = (found[key] for key in ("parameters", "memory", "batch", "epoch"))
    said = ", ".join(
        f"{part} {count[part]:,}" for part in ("base", "experts", "router", "modules_to_save") if part in count
    )
    print(f"{found['base_model']}, router {found['router']} on {count['layers']} layers")
    print(f"parameters: {said}; trainable {count['trainable']:,} of {count['total']:,} ({count['percent']:.4g} %)\n")
    table = Table(title=f"memory of a process, {memory['engine']}, {batch['processes']} of them", box=box.SIMPLE_HEAD)
    for column in ("part", "GPU", "host", "dtype", ""):
        table.add_column(column, justify="right" if column in ("GPU", "host") else "left", no_wrap=bool(column))
    for part in memory["parts"]:
        sizes = [decimal(part[where]) if part[where] else "" for where in ("gpu", "host")]
        table.add_row(part["part"], *sizes, part["dtype"], part["how"])
    table.add_section()
    table.add_row("in all, at most", decimal(memory["gpu"]), decimal(memory["host"]) if memory["host"] else "", "", "")
    Console().print(table)
    for line in memory["missing"]:
        print(f"not predicted, and not in the sum: {line}")
    print(f"precision: {memory['precision']}\n")
    tasks = Table("task", box=box.SIMPLE_HEAD)
    for column in ("rows", "tokens", "share"):
        tasks.add_column(column, justify="right")
    for task_name, task in found["tasks"].items():
        share = f"{100 * task['tokens'] / max(1, epoch['tokens']):.1f} %"
        tasks.add_row(task_name, f"{task['rows']:,}", f"{task['tokens']:,}", share)
    tasks.add_section()
    tasks.add_row("an epoch", f"{epoch['rows']:,}", f"{epoch['tokens']:,}", "")
    Console().print(tasks)
    packed = f"packed into {epoch['sequences']:,} rows" if epoch["packing"] else "not packed"
    factors = f"{batch['per_device']} per device x {batch['accumulation']} accumulated x {batch['processes']} processes"
    print(f"batch: {factors} = {batch['global']:,} rows; {packed}, the longest has {batch['longest_row']:,} tokens")
    an_epoch = f"{epoch['steps']:,} in an epoch of about {epoch['tokens_per_step']:,} tokens each"
    print(f"steps: {an_epoch}; {found['steps']:,} in all ({found['epochs']:g} epochs)")
    for note in found["notes"]:
        print(f"note: {note}")


def environment_table(found: Mapping[str, Any]) -> None:
    """Versions, then a line each on kernels, GPUs and threads."""
    table = Table("package", "version", box=box.SIMPLE_HEAD)
    for name, version in found["versions"].items():
        table.add_row(name, version or "not installed")
    Console(highlight=False).print(table)
    for device, what, kernels in (
        ("CPU", "compiled", found["kernels"]["cpu"]),
        ("GPU", "Triton", found["kernels"]["cuda"]),
    ):
        active = "active" if kernels["active"] else "absent, PyTorch computes"
        print(f"{what} kernels ({device}): {active}: {kernels['status']}")
    print(f"GPUs: {'; '.join(found['gpus']) or 'none'}")
    print(f"CPU threads: {found['threads']}")
