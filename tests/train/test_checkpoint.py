"""Checkpoints are there whole or not at all: killed writers, full disks, damaged folders, retention."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

import moelora
from moelora.core.errors import OutputError
from moelora.io import folder as writing
from moelora.model.write import adapter_tensors
from moelora.train import checkpoint
from moelora.train.checkpoint import (
    MANIFEST,
    OPTIMIZER,
    PAIRS,
    STATE,
    TRAINING,
    Training,
    fault,
    newest,
    random_states,
    read_tensors,
    read_training,
    rotate,
    set_random_state,
    write_checkpoint,
)
from tests import tiny


class Run:
    """A tiny adapted model and made-up states, of which every number says at what step they were written."""

    def __init__(self) -> None:
        self.model = tiny.adapted("llama", "smora")
        self.adapter = {name: value.detach() for name, value in adapter_tensors(self.model).items()}

    def states(self, step: int) -> dict[str, Tensor]:
        trained = tiny.trainable(self.model).items()
        return {f"{name}/{key}": torch.full(p.shape, float(step)) for name, p in trained for key in ("one", "two")}

    def save(self, out: Path, step: int, **parts: dict[str, Tensor]) -> Path:
        given = {"adapter": self.adapter, "states": self.states(step), "pairs": {"site/mean": torch.tensor(step)}}
        training = Training(step, 4, {"last_epoch": step}, random_states())
        return write_checkpoint(out, self.model, **{**given, **parts}, training=training, trainer_state="{}\n")


@pytest.fixture(scope="module")
def run() -> Run:
    return Run()


def names(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


# Killed at any moment


def forked(body: Callable[[int], None]) -> tuple[int, int]:
    """A process that runs ``body(pipe)`` and ends without a trace of pytest; gives its id and the pipe's other end."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            body(write)
        finally:
            os._exit(0)
    os.close(write)
    return child, read


def lines(pipe: int, count: int | None = None) -> list[str]:
    """So many lines from a pipe; all that come until its other end is closed if no count is given."""
    text = b""
    while count is None or text.count(b"\n") < count:
        assert select.select([pipe], [], [], 60)[0], "the writer hangs"
        block = os.read(pipe, 1 << 16)
        if not block:
            break
        text += block
    return text.decode().splitlines()


def kill_writers(run: Run, out: Path, kills: int) -> dict[str, int]:
    """Kill one writer after another, each going on from what the last one left; gives what was counted."""
    run.save(out, 1)
    moments, last = random.Random(7), 1
    found = {"kills": 0, "partial folders seen": 0, "checkpoints written": 0, "corrupt": 0, "intervals lost": 0}
    for kill in range(kills):

        def write_on(pipe: int, after: int = last) -> None:
            for step in range(after + 1, after + 1000):
                run.save(out, step)
                os.write(pipe, f"{step}\n".encode())
                rotate(out, 2, None)

        child, pipe = forked(write_on)
        told = lines(pipe, kill % 3)
        time.sleep(moments.uniform(0, 0.08))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it wrote until it was killed"
        told += lines(pipe)
        os.close(pipe)

        found["kills"] += 1
        found["checkpoints written"] += len(told)
        found["partial folders seen"] += len(list(out.glob(".checkpoint-*.partial")))
        folder = newest(out)
        assert folder is not None
        assert not list(out.glob(".*")), "half-written folders are gone"
        step = int(folder.name.rpartition("-")[2])
        found["intervals lost"] += max(0, max([last, *map(int, told)]) - step)
        expected = run.states(step)
        read = read_tensors(folder, OPTIMIZER)
        whole = read_training(folder).step == step and read.keys() == expected.keys()
        found["corrupt"] += not (whole and all(torch.equal(read[key], value) for key, value in expected.items()))
        last = step
    return found


def check_kills(run: Run, out: Path, kills: int, record_property: Callable[[str, object], None]) -> None:
    found = kill_writers(run, out, kills)
    counts = ", ".join(f"{count} {name}" for name, count in found.items())
    record_property("counts", counts)
    assert found["kills"] == kills
    assert found["partial folders seen"] >= kills // 4, "most kills came in the middle of writing"
    assert found["checkpoints written"] >= kills // 2
    assert found["corrupt"] == 0
    assert found["intervals lost"] == 0, "what was reported as written is there; at most the next one is lost"
    folder = newest(out)
    assert folder is not None
    moelora.load(tiny.MODELS["llama"](0), folder)
    assert len(list(out.glob("checkpoint-*"))) <= 3, "retention goes on after kills"


def test_writers_killed_at_any_moment_leave_no_corrupt_checkpoint(
    run: Run, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    check_kills(run, tmp_path, 12, record_property)


@pytest.mark.full
def test_two_hundred_writers_killed_at_any_moment(
    run: Run, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    check_kills(run, tmp_path, 200, record_property)


def test_a_kill_between_renaming_away_and_removing_leaves_no_checkpoint(run: Run, tmp_path: Path) -> None:
    for step in (1, 2):
        run.save(tmp_path, step)

    def removing(pipe: int) -> None:
        remove = shutil.rmtree

        def half(path: Path, **options: Any) -> None:
            if path.exists():
                (path / TRAINING).unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            remove(path, **options)

        checkpoint.shutil.rmtree = half  # type: ignore[assignment]
        rotate(tmp_path, 1, None)

    child, pipe = forked(removing)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    os.close(pipe)
    assert names(tmp_path) == {"checkpoint-2", ".checkpoint-1.partial"}
    assert newest(tmp_path) == tmp_path / "checkpoint-2"
    assert names(tmp_path) == {"checkpoint-2"}


def test_it_gets_its_name_when_everything_in_it_is_on_the_disk(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    sync, rename = os.fsync, os.rename

    def syncing(handle: int) -> None:
        sync(handle)
        synced.append(os.fstat(handle).st_ino)

    def renaming(partial: Path, folder: Path) -> None:
        inside = [partial, *partial.rglob("*")]
        assert [path for path in inside if path.stat().st_ino not in synced] == []
        assert len(inside) > 10
        assert not folder.exists()
        renamed = shutil.copytree(partial, tmp_path / "copy" / folder.name)
        assert fault(renamed) == ""
        synced.clear()
        rename(partial, folder)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "rename", renaming)
    run.save(tmp_path / "run", 1)
    assert synced == [(tmp_path / "run").stat().st_ino], "and then the name itself"


# Writing fails


def breaking(call: Callable[..., Any], at: int, error: Exception) -> tuple[Callable[..., Any], list[int]]:
    """``call`` that fails at its call number ``at``; and how often it was called."""
    calls = [0]

    def instead(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] - 1 == at:
            raise error
        return call(*args, **options)

    return instead, calls


def failing_writes(kind: str, code: int) -> Iterator[tuple[Any, str, Callable[..., Any], Exception]]:
    text = os.strerror(code)
    place, name = {"save_file": (writing, "save_file"), "mkdir": (Path, "mkdir")}.get(kind, (os, kind))
    errors: list[Exception] = [OSError(code, text)]
    if kind == "save_file":
        errors.append(SafetensorError(f"Error while serializing: I/O error: {text} (os error {code})"))
    for error in errors:
        yield place, name, getattr(place, name), error


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=["ENOSPC", "EIO", "EROFS"])
@pytest.mark.parametrize("kind", ["mkdir", "fsync", "replace", "save_file", "rename"])
def test_a_write_that_fails_anywhere_leaves_the_older_checkpoint(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, code: int
) -> None:
    older = run.save(tmp_path, 1)
    places = 0
    for place, name, call, error in failing_writes(kind, code):
        at = 0
        while True:
            instead, calls = breaking(call, at, error)
            monkeypatch.setattr(place, name, instead)
            try:
                run.save(tmp_path, 2)
            except OutputError as raised:
                message = str(raised)
            else:
                assert calls[0] == at, "every error ends the writing"
                break
            finally:
                monkeypatch.setattr(place, name, call)
            assert str(tmp_path / "checkpoint-2") in message
            assert os.strerror(code) in message
            at += 1
            assert not list(tmp_path.glob(".*")), "nothing half done is left"
            selected = newest(tmp_path)
            if selected == older:
                assert str(older) in message
                assert names(tmp_path) == {"checkpoint-1"}
            else:  # the rename was done, and then its folder could not be synced
                assert kind == "fsync"
                assert selected == tmp_path / "checkpoint-2"
                assert names(tmp_path) == {"checkpoint-1", "checkpoint-2"}
                shutil.rmtree(selected)
        assert selected == older or kind == "fsync", "nothing but the last sync comes after the rename"
        shutil.rmtree(tmp_path / "checkpoint-2")
        places += at
    assert places >= {"mkdir": 8, "fsync": 10, "replace": 8, "save_file": 8, "rename": 1}[kind]
    assert fault(older) == ""


def test_a_disk_that_is_full_leaves_the_older_checkpoint(run: Run, tmp_path: Path) -> None:
    older = run.save(tmp_path, 1)
    largest = max(path.stat().st_size for path in older.rglob("*") if path.is_file())

    def full(pipe: int, limit: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            run.save(tmp_path, 2)
            message = "written"
        except OutputError as error:
            message = str(error)
        except BaseException as error:
            message = f"another error: {error!r}"
        os.write(pipe, f"{message}\n".encode())

    seen = set()
    for limit in (0, 100, 1_000, 5_000, 10_000, largest - 1):

        def body(pipe: int, limit: int = limit) -> None:
            full(pipe, limit)

        child, pipe = forked(body)
        os.waitpid(child, 0)
        (message,) = lines(pipe)
        os.close(pipe)
        assert message.startswith(f"{tmp_path / 'checkpoint-2'}: cannot write the checkpoint: "), message
        assert "File too large" in message
        assert message.endswith(f"; the newest is {older}")
        assert names(tmp_path) == {"checkpoint-1"}
        assert newest(tmp_path) == older
        seen.add(message)
    assert any("serializing" in message for message in seen), "safetensors' own error is among them"
    assert newest(run.save(tmp_path, 2).parent) == tmp_path / "checkpoint-2", "with room again it goes on"


def test_a_folder_that_cannot_be_made_is_an_output_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OutputError, match=r"checkpoint-3: cannot write.*; no older checkpoint is there") as raised:
        run.save(tmp_path / "file", 3)
    assert str(tmp_path / "file") in str(raised.value)
    assert (tmp_path / "file").read_text() == "no folder"


def test_a_read_only_folder_is_an_output_error(run: Run) -> None:
    with tempfile.TemporaryDirectory() as made:  # pytest's folders are for their owner alone
        out, nobody = Path(made), 65534
        older = run.save(out, 1)
        if os.geteuid() == 0:
            for path in [out, *out.rglob("*")]:
                os.chown(path, nobody, nobody)
        out.chmod(0o555)

        def body(pipe: int) -> None:
            if os.geteuid() == 0:  # whom no permission binds
                os.setgroups([])
                os.setgid(nobody)
                os.setuid(nobody)
            try:
                run.save(out, 2)
            except OutputError as error:
                os.write(pipe, f"{error}\n".encode())

        child, pipe = forked(body)
        os.waitpid(child, 0)
        found = lines(pipe)
        os.close(pipe)
        assert found == [
            f"{out / 'checkpoint-2'}: cannot write the checkpoint: Permission denied; the newest is {older}"
        ]
        assert names(out) == {"checkpoint-1"}
        assert newest(out) == older
        out.chmod(0o755)


def test_the_error_names_the_newest_checkpoint_that_is_good(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = run.save(tmp_path, 1)
    (run.save(tmp_path, 2) / OPTIMIZER).unlink()
    (tmp_path / "checkpoint-3").mkdir()
    monkeypatch.setattr(os, "replace", breaking(os.replace, 0, OSError(errno.EIO, "gone"))[0])
    with pytest.raises(OutputError) as raised:
        run.save(tmp_path, 4)
    assert str(raised.value).endswith(f"the newest is {good}")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["adapter", "states", "pairs"])
def test_nothing_that_is_not_finite_is_written(run: Run, tmp_path: Path, part: str, bad: float) -> None:
    older = run.save(tmp_path, 1)
    good = {"adapter": run.adapter, "states": run.states(2), "pairs": {"site/mean": torch.zeros(3)}}[part]
    for name in {min(good), max(good)}:
        spoiled = good[name].detach().clone().float()
        spoiled.view(-1)[-1] = bad
        hidden = {"pairs": {name: torch.zeros(1)}} if part != "pairs" else {}  # of the same name elsewhere
        with pytest.raises(OutputError, match="not finite") as raised:
            run.save(tmp_path, 2, **{**hidden, part: {**good, name: spoiled}})
        assert name in str(raised.value)
        assert str(older) in str(raised.value)
    assert names(tmp_path) == {"checkpoint-1"}
    assert newest(tmp_path) == older


# Choosing


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def rewritten(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
    """Damage that changes what the manifest says."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(change(content) or content))

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "checkpoint.json is missing"),
    "empty manifest": (lambda folder: (folder / MANIFEST).write_text(""), "checkpoint.json cannot be read"),
    "half a manifest": (lambda folder: truncate(folder / MANIFEST), "checkpoint.json cannot be read"),
    "no JSON": (lambda folder: (folder / MANIFEST).write_text("step: 2"), "checkpoint.json cannot be read"),
    "no text": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"), "checkpoint.json cannot be read"),
    "too deep": (lambda folder: (folder / MANIFEST).write_text("[" * 200_000), "checkpoint.json cannot be read"),
    "a list": (lambda folder: (folder / MANIFEST).write_text("[]"), "checkpoint.json cannot be read"),
    "no format": (rewritten(lambda content: content.pop("format") and None), "cannot be read ('format')"),
    "a later format": (rewritten(lambda content: {**content, "format": 2}), "has format 2, and this version reads 1"),
    "another step": (rewritten(lambda content: {**content, "step": 1}), "is of step 1"),
    "no files": (rewritten(lambda content: {**content, "files": {}}), "does not list moelora.json"),
    "a list of files": (rewritten(lambda content: {**content, "files": list(content["files"])}), "cannot be read"),
    "a file fewer": (
        rewritten(lambda content: content["files"].pop(OPTIMIZER) and None),
        f"does not list {OPTIMIZER}",
    ),
    "a file elsewhere": (
        rewritten(lambda content: content["files"].update({"../file": "0"})),
        "../file is missing",
    ),
    "a hash changed": (rewritten(lambda content: content["files"].update({PAIRS: "0" * 64})), f"{PAIRS} was changed"),
    "no optimizer": (lambda folder: (folder / OPTIMIZER).unlink(), f"{OPTIMIZER} is missing"),
    "half an optimizer": (lambda folder: truncate(folder / OPTIMIZER), f"{OPTIMIZER} was changed"),
    "a folder for a file": (
        lambda folder: ((folder / STATE).unlink(), (folder / STATE).mkdir()),
        f"{STATE} cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    older, damaged = run.save(tmp_path, 1), run.save(tmp_path, 2)
    assert newest(tmp_path) == damaged
    break_it, reason = DAMAGE[damage]
    break_it(damaged)
    capsys.readouterr()
    assert newest(tmp_path) == older
    shown = capsys.readouterr().out
    assert shown.startswith(f"{damaged}: passed over: ")
    assert reason in shown
    assert shown.count("\n") == 1
    assert damaged.is_dir(), "it is left for who wants to look at it"


def test_one_changed_byte_in_any_file_is_found(run: Run, tmp_path: Path) -> None:
    folder = run.save(tmp_path, 1)
    made = random.Random(1)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    assert len(files) >= 8
    for path in files:
        whole = path.read_bytes()
        for place in {0, len(whole) - 1, made.randrange(len(whole))}:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert fault(folder) == f"{path.relative_to(folder)} was changed"
        path.write_bytes(whole)
    assert fault(folder) == ""


def test_one_changed_byte_in_the_manifest_is_found_or_means_nothing(run: Run, tmp_path: Path) -> None:
    path = run.save(tmp_path, 1) / MANIFEST
    whole = path.read_bytes()
    content, found = json.loads(whole), 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if fault(path.parent):
            found += 1
        else:
            assert json.loads(path.read_bytes()) == content
    assert found > len(whole) / 2


def test_what_others_left_is_passed_over(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert newest(tmp_path / "nowhere") is None
    assert newest(tmp_path) is None
    good = run.save(tmp_path, 3)
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / STATE).write_text("{}")
    (tmp_path / ".checkpoint-9.partial" / "experts").mkdir(parents=True)
    shutil.copytree(good, tmp_path / ".checkpoint-12.partial")
    shutil.copytree(good, tmp_path / "checkpoint-best")
    (tmp_path / "checkpoint-20").write_text("a file")
    capsys.readouterr()
    assert newest(tmp_path) == good
    assert capsys.readouterr().out == f"{tmp_path / 'checkpoint-7'}: passed over: {MANIFEST} is missing\n"
    assert names(tmp_path) == {"checkpoint-3", "checkpoint-7", "checkpoint-best", "checkpoint-20"}


def test_a_step_that_was_left_half_done_is_written_again(run: Run, tmp_path: Path) -> None:
    run.save(tmp_path, 1)
    for half in (tmp_path / ".checkpoint-2.partial", tmp_path / "checkpoint-2"):
        half.mkdir()
        (half / "left.txt").write_text("by a killed run")
    folder = run.save(tmp_path, 2)
    assert newest(tmp_path) == folder
    assert not (folder / "left.txt").exists()
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-2"}


# Retention


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (None, None, {1, 2, 3, 4, 5}),
        (1, None, {5}),
        (2, None, {4, 5}),
        (3, None, {3, 4, 5}),
        (9, None, {1, 2, 3, 4, 5}),
        (1, 2, {2, 5}),  # the newest is never removed, the best neither
        (2, 2, {2, 5}),
        (3, 2, {2, 4, 5}),
        (3, 5, {3, 4, 5}),
        (3, 4, {3, 4, 5}),
        (2, 7, {4, 5}),  # the best was never saved
    ],
)
def test_the_oldest_go_and_the_best_stays(
    run: Run, tmp_path: Path, keep: int | None, best: int | None, left: set[int]
) -> None:
    for step in range(1, 6):
        run.save(tmp_path, step)
    rotate(tmp_path, keep, None if best is None else f"somewhere/else/checkpoint-{best}")
    assert names(tmp_path) == {f"checkpoint-{step}" for step in left}
    assert newest(tmp_path) == tmp_path / "checkpoint-5"


def test_what_is_no_checkpoint_pushes_none_out(run: Run, tmp_path: Path) -> None:
    for step in (8, 9):
        run.save(tmp_path, step)
    (tmp_path / "checkpoint-99").mkdir()
    truncate(run.save(tmp_path, 50) / OPTIMIZER)  # the run was resumed from before it
    good = run.save(tmp_path, 10)
    rotate(tmp_path, 1, None)
    assert names(tmp_path) == {"checkpoint-10", "checkpoint-50", "checkpoint-99"}
    assert newest(tmp_path) == good


def test_a_checkpoint_that_cannot_be_removed_is_an_output_error(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        run.save(tmp_path, step)
    monkeypatch.setattr(os, "rename", breaking(os.rename, 0, OSError(errno.EROFS, os.strerror(errno.EROFS)))[0])
    with pytest.raises(OutputError, match="checkpoint-1: cannot remove the checkpoint: Read-only file system"):
        rotate(tmp_path, 1, None)
    assert newest(tmp_path) == tmp_path / "checkpoint-2"


def test_what_was_half_removed_before_does_not_stop_retention(run: Run, tmp_path: Path) -> None:
    for step in (1, 2):
        run.save(tmp_path, step)
    shutil.copytree(tmp_path / "checkpoint-1", tmp_path / ".checkpoint-1.partial")
    rotate(tmp_path, 1, None)
    assert names(tmp_path) == {"checkpoint-2"}


# What is in it


def test_the_folder_is_an_adapter_with_the_same_logits_bit_for_bit(run: Run, tmp_path: Path) -> None:
    folder = run.save(tmp_path, 5)
    loaded = moelora.load(tiny.MODELS["llama"](0), folder).eval()
    given = tiny.unlabelled(tiny.given("llama"))
    was = run.model.training
    with torch.no_grad():
        found, expected = loaded(**given).logits, run.model.eval()(**given).logits
        plain = tiny.MODELS["llama"](0).eval()(**{key: v for key, v in given.items() if key != "task_ids"}).logits
    run.model.train(was)
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain), "the experts matter"


def test_what_was_written_is_read(run: Run, tmp_path: Path) -> None:
    folder = run.save(tmp_path, 5, pairs={"site/mean": torch.tensor([0.5, -2.0]), "site/count": torch.tensor(3)})
    tiny.assert_same(read_tensors(folder, OPTIMIZER), run.states(5))
    pairs = read_tensors(folder, PAIRS)
    tiny.assert_same(pairs, {"site/mean": torch.tensor([0.5, -2.0]), "site/count": torch.tensor(3)})
    training = read_training(folder)
    assert (training.step, training.global_batch, training.scheduler) == (5, 4, {"last_epoch": 5})
    assert len(training.random) == 1
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert set(listed) == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {MANIFEST}


def test_random_generators_go_on_where_they_were(run: Run, tmp_path: Path) -> None:
    def draw() -> tuple[Any, ...]:
        gauss = (random.gauss(0, 1), float(np.random.standard_normal()))  # both keep one of two that they made
        return random.random(), *gauss, np.random.rand(3).tolist(), torch.randn(3).tolist(), torch.rand(1).item()

    before = random.getstate(), np.random.get_state()
    try:
        draw()
        folder = run.save(tmp_path, 1)
        expected = draw()
        assert draw() != expected
        (state,) = read_training(folder).random
        set_random_state(state)
        assert draw() == expected
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
