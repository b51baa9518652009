"""docs/composition.md: every method of every axis with every method of every other one, tried on a tiny model.

    python -m tests.docs.composition > docs/composition.md

A pair composes when a model with both is adapted, takes one training step as the trainer takes it, is saved, and comes
back from the folder bit for bit. What is refused is refused with a message; the page shows it.
"""

from __future__ import annotations

import copy
import itertools
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

import moelora
from moelora.cli.catalogue import catalogue
from moelora.core.errors import MoeloraError
from moelora.core.methods import AXES, Methods
from moelora.core.step import Now
from moelora.model.config import resolve, sketch
from moelora.train.engine import Engine
from moelora.train.stepping import Stepping
from tests import tiny

SECTIONS = {axis: "router" if axis == "routers" else axis for axis in AXES}
SAID = re.compile(r"`(\w+: .+?)`")
DEFAULTS = ("full", "plain", "named")
"""Methods that change nothing, and need no table."""

Config = dict[str, Any]


def methods() -> dict[str, dict[str, Config]]:
    """By axis and name: a small configuration that has the method, and what else it needs."""
    found: dict[str, dict[str, Config]] = {axis: {} for axis in AXES}
    for entry in catalogue():
        axis, name = entry["axis"], entry["name"]
        if name in DEFAULTS:
            continue
        config: Config = {}
        for line in SAID.findall(entry["recipe"]):
            config = merged(config, yaml.safe_load(line))
        if axis == "routers":
            config = {key: value for key, value in tiny.METHODS[name].items() if key in ("router", "experts", "init")}
        own = {key: value for key, value in config.items() if key in SECTIONS.values()}
        found[axis][name] = named({**own, SECTIONS[axis]: own.get(SECTIONS[axis], {"name": name})})
    return found


def named(config: Config) -> Config:
    """Methods given by their name alone, as mappings."""
    return {key: {"name": value} if isinstance(value, str) else value for key, value in config.items()}


def merged(one: Config, other: Config) -> Config:
    """Sections of both; where both have one, the keys of both."""
    sections = {**one}
    for key, value in other.items():
        both = isinstance(value, Mapping) and isinstance(sections.get(key), Mapping)
        sections[key] = {**sections[key], **value} if both else value
    return sections


def pair(axes: tuple[str, str], names: tuple[str, str], known: dict[str, dict[str, Config]]) -> Config:
    """A small model's configuration with both methods; each brings along what it needs of the other axes."""
    one, other = (copy.deepcopy(known[axis][name]) for axis, name in zip(axes, names, strict=True))
    config: Config = {"router": {"name": "softmax"}, "experts": {"num_experts": 4}}
    for given in (one, other):
        config = {**config, **{k: v for k, v in given.items() if k not in [SECTIONS[axis] for axis in axes]}}
    for axis, given in zip(axes, (one, other), strict=True):
        config[SECTIONS[axis]] = given[SECTIONS[axis]]
    experts = {key: value for key, value in config["experts"].items() if key != "adapters"}
    ranks = 12 if "ranks" in axes else 4  # enough to share out
    if "routers" in axes:  # sizes that the router asks for
        sizes = known["routers"][names[axes.index("routers")]]["experts"]
        experts = {**experts, "num_experts": 1, **sizes}
        if "experts" in axes:
            experts["name"] = names[axes.index("experts")]
    else:
        count = experts.get("num_experts", 4)
        experts = {**experts, "num_experts": min(4, count), "r": ranks, "lora_alpha": 8}
    if "ranks" in axes:
        experts["r"] = max(ranks, experts["r"])
    if config["router"]["name"] == "single":
        experts["num_experts"] = 1
    if "localised_balance" in config.get("losses", {}):  # a type for every expert
        config["losses"]["localised_balance"]["expert_types"] = [e % 2 for e in range(experts.get("num_experts", 1))]
        config["losses"]["localised_balance"]["task_types"] = [0, 0, 0]
    if config.get("targets", {}).get("name") == "flexora":
        config["targets"] = {**config["targets"], "steps": 2, "validation": 1}
    return {**config, "experts": experts}


def try_pair(config: Config) -> str:
    """Why a configuration is refused, or nothing: then it trains, saves and comes back."""
    config = dict(config)
    optim = config.pop("optim", {"name": "plain"})
    around = tiny.router_of(config["router"]["name"]).around if "router" in config else "linear"
    config["target_modules"] = tiny.FFN_TARGETS["llama"] if around == "ffn" else tiny.TARGETS["llama"]
    torch.manual_seed(0)
    try:
        batches = [tiny.batch(rows=8, seed=seed) for seed in range(2)]  # for initialisers that look at data
        method = Methods().build("optim", optim)
        method.check(sketch(resolve(config, Methods()), Methods())[0][1])
        model: Any = moelora.adapt(tiny.llama(), config, verbose=False, batches=batches)
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            return "nothing is left to train"
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        stepping = Stepping(model.train(), Engine(model, model, optimizer), method)
    except MoeloraError as error:
        return str(error)
    for step in range(2):
        now = Now(step, 2, 1e-2)
        stepping.begin(now)
        model(**tiny.given()).loss.backward()
        stepping.before(now)
        optimizer.step()
        stepping.after(now)
        optimizer.zero_grad()
    assert all(torch.isfinite(p).all() for p in trained), config
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        moelora.save(model, Path(folder) / "out")
        again: Any = moelora.load(tiny.llama(), Path(folder) / "out").eval()
        given = tiny.unlabelled(tiny.given())
        assert torch.equal(again(**given).logits, model.eval()(**given).logits), config
    return ""


def pairs() -> Iterator[tuple[tuple[str, str], tuple[str, str], Config]]:
    """(axes, names, configuration) of every pair."""
    known = methods()
    for one, other in itertools.combinations(AXES, 2):
        for names in itertools.product(known[one], known[other]):
            yield (one, other), names, pair((one, other), names, known)


def outcome(axes: tuple[str, str], names: tuple[str, str], config: Config) -> str:
    """What the page says of a pair: nothing, or the reason without the names of the two."""
    reason = try_pair(config)
    for axis, name in zip(axes, names, strict=True):
        reason = re.sub(rf"'{name}'|(?<={axis}\.){name}\b|(?<=\b{axis} ){name}\b", "...", reason)
    return reason


def page() -> str:
    """docs/composition.md."""
    tables: dict[tuple[str, str], dict[tuple[str, str], str]] = defaultdict(dict)
    for axes, names, config in tqdm(list(pairs()), "Pairs", file=sys.stderr):
        tables[axes][names] = outcome(axes, names, config)
    count = sum(len(table) for table in tables.values())
    refused = sum(bool(reason) for table in tables.values() for reason in table.values())
    lines = [
        "# What composes with what",
        "",
        f"Every method of an axis with every method of the others: {count} pairs. {count - refused} compose, {refused} "
        "are refused by name, before training. Made by `python -m tests.docs.composition`, which adapts a tiny model "
        "with both, takes two training steps, saves it, loads it and compares bit for bit.",
        "",
        "`+` composes; a number is the reason below the table, where ... is the method of the row or the column.",
        "",
    ]
    for (one, other), table in tables.items():
        rows, columns = (list(dict.fromkeys(names[side] for names in table)) for side in (0, 1))
        reasons = {reason: str(i + 1) for i, reason in enumerate(dict.fromkeys(r for r in table.values() if r))}
        lines += [f"## {one} x {other}", "", f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        for row in rows:
            cells = [reasons.get(table[row, column], "+") for column in columns]
            lines.append(f"| **{row}** | {' | '.join(cells)} |")
        lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items()), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
