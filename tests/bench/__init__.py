"""Benchmarks: ``make bench`` on a CPU, ``python -m tests.bench.gpu`` on a GPU."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: its profiler would write a line at every use
