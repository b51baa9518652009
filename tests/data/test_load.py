"""Tasks from files: formats on disk, splits, limits, and bad input with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moelora.core.errors import DataError
from moelora.data.config import DataConfig, TaskConfig
from moelora.data.load import load_tasks

ROWS = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(5)]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        lines = [separator.join(rows[0]), *(separator.join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_file_format_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"rows{ending}", ROWS)
    [task] = load_tasks(DataConfig(tasks={"t": TaskConfig(path=str(path))}))
    assert [row["completion"][0]["content"] for row in task.train] == [f"a{i}" for i in range(5)]
    assert set(task.train["task"]) == {"t"}
    assert task.eval is None


def test_a_root_is_a_folder_of_tasks_and_named_tasks_refine_it(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / name / "train.jsonl", ROWS)
        write(tmp_path / name / "test.jsonl", ROWS[:3])
    write(tmp_path / "c" / "train.tsv", [{"sentence": "s", "label": 1}])
    write(tmp_path / "c" / "dev.tsv", [{"sentence": "s", "label": 0}])
    (tmp_path / "notes").mkdir()
    config = DataConfig(root=str(tmp_path), tasks={"c": TaskConfig(label_names=["no", "yes"])}, max_eval_rows=2)
    tasks = load_tasks(config)
    assert [(task.name, set(task.train["task_id"])) for task in tasks] == [("a", {0}), ("b", {1}), ("c", {2})]
    assert [len(task.eval or []) for task in tasks] == [2, 2, 1]
    assert tasks[2].train[0]["completion"][0]["content"] == "yes"


def test_builtin_tasks_come_with_a_test_split() -> None:
    tasks = load_tasks(DataConfig(builtin=True, max_rows=7, max_eval_rows=3))
    assert {(len(task.train), len(task.eval or [])) for task in tasks} == {(7, 3)}
    assert {task.config.metric for task in tasks} == {"exact_match"}


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
def test_a_bad_row_stops_with_file_and_line_or_is_skipped_and_counted(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"rows{ending}", [*ROWS[:2], {"question": "q", "answer": ""}, *ROWS[2:]])
    line = 3 if ending == ".jsonl" else 4
    tasks = {"t": TaskConfig(path=str(path))}
    with pytest.raises(DataError, match=rf"rows{ending}, line {line}: column 'answer' is .*on_bad_row: skip"):
        load_tasks(DataConfig(tasks=tasks))
    [task] = load_tasks(DataConfig(tasks=tasks, on_bad_row="skip"))
    assert len(task.train) == 5
    assert [message.split(":")[0] for message in task.skipped] == [f"{path}, line {line}"]


def test_a_row_of_a_json_list_is_named_by_its_number(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", [*ROWS[:1], {"question": "q", "answer": None}])
    with pytest.raises(DataError, match=r"rows\.json, row 2: column 'answer' is None"):
        load_tasks(DataConfig(tasks={"t": TaskConfig(path=str(path))}))


def test_broken_json_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n{"question": \n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: not JSON"):
        load_tasks(DataConfig(tasks={"t": TaskConfig(path=str(path))}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(), "no task; give tasks, root"),
        (DataConfig(root="nowhere"), "no folder nowhere"),
        (DataConfig(tasks={"t": TaskConfig(path="nowhere.json")}), r"data\.tasks\.t: no file nowhere\.json"),
        (DataConfig(tasks={"t": TaskConfig()}), "path is required"),
        (DataConfig(tasks={"t": TaskConfig(path="builtin/revers")}), "did you mean 'reverse'"),
    ],
)
def test_missing_input_is_an_error_that_names_it(config: DataConfig, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_tasks(config)


def test_a_file_without_usable_rows_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": "q", "answer": ""}])
    with pytest.raises(DataError, match=r"no usable row \(1 skipped\)"):
        load_tasks(DataConfig(tasks={"t": TaskConfig(path=str(path))}, on_bad_row="skip"))


def test_an_unknown_file_type_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"cannot read '\.xlsx' files"):
        load_tasks(DataConfig(tasks={"t": TaskConfig(path=str(tmp_path / "rows.xlsx"))}))


def test_exact_match_of_plain_text_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "once upon a time"}])
    with pytest.raises(DataError, match=r"exact_match needs prompts with answers, and .*rows\.jsonl is plain text"):
        load_tasks(DataConfig(tasks={"t": TaskConfig(path=str(path), metric="exact_match")}))
