"""The generated tasks: right answers, disjoint splits, reproducible."""

from __future__ import annotations

import pytest

from moelora.data.builtin import TASKS, generate


def test_there_are_enough_tasks_and_they_conflict_on_the_same_input() -> None:
    digits = [3, 1, 4, 1, 5]
    answers = {name: answer(digits) for name, answer in TASKS.items()}
    assert len(TASKS) >= 8
    assert len(set(answers.values())) >= 7  # count and largest may agree on some inputs
    assert answers["reverse"] == "5 1 4 1 3"
    assert answers["sort"] == "1 1 3 4 5"
    assert answers["shift"] == "4 2 5 2 6"
    assert answers["rotate"] == "1 4 1 5 3"
    assert answers["count"] == "5"
    assert answers["sum"] == "14"
    assert answers["largest"] == "5"
    assert answers["format"] == "[3, 1, 4, 1, 5]"


def test_no_input_is_both_trained_and_tested_on() -> None:
    def inputs(split: str) -> set[str]:
        return {row["prompt"].split(": ")[1] for task in TASKS for row in generate(task, split, 400)}

    assert not inputs("train") & inputs("test")


def test_the_same_arguments_give_the_same_rows_and_another_seed_gives_others() -> None:
    assert generate("sort", "train", 20) == generate("sort", "train", 20)
    assert generate("sort", "train", 20) != generate("sort", "train", 20, seed=1)


def test_an_unknown_task_is_an_error() -> None:
    with pytest.raises(KeyError):
        generate("juggle", "train", 1)
