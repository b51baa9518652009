"""Several processes as one run: starting them on this machine, and what they decide together."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from accelerate.utils.environment import get_int_from_env
from transformers import TrainingArguments

from moelora.core.errors import MoeloraError
from moelora.model.record import main_process

T = TypeVar("T")

GRACE: Final = 120
"""Seconds that processes have to finish a step and write a checkpoint after SIGTERM."""

_WORLD: Final = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def started() -> int:
    """How many processes a launcher (ours, torchrun, deepspeed, mpirun) started, this one among them; 0 without one."""
    count: int = get_int_from_env(_WORLD, 0)
    return count


def join(arguments: TrainingArguments) -> None:
    """Meet the other processes of the run, if it has some, and share the cores of the machine with them."""
    if arguments.deepspeed is not None:
        import deepspeed

        deepspeed.init_distributed(dist_backend=None if torch.cuda.is_available() else "gloo")
    local, cores = get_int_from_env(("LOCAL_WORLD_SIZE",), 1), os.cpu_count() or 1
    if arguments.world_size > 1 and torch.get_num_threads() * local > cores:
        torch.set_num_threads(max(1, cores // local))


def leave() -> None:
    """Part from the others."""
    if together():
        torch.distributed.destroy_process_group()


def end() -> None:
    """End a process that is one of a group and has done its work.

    The interpreter is not taken down: now and then a thread that still carries messages would want it, and abort.
    """
    if together():
        leave()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def together() -> bool:
    """Whether this process is one of a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def agreed(decide: Callable[[], T]) -> T:
    """What the first process decides, in all processes; a MoeloraError that it raises is raised in all of them."""
    if not together():
        return decide()
    found: list[Any] = [None, None]
    if main_process():
        try:
            found[0] = decide()
        except MoeloraError as error:
            found[1] = error
    torch.distributed.broadcast_object_list(found)
    if found[1] is not None:
        found[1].told = not main_process()
        raise found[1]
    value: T = found[0]
    return value


def any_of(flags: list[bool]) -> list[bool]:
    """For each flag, whether any process has it set."""
    if not together():
        return flags
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(flags, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
    return [bool(value) for value in tensor.tolist()]


def launch(arguments: list[str], processes: int) -> int:
    """Run ``moelora`` with these arguments in some processes of this machine. Gives the exit code of the first that
    failed, 128 + n for signal n, or 0.

    The first process has the terminal. What the others print is shown when one of them fails.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what they say, we say shorter
    with tempfile.TemporaryDirectory(prefix="moelora-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.2,
            logs_specs=DefaultLogsSpecs(logs, redirects=dict.fromkeys(range(1, processes), Std.ALL)),
            shutdown_timeout=GRACE,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "moelora", *arguments)
        except ChildFailedError as error:
            # One that says what is wrong (exit code 2) before those that only lost it.
            first = min(error.failures.items(), key=lambda item: (item[1].exitcode != 2, item[1].timestamp))
            return _explained(first[0], first[1].exitcode, Path(logs))
        except SignalException as error:
            return 128 + int(error.sigval)
    return 0


def _explained(rank: int, code: int, logs: Path) -> int:
    """Say why a run ended; gives its exit code."""
    if rank:
        for log in logs.glob(f"**/{rank}/stderr.log"):
            sys.stderr.write("".join(log.read_text(errors="replace").splitlines(keepends=True)[-30:]))
    if code < 0:
        name = signal.Signals(-code).name
        print(f"error: process {rank} was ended by {name}, and the others with it; --resume goes on", file=sys.stderr)
        return 128 - code
    return code
