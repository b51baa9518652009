"""Adapters made to do harm: valid files and what can be done to them. Run as a program, it reads thousands of them.

    python -m tests.io.hostile FOLDER SEED COUNT

reads COUNT mutations in a process with little memory, which notes every audit event of Python (files opened, modules
imported, code run), and prints as JSON what happened.
"""

from __future__ import annotations

import json
import os
import random
import resource
import struct
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from moelora.core.errors import AdapterError
from moelora.io.peft import CONFIG, PREFIX, WEIGHTS, read_peft, warn_if_untrained
from moelora.io.tensors import MAX_FILE, MAX_HEADER

ROOM = 384 << 20
"""Bytes of address space that reading may take."""


def valid(bias: str = "none", dora: bool = False) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(configuration, tensors) of a small adapter with parts of every kind."""
    config: dict[str, Any] = {
        **{"peft_type": "LORA", "base_model_name_or_path": "org/base", "revision": None, "task_type": "CAUSAL_LM"},
        **{"r": 4, "lora_alpha": 8, "use_rslora": False, "init_lora_weights": True, "bias": bias, "use_dora": dora},
        **{"rank_pattern": {"k": 2, r"h\.(0|1)\.v": 3}, "alpha_pattern": {".*k": 16, "[v-z]": 1.5}, "lora_bias": False},
        **{"target_modules": ["q", "k", "v"], "modules_to_save": ["head"], "layers_to_transform": [0]},
        **{
            "eva_config": None,
            "fan_in_fan_out": False,
            "lora_dropout": 0.1,
            "inference_mode": True,
            "trainable_token_indices": None,
        },
    }
    tensors = {"head.weight": torch.ones(2, 3), "model.embed_tokens.weight": torch.ones(5, 6)}
    for name, rank in (("q", 4), ("k", 2), ("v", 3)):
        tensors[f"h.0.{name}.lora_A.weight"] = torch.ones(rank, 6)
        tensors[f"h.0.{name}.lora_B.weight"] = torch.ones(5, rank, dtype=torch.bfloat16)
        if dora:
            tensors[f"h.0.{name}.lora_magnitude_vector"] = torch.ones(5)
    if bias != "none":
        tensors["h.0.q.base_layer.bias"] = torch.ones(5)
    return config, {f"{PREFIX}{name}": value for name, value in tensors.items()}


ALL = [valid(), valid("all"), valid("lora_only", True)]
CONFIGS = [json.dumps(config).encode() for config, _ in ALL]
FILES = [save(tensors, {"format": "pt"}) for _, tensors in ALL]


def put(folder: Path, config: bytes, weights: bytes) -> Path:
    (folder / CONFIG).write_bytes(config)
    (folder / WEIGHTS).write_bytes(weights)
    return folder


def take_all(folder: Path) -> int:
    """Read an adapter as its users do; how many tensors it has."""
    adapter = read_peft(folder)
    try:
        warn_if_untrained(adapter)
        read = [adapter.read(module) for module in adapter.modules]
        return len(read) + len([adapter.read_full(name) for name in adapter.full])
    finally:
        adapter.file.close()


NUMBERS = [0, -1, 1, 3, 2**31, 2**63, 2**64, 10**400, -(10**30), 0.5, -0.0, 1e308, 4096, 4097, 1 << 22, 1 << 35]
WORDS = [
    *("", "q", "h.0.q", "../../etc/passwd", "a\0b", "\x1b[2J", "\u202e\U0001f600", "lora_A", "F32", "LORA", "all"),
    *("(a|a)*[bc]", "(?:a*?)*?[b]", "(" * 60, "[" * 9, "\\", "(?R)", "(?P<n>a)(?P=n)", "{99}{99}", ".*" * 90),
    *("__metadata__", "__class__", "pissa", "mica", "cos\nsystem\n(S'true'\ntR.", "None", "NaN", "1e999", ".", ".."),
    *("x" * 3000, "a..b"),
]
PIECES = [b"{", b"}", b"[", b"]", b",", b'"', b":", b"\\", b"NaN", b"1e999", b"\xed\xa0\x80"]
STRANGE: list[Any] = [None, True, False, [], {}, [[]], [None], {"": {}}, *NUMBERS, *WORDS]


def confused(draw: random.Random, value: Any, depth: int = 0) -> Any:
    """The value with something at a random place exchanged, added, doubled or taken out."""
    if isinstance(value, dict) and value and depth < 4 and draw.random() < 0.85:
        key = draw.choice(sorted(value))
        changed = dict(value)
        match draw.randrange(6):
            case 0:
                changed[draw.choice([*WORDS, key.upper(), key + ".", f"{key}\n"])] = changed.pop(key)
            case 1:
                del changed[key]
            case 2:
                changed[draw.choice(WORDS)] = draw.choice([value[key], *STRANGE])
            case _:
                changed[key] = confused(draw, value[key], depth + 1)
        return changed
    if isinstance(value, list) and value and depth < 4 and draw.random() < 0.8:
        place = draw.randrange(len(value))
        inner = confused(draw, value[place], depth + 1)
        there = [*value[:place], inner, *value[place + 1 :]]
        return draw.choice([there, there, value + value, value[:-1], [value], [*value, inner]])
    if type(value) is int and draw.random() < 0.5:
        return value + draw.choice([-8, -1, 1, 4, 8, 16, 1 << 20])
    strange = draw.choice(STRANGE)
    return nested(strange, draw.randrange(1, 3000)) if draw.random() < 0.05 else strange


def nested(value: Any, depth: int) -> Any:
    for level in range(min(depth, 600)):
        value = [value] if level % 2 else {"a": value}
    return value


def spoiled(draw: random.Random, content: bytes, end: int) -> bytes:
    """The bytes with a few of the first ``end`` flipped, inserted, doubled, cut out or cut off."""
    text = bytearray(content)
    for _ in range(draw.randrange(1, 4)):
        place, size = draw.randrange(end), draw.choice([1, 1, 2, 8, 60])
        match draw.randrange(7):
            case 0:
                text[place : place + 1] = bytes([draw.randrange(256)])
            case 1:
                text[place:place] = bytes(draw.randrange(256) for _ in range(size % 9))
            case 2:
                del text[place : place + size]
            case 3:
                text[place:place] = text[place : place + size]
            case 4:
                text[place:place] = draw.choice(PIECES)
            case 5:
                digits = [at for at in range(min(end, len(text))) if chr(text[at]).isdigit()]
                if digits:
                    text[draw.choice(digits)] = ord(draw.choice("0123456789-e."))
            case 6:
                if draw.random() < 0.3:
                    del text[place:]
                    return bytes(text)
    return bytes(text)


def with_header(draw: random.Random, weights: bytes, change: Callable[[Any], Any]) -> bytes:
    """The file with another header, mostly of a length that it tells."""
    length = int.from_bytes(weights[:8], "little")
    header, data = json.loads(weights[8 : 8 + length]), weights[8 + length :]
    text = json.dumps(change(header)).encode()
    if draw.random() < 0.1:
        text = text.replace(b"}", b', "dtype": "F32"}', 1)  # a key twice
    told = len(text)
    if draw.random() < 0.1:
        told = draw.choice([0, 1, 7, told - 1, told + 1, MAX_HEADER + 1, 2**31, 2**63, 2**64 - 1])
    size = len(data)
    data = draw.choice([data, data, data, data + b"\0", data[:-1], b"", bytes(size), data * 2, b"\xff" * size])
    return struct.pack("<Q", told) + text + data


def swapped(draw: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    """The header with the parts of entries exchanged between them, so that each is honest by itself."""
    one, two = draw.sample(sorted(header.keys() - {"__metadata__"}), 2)
    place = ["shape", "data_offsets"]
    parts = draw.choice([["dtype"], ["shape"], ["data_offsets"], place, [*place, "dtype"]])
    header[one], header[two] = (
        {**header[one], **{part: header[two][part] for part in parts}},
        {**header[two], **{part: header[one][part] for part in parts}},
    )
    if draw.random() < 0.3:
        header[one.replace("lora_A", "lora_B")] = header.pop(one)
    return header


def hostile(draw: random.Random) -> tuple[bytes, bytes]:
    """(configuration, weights): one of them spoiled, now and then both."""
    which = draw.randrange(3)
    config, weights = CONFIGS[which], FILES[which]
    kind = draw.randrange(6)
    if kind in (0, 5):
        config = spoiled(draw, config, len(config))
    elif kind == 1:
        config = json.dumps(confused(draw, json.loads(config))).encode()
    if kind in (2, 5):
        weights = spoiled(draw, weights, 8 + int.from_bytes(weights[:8], "little"))
    elif kind == 3:
        weights = with_header(draw, weights, lambda header: confused(draw, header))
    elif kind == 4:
        weights = with_header(draw, weights, lambda header: swapped(draw, header))
    return config, weights


def objects(count: int, entry: Callable[[int], str]) -> bytes:
    return ("{" + ",".join(entry(place) for place in range(count)) + "}").encode()


def honest(names: list[str], shape: Callable[[str], list[int]]) -> tuple[bytes, int]:
    """(header, bytes of data) of bfloat16 tensors."""
    header, end = {}, 0
    for name in names:
        sizes = shape(name)
        begin, end = end, end + 2 * int(torch.Size(sizes).numel())
        header[f"{PREFIX}{name}"] = {"dtype": "BF16", "shape": sizes, "data_offsets": [begin, end]}
    return json.dumps(header, separators=(",", ":")).encode(), end


HALVES = ["lora_A.weight", "lora_B.weight"]


def thin(name: str) -> list[int]:
    return [4, 1] if "lora_A" in name else [1, 4]


def large(folder: Path) -> Iterator[tuple[str, str]]:
    """Put one large attack after the other there; (its name, a part of the refusal, or of what is read)."""
    small, file = b'{"peft_type":"LORA","r":4,"lora_alpha":8%s}', FILES[0]

    def hole(config: bytes, header: bytes, data: int, told: int | None = None) -> None:
        put(folder, config, struct.pack("<Q", len(header) if told is None else told) + header)
        os.truncate(folder / WEIGHTS, 8 + len(header) + data)

    put(folder, b"", file)
    os.truncate(folder / CONFIG, 100 << 20)
    yield "100 MB of configuration", "104857600 bytes"
    filler = (1 << 20) - 100
    number = b'{"a":0.' + b"3" * filler + b"}"
    for text in (b"[" * filler, b'{"a":' * (filler // 5), b"[" + b"{}," * (filler // 3), number):
        put(folder, text, file)
        yield f"a configuration of {text[:5]!r}", CONFIG
    for text in (objects(70_000, lambda i: f'"{i:x}":null'), b'{"a":[' + b"1e5," * 200_000 + b"1]}"):
        put(folder, text, file)
        yield f"a configuration of {text[:20]!r}", "peft_type"
    names, data = honest([f"{'a' * 240}.{i}x.{half}" for i in range(500) for half in HALVES], thin)
    for patterns in (
        objects(60, lambda i: f'"(a|a)*[b{i}]":4'),
        objects(60, lambda i: f'"(a|a){{14}}[b{i}]":4'),
        objects(90_000, lambda i: f'"{i:x}":4'),
        objects(4000, lambda i: f'"[ab]{i}":4'),
    ):
        hole(small % (b',"rank_pattern":' + patterns), names, data)
        yield f"patterns {patterns[:30]!r}", "rank_pattern"
    hole(small % (b',"rank_pattern":' + objects(2000, lambda i: f'"{"a" * 240}.{i}..":4') + b""), names, data)
    yield "a million comparisons", "500 modules"
    for length in (1 << 63, (1 << 64) - 1, MAX_HEADER + 1, MAX_HEADER):
        hole(small % b"", b"{}", MAX_HEADER, length)
        yield f"a header that says {length}", WEIGHTS
    for text in (b'{"a":' + b"[" * MAX_HEADER, b'{"a":[' + b"{}," * (MAX_HEADER // 3), b'{"a":"' + b"a" * MAX_HEADER):
        hole(small % b"", text[:MAX_HEADER], 0)
        yield f"a header of {text[:8]!r}", WEIGHTS
    hole(small % b"", objects(220_000, lambda i: f'"{i:x}":{{"a":0}}'), 0)
    yield "a header of objects", "dtype, shape and data_offsets"
    hole(small % b"", ('{"a":"' + "\U0001f600" * (3 << 20)).encode()[: MAX_HEADER - 9] + b'"}', 0)
    yield "a header of wide characters", WEIGHTS
    hole(small % b"", *honest([f"layers.{i}.{half}" for i in range(25_088) for half in HALVES], thin))
    yield "28 adapters of 448 modules, doubled", "25088 modules"
    hole(small % b',"modules_to_save":["x","y","zz"]', *honest([f"{'a.' * 40}{i}.zz.w" for i in range(20_000)], thin))
    yield "20,000 tensors of saved modules", "20000 whole"
    saved = json.dumps([f"x{i}" for i in range(4000)]).encode()
    hole(small % (b',"modules_to_save":' + saved), *honest([f"{'a.' * 200}{i}.w" for i in range(5000)], thin))
    yield "names times tensors", "4000 names for 5000 tensors"
    hole(small % b"", b"{}", MAX_FILE)
    yield "a file of 32 GiB", f"8 to {MAX_FILE}"
    hole(small % b"", *honest([f"q.{half}" for half in HALVES], lambda name: [4, 1] if "A" in name else [1 << 22, 4]))
    yield "a tensor of 32 MB", "1 modules"


def main(folder: Path, seed: int, count: int) -> dict[str, Any]:
    """What happened: events by name, files opened outside, the slowest case, escapes."""
    put(folder, CONFIGS[0], FILES[0])
    events: Counter[str] = Counter()
    outside: list[str] = []
    escaped: list[str] = []
    outcomes: Counter[str] = Counter()
    slowest = (0.0, "")
    watching = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if watching:
            events[event] += 1
            if event == "open" and not isinstance(args[0], int):  # a number: a file that is open
                path = Path(os.path.realpath(args[0]))
                outside.extend([] if path.is_relative_to(os.path.realpath(folder)) else [str(path)])

    def read(name: str, part: str | None) -> None:
        nonlocal watching, slowest
        begun = time.process_time()
        watching = True
        try:
            adapter = read_peft(folder)
            text = f"{len(adapter.modules)} modules, {len(adapter.full)} whole"
            if part is None:
                take_all(folder)
        except AdapterError as error:
            text = str(error)
            outcomes["refused"] += 1
        except BaseException as error:
            text = f"{name}: {type(error).__name__}: {error}"
            escaped.append(text[:300])
        finally:
            watching = False
        slowest = max(slowest, (time.process_time() - begun, name))
        if (part or "") not in text or len(text) > 3000 or not text.isprintable():
            escaped.append(f"{name}: {text[:300]!a}")

    take_all(folder)  # whatever is imported late is there now
    handles = len(os.listdir("/proc/self/fd"))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    sys.addaudithook(hook)
    warnings.simplefilter("ignore")
    draw = random.Random(seed)
    for place in range(count):
        put(folder, *hostile(draw))
        read(f"seed {seed}, case {place}", None)
    small, slowest = slowest, (0.0, "")
    for name, part in large(folder):
        read(name, part)
    return {
        **{"events": dict(events), "outside": outside[:9], "escaped": escaped[:9], "refused": outcomes["refused"]},
        **{"slowest": small, "slowest large": slowest, "handles": len(os.listdir("/proc/self/fd")) - handles},
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
