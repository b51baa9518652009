"""Every method of the axes beside routers trains alike on one process and under ZeRO-2, and resumes bit for bit."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.docs.composition import DEFAULTS, methods
from tests.train.test_world import adapter, losses
from tests.train.world import run

pytestmark = [pytest.mark.full, pytest.mark.timeout(9000)]

STEPS = 100
METHODS = [
    (axis, name)
    for axis, found in methods().items()
    if axis in ("experts", "init", "ranks", "targets", "optim", "losses")
    for name in found
    if name not in DEFAULTS
]


def case(axis: str, name: str, out: Path, **more: Any) -> dict[str, Any]:
    """A short run of a mixture with the method."""
    own = methods()[axis][name]
    sections = {"router": {"name": "softmax"}, **own}
    experts = {key: value for key, value in sections.get("experts", {}).items() if key != "adapters"}
    sections["experts"] = {"r": 4, "lora_alpha": 8, "num_experts": 2, **experts}
    overrides = [
        f"{'' if key == 'optim' else 'adapter.'}{key}={yaml.safe_dump(value, default_flow_style=True, width=9999)}"
        for key, value in sections.items()
    ]
    if name == "loftq":
        overrides += ["quantization_config={load_in_4bit: true, bnb_4bit_quant_type: nf4}", "training.use_cpu=true"]
    if name == "flexora":
        overrides += ["adapter.targets.steps=20"]
    if name == "ba_lora":  # its third part depends on how a step is cut into micro-batches
        overrides += ["adapter.losses.ba_lora.svd=0"]
    # A larger rate makes of rounding what it will: differences double every few steps.
    overrides += ["training.learning_rate=5e-4"]
    saved = [f"training.max_steps={STEPS}", "training.save_strategy=steps", f"training.save_steps={STEPS // 2}"]
    return {"recipe": "softmax", "overrides": [*overrides, *saved], "out": str(out), **more}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """By axis: a folder with the runs of all its methods, NAME/ENGINE, and the resumed ones, NAME/again/ENGINE."""

    @functools.cache
    def runs(axis: str) -> Path:
        folder = tmp_path_factory.mktemp(axis)
        names = [name for other, name in METHODS if other == axis]
        for engine in ("one", "zero2"):
            run(engine, [case(axis, name, folder / name / engine) for name in names], folder, timeout=3000)
            for name in names:
                again = folder / name / "again" / engine
                again.mkdir(parents=True)
                half = f"checkpoint-{STEPS // 2}"
                shutil.copytree(folder / name / engine / half, again / half)
                shutil.copy(folder / name / engine / "recipe.yaml", again)
            resumed = [case(axis, name, folder / name / "again" / engine, resume=True) for name in names]
            run(engine, resumed, folder, timeout=3000)
        return folder

    return runs


@pytest.mark.parametrize(("axis", "name"), METHODS)
def test_it_trains_alike_everywhere(axis: str, name: str, trained: Callable[[str], Path]) -> None:
    one, two = (losses(trained(axis) / name / engine) for engine in ("one", "zero2"))
    assert len(one) == STEPS and two == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("engine", ["one", "zero2"])
@pytest.mark.parametrize(("axis", "name"), METHODS)
def test_it_resumes_bit_for_bit(axis: str, name: str, engine: str, trained: Callable[[str], Path]) -> None:
    folder = trained(axis) / name
    assert losses(folder / "again" / engine) == losses(folder / engine)
    whole, found = adapter(folder / engine), adapter(folder / "again" / engine)
    assert [key for key, value in whole.items() if not torch.equal(found[key], value)] == []
