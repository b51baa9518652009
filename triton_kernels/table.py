"""Block sizes: a shipped table for compute capabilities 8.0 and 9.0, and what ``moelora tune`` found on this machine.

A row is keyed by the kernel, whether tokens are float32, and the ranks that a tile holds (a power of two). Lengths are
not part of it: tiles cut tokens, and another length would mean to tune again.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Final, Literal

from moelora.triton_kernels.launch import Config

from moelora.core.errors import ConfigError

Kernel = Literal["shrink", "expand", "outer"]
KERNELS: Final[tuple[Kernel, ...]] = ("shrink", "expand", "outer")
RANKS: Final = (16, 32, 64, 128)
"""Widest tile of ranks; more of them are several tiles."""

POWERS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CACHE: Final = Path.home() / ".cache" / "moelora"


def shipped(kernel: Kernel, single: bool, ranks: int, capability: int) -> Config:
    """The table's row. single: float32 tokens. ranks: of RANKS. capability: 80 or 90; others take the nearest below.

    Chosen so that nothing spills and shared memory holds the loads in flight on each of the two; not measured yet.
    """
    hopper = capability >= 90
    if single:
        depth, stages = 32, 2
        if kernel == "shrink":
            return Config(64, min(ranks, 64), depth, 4, stages)
        if kernel == "expand":
            return Config(64, 64, min(ranks, 32), 4, stages)
        return Config(min(ranks, 64), 64, depth, 4, 1 if ranks == 16 else stages)
    if kernel == "shrink":
        if not hopper:
            return Config(64, ranks, 64, 4 if ranks <= 64 else 8, 3)
        return Config(128 if ranks <= 64 else 64, ranks, 64, 4, 4)
    if kernel == "expand":
        return Config(128, 128, min(ranks, 64), 8, 3) if hopper else Config(64, 128, min(ranks, 64), 4, 2)
    return Config(ranks, 128, 64, 4 if ranks <= 64 else 8, 4 if hopper else 3)


def name(kernel: Kernel, single: bool, ranks: int) -> str:
    """A row's key in a tuned file."""
    return f"{kernel}/{'float32' if single else 'half'}/{ranks}"


@functools.cache
def tuned(path: Path) -> dict[str, Config]:
    """The rows of a file of ``moelora tune``; none where there is no file. Raises ConfigError for a broken one."""
    if not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        found = {key: Config(**row) for key, row in rows.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: not a file of 'moelora tune' ({error}); delete it, or run 'moelora tune' again"
        ) from error
    for key, config in found.items():
        *sizes, stages = config.as_dict().values()
        if not (all(size in POWERS for size in sizes) and stages in range(1, 9)):
            raise ConfigError(
                f"{path}: row '{key}' has sizes that are no powers of two up to 256, or stages outside 1 to 8; delete "
                "it, or run 'moelora tune' again"
            )
    return found


def tuned_file(device: str, folder: Path = CACHE) -> Path:
    """Where the rows for a GPU of this name are kept."""
    return folder / f"kernels-{'-'.join(device.split())}.json"


def pick(kernel: Kernel, single: bool, ranks: int, capability: int, rows: dict[str, Config]) -> Config:
    """The tuned row, or the shipped one."""
    bucket = next((size for size in RANKS if ranks <= size), RANKS[-1])
    return rows.get(name(kernel, single, bucket)) or shipped(kernel, single, bucket, capability)
