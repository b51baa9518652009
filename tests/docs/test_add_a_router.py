"""The page's code runs as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moelora.cli.main import app

PAGE = Path(__file__).parents[2] / "docs" / "add_a_router.md"


def test_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "bash", "python"]
    router, command, script = (code for _, code in blocks)
    code_lines = [line for line in router.splitlines() if line.strip() and not line.startswith('"""')]
    assert len(code_lines) <= 17
    Path("cosine.py").write_text(router, encoding="utf-8")

    scope: dict[str, object] = {}
    exec(compile(script, str(PAGE), "exec"), scope)
    model = scope["model"]
    gradients = [p.grad for n, p in model.named_parameters() if n.endswith("router.keys")]  # type: ignore[attr-defined]
    assert gradients
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)

    fast = ["data.max_rows=16", "data.max_eval_rows=4", "training.max_steps=1", "training.disable_tqdm=true"]
    words = shlex.split(command)
    assert words[:2] == ["moelora", "train"]
    result = CliRunner().invoke(app, [*words[1:], *fast], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert Path("out/cosine/moelora.json").is_file()
