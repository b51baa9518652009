"""One run on one process, DDP and ZeRO-1 to ZeRO-3: the same losses and adapters, and each goes on from the other's
checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.train.world import ENGINES, run

STEPS, HALF = 8, 4
ROUTERS = ["smora", "comol", "meteora", "xlora", "lora_mixer", "flylora"]
"""The mission's five, and one with a balance bias; ``task`` sends every process's tokens to experts of its own."""

CASES: dict[str, dict[str, Any]] = {
    **{name: {"recipe": name} for name in ROUTERS},
    "task": {"recipe": "task", "overrides": ["data.temperature=1"]},
    "accumulated": {"recipe": "meteora", "accumulation": 2},
    "rescaled": {"recipe": "smora", "transform": "rescale", "overrides": ["training.max_grad_norm=0.05"]},
}
PLAIN = {"xlora": ["adapter.router.xlora_dropout_p=0"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases on all engines, STEPS steps with a checkpoint half way; and from there again, by the same engine."""
    folder = tmp_path_factory.mktemp("world")
    for engine in ENGINES:
        cases = []
        for name, case in CASES.items():
            steps = [f"training.max_steps={STEPS}", "training.save_strategy=steps", f"training.save_steps={HALF}"]
            overrides = [*case.get("overrides", []), *PLAIN.get(name, []), *steps]
            cases.append({**case, "overrides": overrides, "out": str(folder / engine / name)})
            if engine == "one" and case.get("accumulation") == 2:
                cases[-1]["accumulation"] = 4  # as many micro-batches, each as large
        run(engine, cases, folder)
    return folder


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in json.loads((folder / "history.json").read_text()) if "loss" in row]


def adapter(folder: Path) -> dict[str, Tensor]:
    files = [folder / "router.safetensors", *folder.glob("experts/*/*.safetensors")]
    return {f"{file.relative_to(folder)}/{key}": value for file in files for key, value in load_file(file).items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "one"])
def test_every_engine_trains_the_same_adapter(world: Path, engine: str, name: str) -> None:
    one, many = world / "one" / name, world / engine / name
    assert losses(many) == pytest.approx(losses(one), rel=2e-5)
    expected, found = adapter(one), adapter(many)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=2e-3, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")
    manifests = [json.loads((folder / "moelora.json").read_text()) for folder in (one, many)]
    for manifest in manifests:
        manifest["files"] = sorted(manifest["files"])
    assert manifests[0] == manifests[1], "fingerprint, sites and configuration are those of one process"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_engines_of_as_many_processes_agree_to_the_last_bits(world: Path, engine: str, name: str) -> None:
    ddp, zero = adapter(world / "ddp" / name), adapter(world / engine / name)
    for key, value in ddp.items():
        torch.testing.assert_close(zero[key], value, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "one"])
def test_all_processes_have_the_same_experts_and_biases(world: Path, engine: str, name: str) -> None:
    ranks = [json.loads((world / engine / name / f"rank-{rank}.json").read_text()) for rank in range(ENGINES[engine])]
    assert len({rank["hash"] for rank in ranks}) == 1


ELASTIC = {"one": "zero3", "ddp": "one", "zero1": "ddp", "zero2": "one", "zero3": "zero2"}
"""Whose checkpoint each engine goes on from, too."""
RESUMED = ["smora", "lora_mixer", "xlora", "rescaled"]


@pytest.fixture(scope="module")
def resumed(world: Path) -> Path:
    """Cases on all engines from the checkpoints half way: of the same engine, and of another."""
    folder = world / "resumed"
    for engine in ENGINES:
        cases = []
        for source in (engine, ELASTIC[engine]):
            for name in RESUMED:
                out, of = folder / engine / source / name, world / source / name
                out.mkdir(parents=True)
                shutil.copytree(of / f"checkpoint-{HALF}", out / f"checkpoint-{HALF}")
                shutil.copy(of / "recipe.yaml", out)
                overrides = [*CASES[name].get("overrides", []), *PLAIN.get(name, []), f"training.max_steps={STEPS}"]
                cases.append({**CASES[name], "overrides": overrides, "out": str(out), "resume": True})
        run(engine, cases, folder)
    return folder


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("engine", ENGINES)
def test_half_a_run_and_the_rest_are_the_whole_run_bit_for_bit(
    world: Path, resumed: Path, engine: str, name: str
) -> None:
    whole, rest = world / engine / name, resumed / engine / engine / name
    assert losses(rest) == losses(whole)
    expected, found = adapter(whole), adapter(rest)
    assert found.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_goes_on_from_the_checkpoint_of_another_engine(
    world: Path, resumed: Path, engine: str, name: str
) -> None:
    rest, source = resumed / engine / ELASTIC[engine] / name, world / ELASTIC[engine] / name
    assert losses(rest)[:HALF] == losses(source)[:HALF], "what was logged before comes with it"
    assert losses(rest) == pytest.approx(losses(source), rel=2e-5)
    for key, value in adapter(source).items():
        torch.testing.assert_close(
            adapter(rest)[key], value, rtol=2e-3, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}"
        )
