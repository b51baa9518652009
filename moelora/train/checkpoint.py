"""Checkpoints of a run: an adapter folder with what training needs beside it. There whole or not at all.

    checkpoint-120/          appears by one rename, when everything in it is on the disk
      moelora.json ...       the adapter, as ``moelora.save`` writes it: ``moelora.load`` takes the folder
      trainer_state.json     steps, logged numbers, callbacks: transformers' own
      training.json          learning-rate schedule, random states, processes
      optimizer.safetensors  the optimiser's state of every parameter, whole: for any engine and number of processes
      pairs.safetensors      what methods keep from step to step (``moelora.train.stepping``)
      checkpoint.json        sha256 of every file; written last

Only the first process writes. What it does not find complete it does not read.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moelora.core.errors import AdapterError, MoeloraError, OutputError
from moelora.io.files import sha256_of
from moelora.io.folder import MANIFEST as ADAPTER
from moelora.io.folder import write_file
from moelora.model.write import write
from moelora.train.processes import together

MANIFEST, TRAINING, STATE = "checkpoint.json", "training.json", "trainer_state.json"
OPTIMIZER, PAIRS = "optimizer.safetensors", "pairs.safetensors"
FORMAT: Final = 1


@dataclass(frozen=True)
class Training:
    """The content of training.json. random: of every process."""

    step: int
    global_batch: int
    scheduler: dict[str, Any]
    random: list[dict[str, Any]]


def checkpoint_folder(out: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return out / f"checkpoint-{step}"


def write_checkpoint(
    out: Path,
    model: nn.Module,
    adapter: dict[str, Tensor],
    states: dict[str, Tensor],
    pairs: dict[str, Tensor],
    training: Training,
    trainer_state: str,
) -> Path:
    """Write a checkpoint; gives its folder. By the first process alone. Raises OutputError, and then leaves nothing.

    adapter, states, pairs: whole tensors.
    """
    folder = checkpoint_folder(out, training.step)
    partial = out / f".{folder.name}.partial"
    values = (item for part in (adapter, states, pairs) for item in part.items())
    bad = next((name for name, value in values if not torch.isfinite(value).all()), None)
    if bad is not None:
        raise OutputError(
            f"{folder}: not written, for {bad} holds a number that is not finite; go on from an older checkpoint with "
            f"a lower learning rate{newest_is(out)}"
        )
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(model, partial, adapter)
        write_file(partial / STATE, trainer_state)
        write_file(partial / TRAINING, json.dumps(asdict(training)))
        for name, tensors in ((OPTIMIZER, states), (PAIRS, pairs)):
            write_file(partial / name, {key: value.cpu() for key, value in tensors.items()})
        files = {str(path.relative_to(partial)): _hash(path) for path in _files(partial)}
        write_file(partial / MANIFEST, json.dumps({"format": FORMAT, "step": training.step, "files": files}, indent=1))
        for place in [partial, *(path for path in partial.rglob("*") if path.is_dir())]:
            _to_disk(place)
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was resumed from before it
        os.rename(partial, folder)
        _to_disk(out)
    except (OSError, MoeloraError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        why = error.strerror or error if isinstance(error, OSError) else error
        raise OutputError(f"{folder}: cannot write the checkpoint: {why}{newest_is(out)}") from error
    return folder


def rotate(out: Path, keep: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond ``keep``, never the best one or the newest. Raises OutputError.

    The newest is read back before anything is removed. Folders without a manifest neither count nor go.
    """
    numbered = sorted(_numbered(out), reverse=True)
    found = [folder for step in numbered if (folder := checkpoint_folder(out, step)) and (folder / MANIFEST).is_file()]
    if not keep or len(found) <= keep:
        return
    while found and fault(found[0]):  # of a run that was resumed from before it
        found.pop(0)
    newest_first = [folder.name for folder in found]
    spared = {Path(best).name} & set(newest_first) if best is not None else set()
    spared |= set(newest_first[:1])
    for name in newest_first:
        if len(spared) < keep:
            spared.add(name)
    for folder in found:
        if folder.name not in spared:
            gone = out / f".{folder.name}.partial"  # a folder half removed is no checkpoint
            shutil.rmtree(gone, ignore_errors=True)
            try:
                os.rename(folder, gone)
            except OSError as error:
                raise OutputError(f"{folder}: cannot remove the checkpoint: {error.strerror or error}") from error
            shutil.rmtree(gone, ignore_errors=True)


def newest(out: Path) -> Path | None:
    """The newest complete checkpoint, by its hashes; None without one. Removes what a killed run left half done."""
    for partial in out.glob(".checkpoint-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    for step in sorted(_numbered(out), reverse=True):
        folder = checkpoint_folder(out, step)
        problem = fault(folder)
        if not problem:
            return folder
        print(f"{folder}: passed over: {problem}")
    return None


def fault(folder: Path) -> str:
    """What is wrong with a checkpoint, or an empty string."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            return f"{MANIFEST} has format {content['format']}, and this version reads {FORMAT}"
        if checkpoint_folder(folder.parent, content["step"]).name != folder.name:
            return f"{MANIFEST} is of step {content['step']}"
        listed = content["files"].items()
        if unlisted := {ADAPTER, STATE, TRAINING, OPTIMIZER, PAIRS} - content["files"].keys():
            return f"{MANIFEST} does not list {min(unlisted)}"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, expected in listed:
        try:
            if _hash(folder / name) != expected:
                return f"{name} was changed"
        except (OSError, AdapterError) as error:
            return f"{name} is missing" if not os.path.exists(folder / name) else f"{name} cannot be read ({error})"
    return ""


def read_training(folder: Path) -> Training:
    """The training state of a complete checkpoint."""
    return Training(**json.loads((folder / TRAINING).read_text(encoding="utf-8")))


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """OPTIMIZER or PAIRS of a complete checkpoint."""
    return load_file(folder / name)


def random_states() -> list[dict[str, Any]]:
    """The state of every random generator, of every process. Called by all of them together."""
    name, keys, *rest = np.random.get_state(legacy=True)
    own = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in torch.cuda.get_rng_state_all()],
    }
    if not together():
        return [own]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    return found


def set_random_state(state: dict[str, Any]) -> None:
    """Give this process's generators a state that ``random_states`` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes(state["torch"]))
    for device, value in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(_bytes(value), device)


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _numbered(out: Path) -> Iterator[int]:
    for path in out.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal() and path.is_dir():
            yield int(number)


def newest_is(out: Path) -> str:
    """What an error says at its end about the checkpoints that are there."""
    folders = (checkpoint_folder(out, step) for step in sorted(_numbered(out), reverse=True))
    found = next((folder for folder in folders if not fault(folder)), None)
    return "; no older checkpoint is there" if found is None else f"; the newest is {found}"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _hash(path: Path) -> str:
    return sha256_of(path.parent, path.name, limit=None)


def _to_disk(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
