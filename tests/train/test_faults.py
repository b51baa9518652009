"""What goes wrong in a run, on one process and on many: numbers that are not finite, SIGTERM, a killed process, a
killed data-loader worker, a folder that becomes read-only."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from moelora.core.errors import ConfigError, MoeloraError, OutputError
from moelora.recipe import read_recipe
from moelora.train import run as running
from moelora.train.checkpoint import newest
from moelora.train.guard import naming_dead_workers
from tests.train.test_world import adapter, losses
from tests.train.world import ENGINES, FAST, prepare, run

pytestmark = pytest.mark.timeout(900)

STEPS, BAD = 5, 3
LAYER = "model.layers.1.self_attn.v_proj"


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of STEPS steps with a checkpoint at each; at step BAD the last process alone has a NaN in a layer."""
    folder = tmp_path_factory.mktemp("spoiled")
    for engine, processes in ENGINES.items():
        fault = {"steps": [BAD], "rank": processes - 1, "layer": LAYER}
        steps = [f"training.max_steps={STEPS}", "training.save_strategy=steps", "training.save_steps=1"]
        case = {"recipe": "smora", "overrides": [*steps, "training.save_total_limit=9"], "nan": fault}
        run(engine, [{**case, "out": str(folder / engine)}], folder / "lists")
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_from_what_is_not_finite_changes_nothing(spoiled: Path, engine: str) -> None:
    out = spoiled / engine
    summary = json.loads((out / "summary.json").read_text())
    assert summary["skipped_steps"] == 1 and summary["steps"] == STEPS
    folders = [out / f"checkpoint-{step}" for step in range(1, STEPS + 1)]
    states = [{**adapter(folder), **load_file(folder / "optimizer.safetensors")} for folder in folders]
    for key, value in states[BAD - 2].items():
        assert torch.equal(states[BAD - 1][key], value), f"{key}: weights, moments, counts and biases stay"
    for before, after in ((0, 1), (BAD - 1, BAD)):
        assert any(not torch.equal(states[after][key], value) for key, value in states[before].items())
    assert all(torch.isfinite(value).all() for state in states for value in state.values())


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "one"])
def test_all_processes_skip_together(spoiled: Path, engine: str) -> None:
    ranks = [json.loads((spoiled / engine / f"rank-{rank}.json").read_text()) for rank in range(ENGINES[engine])]
    assert len({rank["hash"] for rank in ranks}) == 1
    expected, found = losses(spoiled / "one"), losses(spoiled / engine)
    del expected[BAD - 1], found[BAD - 1]
    assert found == pytest.approx(expected, rel=2e-5)


def local(tmp_path: Path, case: dict[str, Any], *overrides: str, resume: bool = False) -> Any:
    """A run of one process, in this one."""
    given = [*FAST, "training.per_device_train_batch_size=4", f"training.output_dir={tmp_path / 'run'}", *overrides]
    recipe = read_recipe("smora", given)
    build = running.build_trainer

    def built(*args: Any) -> Any:
        trainer = build(*args)
        prepare(trainer, case)
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "build_trainer", built)
        return running.train(recipe, resume=resume)


def test_too_many_in_a_row_end_the_run_and_name_layer_and_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = {"nan": {"steps": range(2, 9), "rank": 0, "layer": LAYER}}
    with pytest.raises(MoeloraError, match=rf"training ended: step 4 skipped .3 in a row, at most 3.*{LAYER}"):
        local(tmp_path, case, "training.max_steps=8", "max_skipped_steps=3")
    shown = capsys.readouterr().err
    assert "step 2 skipped (1 in a row, at most 3): the loss of" in shown
    assert "reverse" in shown or "count" in shown
    assert f"first at {LAYER}" in shown


def test_steps_that_are_skipped_now_and_then_do_not_add_up(tmp_path: Path) -> None:
    case = {"nan": {"steps": [1, 3, 4, 6], "rank": 0, "layer": LAYER}}
    result = local(tmp_path, case, "training.max_steps=7", "max_skipped_steps=3")
    assert result.summary["skipped_steps"] == 4


def command(out: Path, *overrides: str) -> list[str]:
    steps = ["training.max_steps=4000", "training.save_strategy=steps", "training.save_steps=5"]
    size = ["training.per_device_train_batch_size=2", "data.max_rows=20", "adapter.target_modules=[q_proj]"]
    given = [*FAST, *size, *steps, f"training.output_dir={out}", *overrides]
    return [sys.executable, "-m", "moelora", "train", "smora", "--num-processes", "2", *given]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(process: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.parametrize("engine", ["none", "zero2"])
def test_sigterm_ends_with_a_checkpoint_that_resumes(tmp_path: Path, engine: str) -> None:
    out = tmp_path / "run"
    chosen = [] if engine == "none" else [f"deepspeed={engine}"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(out, *chosen), **pipes)
    wait_for(out / "checkpoint-5", process)
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=120)
    assert process.returncode == 143, shown
    assert "ended by SIGTERM" in shown and "--resume goes on" in shown
    assert "Traceback" not in shown
    newest = max(int(path.name.rpartition("-")[2]) for path in out.glob("checkpoint-*"))
    assert not list(out.glob(".checkpoint-*")) and not (out / "summary.json").exists()
    again = [
        f"training.max_steps={newest + 2}" if part.startswith("training.max_steps") else part for part in command(out)
    ]
    done = subprocess.run([*again, *chosen, "--resume"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in json.loads((out / "history.json").read_text()) if "loss" in row] == list(
        range(1, newest + 3)
    )


def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(command(out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(out / "checkpoint-5", process)
    assert len(children(process.pid)) == 2
    os.kill(children(process.pid)[1], signal.SIGKILL)
    _, shown = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "process 1 was ended by SIGKILL, and the others with it; --resume goes on" in shown, shown
    assert children(process.pid) == []


SAVED = ["training.max_steps=5", "training.save_strategy=steps", "training.save_steps=1"]
WORKER = "training.dataloader_num_workers=1"


def test_a_killed_data_loader_worker_ends_the_run_and_it_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(
        MoeloraError, match=r"data-loader worker was killed \(.*--resume goes on; the newest is"
    ) as ended:
        local(tmp_path, {"kill_worker": 3}, WORKER, *SAVED)
    assert str(ended.value).endswith(str(out / "checkpoint-2"))
    assert newest(out) == out / "checkpoint-2"
    local(tmp_path, {}, WORKER, *SAVED, resume=True)
    local(tmp_path / "whole", {}, *SAVED)
    expected, found = adapter(tmp_path / "whole" / "run"), adapter(out)
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []


class Rows(Dataset[int]):
    """Rows of which the fifth does something to the worker that reads it."""

    def __init__(self, fifth: Any) -> None:
        self.fifth = fifth

    def __len__(self) -> int:
        return 99

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 5:
            self.fifth()
        return torch.tensor(index)


def killed_worker() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def read(rows: Rows, out: Path) -> None:
    with naming_dead_workers(out):
        list(DataLoader(rows, batch_size=1, num_workers=1))


def test_a_killed_worker_is_named_where_its_signal_is_not_heeded(tmp_path: Path) -> None:
    read(Rows(int), tmp_path)  # torch heeds it from now on
    heeded = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        with pytest.raises(MoeloraError, match="a data-loader worker was killed"):
            read(Rows(killed_worker), tmp_path)
    finally:
        signal.signal(signal.SIGCHLD, heeded)


def test_a_killed_worker_is_named_where_its_batch_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    get, here, calls = Queue.get, os.getpid(), itertools.count()

    def broken(*args: Any, **options: Any) -> Any:
        if os.getpid() == here and next(calls) == 2:
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        return get(*args, **options)

    monkeypatch.setattr(Queue, "get", broken)
    with pytest.raises(MoeloraError, match=r"worker was killed \(.*Connection reset by peer\)"):
        read(Rows(int), tmp_path)


@pytest.mark.parametrize("kind", [RuntimeError, FileNotFoundError, EOFError])
def test_what_goes_wrong_inside_a_worker_stays_what_it_is(tmp_path: Path, kind: type[Exception]) -> None:
    def fifth() -> None:
        raise kind("no such row")

    with pytest.raises(kind, match=rf"Caught {kind.__name__} in DataLoader worker.*\n[^$]*no such row"):
        read(Rows(fifth), tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("engine", ["none", "zero2"])
def test_a_killed_worker_of_one_process_ends_all_with_its_message(tmp_path: Path, engine: str, rank: int) -> None:
    out = tmp_path / "run"
    given = [*command(out, WORKER, "data.max_rows=60"), *([] if engine == "none" else [f"deepspeed={engine}"])]
    process = subprocess.Popen(given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(out / "checkpoint-5", process)
    trainer, killed = children(process.pid)[rank], False
    while not killed and process.poll() is None:  # between two epochs there is none
        with contextlib.suppress(IndexError, ProcessLookupError):
            os.kill(children(trainer)[0], signal.SIGKILL)
            killed = True
    _, shown = process.communicate(timeout=120)
    assert process.returncode == 2, shown
    assert shown.count("a data-loader worker was killed") == 1 and "; the newest is" in shown
    selected = newest(out)
    assert selected is not None
    last = int(selected.name.rpartition("-")[2])
    done = subprocess.run(
        [*given, f"training.max_steps={last + 2}", "--resume"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "summary.json").read_text())["steps"] == last + 2


def test_a_folder_that_becomes_read_only_ends_the_run_with_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, mkdir = tmp_path / "run", Path.mkdir

    def refused(path: Path, *args: Any, **options: Any) -> None:
        if path.name == ".checkpoint-3.partial":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        mkdir(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refused)
        with pytest.raises(OutputError) as ended:
            local(tmp_path, {}, *SAVED)
    found = f"cannot write the checkpoint: Read-only file system; the newest is {out / 'checkpoint-2'}"
    assert str(ended.value) == f"{out / 'checkpoint-3'}: {found}"
    assert newest(out) == out / "checkpoint-2"
    assert local(tmp_path, {}, *SAVED, resume=True).summary["steps"] == 5


def test_a_user_s_mistake_is_one_message_of_many_processes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    done = subprocess.run(command(out), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("holds files that no run wrote") == 1 and "Traceback" not in done.stderr


@pytest.mark.full
def test_a_folder_that_cannot_be_made_is_one_message_of_many_processes(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = subprocess.run(command(tmp_path / "notes.txt" / "run"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("notes.txt/run: cannot be used: Not a directory") == 1 and "Traceback" not in done.stderr


def test_an_unknown_deepspeed_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"deepspeed: no configuration zero4.*zero1"):
        read_recipe("smora", ["deepspeed=zero4"])
    with pytest.raises(ConfigError, match="write it beside training"):
        read_recipe("smora", ["training.deepspeed=zero2.json"])
    with pytest.raises(ConfigError, match="FSDP is not supported; deepspeed: zero3"):
        read_recipe("smora", ["training.fsdp=full_shard"])
    with pytest.raises(ConfigError, match="load_best_model_at_end: not with deepspeed"):
        read_recipe("smora", ["training.load_best_model_at_end=true", "deepspeed=zero2"])
    file = tmp_path / "mine.json"
    file.write_text("{zero_optimization: 2}")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_recipe("smora", [f"deepspeed={file}"])
