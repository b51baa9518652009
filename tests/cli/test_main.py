"""The command line: exit codes, one-screen errors, recipes, methods, plugins."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moelora.cli.main import app
from moelora.core.methods import AXES, Methods

FAST = [
    "data.max_rows=32", "data.max_eval_rows=4", "training.max_steps=2", "training.disable_tqdm=true",
    "adapter.target_modules=[q_proj]", "training.per_device_train_batch_size=8",
]  # fmt: skip


def run(*arguments: str, code: int = 0, typed: str | None = None) -> str:
    result = CliRunner().invoke(app, list(arguments), input=typed, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize(
    "command",
    [[], ["train"], ["ablate"], ["eval"], ["generate"], ["methods"], ["env"], ["recipes", "ls"], ["recipes", "cp"]],
)
def test_every_command_has_help(command: list[str]) -> None:
    assert "Usage:" in run(*command, "--help")


def test_help_needs_no_heavy_import() -> None:
    program = (
        "import sys; from moelora.cli.main import app\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'pydantic'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_train_eval_generate(tmp_path: Path) -> None:
    out = tmp_path / "run"
    shown = run("train", "meteora", f"training.output_dir={out}", *FAST)
    assert "reverse" in shown
    assert str(out) in shown
    found = json.loads(run("eval", str(out), "--json"))
    assert found["tasks"] == json.loads((out / "summary.json").read_text())["tasks"]
    assert found["routing"]["summary"].keys() >= {"agreement", "dead", "collapsed"}
    assert "0.self_attn.q_proj" in run("eval", str(out), "--routing")
    answer = run("generate", str(out), "reverse: 1 2 3", "--max-new-tokens", "4")
    assert answer == run("generate", str(out), "reverse: 1 2 3", "--max-new-tokens", "4")
    chat = run("generate", str(out), "--max-new-tokens", "4", "--temperature", "0.7", typed="sort: 2 1\n\n")
    assert "an empty line ends it" in chat


def test_a_model_routed_by_task_is_told_the_task(tmp_path: Path) -> None:
    out = tmp_path / "run"
    hard = ["adapter.router.routing=hard", "adapter.experts.num_experts=8", "adapter.losses={}"]
    run("train", "lora_mixer", f"training.output_dir={out}", *hard, *FAST)
    assert run("generate", str(out), "reverse: 1 2 3", "--task", "reverse", "--max-new-tokens", "4")
    assert "routes by task" in run("generate", str(out), "reverse: 1 2 3", code=2)
    assert "no task 'revers'; did you mean 'reverse'" in run("generate", str(out), "x", "--task", "revers", code=2)


def test_ablate(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("recipes: [single, smora]\nevaluate_base: false\n", encoding="utf-8")
    shown = run("ablate", str(tmp_path / "two.yaml"), "--out", str(tmp_path / "out"), *FAST)
    assert all(word in shown for word in ("single", "smora", "trainable", "reverse"))
    assert (tmp_path / "out" / "report.html").is_file()
    assert list(json.loads((tmp_path / "out" / "summary.json").read_text())["variants"]) == ["single", "smora"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "smora", "adapter.router.topk=3"], "did you mean 'top_k'"),
        (["train", "nowhere.yaml"], "no recipe nowhere.yaml"),
        (["eval", "nowhere"], "moelora.json: no such file"),
        (["generate", "nowhere", "hi"], "moelora.json: no such file"),
        (["recipes", "cp", "nowhere"], "no recipe nowhere"),
    ],
)
def test_mistakes_are_one_screen_and_exit_code_2(arguments: list[str], message: str) -> None:
    shown = run(*arguments, code=2)
    assert shown.startswith("error: ")
    assert message in shown
    assert len(shown.splitlines()) <= 10
    assert "Traceback" not in shown


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("moelora.train.run.train", interrupted)
    assert "--resume" in run("train", "smora", code=130)


def test_recipes_are_listed_and_copied(tmp_path: Path) -> None:
    listed = run("recipes", "ls")
    for name in ("single", "smora", "meteora", "local_tasks"):
        assert name in listed
    assert run("recipes", "cp", "smora", str(tmp_path)).strip() == str(tmp_path / "smora.yaml")
    assert (tmp_path / "smora.yaml").read_text().startswith("# SMoRA")
    assert "exists already" in run("recipes", "cp", "smora", str(tmp_path), code=2)


def test_the_catalogue_is_complete() -> None:
    entries = json.loads(run("methods", "--json"))
    methods = Methods()
    assert [(entry["axis"], entry["name"]) for entry in entries] == [(a, n) for a in AXES for n in methods.names(a)]
    for entry in entries:
        assert "arXiv" in entry["paper"] or "aseline" in entry["paper"] + entry["summary"], entry
        assert entry["recipe"].startswith("`"), entry
        assert entry["file"] == f"{entry['axis']}/{entry['name']}.py"
        assert len(entry["summary"]) > 15
    shown = run("methods")
    assert all(entry["name"] in shown for entry in entries)


PLUGIN = '''
"""Everyone alike. Recipe line: `router: {name: alike}`"""
from moelora.core.route import Route
from moelora.routers.base import Router

class Alike(Router):
    def __init__(self, site, num_experts, r, *, share: float = 0.5):
        super().__init__(site, num_experts, r)
        self.share = share

    def forward(self, x, view):
        return Route(x.new_full((len(x), self.num_experts), self.share), self.num_experts)
'''


def test_a_router_from_a_file_of_one_s_own(tmp_path: Path) -> None:
    plugin = tmp_path / "alike.py"
    plugin.write_text(PLUGIN, encoding="utf-8")
    out = tmp_path / "run"
    changes = ["adapter.router={name: alike, share: 0.25}", "adapter.losses={}", f"training.output_dir={out}"]
    assert "no method named 'alike'" in run("train", "meteora", *changes, *FAST, code=2)
    run("train", "meteora", *changes, *FAST, "--plugin", str(plugin))
    assert "no method named 'alike'" in run("eval", str(out), code=2)
    run("eval", str(out), "--plugin", str(plugin))
    assert "alike" in run("methods", "--plugin", str(plugin))


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = ["train", "meteora", f"training.output_dir={out}", "data.max_rows=40", "deepspeed=zero2", "--dry-run"]
    shown = run(*given, "--num-processes", "4")
    assert "ZeRO-2, 4 of them" in shown and "steps:" in shown
    found = json.loads(run(*given, "--json"))
    assert found["parameters"]["trainable"] == 337_920
    assert not out.exists()
