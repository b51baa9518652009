"""Tables on the terminal."""

from __future__ import annotations

from typing import Any

import pytest

from moelora.cli.show import routing_table

FIGURES = {"load_entropy": 0.81, "top_share": 0.3, "dead": 0.25, "specialisation": 0.1, "top1": 0.42}
LAYER = {"units": 8, **FIGURES, "token_entropy": 0.07, "agreement": 0.63}


def shown(capsys: pytest.CaptureFixture[str], sites: list[str], collapsed: float = 0.0) -> list[str]:
    routing: dict[str, Any] = {"sites": dict.fromkeys(sites, LAYER), "summary": {**LAYER, "collapsed": collapsed}}
    routing_table(routing if sites else {})
    return capsys.readouterr().out.splitlines()


def cells(lines: list[str], name: str) -> list[str]:
    [line] = [line for line in lines if f" {name} " in line]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_a_row_per_layer_and_their_mean(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"])
    assert "routing, layers of model.layers" in lines[0]
    for name in ("0.mlp.up_proj", "1.mlp.up_proj"):
        assert cells(lines, name) == [name, "8", "0.81", "0.42", "0.25", "0.07", "0.63"]
    assert cells(lines, "mean") == ["mean", "", "0.81", "0.42", "0.25", "0.07", "0.63"]
    assert max(map(len, lines)) <= 92  # a plain terminal shows it without folding names


@pytest.mark.parametrize(
    ("sites", "names"),
    [(["a.b.q"], ["q"]), (["q", "k"], ["q", "k"]), (["a.x.q", "a.y.x.q"], ["x.q", "y.x.q"])],
)
def test_what_all_names_begin_with_is_said_once(
    capsys: pytest.CaptureFixture[str], sites: list[str], names: list[str]
) -> None:
    lines = shown(capsys, sites)
    for name in names:
        assert cells(lines, name)


def test_collapsed_layers_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert "collapsed" not in " ".join(shown(capsys, ["q"]))
    assert shown(capsys, ["q"], 3.0)[-1].startswith("collapsed layers: 3; try losses: {balance: 0.01}")


def test_nothing_routed_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, []) == ["no layer has units to choose between, so there is no routing to show"]
