"""Every kernel as it would be launched, compiled for sm_80 and sm_90 without a GPU: no spills, and it fits the chip."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moelora.ops import cuda

pytestmark = pytest.mark.skipif(
    bool(cuda.PROBLEM) or os.environ.get("TRITON_INTERPRET") == "1", reason="compiles, so not in the interpreter"
)

SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory a block may have."""
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}
Launch = tuple[Any, tuple[Any, ...], Any, dict[str, Any]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What would be started, in place of starting it."""
    from moelora.triton_kernels import launch

    found: list[Launch] = []
    monkeypatch.setattr(
        launch,
        "start",
        lambda kernel, grid, arguments, config, **constants: found.append((kernel, arguments, config, constants)),
    )
    return found


def compiled(one: Launch, capability: int, folder: Path) -> tuple[int, int]:
    """(bytes of shared memory, bytes of spilled registers)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, arguments, config, constants = one
    signature: dict[str, str] = {}
    fixed: dict[Any, Any] = {}
    aligned: dict[Any, Any] = {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, None
        if name not in constants:
            value = arguments[place]
        if isinstance(value, Tensor):
            signature[name], aligned[(place,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        elif value is None or value == 1:
            signature[name], fixed[(place,)] = "constexpr", constants.get(name, value)
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=fixed, attrs=aligned)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": config.warps, "num_stages": config.stages},
    )
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    text = folder / "kernel.ptx"
    text.write_text(made.asm["ptx"])
    arch = f"sm_{capability}{'a' if capability == 90 else ''}"
    said = subprocess.run(
        [assembler, "-v", f"-arch={arch}", text, "-o", folder / "kernel.cubin"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert spilled is not None, said
    return made.metadata.shared, int(spilled.group(1))


def operands(form: str, width: int, dtype: torch.dtype, k: int | None) -> tuple[Any, ...]:
    """(x, A, B, scale, weight, index, core, width) of one layer, without memory."""
    tokens, features, units = 16384, 4096, 8

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=of, device="meta")

    R, C = (units * width if form == "blocks" else width), (width if form == "core" else units * width)
    index = None if k is None else empty(tokens, k, of=torch.int64)
    core = empty(units, width, width) if form == "core" else None
    scale, weight = empty(C, of=torch.float32), empty(tokens, k or units, of=torch.float32)
    return empty(tokens, features), empty(R, features), empty(features, C), scale, weight, index, core, C // units


CASES = [
    *((form, width, k, "dense") for form in ("blocks", "shared") for width in (1, 16) for k in (2, None)),
    *(("core", width, k, "dense") for width in (16, 32, 64) for k in (2, None)),
    *(("blocks", width, 2, path) for width in (8, 32, 64, 128) for path in ("sorted", "gather")),
]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("form", "width", "k", "path"), CASES)
def test_no_registers_are_spilled_and_shared_memory_suffices(
    form: str,
    width: int,
    k: int | None,
    path: str,
    dtype: torch.dtype,
    capability: int,
    launches: list[Launch],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(cuda, "_capability", lambda _: capability)
    cuda._cached_kit.cache_clear()
    *tensors, ranks = operands(form, width, dtype, k)
    y, h = cuda.forward(*tensors, ranks, torch.empty_like(tensors[0]), path)
    need = [True, True, True, True, form == "core"]
    if path != "gather":  # its backward is the sorted one
        cuda.backward(y, *tensors, h, ranks, need, path)
    seen = set()
    for one in launches:
        key = (one[0].__name__, str(one[2:]), str([a.dtype if isinstance(a, Tensor) else a for a in one[1]]))
        if key in seen:
            continue
        seen.add(key)
        shared, spilled = compiled(one, capability, tmp_path)
        assert spilled == 0 and shared <= SHARED[capability], (one[0].__name__, one[2:], shared, spilled)
    assert len(seen) >= 3


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ranks", [16, 32, 64, 128, 256])
def test_scores_fit_beside_every_width(
    ranks: int,
    dtype: torch.dtype,
    capability: int,
    launches: list[Launch],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(cuda, "_capability", lambda _: capability)
    cuda._cached_kit.cache_clear()
    empty = [torch.empty(n, 4096, dtype=dtype, device="meta") for n in (16384, ranks, 16)]
    assert cuda.project(empty[0], empty[1:]).shape == (16384, ranks + 16)
    shared, spilled = compiled(launches[0], capability, tmp_path)
    assert spilled == 0 and shared <= SHARED[capability]
