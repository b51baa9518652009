"""Row formats: how a row of a published dataset becomes a prompt and a completion.

Every format ends as chat messages: a prompt (a list of messages) and a completion (one assistant message). A
conversation with several assistant turns gives one example per turn, so each is trained on once. Plain text has no
prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moelora.core.errors import DataError

Message = dict[str, str]
Row = Mapping[str, Any]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True, slots=True)
class Example:
    """One training example: messages, or plain ``text`` without them."""

    prompt: list[Message]
    completion: list[Message]
    text: str | None = None


def _text(row: Row, column: str, empty: bool = False) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise ValueError(f"column '{column}' is {value!r}, expected text")
    if not empty and not value.strip():
        raise ValueError(f"column '{column}' is empty")
    return value


def _pair(question: str, answer: str, system: str | None = None) -> list[Example]:
    first = [{"role": "system", "content": system}] if system else []
    prompt = [*first, {"role": "user", "content": question}]
    return [Example(prompt, [{"role": "assistant", "content": answer}])]


def _turns(messages: list[Message]) -> list[Example]:
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i > 0]
    if not answers:
        raise ValueError("the conversation has no assistant turn after its first message")
    return [Example(messages[:i], [messages[i]]) for i in answers]


def _messages(row: Row, column: str, role: str, content: str) -> list[Example]:
    turns = row.get(column)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"column '{column}' is {turns!r}, expected a list of turns")
    messages = []
    for turn in turns:
        if not isinstance(turn, Mapping) or turn.get(role) not in _ROLES or not isinstance(turn.get(content), str):
            known = ", ".join(_ROLES)
            raise ValueError(f"turn {turn!r} in '{column}': expected '{role}' (one of {known}) and '{content}' as text")
        messages.append({"role": _ROLES[turn[role]], "content": turn[content]})
    return _turns(messages)


def _prompt_completion(row: Row, _: list[str] | None) -> list[Example]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        turns = _messages({"turns": [*prompt, *completion]}, "turns", "role", "content")
        return [example for example in turns if len(example.prompt) >= len(prompt)]
    return _pair(_text(row, "prompt"), _text(row, "completion"))


def _alpaca(row: Row, _: list[str] | None) -> list[Example]:
    more = row.get("input") or ""
    if not isinstance(more, str):
        raise ValueError(f"column 'input' is {more!r}, expected text")
    instruction = _text(row, "instruction")
    return _pair(f"{instruction}\n\n{more}" if more.strip() else instruction, _text(row, "output"), row.get("system"))


def _text_label(row: Row, names: list[str] | None) -> list[Example]:
    label = row.get("label")
    if label is None or isinstance(label, float) or (isinstance(label, str) and not label.strip()):
        raise ValueError(f"column 'label' is {label!r}, expected a label")
    if names is not None and not isinstance(label, str):
        if not 0 <= int(label) < len(names):
            raise ValueError(f"label {label} has no name; label_names has {len(names)} entries")
        label = names[int(label)]
    return _pair(_text(row, "text"), str(label))


@dataclass(frozen=True, slots=True)
class _Format:
    """needs: for each column of the format, the names it goes by; read: a row under the first of those names."""

    needs: dict[str, tuple[str, ...]]
    read: Callable[[Row, list[str] | None], list[Example]]
    optional: tuple[str, ...] = ()


FORMATS = {
    "messages": _Format({"messages": ("messages",)}, lambda r, _: _messages(r, "messages", "role", "content")),
    "sharegpt": _Format(
        {"conversations": ("conversations",)}, lambda r, _: _messages(r, "conversations", "from", "value")
    ),
    "alpaca": _Format({"instruction": ("instruction",), "output": ("output",)}, _alpaca, optional=("input", "system")),
    "prompt_completion": _Format({"prompt": ("prompt",), "completion": ("completion",)}, _prompt_completion),
    "question_answer": _Format(
        {"question": ("question", "query"), "answer": ("answer", "response")},
        lambda r, _: _pair(_text(r, "question"), _text(r, "answer")),
    ),
    "text_label": _Format({"text": ("text", "sentence"), "label": ("label", "labels")}, _text_label),
    "text": _Format({"text": ("text",)}, lambda r, _: [Example([], [], _text(r, "text"))]),
}


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads rows of one file: the format, and the file's column for each of the format's."""

    format: str
    columns: dict[str, str]
    label_names: list[str] | None = None

    def __call__(self, row: Row) -> list[Example]:
        """Examples of one row. Raises ValueError with the reason when the row is bad."""
        own = FORMATS[self.format]
        named = {name: row.get(column) for name, column in self.columns.items()}
        named.update({name: row[name] for name in own.optional if name in row and name not in named})
        return own.read(named, self.label_names)


def reader(columns: list[str], where: str, format: str, mapping: dict[str, str], names: list[str] | None) -> Reader:
    """A reader for rows with ``columns``; ``where`` names them. Raises DataError unless exactly one format fits."""
    unknown = [column for column in mapping.values() if column not in columns]
    if unknown:
        raise DataError(f"{where}: columns: no column '{unknown[0]}'; the data has {', '.join(columns)}")
    candidates = FORMATS if format == "auto" else {format: FORMATS[format]}
    fits: dict[str, dict[str, str]] = {}
    for name, spec in candidates.items():
        known = {*spec.needs, *spec.optional}
        if not mapping.keys() <= known:
            continue
        found = {
            need: mapping.get(need) or next((alias for alias in aliases if alias in columns), None)
            for need, aliases in spec.needs.items()
        }
        found.update({need: mapping[need] for need in spec.optional if need in mapping})
        if None not in found.values():
            fits[name] = {key: column for key, column in found.items() if column is not None}
    if "text_label" in fits:
        fits.pop("text", None)  # a labelled text is not a text to continue
    if len(fits) == 1:
        chosen, own = next(iter(fits.items()))
        return Reader(chosen, own, names)
    have = ", ".join(columns)
    if fits:
        raise DataError(
            f"{where}: the columns ({have}) fit several formats: {', '.join(fits)}; say `format:` in the task"
        )
    wanted = "; ".join(f"{name}: {', '.join(FORMATS[name].needs)}" for name in candidates)
    raise DataError(
        f"{where}: the columns ({have}) fit no known format ({wanted}); name them, for instance "
        f"columns: {{prompt: {columns[0]}, completion: {columns[-1]}}}"
    )
