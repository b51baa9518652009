"""docs/composition.md says of every pair of methods what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.composition import Config, outcome, pairs

PAGE = Path(__file__).parents[2] / "docs" / "composition.md"
PAIRS = list(pairs())
MAKE = "run: python -m tests.docs.composition > docs/composition.md"


def said(page: str) -> dict[tuple[tuple[str, ...], tuple[str, str]], str]:
    """(axes, names) to the reason, or nothing, as the page has them."""
    found = {}
    for section in page.split("\n## ")[1:]:
        head, *lines = section.splitlines()
        axes = tuple(head.split(" x "))
        reasons = dict(match.groups() for line in lines if (match := re.match(r"(\d+)\. (.*)", line)))
        rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        for name, *cells in rows[2:]:
            for column, cell in zip(rows[0][1:], cells, strict=True):
                found[axes, (name, column)] = reasons.get(cell, "")
    return found


def test_the_page_has_every_pair() -> None:
    assert said(PAGE.read_text(encoding="utf-8")).keys() == {(axes, names) for axes, names, _ in PAIRS}, MAKE


def agrees(axes: tuple[str, str], names: tuple[str, str], config: Config) -> None:
    expected = said(PAGE.read_text(encoding="utf-8"))[axes, names]
    assert outcome(axes, names, config) == expected, f"{names}: {MAKE}"


@pytest.mark.parametrize(("axes", "names", "config"), PAIRS[::23], ids=lambda value: str(value)[:60])
def test_some_pairs_are_as_the_page_says(axes: tuple[str, str], names: tuple[str, str], config: Config) -> None:
    agrees(axes, names, config)


@pytest.mark.full
def test_all_pairs_are_as_the_page_says() -> None:
    for axes, names, config in PAIRS:
        agrees(axes, names, config)
