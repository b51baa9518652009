"""Generated tasks that ask for different answers to the same inputs.

Every task reads a list of three to six digits, so nothing but the instruction tells the tasks apart:
the case a mixture of experts is for. Train and test never share an input list, whatever the task
and the seed: a list belongs to one split by a hash of its digits.

Recipe line: ``data: {tasks: {reverse: {path: builtin/reverse}}}`` or ``data: {builtin: true}`` for all.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator

Digits = list[int]


def _spaced(digits: Digits) -> str:
    return " ".join(map(str, digits))


TASKS: dict[str, Callable[[Digits], str]] = {
    "reverse": lambda d: _spaced(d[::-1]),
    "sort": lambda d: _spaced(sorted(d)),
    "shift": lambda d: _spaced([(x + 1) % 10 for x in d]),
    "rotate": lambda d: _spaced(d[1:] + d[:1]),
    "count": lambda d: str(len(d)),
    "sum": lambda d: str(sum(d)),
    "largest": lambda d: str(max(d)),
    "format": lambda d: "[" + ", ".join(map(str, d)) + "]",
}


def is_test(digits: Digits) -> bool:
    """True for the tenth of all inputs kept for testing; depends on the digits alone."""
    return zlib.crc32(bytes(digits)) % 10 == 0


def _inputs(split: str, rng: random.Random) -> Iterator[Digits]:
    while True:
        digits = [rng.randrange(10) for _ in range(rng.randint(3, 6))]
        if is_test(digits) == (split == "test"):
            yield digits


def generate(task: str, split: str, size: int, seed: int = 0) -> list[dict[str, str]]:
    """``size`` rows of one task as ``{"prompt", "completion"}``, the same for the same arguments.

    task: a key of ``TASKS``. split: ``"train"`` or ``"test"``. Raises ``KeyError`` for another task.
    """
    answer = TASKS[task]
    inputs = _inputs(split, random.Random(f"{task}/{split}/{seed}"))
    return [
        {"prompt": f"{task}: {_spaced(digits)}", "completion": answer(digits)}
        for digits, _ in zip(inputs, range(size), strict=False)
    ]
