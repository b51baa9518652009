"""Mixing: shares, repetition, and nothing lost at the defaults."""

from __future__ import annotations

from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from moelora.data.config import TaskConfig
from moelora.data.load import Task
from moelora.data.mixture import mix, probabilities


def task(name: str, size: int, weight: float = 1.0) -> Task:
    rows = Dataset.from_dict({"task": [name] * size, "row": list(range(size))})
    return Task(name, TaskConfig(weight=weight), rows, None)


def test_at_the_defaults_every_row_comes_once() -> None:
    mixed = mix([task("a", 30), task("b", 5)], temperature=1.0, seed=0)
    assert Counter(mixed["task"]) == {"a": 30, "b": 5}
    assert len({(row["task"], row["row"]) for row in mixed}) == 35


def test_weights_and_temperature_set_the_shares_and_rows_repeat_evenly() -> None:
    mixed = mix([task("a", 90), task("b", 10)], temperature=1e9, seed=0)
    assert Counter(mixed["task"]) == {"a": 50, "b": 50}
    times = Counter(row["row"] for row in mixed if row["task"] == "b")
    assert set(times.values()) == {5}
    assert max(Counter(row["row"] for row in mixed if row["task"] == "a").values()) == 1
    assert Counter(mix([task("a", 50, 3.0), task("b", 50)], 1.0, 0)["task"]) == {"a": 75, "b": 25}


def test_the_order_is_a_function_of_the_seed() -> None:
    parts = [task("a", 20), task("b", 20)]
    assert mix(parts, 1.0, 3)["row"] == mix(parts, 1.0, 3)["row"]
    assert mix(parts, 1.0, 3)["row"] != mix(parts, 1.0, 4)["row"]


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=6), st.floats(0.2, 50))
def test_probabilities_add_up_and_follow_the_formula(sizes: list[int], temperature: float) -> None:
    shares = probabilities(sizes, [1.0] * len(sizes), temperature)
    assert sum(shares) == pytest.approx(1)
    ratio = (sizes[0] / sizes[-1]) ** (1 / temperature)
    assert shares[0] / shares[-1] == pytest.approx(ratio, rel=1e-6)
