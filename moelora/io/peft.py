"""A strict reader of PEFT LoRA adapter folders. Whatever is not plain LoRA is refused by name.

    adapter_config.json          configuration, at most 1 MB
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight [r, D] and .lora_B.weight [O, r]

No other file is opened, nothing is unpickled and no model is built. The header of the tensor file is checked against
the configuration before a tensor is read. The time and the memory that a file can cost are bounded.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from moelora.core.errors import AdapterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG, MAX_HEADER, MAX_FILE = 1 << 20, 16 << 20, 32 << 30
MAX_RANK, MAX_WIDTH, MAX_ALPHA = 4096, 1 << 22, 1e6
MAX_PATTERN, MAX_MATCHES = 256, 1_000_000  # characters of one pattern; patterns times modules
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.pkl")
INITS = (True, False, "gaussian", "orthogonal")
READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "init_lora_weights"}
RECORDED = {"base_model_name_or_path", "revision", "fan_in_fan_out"}
IGNORED = {
    *("task_type", "auto_mapping", "peft_version", "inference_mode", "target_modules", "exclude_modules"),
    *("lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "runtime_config"),
}
REFUSED = {
    **dict.fromkeys(("use_dora", "lora_bias", "use_qalora", "kasa_config", "monteclora_config", "use_bdlora")),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication")),
    **dict.fromkeys(("megatron_config", "arrow_config", "alora_invocation_tokens", "velora_config")),
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying")),
}
"""Fields of PEFT's LoraConfig that must be null, false or empty."""

TENSOR = re.compile(r"base_model\.model\.([A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)\.lora_([AB])(?:\.default)?\.weight")
PATTERN = re.compile(r"(\^|\.\*)?((?:[A-Za-z0-9_-]|\\?\.)+)\$?")
NAMES = "base_model.model.<module>.lora_A.weight or .lora_B.weight"
PLAIN = "moelora reads plain LoRA only: train the adapter again without it, or leave this adapter out"
MOVED = (
    "this start may have changed the base weights, so the tensors fit only the changed model: save the adapter with "
    "PEFT's path_initial_model_for_weight_conversion, which writes a plain LoRA. A start that left the base as it was, "
    "such as EVA: set init_lora_weights to true and the settings of the start to null"
)
FIX = "correct the file, or save the adapter again"
CONVERT = "if you trust its origin: load it with PEFT and call save_pretrained(folder, safe_serialization=True)"
AGAIN = "the file is damaged or incomplete: copy or save the adapter again"


@dataclass(frozen=True)
class LoRATensors:
    """One module's LoRA: its delta weight is ``scale * B @ A``, [O, D]. A is [r, D] and B [O, r], as in the file."""

    A: Tensor
    B: Tensor
    scale: float


@dataclass(frozen=True)
class PeftAdapter:
    """A PEFT adapter: its configuration as in the file, and its tensors by module path in the base model."""

    folder: Path
    base_model: str | None
    revision: str | None
    config: dict[str, Any]
    tensors: dict[str, LoRATensors]


class _Entry(NamedTuple):
    """One tensor of the header. Bytes are counted from the first byte after the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, int]
    begin: int
    end: int


def read_peft(folder: Path) -> PeftAdapter:
    """Read the adapter that PEFT saved in a folder; tensors are on the CPU in the dtypes of the file.

    Warns where every B is zero, and where unknown settings are off. Raises AdapterError.
    """
    folder = Path(folder)
    path = folder / CONFIG
    with _open(folder, CONFIG) as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_CONFIG:
            _fail(path, "size", f"{size} bytes", f"at most {MAX_CONFIG}", AGAIN)
        config = _parse(_take(file, path, size), path)
    _check_config(config, path)
    path = folder / WEIGHTS
    with _open(folder, WEIGHTS) as file:
        start, entries = _header(file, path)
        scales = _check_ranks(entries, config, folder)
        found = {key: _tensor(file, path, start, entry) for key, entry in entries.items()}
    tensors = {name: LoRATensors(found[name, "A"], found[name, "B"], scale) for name, scale in scales.items()}
    if not any(bool(pair.B.any()) for pair in tensors.values()):
        warnings.warn(f"{path}: every lora_B is zero, so the adapter changes nothing: was it trained?", stacklevel=2)
    return PeftAdapter(folder, config.get("base_model_name_or_path"), config.get("revision"), config, tensors)


def _fail(path: Path, key: str, found: str, expected: str, remedy: str) -> NoReturn:
    raise AdapterError(f"{path}: {key}: found {found}, expected {expected}; {remedy}")


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _open(folder: Path, name: str) -> io.BufferedReader:
    """A regular file of the folder, opened for reading. Symlinks may lead anywhere inside the folder."""
    path = folder / name
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(os.path.realpath(folder)):
        _fail(path, "link", "a link that leaves the folder", "a file in it", "copy the file itself into the folder")
    if not real.exists() and not path.is_symlink():
        pickled = next((other for other in PICKLES if (folder / other).exists()), None)
        if name == WEIGHTS and pickled is not None:
            _fail(folder / pickled, "format", "a pickle, which can run code and is never opened", WEIGHTS, CONVERT)
        _fail(
            path, "file", "nothing", f"{CONFIG} and {WEIGHTS} as PEFT's save_pretrained writes them", "check the path"
        )
    try:
        handle = os.open(real, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        _fail(path, "file", str(error.strerror), "a readable file", "check the path and its permissions")
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        _fail(path, "file", "a folder, pipe or device", "a regular file", AGAIN)
    return os.fdopen(handle, "rb")


def _take(file: io.BufferedReader, path: Path, count: int) -> bytearray:
    """The next ``count`` bytes of a file; the caller bounds the count by the size of the file."""
    data, done = bytearray(count), 0
    try:
        while done < count and (more := file.readinto(memoryview(data)[done:])):
            done += more
    except OSError as error:
        _fail(path, "file", str(error.strerror), "a readable file", AGAIN)
    if done < count:
        _fail(path, "file", f"{done} bytes", f"{count} more", AGAIN)
    return data


def _parse(text: bytearray, path: Path) -> dict[str, Any]:
    """A JSON object without repeated keys."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                _fail(path, _short(key), "the key twice", "it once", AGAIN)
            found[key] = value
        return found

    def constant(name: str) -> NoReturn:
        _fail(path, "JSON", name, "finite numbers", AGAIN)

    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=constant)
    except AdapterError:
        raise
    except (ValueError, RecursionError) as error:
        _fail(path, "JSON", _short(str(error)), "JSON text", AGAIN)
    if not isinstance(found, dict):
        _fail(path, "JSON", type(found).__name__, "an object", AGAIN)
    return found


def _check_config(config: dict[str, Any], path: Path) -> None:
    """Refuse every setting that is on and is not plain LoRA."""

    def check(key: str, good: Callable[[Any], bool], expected: str, what: str, *default: Any) -> None:
        value = config.get(key, *default)
        if not good(value):
            _fail(path, key, _short(value), expected, what)

    check("peft_type", lambda v: v == "LORA", "'LORA'", "moelora reads LoRA adapters only")
    check("init_lora_weights", lambda v: type(v) in (bool, str) and v in INITS, f"one of {INITS}", MOVED, True)
    for key in REFUSED:
        check(key, _inactive, "null, false or empty", PLAIN)
    check("bias", lambda v: v == "none", "'none'", PLAIN, "none")
    check("r", _is_rank, f"an integer from 1 to {MAX_RANK}", FIX)
    check("lora_alpha", _is_alpha, f"a number above 0, at most {MAX_ALPHA:g}", FIX)
    for key in ("use_rslora", "fan_in_fan_out"):
        check(key, lambda v: type(v) is bool, "true or false", FIX, False)
    for key in ("base_model_name_or_path", "revision"):
        check(key, lambda v: v is None or isinstance(v, str), "a string or null", FIX)
    for key, good in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        check(key, lambda v: v is None or isinstance(v, dict), "an object or null", FIX)
        for pattern, value in (config.get(key) or {}).items():
            if not good(value):
                _fail(path, f"{key}: {_short(pattern)}", _short(value), "a number in the range of its default", FIX)
    unknown = sorted(config.keys() - READ - RECORDED - IGNORED - REFUSED.keys())
    for key in unknown:
        check(key, _inactive, "null, false or empty", "moelora does not know this setting, so it cannot honour it")
    if unknown:
        warnings.warn(f"{path}: unknown settings, all off: {_short(unknown)}", stacklevel=3)


def _inactive(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_alpha(value: object) -> bool:
    return type(value) in (int, float) and 0 < value <= MAX_ALPHA  # type: ignore[operator]


def _header(file: io.BufferedReader, path: Path) -> tuple[int, dict[tuple[str, str], _Entry]]:
    """(offset of the first tensor byte, entries by module and half) of a safetensors file. Reads no tensor."""
    size = os.fstat(file.fileno()).st_size
    if not 8 <= size <= MAX_FILE:
        _fail(path, "size", f"{size} bytes", f"8 to {MAX_FILE}", AGAIN)
    length = int.from_bytes(_take(file, path, 8), "little")
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        _fail(path, "header", f"{length} bytes in a file of {size}", f"at most {MAX_HEADER}", AGAIN)
    header = _parse(_take(file, path, length), path)
    header.pop("__metadata__", None)
    entries: dict[tuple[str, str], _Entry] = {}
    for name, value in header.items():
        match = TENSOR.fullmatch(name) if len(name) <= 512 else None
        if match is None or "base_layer" in match[1].split("."):
            _fail(path, _short(name), _kind(name), NAMES, PLAIN)
        if (match[1], match[2]) in entries:
            _fail(path, name, f"lora_{match[2]} of the module twice", "it once", AGAIN)
        entries[match[1], match[2]] = _entry(name, value, path)
    if not entries:
        _fail(path, "tensors", "none", "two for each module", "under ZeRO-3, gather the weights before saving")
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.begin):
        if entry.begin != end:
            _fail(path, entry.name, f"data at byte {entry.begin}", f"it at {end}", AGAIN)
        end = entry.end
    if 8 + length + end != size:
        _fail(path, "size", f"{size} bytes", f"{8 + length + end} by its header", AGAIN)
    return 8 + length, entries


def _kind(name: str) -> str:
    """What a tensor is that is no half of a LoRA."""
    kinds = {
        "lora_embedding_": "LoRA of an embedding",
        "lora_magnitude_vector": "DoRA (use_dora)",
        "lora_B.bias": "bias of lora_B (lora_bias)",
        "trainable_tokens": "trained tokens (trainable_token_indices)",
        "base_layer.lora_": "LoRA of a parameter (target_parameters)",
        "base_layer": "a weight or bias of the base layer (bias, or an embedding)",
    }
    return next((kind for part, kind in kinds.items() if part in name), "not LoRA (modules_to_save, bias or foreign)")


def _entry(name: str, value: Any, path: Path) -> _Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        _fail(path, name, _short(value), "dtype, shape and data_offsets", AGAIN)
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        _fail(path, name, f"dtype {_short(kind)}", f"one of {', '.join(DTYPES)}", PLAIN)
    if not _is_pair(shape) or not 1 <= min(shape) <= max(shape) <= MAX_WIDTH:
        what = "convolutions are not read; under ZeRO-3, gather the weights before saving"
        _fail(path, name, f"shape {_short(shape)}", f"2 sizes from 1 to {MAX_WIDTH}", what)
    count = shape[0] * shape[1] * DTYPES[kind].itemsize
    if not _is_pair(offsets) or offsets[0] < 0 or offsets[1] - offsets[0] != count:
        _fail(path, name, f"data_offsets {_short(offsets)}", f"{count} bytes", AGAIN)
    return _Entry(name, DTYPES[kind], (shape[0], shape[1]), offsets[0], offsets[1])


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(size) is int for size in value)


def _check_ranks(entries: dict[tuple[str, str], _Entry], config: dict[str, Any], folder: Path) -> dict[str, float]:
    """Scale of every module, once its halves are paired and have the rank of the configuration."""
    modules = dict.fromkeys(module for module, _ in entries)
    ranks = _resolver(config, "rank_pattern", "r", folder / CONFIG, len(modules))
    alphas = _resolver(config, "alpha_pattern", "lora_alpha", folder / CONFIG, len(modules))
    scales = {}
    for module in modules:
        for half, other in ("AB", "BA"):
            if (module, half) not in entries:
                _fail(folder / WEIGHTS, entries[module, other].name, f"no lora_{half} beside it", "both", AGAIN)
        rank = ranks(module)
        for entry, axis in ((entries[module, "A"], 0), (entries[module, "B"], 1)):
            if entry.shape[axis] != rank:
                found, expected = f"shape {list(entry.shape)}", f"rank {rank} by {CONFIG}"
                _fail(folder / WEIGHTS, entry.name, found, expected, "the two files do not match: copy both again")
        scales[module] = alphas(module) / (math.sqrt(rank) if config.get("use_rslora", False) else rank)
    return scales


def _resolver(config: dict[str, Any], key: str, base: str, path: Path, modules: int) -> Callable[[str], Any]:
    """A function from module path to its value: that of the first pattern that matches, in the order of the file.

    PEFT's rule is ``re.match(rf"(.*\\.)?({pattern})$", module)``. Names, ``.`` and ``\\.``, after ``^`` or ``.*``, are
    all that is matched here; a ``.`` stands for any character, as in PEFT.
    """
    patterns = config.get(key) or {}
    if len(patterns) * modules > MAX_MATCHES:
        _fail(path, key, f"{len(patterns)} patterns for {modules} modules", "fewer", "merge the patterns")
    table = []
    for pattern, value in patterns.items():
        match = PATTERN.fullmatch(pattern) if len(pattern) <= MAX_PATTERN else None
        if match is None:
            expected = f"the name of a module or its end, at most {MAX_PATTERN} characters"
            _fail(path, key, f"the pattern {_short(pattern)}", expected, "list the modules by name")
        table.append((match[1], re.compile(match[2]), len(match[2].replace("\\", "")), value))

    def value_of(module: str) -> Any:
        for anchor, rule, length, value in table:
            start = len(module) - length
            border = start == 0 or anchor == ".*" or (anchor is None and module[start - 1 : start] == ".")
            if start >= 0 and border and rule.fullmatch(module, start):
                return value
        return config[base]

    return value_of


def _tensor(file: io.BufferedReader, path: Path, start: int, entry: _Entry) -> Tensor:
    file.seek(start + entry.begin)
    data = _take(file, path, entry.end - entry.begin)
    value = torch.frombuffer(data, dtype=entry.dtype).view(entry.shape)
    if not bool(torch.isfinite(value).all()):
        _fail(path, entry.name, "NaN or infinite values", "finite ones", "the training run diverged: train it again")
    return value
