"""The ``data:`` section of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moelora.core.validate import Strict

Positive = Annotated[int, Field(ge=1)]
Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "text_label", "text"]


class TaskConfig(Strict):
    """One task.

    path: a file (.json, .jsonl, .csv, .tsv, .parquet), a folder with ``train.*`` and ``test.*`` (or dev, validation),
    a hub
        dataset id, or ``builtin/NAME``.
    split, name, revision: of a hub dataset. eval_path, eval_split: where the evaluation rows are, if not found beside.
    format: how rows are read; ``auto`` decides by their columns. columns: the format's column names to the file's, for
        instance ``{prompt: question_text, completion: gold}``.
    label_names: texts for the labels 0, 1, ... of ``text_label`` rows.
    weight: relative sampling weight. metric: ``exact_match`` generates answers at evaluation and compares them.
    """

    path: str | None = None
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    eval_path: str | None = None
    eval_split: str | None = None
    format: Format = "auto"
    columns: dict[str, str] = {}
    label_names: list[str] | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    metric: Literal["none", "exact_match"] = "none"
    max_rows: Positive | None = None
    max_eval_rows: Positive | None = None


class DataConfig(Strict):
    """All tasks and how they are mixed.

    root: a folder whose subfolders are tasks, added to ``tasks`` (an entry there with the same name refines it).
    builtin: add the generated tasks. temperature: tasks are sampled in proportion to weight * rows^(1/temperature).
    chat_template: render with the tokenizer's template; ``auto`` when it has one. on_bad_row: stop, or skip and count.
    max_rows, max_eval_rows: per task, where the task does not say.
    """

    root: str | None = None
    tasks: dict[str, TaskConfig] = {}
    builtin: bool = False
    temperature: Annotated[float, Field(gt=0)] = 1.0
    chat_template: bool | Literal["auto"] = "auto"
    on_bad_row: Literal["error", "skip"] = "error"
    max_rows: Positive | None = None
    max_eval_rows: Positive | None = None
