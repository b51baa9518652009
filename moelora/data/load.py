"""Tasks from files, the hub, or the built-in generators, as datasets of examples."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError

from moelora.core.errors import DataError
from moelora.core.validate import nearest
from moelora.data import builtin
from moelora.data.config import DataConfig, TaskConfig
from moelora.data.formats import Reader, reader
from moelora.data.progress import quiet_if_small

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_TRAIN, _EVAL = ("train",), ("test", "dev", "validation", "valid", "eval")
_MESSAGES = [{"role": Value("string"), "content": Value("string")}]
_FEATURES = {
    "task": Value("string"),
    "task_id": Value("int64"),
    "prompt": _MESSAGES,
    "completion": _MESSAGES,
    "text": Value("string"),
}


@dataclass
class Task:
    """One loaded task. train, eval: columns task, task_id, prompt and completion (messages), text (or null)."""

    name: str
    config: TaskConfig
    train: Dataset
    eval: Dataset | None
    skipped: list[str] = field(default_factory=list)


def load_tasks(config: DataConfig) -> list[Task]:
    """All tasks of a recipe, in order; a task's position is its id. Raises DataError."""
    named = _task_configs(config)
    if not named:
        raise DataError("data: no task; give tasks, root: FOLDER, or builtin: true")
    return [_load_task(name, task, index, config) for index, (name, task) in enumerate(named.items())]


def task_names(config: DataConfig) -> list[str]:
    """The names of a recipe's tasks; a name's position is the task's id. Raises DataError."""
    return list(_task_configs(config))


def _task_configs(config: DataConfig) -> dict[str, TaskConfig]:
    named: dict[str, TaskConfig] = {}
    if config.builtin:
        named.update({name: TaskConfig(path=f"builtin/{name}", metric="exact_match") for name in builtin.TASKS})
    if config.root is not None:
        root = Path(config.root)
        if not root.is_dir():
            raise DataError(f"data.root: no folder {root} (seen from {Path.cwd()})")
        folders = sorted(path for path in root.iterdir() if path.is_dir() and _find(path, _TRAIN))
        if not folders:
            raise DataError(f"data.root: {root} has no subfolder with a train file ({', '.join(_READERS)})")
        named.update({path.name: TaskConfig(path=str(path)) for path in folders})
    for name, task in config.tasks.items():
        if task.path is None:
            if name not in named:
                raise DataError(f"data.tasks.{name}: path is required{nearest(name, named)}")
            task = task.model_copy(update={"path": named[name].path})
        named[name] = task
    return named


def _load_task(name: str, task: TaskConfig, task_id: int, config: DataConfig) -> Task:
    assert task.path is not None
    where = f"data.tasks.{name}"
    rows, eval_rows = task.max_rows or config.max_rows, task.max_eval_rows or config.max_eval_rows
    skipped: list[str] = []
    if task.path.startswith("builtin/"):
        sources = _builtin(task.path.removeprefix("builtin/"), where, rows or 4000, eval_rows or 64)
    else:
        sources = _sources(task, where)
    loaded: list[Dataset | None] = []
    for source, limit in zip(sources, (rows, eval_rows), strict=True):
        if source is None:
            loaded.append(None)
            continue
        raw, origin = source
        if limit is not None and limit < len(raw):
            raw = raw.select(range(limit))
        names = task.label_names or _label_names(raw)
        read = reader(raw.column_names, f"{where} ({origin})", task.format, task.columns, names)
        if read.format == "text" and task.metric == "exact_match":
            raise DataError(f"{where}: metric exact_match needs prompts with answers, and {origin} is plain text")
        loaded.append(_convert(raw, read, name, task_id, origin, config.on_bad_row, skipped))
    train, held_out = loaded
    assert train is not None
    return Task(name, task, train, held_out, skipped)


def _builtin(name: str, where: str, rows: int, eval_rows: int) -> list[tuple[Dataset, str] | None]:
    if name not in builtin.TASKS:
        raise DataError(f"{where}: no built-in task '{name}'{nearest(name, builtin.TASKS)}")
    return [
        (Dataset.from_list(builtin.generate(name, split, size)), f"builtin/{name}, {split}")
        for split, size in (("train", rows), ("test", eval_rows))
    ]


def _sources(task: TaskConfig, where: str) -> list[tuple[Dataset, str] | None]:
    """(train, evaluation or None), each with where it came from."""
    assert task.path is not None
    path = Path(task.path)
    if path.is_dir():
        train, test = _find(path, _TRAIN), _find(path, _EVAL)
        if train is None:
            raise DataError(f"{where}: {path} has no train file ({', '.join('train' + end for end in _READERS)})")
    elif path.suffix in _READERS or path.exists():
        train, test = path, None
    else:
        return _hub(task, where)
    if task.eval_path is not None:
        test = Path(task.eval_path)
    return [_read_file(train, where), None if test is None else _read_file(test, where)]


def _find(folder: Path, stems: Sequence[str]) -> Path | None:
    return next((p for stem in stems for end in _READERS if (p := folder / f"{stem}{end}").is_file()), None)


def _read_file(path: Path, where: str) -> tuple[Dataset, str]:
    if not path.is_file():
        raise DataError(f"{where}: no file {path} (seen from {Path.cwd()})")
    if path.suffix not in _READERS:
        raise DataError(f"{where}: {path}: cannot read '{path.suffix}' files; known: {', '.join(_READERS)}")
    options: dict[str, Any] = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
    try:
        with quiet_if_small(path.stat().st_size // 500):
            data = datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split="train", **options)
    except (DatasetGenerationError, ValueError) as error:
        raise DataError(f"{where}: {_what_is_wrong(path) or f'{path}: {error.__cause__ or error}'}") from None
    return data, str(path)


def _hub(task: TaskConfig, where: str) -> list[tuple[Dataset, str] | None]:
    def read(split: str) -> tuple[Dataset, str]:
        data = datasets.load_dataset(str(task.path), task.name, split=split, revision=task.revision)
        return data, f"{task.path}, {split}"

    try:
        return [read(task.split), read(task.eval_split) if task.eval_split else None]
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, ValueError) as error:
        raise DataError(
            f"{where}: '{task.path}' is no local file or folder (seen from {Path.cwd()}), and the hub says: {error}"
        ) from None


def _label_names(data: Dataset) -> list[str] | None:
    for column in ("label", "labels"):
        feature = data.features.get(column)
        if isinstance(feature, datasets.ClassLabel):
            return list(feature.names)
    return None


def _convert(
    data: Dataset, read: Reader, task: str, task_id: int, origin: str, on_bad_row: str, skipped: list[str]
) -> Dataset:
    def rows(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {column: [] for column in _FEATURES}
        for position, index in enumerate(indices):
            try:
                examples = read({column: values[position] for column, values in batch.items()})
            except ValueError as error:
                # Finding a line reads the file, so of many skipped rows only the first are placed exactly.
                place = _place(origin, index) if len(skipped) < 20 else f"{origin}, row {index + 1}"
                message = f"{place}: {error}"
                if on_bad_row == "error":
                    raise DataError(f"{message}; mend the row, or set data.on_bad_row: skip") from None
                skipped.append(message)
                continue
            for example in examples:
                for column, value in zip(
                    _FEATURES, (task, task_id, example.prompt, example.completion, example.text), strict=True
                ):
                    out[column].append(value)
        return out

    with quiet_if_small(len(data)):
        converted = data.map(
            rows,
            batched=True,
            with_indices=True,
            remove_columns=data.column_names,
            features=Features(_FEATURES),
            load_from_cache_file=False,
            desc=f"Reading {task}",
        )
    if not len(converted):
        raise DataError(f"data.tasks.{task}: {origin} has no usable row ({len(skipped)} skipped)")
    return converted


def _place(origin: str, index: int) -> str:
    """``file, line N`` of row ``index`` where the format has lines."""
    path = Path(origin)
    if path.suffix in (".jsonl", ".csv", ".tsv") and path.is_file():
        lines = list(_line_numbers(path))
        if index < len(lines):
            return f"{path}, line {lines[index]}"
    return f"{origin}, row {index + 1}"


def _line_numbers(path: Path) -> Iterator[int]:
    with open(path, encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            yield from (number for number, line in enumerate(file, 1) if line.strip())
        else:
            table = csv.reader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            next(table, None)
            yield from (table.line_num for row in table if row)


def _what_is_wrong(path: Path) -> str | None:
    """The first line of a JSON file that does not parse."""
    if path.suffix not in (".json", ".jsonl"):
        return None
    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        json.loads(text)
        return None
    except json.JSONDecodeError as whole:
        if path.suffix == ".json" and text.lstrip().startswith("["):
            return f"{path}, line {whole.lineno}: not JSON: {whole.msg}"
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                json.loads(line)
            except json.JSONDecodeError as error:
                return f"{path}, line {number}: not JSON: {error.msg}"
    return None
