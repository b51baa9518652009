"""``import moelora`` is instant: heavy libraries come with the first name that needs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "pydantic", "trl", "datasets", "peft", "yaml", "rich", "numpy", "safetensors")


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after some code."""
    tail = "\nimport json, sys\nprint(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    ran = subprocess.run([sys.executable, "-c", code + tail], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return set(json.loads(ran.stdout.splitlines()[-1]))


def test_importing_the_package_imports_nothing_heavy() -> None:
    found = modules_after("import moelora\nmoelora.__version__\nmoelora.__all__")
    assert "moelora" in found and not found & set(HEAVY)


def test_names_bring_what_they_need() -> None:
    found = modules_after("import moelora\nmoelora.adapt")
    assert {"torch", "transformers", "pydantic"} <= found
    # Adapting a model needs no trainer, no table and no data library.
    assert not found & {"trl", "datasets", "peft", "rich"}


def test_the_vocabulary_needs_no_transformers() -> None:
    found = modules_after(
        "import moelora.core.methods, moelora.core.tape, moelora.ops.routed_lora, moelora.routers.smora"
    )
    assert "torch" in found and "transformers" not in found
