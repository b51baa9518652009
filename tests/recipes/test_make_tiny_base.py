"""The script that made the embedded base model: same seed, same model; and the committed tokenizer is the script's."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from moelora.recipes import make_tiny_base

ASSETS = Path(make_tiny_base.__file__).parents[1] / "moelora" / "assets" / "tiny"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_two_runs_give_the_same_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        command = [
            sys.executable,
            make_tiny_base.__file__,
            "--out",
            str(tmp_path / name),
            "--steps",
            "3",
            "--batch",
            "8",
        ]
        subprocess.run(command, check=True, capture_output=True)
    for name in ("model.safetensors", "tokenizer.json"):
        assert digest(tmp_path / "one" / name) == digest(tmp_path / "two" / name)
    assert digest(tmp_path / "one" / "tokenizer.json") == digest(ASSETS / "tokenizer.json")
    assert (tmp_path / "one" / "chat_template.jinja").read_text() == (ASSETS / "chat_template.jinja").read_text()


def test_the_skills_it_learns_are_not_the_tasks() -> None:
    from moelora.data.builtin import TASKS

    source = make_tiny_base.texts(0)
    text = " ".join(next(source) for _ in range(2000))
    assert not [task for task in TASKS if f"{task}:" in text]


def test_skills_are_right() -> None:
    letters = make_tiny_base.LETTERS
    answers = {name: skill(list("dab"), letters) for name, skill in make_tiny_base.SKILLS.items()}
    assert answers["say backwards"] == "b a d"
    assert answers["next of each"] == "e b c"
    assert answers["one before each"] == "c z a"
    assert answers["swap the ends"] == "b a d"
    assert answers["put in order"] == "a b d"
    assert answers["how long"] == "3"
