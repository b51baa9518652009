"""Every method of the axes beside routers trains alike on one process and under ZeRO-2, and resumes bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.docs.composition import DEFAULTS, methods
from tests.train.test_world import adapter, losses
from tests.train.world import run

pytestmark = [pytest.mark.full, pytest.mark.timeout(3000)]

STEPS = 100
METHODS = [
    (axis, name)
    for axis, found in methods().items()
    if axis in ("experts", "init", "ranks", "optim", "losses")
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
    saved = [f"training.max_steps={STEPS}", "training.save_strategy=steps", f"training.save_steps={STEPS // 2}"]
    return {"recipe": "meteora", "overrides": [*overrides, *saved], "out": str(out), **more}


@pytest.mark.parametrize(("axis", "name"), METHODS)
def test_it_trains_alike_everywhere_and_resumes_bit_for_bit(axis: str, name: str, tmp_path: Path) -> None:
    for engine in ("one", "zero2"):
        run(engine, [case(axis, name, tmp_path / engine)], tmp_path, timeout=900)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "zero2")
    assert two[:10] == pytest.approx(one[:10], rel=2e-5)
    assert two == pytest.approx(one, rel=1e-2)  # a hundred steps make more of what rounding did to the first
    for engine in ("one", "zero2"):
        again = tmp_path / "again" / engine
        again.mkdir(parents=True)
        shutil.copytree(tmp_path / engine / f"checkpoint-{STEPS // 2}", again / f"checkpoint-{STEPS // 2}")
        shutil.copy(tmp_path / engine / "recipe.yaml", again)
        run(engine, [case(axis, name, again, resume=True)], tmp_path, timeout=900)
        assert losses(again) == losses(tmp_path / engine)
        whole, found = adapter(tmp_path / engine), adapter(again)
        assert [key for key, value in whole.items() if not torch.equal(found[key], value)] == []
