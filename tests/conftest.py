"""Settings of the whole test set."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may ask the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes that tests start would spin in each other's way

import pytest
import torch
from hypothesis import settings

settings.register_profile("moelora", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("moelora")

# Reductions over one thread have one order, so that bitwise comparisons do not depend on the machine.
torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests counted and gave ``record_property("counts", text)``."""
    for report in terminalreporter.getreports("passed"):
        for key, value in report.user_properties:
            if key == "counts":
                terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {value}")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves the global one as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
