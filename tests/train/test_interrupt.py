"""Ctrl-C on a real process, and going on from the last checkpoint."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path


def test_ctrl_c_and_resume(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "moelora", "train", "smora", f"training.output_dir={out}", "training.save_steps=2",
        "training.max_steps=400", "training.per_device_train_batch_size=4", "data.max_rows=50", "data.max_eval_rows=2",
        "adapter.target_modules=[q_proj]", "training.logging_steps=1",
    ]  # fmt: skip
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job would ignore it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heeds)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint-4" / "trainer_state.json").is_file():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    assert "--resume" in shown
    assert "Traceback" not in shown
    assert not (out / "summary.json").exists()

    complete = [path for path in out.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    newest = max(int(path.name.rpartition("-")[2]) for path in complete)
    done = subprocess.run(
        [*command, f"training.max_steps={newest + 2}", "--resume"], capture_output=True, text=True, check=True
    )
    assert "reverse" in done.stdout
    assert json.loads((out / "summary.json").read_text())["steps"] == newest + 2
    history = json.loads((out / "history.json").read_text())
    assert [row["step"] for row in history if "loss" in row] == list(range(1, newest + 3))
