"""The page: figures of every routed run and layer, however many runs there are."""

from __future__ import annotations

from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moelora.core.route import Route
from moelora.core.tape import Site, Tape, View
from moelora.eval.routing import RoutingStats
from moelora.train import plots
from moelora.train.report import write_report

HISTORY = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.1}]
TASKS = {
    "a": {"loss": 1.0, "token_accuracy": 0.5, "accuracy": 0.25},
    "b": {"loss": 1.0, "token_accuracy": 0.5, "accuracy": None},
}


def run(name: str, layers: list[str], favourite: bool = False, experts: Sequence[str] = ()) -> Any:
    """A run whose routers have four units, and send the two tasks to two of them, or everything to one."""
    stats = RoutingStats(["a", "b"], list(experts))
    task = torch.tensor([0, 1] * 30)
    for number, layer in enumerate(layers):
        index = torch.zeros(60, 1).long() if favourite else task.unsqueeze(1)
        view = View(Tape(), Site(layer, number, 4, 4), torch.Size([1, 60]), None, task)
        stats(view, Route(torch.ones(60, 1), 4, index))
    summary = {
        "trainable_parameters": 10, "total_parameters": 100, "seconds": 1.5, "steps": 2, "tasks": TASKS,
        "routing": stats.summary(),
    }  # fmt: skip
    return SimpleNamespace(name=name, summary=summary, routing=stats.to_json(), history=HISTORY)


class Rows(HTMLParser):
    """The text of every table cell, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data.strip()


def page(path: Path, *runs: Any) -> tuple[str, list[list[str]]]:
    write_report(path / "report.html", runs, "a: recipe", {"a": {"loss": 2.0, "token_accuracy": 0.1, "accuracy": 0.0}})
    text, rows = (path / "report.html").read_text(encoding="utf-8"), Rows()
    rows.feed(text)
    return text, rows.rows


def test_runs_and_layers_have_their_figures(tmp_path: Path) -> None:
    text, rows = page(tmp_path, run("plain", []), run("mixed", ["block.0.q", "block.1.q"]))
    assert rows[0][-5:] == ["load entropy", "busiest unit", "dead units", "specialisation", "agreement"]
    assert rows[1][0] == "plain" and rows[1][-5:] == ["\N{EN DASH}"] * 5
    assert rows[2][0] == "mixed" and rows[2][-5:] == ["0.50", "0.50", "0.50", "0.50", "1.00"]
    layer = ["4", "0.50", "0.50", "0.50", "0.50", "0.00", "0.50", "1.00"]
    assert [row for row in rows if row[0].startswith("block.")] == [["block.0.q", *layer], ["block.1.q", *layer]]
    assert text.count("<details>") == 1  # folded away, one for each routed run
    assert "have collapsed" not in text


def test_experts_with_names_have_a_table_of_who_serves_which_task(tmp_path: Path) -> None:
    text, rows = page(tmp_path, run("mixed", ["q", "k"], experts=["one", "two", "three", "four"]))
    at = rows.index(["task", "one", "two", "three", "four"])
    assert rows[at + 1 : at + 3] == [["a", "100", "0", "0", "0"], ["b", "0", "100", "0", "0"]]
    assert "Which adapters each task uses" in text
    for unnamed in (run("mixed", ["q"]), run("ranks", ["q"], experts=["one"])):  # units that are not the experts
        assert "Which adapters each task uses" not in page(tmp_path, unnamed)[0]


def test_collapsed_layers_are_named(tmp_path: Path) -> None:
    text, _ = page(tmp_path, run("good", ["q"]), run("bad", ["q", "k"], favourite=True))
    assert "bad: layers that have collapsed: 2." in text
    assert "good: layers" not in text


def test_a_page_without_routed_runs_has_no_word_of_routing(tmp_path: Path) -> None:
    text, _ = page(tmp_path, run("plain", []))
    assert "Agreement:" not in text and "<details>" not in text and "Routing of" not in text


@pytest.mark.parametrize("count", [1, 4, len(plots.COLOURS) + 2])
def test_any_number_of_runs_and_runs_with_other_layers_share_pictures(count: int) -> None:
    runs = [run(f"a_long_name_{number}", ["q", "k", "v"][number % 3 :]) for number in range(count)]
    colours = plots.colours(each.name for each in runs)
    accuracy = {each.name: {task: values["loss"] for task, values in TASKS.items()} for each in runs}
    pictures = [
        plots.loss_curves({each.name: each.history for each in runs}, colours),
        plots.bars(accuracy, "accuracy", colours),
        plots.layer_figures({each.name: each.routing for each in runs}, colours),
    ]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)


def test_a_run_has_one_colour_and_the_base_model_none() -> None:
    names = ["base", *(f"run{number}" for number in range(len(plots.COLOURS)))]
    found = plots.colours(names)
    assert len(set(found.values())) == len(names)
    assert found["base"] == plots.BASE
