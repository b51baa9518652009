"""The operator by Triton kernels, on GPUs; the same functions as ``moelora.ops.reference``, which keeps the rest."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from typing import Any, Final, Literal

import torch
from torch import Tensor

PROBLEM: Final = "" if importlib.util.find_spec("triton") else "triton is not installed"
"""Why there are no Triton kernels, or an empty string."""

HALF: Final = (torch.bfloat16, torch.float16)


def status() -> str:
    """One line on the kernels, for people."""
    if PROBLEM:
        return PROBLEM
    if not torch.cuda.is_available():
        return "no CUDA GPU"
    return f"Triton {importlib.metadata.version('triton')}, sm_{_capability(torch.device('cuda', 0))}"


def machine(
    x: Tensor,
    A: Tensor | None,
    B: Tensor,
    scale: Tensor,
    weight: Tensor,
    core: Tensor | None,
    onto: Tensor | None = None,
) -> Literal["torch", "cuda"]:
    """What can compute these tensors: the kernels, or PyTorch alone."""
    factors = [factor for factor in (A, B, core) if factor is not None]
    able = (
        not PROBLEM
        and x.device.type == "cuda"
        and all(tensor.dtype in (torch.float32, *HALF) for tensor in (x, x if onto is None else onto, *factors))
        and scale.dtype == weight.dtype == torch.float32
        and not any(0 in tensor.shape for tensor in (weight, *factors))
        and (core is None or core.shape[1] <= 64)
    )
    return "cuda" if able else "torch"


def forward(
    x: Tensor,
    A: Tensor | None,
    B: Tensor,
    scale: Tensor,
    weight: Tensor,
    index: Tensor | None,
    core: Tensor | None,
    width: int,
    onto: Tensor | None,
    path: str,
    ranks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``reference.forward``; h is float32, on the paths ``sorted`` and ``gather`` [T, k * width]."""
    kernels, kit, out = _kernels(), _kit(x), x.dtype if onto is None else onto.dtype
    weight, index, core = _packed(weight), _packed(index), _packed(core)
    if path == "dense":
        h = x.contiguous() if A is None else kernels.shrink.shrink(x, A, kit.config("shrink", A.shape[0]))
        u = _mixed(h, B, scale, weight, index, core, width, out)
        y = kernels.expand.expand(u, B.t(), kit.config("expand", B.shape[1]), onto)
        return y, h.new_empty(0) if A is None else h
    assert A is not None and index is not None
    if path == "gather":
        h = kernels.gather.down(x, A, index, width)
        u = kernels.mix.mix(h, weight, index, scale, width, "pairs", out)
        return kernels.gather.up(u, B.t(), index, onto), h
    segments = kernels.sort.sort_tokens(index, A.shape[0] // width, kit.config("shrink", width).rows)
    h = kernels.shrink.shrink_sorted(x, A, width, segments, kit.config("shrink", width), ranks)
    h = h.view(x.shape[0], index.shape[1] * width)
    u = kernels.mix.mix(h, weight, index, scale, width, "pairs", out).view(-1, width)
    return kernels.expand.expand_sorted(u, B.t(), segments, kit.config("expand", width), onto, ranks), h


def backward(
    dy: Tensor,
    x: Tensor,
    A: Tensor | None,
    B: Tensor,
    scale: Tensor,
    weight: Tensor,
    index: Tensor | None,
    core: Tensor | None,
    h: Tensor,
    width: int,
    need: list[bool],
    path: str,
    ranks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``reference.backward``."""
    given, h = _packed(weight), x.contiguous() if A is None else h
    chosen, core = _packed(index), _packed(core)
    if path == "dense":
        return _dense_backward(dy, x, A, B, scale, given, chosen, core, h, width, need)
    assert A is not None and chosen is not None
    return _sorted_backward(dy, x, A, B, scale, given, chosen, h, width, need, ranks)


def _dense_backward(
    dy: Tensor,
    x: Tensor,
    A: Tensor | None,
    B: Tensor,
    scale: Tensor,
    weight: Tensor,
    index: Tensor | None,
    core: Tensor | None,
    h: Tensor,
    width: int,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernels, kit = _kernels(), _kit(dy)
    need_x, need_A, need_B, need_weight, need_core = need
    dx, dA, dB, dweight, dcore = (x.new_empty(0) for _ in need)
    if need_B:
        dB = (dy.t() @ _mixed(h, B, scale, weight, index, core, width, dy.dtype)).to(B.dtype)
    if not (need_x or need_A or need_weight or need_core):
        return dx, dA, dB, dweight, dcore
    du = kernels.shrink.shrink(dy, B.t(), kit.config("shrink", B.shape[1]))
    if core is None:
        form = "blocks" if B.shape[1] == h.shape[1] else "shared"
        dh, gates = kernels.mix.unmix(du, h, weight, index, scale, width, form, need_weight)
    else:
        dh, gates = kernels.cores.unmix(du, h, core, weight, index, scale, need_weight)
        if need_core:
            dcore = kernels.cores.core_gradient(du, h, core.shape[0], weight, index, scale).to(core.dtype)
    if gates is not None:
        dweight = gates
    if A is None:
        return dh.to(x.dtype) if need_x else dx, dA, dB, dweight, dcore
    dh = dh.to(x.dtype)
    if need_A:
        dA = (dh.t() @ x).to(A.dtype)
    if need_x:
        dx = kernels.expand.expand(dh, A, kit.config("expand", A.shape[0]))
    return dx, dA, dB, dweight, dcore


def _sorted_backward(
    dy: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: Tensor,
    weight: Tensor,
    index: Tensor,
    h: Tensor,
    width: int,
    need: list[bool],
    ranks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernels, kit = _kernels(), _kit(dy)
    need_x, need_A, need_B, need_weight, _ = need
    dx, dA, dB, dweight, dcore = (x.new_empty(0) for _ in need)
    segments = kernels.sort.sort_tokens(index, A.shape[0] // width, kit.config("shrink", width).rows)
    outer = kit.config("outer", width)
    if need_B:
        u = kernels.mix.mix(h, weight, index, scale, width, "pairs", x.dtype).view(-1, width)
        dB = torch.empty_like(B, memory_format=torch.contiguous_format)
        kernels.outer.outer_sorted(u, dy, dB.t(), width, segments, outer, ranks)
    if not (need_x or need_A or need_weight):
        return dx, dA, dB, dweight, dcore
    du = kernels.shrink.shrink_sorted(dy, B.t(), width, segments, kit.config("shrink", width), ranks).view(h.shape)
    dh, gates = kernels.mix.unmix(du, h, weight, index, scale, width, "pairs", need_weight)
    if gates is not None:
        dweight = gates
    dh = dh.to(x.dtype).view(-1, width)
    if need_A:
        dA = torch.empty_like(A, memory_format=torch.contiguous_format)
        kernels.outer.outer_sorted(dh, x, dA, width, segments, outer, ranks)
    if need_x:
        dx = kernels.expand.expand_sorted(dh, A, segments, kit.config("expand", width), None, ranks)
    return dx, dA, dB, dweight, dcore


def project(x: Tensor, weights: list[Tensor]) -> Tensor:
    """x [W1, W2, ...]^T [T, N] float32, from one read of x."""
    first = weights[0] if len(weights) < 3 else torch.cat([w.to(x.dtype) for w in weights])
    second = weights[1] if len(weights) == 2 else None
    out: Tensor = _kernels().shrink.shrink(x, first, _kit(x).config("shrink", first.shape[0]), second)
    return out


class Kit:
    """Block sizes for tensors of one device and dtype."""

    def __init__(self, device: torch.device, single: bool) -> None:
        self.single, self.capability = single, _capability(device)
        table = _kernels().table
        self.rows = table.tuned(table.tuned_file(torch.cuda.get_device_name(device))) if device.type == "cuda" else {}

    def config(self, kernel: str, ranks: int) -> Any:
        return _kernels().table.pick(kernel, self.single, ranks, self.capability, self.rows)


@functools.cache
def _cached_kit(device: torch.device, single: bool) -> Kit:
    return Kit(device, single)


def _kit(x: Tensor) -> Kit:
    return _cached_kit(x.device, x.dtype == torch.float32)


def _mixed(
    h: Tensor,
    B: Tensor,
    scale: Tensor,
    weight: Tensor,
    index: Tensor | None,
    core: Tensor | None,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    if core is not None:
        mixed: Tensor = _kernels().cores.mix(h, core, weight, index, scale, dtype)
        return mixed
    form = "blocks" if B.shape[1] == h.shape[1] else "shared"
    gated: Tensor = _kernels().mix.mix(h, weight, index, scale, width, form, dtype)
    return gated


def _packed(tensor: Any) -> Any:
    return None if tensor is None else tensor.contiguous()


@functools.cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 90  # Triton's interpreter
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _kernels() -> Any:
    """The package of kernels; imported at the first call, since Triton takes its time."""
    from moelora import triton_kernels
    from moelora.triton_kernels import cores, expand, gather, mix, outer, shrink, sort, table  # noqa: F401

    return triton_kernels
