"""What moelora runs on: versions, the kernels that are active, and the machine; as data."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from moelora import __version__
from moelora.ops import cpu, cuda

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "deepspeed", "bitsandbytes", "datasets")


def environment() -> dict[str, Any]:
    """versions (None: not installed); kernels of the operator per device, each active or not and why; gpus; threads."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "moelora": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "kernels": {
            "cpu": {"active": not cpu.PROBLEM, "status": cpu.status()},
            "cuda": {"active": not cuda.PROBLEM and bool(gpus), "status": cuda.status()},
        },
        "gpus": [f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus],
        "threads": torch.get_num_threads(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
