"""A run from recipe to report, and what its folder is good for afterwards."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import moelora
from moelora.core.errors import ConfigError, MoeloraError, OutputError
from moelora.recipe import read_recipe
from moelora.train.run import Result, load_base, train
from moelora.train.use import Chat, evaluate_folder

FAST = [
    "data.builtin=false",
    "data.tasks={reverse: {path: builtin/reverse, metric: exact_match}, count: {path: builtin/count}}",
    "data.max_rows=300", "data.max_eval_rows=8", "training.per_device_train_batch_size=16",
    "training.disable_tqdm=true", "adapter.target_modules=[q_proj, v_proj, down_proj]",
]  # fmt: skip


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    out = tmp_path_factory.mktemp("run") / "smora"
    recipe = read_recipe("smora", [*FAST, "training.max_steps=30", f"training.output_dir={out}"])
    return train(recipe, evaluate_base=True)


def test_training_helps_on_every_task(result: Result) -> None:
    assert result.base is not None
    for task, base in result.base.items():
        assert result.summary["tasks"][task]["loss"] < 0.5 * base["loss"]
    assert result.summary["tasks"]["count"]["accuracy"] is None
    assert result.summary["tasks"]["reverse"]["accuracy"] is not None
    assert result.summary["trainable_parameters"] == sum(
        p.numel() for p in result.model.parameters() if p.requires_grad
    )


def test_the_folder_holds_everything(result: Result) -> None:
    assert json.loads((result.out / "summary.json").read_text()) == result.summary
    names = {path.name for path in result.out.iterdir()}
    assert {"moelora.json", "router.safetensors", "experts", "README.md", "recipe.yaml", "report.html"} <= names
    history = json.loads((result.out / "history.json").read_text())
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < losses[0]
    assert list((result.out / "runs").rglob("events.*")), "TensorBoard is on by default"


def test_the_report_is_one_self_contained_page(result: Result) -> None:
    page = (result.out / "report.html").read_text(encoding="utf-8")
    sources: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            sources.extend(value or "" for name, value in attrs if name in ("src", "href"))

    Reader().feed(page)
    assert len(sources) >= 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for word in ("reverse", "Routing of smora", "Load and entropy per layer", "top_k: 8"):
        assert word in page


def test_another_process_loads_the_very_same_model(result: Result, tmp_path: Path) -> None:
    prompt = "<|user|>reverse: 1 2 3<|end|><|assistant|>"
    batch = result.tokenizer(prompt, return_tensors="pt")
    result.model.eval()
    with torch.no_grad():
        logits = result.model(**batch).logits
    generated = result.model.generate(**batch, max_new_tokens=8, do_sample=False)
    torch.save({"logits": logits, "generated": generated}, tmp_path / "before.pt")
    program = f"""
import torch, moelora
from moelora.recipe import Recipe
from moelora.train.run import load_base
torch.set_num_threads(1)
model, tokenizer = load_base(Recipe())
moelora.load(model, {str(result.out)!r}).eval()
before = torch.load({str(tmp_path / "before.pt")!r})
batch = tokenizer({prompt!r}, return_tensors="pt")
with torch.no_grad():
    assert torch.equal(model(**batch).logits, before["logits"])
assert torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False), before["generated"])
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_evaluating_the_folder_gives_the_run_s_numbers(result: Result) -> None:
    before = {path: path.stat().st_mtime_ns for path in result.out.rglob("*")}
    found = evaluate_folder(result.out)
    assert found["tasks"] == result.summary["tasks"]
    assert found["routing"] == result.routing
    assert {path: path.stat().st_mtime_ns for path in result.out.rglob("*")} == before


def test_chat_answers_and_remembers(result: Result) -> None:
    chat = Chat(result.out, max_new_tokens=12)
    first = chat.answer("count: 4 5 6")
    assert first == Chat(result.out, max_new_tokens=12).answer("count: 4 5 6")
    chat.answer("count: 1 2")
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] * 2


def test_a_second_run_into_the_same_folder_is_refused_and_resume_goes_on(result: Result) -> None:
    recipe = read_recipe("smora", [*FAST, "training.max_steps=30", f"training.output_dir={result.out}"])
    with pytest.raises(OutputError, match="holds a run already; add --resume"):
        train(recipe)


def test_interrupted_runs_resume_from_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "run"
    steps = [*FAST, "training.save_steps=2", "training.eval_strategy=no", f"training.output_dir={out}"]
    train(read_recipe("single", [*steps, "training.max_steps=4"]))
    (out / "checkpoint-9").mkdir()  # cut off while it was written
    resumed = train(read_recipe("single", [*steps, "training.max_steps=6"]), resume=True)
    logged = [row["step"] for row in resumed.history if "loss" in row or "train_runtime" in row]
    assert resumed.summary["steps"] == 6
    assert min(logged) > 4


def test_a_resumed_run_saves_as_often_as_it_is_told_now(tmp_path: Path) -> None:
    out = tmp_path / "run"
    steps = [*FAST, "training.eval_strategy=no", "training.save_total_limit=9", f"training.output_dir={out}"]
    train(read_recipe("single", [*steps, "training.save_steps=2", "training.max_steps=2"]))
    train(read_recipe("single", [*steps, "training.save_steps=3", "training.max_steps=7"]), resume=True)
    assert {path.name for path in out.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (2, 3, 6, 7)}


def test_a_run_that_was_killed_after_its_last_step_takes_no_other(tmp_path: Path) -> None:
    out = tmp_path / "run"
    steps = ["training.max_steps=3", "training.save_steps=1", "training.eval_strategy=no"]
    recipe = read_recipe("single", [*FAST, *steps, f"training.output_dir={out}"])
    train(recipe)
    trained = {path: path.read_bytes() for path in out.glob("experts/*/*")}
    (out / "summary.json").unlink()
    (out / "moelora.json").unlink()
    resumed = train(recipe, resume=True)
    assert resumed.summary["steps"] == 3 and (out / "moelora.json").is_file()
    assert {path: path.read_bytes() for path in out.glob("experts/*/*")} == trained
    assert not (out / "checkpoint-4").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["adapter.target_modules=[q_prj]"], "'q_prj' matches no layer; did you mean 'q_proj'"),
        (["data.tasks={a: {path: nowhere.json}}"], "no file nowhere.json"),
        (["base_model=./nowhere"], "base_model './nowhere'"),
        (
            ["adapter.router=meteora", "adapter.experts.num_experts=2", "adapter.losses={supervised_gate: 1}",
             "data.builtin=true"],
            "8 tasks, but num_experts is 2",
        ),
    ],
)  # fmt: skip
def test_bad_input_writes_nothing(tmp_path: Path, changes: list[str], message: str) -> None:
    out = tmp_path / "out"
    base = ["data.builtin=false", "data.tasks={reverse: {path: builtin/reverse}}", "data.max_rows=8"]
    with pytest.raises(MoeloraError, match=message):
        train(read_recipe("smora", [*base, f"training.output_dir={out}", *changes]))
    assert not out.exists()


def test_someone_else_s_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=r"holds files that no run wrote \(thesis.txt\)"):
        train(read_recipe("smora", [f"training.output_dir={tmp_path}"]))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def untrained(*_: object) -> None:
    raise AssertionError("training began")


def refused(path: Path, *_: object, **__: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


def test_a_folder_that_cannot_be_made_is_an_error_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moelora.train.trainer.MoeLoraTrainer.train_guarded", untrained)
    (tmp_path / "file").write_text("mine")
    below = tmp_path / "file" / "run"
    with pytest.raises(OutputError, match=rf"^training.output_dir {below}: cannot be used: Not a directory; choose"):
        train(read_recipe("single", [*FAST, f"training.output_dir={below}"]))
    assert (tmp_path / "file").read_text() == "mine"
    monkeypatch.setattr(Path, "mkdir", refused)
    out = tmp_path / "run"
    with pytest.raises(
        OutputError, match=rf"^training.output_dir {out}: cannot be used: Read-only file system; choose"
    ):
        train(read_recipe("single", [*FAST, f"training.output_dir={out}"]))


def test_a_folder_that_is_read_only_by_now_is_an_error_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    recipe = read_recipe("single", [*FAST, "training.max_steps=1", f"training.output_dir={out}"])
    train(recipe)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr("moelora.train.trainer.MoeLoraTrainer.train_guarded", untrained)
    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(
        OutputError, match=rf"^training.output_dir {out}: cannot be used: Read-only file system; choose"
    ):
        train(recipe, resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_disk_that_is_full_at_the_end_does_not_lose_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("moelora.train.run.write_report", full)
    out = tmp_path / "out"
    with pytest.raises(OutputError, match=rf"{out}: cannot be used: No space left on device"):
        train(read_recipe("single", [*FAST, "training.max_steps=1", f"training.output_dir={out}"]))
    moelora.load(load_base(read_recipe("single"))[0], out)


def test_a_run_that_was_killed_as_it_began_is_begun_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / ".recipe.yaml.partial").mkdir(parents=True)
    (out / ".recipe.yaml.partial" / "recipe.yaml").write_text("base_model: moe")
    recipe = read_recipe("single", [*FAST, "training.max_steps=1", f"training.output_dir={out}"])
    with pytest.raises(OutputError, match="nothing to resume; run without --resume first"):
        train(recipe, resume=True)
    assert train(recipe).summary["steps"] == 1
    assert not (out / ".recipe.yaml.partial").exists()


def test_skipped_rows_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = '{"question": "q", "answer": "a"}\n' * 8 + '{"question": "q", "answer": ""}\n'
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    changes = [
        "data.builtin=false", f"data.tasks={{a: {{path: {tmp_path / 'rows.jsonl'}}}}}", "data.on_bad_row=skip",
        f"training.output_dir={tmp_path / 'out'}", "training.max_steps=1", "training.disable_tqdm=true",
    ]  # fmt: skip
    result = train(read_recipe("single", changes))
    assert result.summary["skipped_rows"] == 1
    assert "a: skipped 1 bad rows; the first" in capsys.readouterr().out


def test_a_base_model_that_is_not_there_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"base_model '\./nowhere'"):
        load_base(read_recipe("smora", ["base_model=./nowhere"]))


def test_the_tiny_base_is_small_and_knows_its_template() -> None:
    model, tokenizer = load_base(read_recipe("smora"))
    assert 1e6 < model.num_parameters() < 3e6
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|user|>hi<|end|><|assistant|>"
    assert isinstance(moelora.__version__, str)


def test_a_worker_that_is_killed_in_the_last_evaluation_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr("moelora.train.trainer.MoeLoraTrainer.evaluate", killed)
    out = tmp_path / "out"
    steps = ["training.max_steps=1", "training.save_strategy=steps", "training.save_steps=1"]
    with pytest.raises(MoeloraError, match=r"worker was killed .*the newest is .*checkpoint-1"):
        train(read_recipe("single", [*FAST, *steps, "training.eval_strategy=no", f"training.output_dir={out}"]))


def test_a_failing_evaluation_does_not_lose_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("evaluation broke")

    monkeypatch.setattr("moelora.train.trainer.MoeLoraTrainer.evaluate", fail)
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="evaluation broke"):
        train(read_recipe("single", [*FAST, "training.max_steps=1", f"training.output_dir={out}"]))
    moelora.load(load_base(read_recipe("single"))[0], out)
