"""docs/methods.md is what the method files say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from moelora.cli.catalogue import catalogue, methods_page
from moelora.core.methods import Methods
from moelora.model.config import resolve

TOP = Path(__file__).parents[2]
ENTRIES = catalogue()
SAID = re.compile(r"`(\w+: .+?)`")


def test_the_page_is_up_to_date() -> None:
    page = (TOP / "docs" / "methods.md").read_text(encoding="utf-8")
    assert page == methods_page(), "run: moelora methods --markdown > docs/methods.md"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry['axis']}-{entry['name']}")
class TestEntry:
    def test_says_where_it_is_from(self, entry: dict[str, str]) -> None:
        assert re.search(r"arXiv \d{4}\.\d{5}|[Bb]aseline", entry["paper"] + entry["summary"])
        assert (TOP / "moelora" / entry["file"]).is_file() and (TOP / entry["test"]).is_file()

    def test_its_recipe_line_is_a_recipe(self, entry: dict[str, str]) -> None:
        config: dict[str, Any] = {}
        for line in SAID.findall(entry["recipe"]):
            for key, value in yaml.safe_load(line).items():
                config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
        named = "router" if entry["axis"] == "routers" else entry["axis"]
        assert named in config or entry["name"] in config
        if named == "optim":
            assert Methods().check("optim", config["optim"])["name"] == entry["name"]
            return
        config = {
            key: value
            for key, value in config.items()
            if key in ("experts", "router", "init", "ranks", "targets", "losses")
        }
        filled = resolve(_completed(config, entry), Methods())
        methods = (filled.router, filled.init, filled.ranks, filled.targets, filled.experts.method())
        assert entry["name"] in (*(method["name"] for method in methods), *filled.losses)


def _completed(config: dict[str, Any], entry: dict[str, str]) -> dict[str, Any]:
    """The sections that a line leaves out: a router that scores its units, and enough experts."""
    if "router" not in config:
        config = {**config, "router": "comol" if entry["name"] in ("core", "core_orthogonality") else "meteora"}
    experts = config.get("experts", {})
    single = config["router"] in ("single", {"name": "single"})
    if entry["name"] == "core_orthogonality":
        experts = {"name": "core", **experts}
    return {**config, "experts": {"num_experts": 1 if single else 8, **experts}}
