"""The routed-LoRA operator in plain PyTorch: the definition, and the kernel wherever there is no faster one.

With x [T, D], A [R, D], B [O, C], gates g [T, G], scale [C]:

    h = x A^T                                                            [T, R]
    u = scale * mix(h; g)                                                [T, C]
    y = onto + u B^T                                                     [T, O]

and mix is one of

    blocks  (C = R)      u[t, j] = g[t, j // (R/G)] h[t, j]
    shared  (C = G*R)    u[t, q*R + j] = g[t, q] h[t, j]
    core    (C = R)      u[t] = sum_q g[t, q] core[q] h[t]

All gates are computed densely: ranks are few, and two plain matrix products beat any gather until R is large. Without
A, x is h already. Half precision is computed in float32 on CPU, where half-precision products are slow and coarse; else
products run in x's dtype with the gates applied in float32. Nothing of size [T, G, O] or [T, r, r] is ever made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelora.core.route import dense_gates


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the operator's matrix products."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and x.device.type == "cpu" else x.dtype


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of rank space: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def unit_count(B: Tensor, core: Tensor | None, width: int) -> int:
    """G, from the shapes and the block width."""
    return core.shape[0] if core is not None else B.shape[1] // width


def mix(h: Tensor, gate: Tensor, core: Tensor | None, columns: int) -> Tensor:
    """u before scaling: [T, columns]. h: [T, R]. gate: [T, G]."""
    if core is not None:
        each = torch.einsum("tj,gij->tgi", h, core)
        return (each * gate.unsqueeze(-1)).sum(1)
    if columns == h.shape[1]:
        blocks = h.unflatten(1, (gate.shape[1], -1))
        return (blocks * gate.unsqueeze(-1)).flatten(1)
    return (h.unsqueeze(1) * gate.unsqueeze(-1)).flatten(1)


def forward(
    x: Tensor,
    A: Tensor | None,
    B: Tensor,
    scale: Tensor,
    weight: Tensor,
    index: Tensor | None,
    core: Tensor | None,
    width: int,
    onto: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [T, O]: the update in x's dtype, or on top of ``onto`` in its; h [T, R] for backward, empty without A)."""
    dtype = compute_dtype(x if onto is None else onto)
    gate = dense_gates(weight, index, unit_count(B, core, width))
    own = wide(dtype)
    h = (x if A is None else x.to(dtype) @ A.to(dtype).t()).to(own)
    u = mix(h, gate.to(own), None if core is None else core.to(own), B.shape[1]) * scale.to(own)
    up = B.to(dtype).t()
    y = u.to(dtype) @ up if onto is None else torch.addmm(onto.to(dtype), u.to(dtype), up)
    return y.to(x.dtype if onto is None else onto.dtype), h.new_empty(0) if A is None else h


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, A, B, weight, core); an empty tensor where ``need`` says False.

    The gate's gradient is an inner product in rank space, so no expert's output is ever kept.
    """
    need_x, need_A, need_B, need_weight, need_core = need
    dtype = compute_dtype(dy)
    own = wide(dtype)
    gate = dense_gates(weight, index, unit_count(B, core, width)).to(own)
    dy, h, scale = dy.to(dtype), (x if A is None else h).to(own), scale.to(own)
    wide_core = None if core is None else core.to(own)
    dx, dA, dB, dweight, dcore = (x.new_empty(0) for _ in need)

    if need_B:
        u = mix(h, gate, wide_core, B.shape[1]) * scale
        dB = (dy.t() @ u.to(dtype)).to(B.dtype)
    if not (need_x or need_A or need_weight or need_core):
        return dx, dA, dB, dweight, dcore

    du = (dy @ B.to(dtype)).to(own) * scale
    if wide_core is not None:
        gated = gate.unsqueeze(-1) * du.unsqueeze(1)
        dgate = (torch.einsum("tj,gij->tgi", h, wide_core) * du.unsqueeze(1)).sum(-1) if need_weight else dweight
        dh = torch.einsum("tgi,gij->tj", gated, wide_core)
        if need_core and core is not None:
            dcore = torch.einsum("tgi,tj->gij", gated, h).to(core.dtype)
    elif B.shape[1] == h.shape[1]:
        blocks = du.unflatten(1, (gate.shape[1], -1))
        dgate = (blocks * h.unflatten(1, (gate.shape[1], -1))).sum(-1) if need_weight else dweight
        dh = (blocks * gate.unsqueeze(-1)).flatten(1)
    else:
        blocks = du.unflatten(1, (gate.shape[1], -1))
        dgate = (blocks * h.unsqueeze(1)).sum(-1) if need_weight else dweight
        dh = (blocks * gate.unsqueeze(-1)).sum(1)
    if need_weight:
        dweight = (dgate if index is None else dgate.gather(1, index)).to(weight.dtype)
    dh = dh.to(dtype)
    if A is None:
        return dh.to(x.dtype) if need_x else dx, dA, dB, dweight, dcore
    if need_A:
        dA = (dh.t() @ x.to(dtype)).to(A.dtype)
    if need_x:
        dx = (dh @ A.to(dtype)).to(x.dtype)
    return dx, dA, dB, dweight, dcore
