"""Rows of every known format, detection by columns, and bad rows with their reason."""

from __future__ import annotations

from typing import Any

import pytest

from moelora.core.errors import DataError
from moelora.data.formats import FORMATS, Example, reader

USER = {"role": "user", "content": "q"}
BOT = {"role": "assistant", "content": "a"}


def read(row: dict[str, Any], format: str = "auto", names: list[str] | None = None, **mapping: str) -> list[Example]:
    return reader(list(row), "here", format, mapping, names)(row)


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"messages": [USER, BOT]}, "messages"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca"),
        ({"prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"prompt": [USER], "completion": [BOT]}, "prompt_completion"),
        ({"question": "q", "answer": "a"}, "question_answer"),
        ({"query": "q", "response": "a", "id": "7"}, "question_answer"),
        ({"sentence": "q", "label": "a"}, "text_label"),
        ({"text": "q", "label": "a"}, "text_label"),
    ],
)
def test_each_format_is_known_by_its_columns_and_ends_as_the_same_messages(row: dict[str, Any], format: str) -> None:
    assert reader(list(row), "here", "auto", {}, None).format == format
    assert read(row) == [Example([USER], [BOT])]


def test_every_format_is_covered_above() -> None:
    assert set(FORMATS) == {
        "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "text_label", "text",
    }  # fmt: skip


def test_plain_text_has_no_prompt() -> None:
    assert read({"text": "once upon"}) == [Example([], [], "once upon")]


def test_alpaca_input_and_system_are_kept() -> None:
    [example] = read({"instruction": "add", "input": "1 2", "output": "3", "system": "be brief"})
    assert example.prompt == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "add\n\n1 2"}]


def test_every_assistant_turn_of_a_conversation_is_one_example() -> None:
    more = [{"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2"}]
    first, second = read({"messages": [USER, BOT, *more]})
    assert (first.prompt, first.completion) == ([USER], [BOT])
    assert (second.prompt, second.completion) == ([USER, BOT, more[0]], [more[1]])


def test_a_prompt_of_turns_is_not_trained_on() -> None:
    row = {"prompt": [USER, BOT, USER], "completion": [{"role": "assistant", "content": "z"}]}
    [example] = read(row)
    assert (len(example.prompt), example.completion[0]["content"]) == (3, "z")


def test_labels_get_their_names() -> None:
    assert read({"sentence": "q", "label": 1}, names=["bad", "good"])[0].completion[0]["content"] == "good"
    assert read({"sentence": "q", "label": 1})[0].completion[0]["content"] == "1"
    with pytest.raises(ValueError, match="label 2 has no name"):
        read({"sentence": "q", "label": 2}, names=["bad", "good"])


def test_columns_can_be_named() -> None:
    assert read({"frage": "q", "antwort": "a"}, prompt="frage", completion="antwort") == [Example([USER], [BOT])]


def test_columns_that_fit_nothing_or_too_much_are_errors_that_help() -> None:
    with pytest.raises(DataError, match=r"here: the columns \(foo, bar\) fit no known format.*columns: \{prompt: foo"):
        read({"foo": "q", "bar": "a"})
    with pytest.raises(DataError, match="fit several formats: prompt_completion, question_answer"):
        read({"prompt": "q", "completion": "a", "question": "q", "answer": "a"})
    with pytest.raises(DataError, match="no column 'nope'; the data has foo"):
        read({"foo": "q"}, prompt="nope")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "q", "answer": None}, "column 'answer' is None, expected text"),
        ({"question": " ", "answer": "a"}, "column 'question' is empty"),
        ({"question": "q", "answer": 3}, "column 'answer' is 3, expected text"),
        ({"messages": []}, "expected a list of turns"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "one of human, user, gpt"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"conversations": [{"from": "human"}]}, "'value' as text"),
        ({"sentence": "q", "label": None}, "expected a label"),
    ],
)
def test_a_bad_row_says_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read(row)
