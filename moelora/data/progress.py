"""Progress bars where there is something to wait for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import datasets

SMALL = 50_000
"""Rows that are read or tokenised in seconds."""


@contextmanager
def quiet_if_small(rows: int) -> Iterator[None]:
    """No dataset progress bars for fewer than ``SMALL`` rows; the setting is restored afterwards."""
    hidden = datasets.are_progress_bars_disabled()
    if rows < SMALL and not hidden:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()
