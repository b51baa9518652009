"""What PEFT LoRA folders hold, before a model is there to put them into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moelora.core.errors import AdapterError
from moelora.io.folder import MANIFEST, read_manifest
from moelora.io.peft import PeftAdapter, read_peft


def inspect_adapters(folders: Iterable[str | Path]) -> list[dict[str, Any]]:
    """One entry per adapter, JSON-ready; a folder that moelora wrote counts as the experts in it.

    folder, base_model, ranks, scales, targets (endings of module names), modules, parameters, dtypes, norm (Frobenius
    norm of all updates scale B A together), zero (modules whose update is zero), and error: why it cannot be an expert,
    in place of the figures. Every tensor is read, one adapter at a time.
    """
    return [_entry(path) for folder in folders for path in _adapters(Path(folder))]


def _adapters(folder: Path) -> list[Path]:
    if (folder / MANIFEST).is_file():
        return [folder / "experts" / name for name in read_manifest(folder).experts]
    return [folder]


def _entry(folder: Path) -> dict[str, Any]:
    try:
        adapter = read_peft(folder)
    except AdapterError as error:
        return {"folder": str(folder), "error": str(error)}
    return {"folder": str(folder), "error": None, **_figures(adapter)}


def _figures(adapter: PeftAdapter) -> dict[str, Any]:
    loras = adapter.tensors.values()
    squares = [_square(lora.A.double(), lora.B.double()) * lora.scale**2 for lora in loras]
    return {
        "base_model": adapter.base_model,
        "ranks": sorted({lora.A.shape[0] for lora in loras}),
        "scales": sorted({round(lora.scale, 6) for lora in loras}),
        "targets": dict(Counter(path.rpartition(".")[2] for path in adapter.tensors)),
        "modules": len(loras),
        "parameters": sum(lora.A.numel() + lora.B.numel() for lora in loras),
        "dtypes": sorted({str(half.dtype).removeprefix("torch.") for lora in loras for half in (lora.A, lora.B)}),
        "norm": sum(squares) ** 0.5,
        "zero": sum(square == 0 for square in squares),
    }


def _square(A: Any, B: Any) -> float:
    """Squared Frobenius norm of B A, from r x r products alone."""
    return max(0.0, float(((B.t() @ B) * (A @ A.t())).sum()))
