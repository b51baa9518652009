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

pytestmark = pytest.mark.timeout(3000)

ROUTERS = ["smora", "comol", "meteora", "xlora", "lora_mixer", "flylora"]
"""The mission's five, and one with a balance bias; ``task`` sends every process's tokens to experts of its own."""

ANSWERED = ["data.tasks={reverse: {path: builtin/reverse, metric: exact_match}, count: {path: builtin/count}}"]
CASES: dict[str, dict[str, Any]] = {
    **{name: {"recipe": name} for name in ROUTERS},
    "comol": {"recipe": "comol", "overrides": ANSWERED},
    "xlora": {"recipe": "xlora", "overrides": [*ANSWERED, "adapter.router.xlora_dropout_p=0"]},
    "task": {"recipe": "task", "overrides": ["data.temperature=1"]},
    "accumulated": {"recipe": "meteora", "rows": 1},
    "rescaled": {"recipe": "smora", "transform": "rescale", "overrides": ["training.max_grad_norm=0.05"]},
    "mgpo": {"recipe": "smora", "overrides": ["optim=mgpo"]},
}


FEW = 6


@pytest.fixture(scope="module")
def steps(request: pytest.FixtureRequest) -> int:
    """Few, or as many as the whole form asks for (``make test-full``)."""
    return FEW if request.config.getoption("markexpr") == "not full" else 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, steps: int) -> Path:
    """All cases on all engines, with a checkpoint half way."""
    folder = tmp_path_factory.mktemp("world")
    for engine in ENGINES:
        cases = []
        for name, case in CASES.items():
            saved = ["training.save_strategy=steps", f"training.save_steps={steps // 2}"]
            overrides = [*case.get("overrides", []), f"training.max_steps={steps}", *saved]
            cases.append({**case, "overrides": overrides, "out": str(folder / engine / name)})
        run(engine, cases, folder)
    return folder


def close(found: Tensor, expected: Tensor, rtol: float, atol: float, name: str) -> None:
    """Equal but for rounding, and for one number in a thousand.

    A gradient may cancel to exactly zero in one order of addition alone, and the optimiser leaves that number at rest.
    """
    off = ~torch.isclose(found, expected, rtol=rtol, atol=atol)
    assert int(off.sum()) <= 1 + off.numel() // 1000, f"{name}: {int(off.sum())} of {off.numel()} numbers differ"
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-3, msg=lambda text: f"{name}: {text}")


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
        close(found[key], value, 2e-3, 2e-5, key)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, many)]
    for task, values in summaries[0]["tasks"].items():
        there = summaries[1]["tasks"][task]
        assert [key for key, value in values.items() if value is None] == [k for k, v in there.items() if v is None]
        for key, value in values.items():  # evaluation and generated answers
            assert value is None or there[key] == pytest.approx(value, rel=1e-4), key
    assert summaries[1]["trainable_parameters"] == summaries[0]["trainable_parameters"]
    manifests = [json.loads((folder / "moelora.json").read_text()) for folder in (one, many)]
    for manifest in manifests:
        manifest["files"] = sorted(manifest["files"])
    assert manifests[0] == manifests[1], "fingerprint, sites and configuration are those of one process"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_engines_of_as_many_processes_agree_to_the_last_bits(world: Path, engine: str, name: str) -> None:
    ddp, zero = adapter(world / "ddp" / name), adapter(world / engine / name)
    for key, value in ddp.items():
        close(zero[key], value, 1e-4, 1e-6, key)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "one"])
def test_all_processes_have_the_same_experts_and_biases(world: Path, engine: str, name: str) -> None:
    ranks = [json.loads((world / engine / name / f"rank-{rank}.json").read_text()) for rank in range(ENGINES[engine])]
    assert len({rank["hash"] for rank in ranks}) == 1


ELASTIC = {"one": "zero3", "ddp": "one", "zero1": "ddp", "zero2": "one", "zero3": "zero2"}
"""Whose checkpoint each engine goes on from, too."""
RESUMED = ["smora", "lora_mixer", "xlora", "rescaled", "mgpo"]
"""Of these in the fast form; the whole form resumes all."""
EVERY = [name if name in RESUMED else pytest.param(name, marks=pytest.mark.full) for name in CASES]


@pytest.fixture(scope="module")
def resumed(world: Path, steps: int) -> Path:
    """Cases on all engines from the checkpoints half way: of the same engine, and of another."""
    folder, names = world / "resumed", RESUMED if steps == FEW else CASES
    for engine in ENGINES:
        sources = [world / source / name for source in (engine, ELASTIC[engine]) for name in names]
        cases = [rest(source, folder / engine / source.parent.name / source.name, steps) for source in sources]
        run(engine, cases, folder, timeout=280 if names == RESUMED else 900)
    return folder


def rest(source: Path, out: Path, steps: int, after: int | None = None) -> dict[str, Any]:
    """A case that goes on from a checkpoint of ``source``, the one half way unless ``after`` is given."""
    case, checkpoint = CASES[source.name], f"checkpoint-{after or steps // 2}"
    out.mkdir(parents=True)
    shutil.copytree(source / checkpoint, out / checkpoint)
    shutil.copy(source / "recipe.yaml", out)
    overrides = [*case.get("overrides", []), f"training.max_steps={steps}"]
    return {**case, "overrides": overrides, "out": str(out), "resume": True}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("engine", ENGINES)
def test_half_a_run_and_the_rest_are_the_whole_run_bit_for_bit(
    world: Path, resumed: Path, engine: str, name: str
) -> None:
    whole, second = world / engine / name, resumed / engine / engine / name
    assert losses(second) == losses(whole)
    expected, found = adapter(whole), adapter(second)
    assert found.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_goes_on_from_the_checkpoint_of_another_engine(
    world: Path, resumed: Path, steps: int, engine: str, name: str
) -> None:
    found, source = resumed / engine / ELASTIC[engine] / name, world / ELASTIC[engine] / name
    assert losses(found)[: steps // 2] == losses(source)[: steps // 2], "what was logged before comes with it"
    same(found, source)


def same(found: Path, source: Path) -> None:
    """Equal but for rounding."""
    assert losses(found) == pytest.approx(losses(source), rel=2e-5)
    there = adapter(found)
    for key, value in adapter(source).items():
        close(there[key], value, 2e-3, 2e-5, key)


@pytest.fixture(scope="module", params=[engine for engine in ENGINES if engine != "one"])
def fours(request: pytest.FixtureRequest, world: Path, steps: int) -> Path:
    """All cases on four processes of an engine, from the checkpoints half way of one and of two; and on one and on two,
    from what four saved three quarters of the way."""
    engine, late = request.param, steps * 3 // 4
    folder = world / "fours" / engine
    saved = ["training.save_strategy=steps", f"training.save_steps={late}"]
    for other, count in (("one", "one"), (engine, "two")):
        cases = [rest(world / other / name, folder / f"from-{count}" / name, steps) for name in CASES]
        cases = [{**case, "overrides": [*case["overrides"], *saved]} for case in cases]
        run(engine, cases, folder, processes=4, timeout=900)
    for other, count in (("one", "one"), (engine, "two")):
        cases = [rest(folder / "from-one" / name, folder / f"to-{count}" / name, steps, late) for name in CASES]
        run(other, cases, folder, timeout=900)
    return folder


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_four_processes_go_on_from_one_and_two_and_these_from_four(world: Path, fours: Path, name: str) -> None:
    for found in ("from-one", "from-two", "to-one", "to-two"):
        same(fours / found / name, world / "one" / name)
