"""The leading singular directions of a matrix, at a fixed number of rounds and from a fixed seed."""

from __future__ import annotations

import torch
from torch import Tensor


def top_directions(weight: Tensor, r: int, more: int = 10, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """(S V^T [n, D], U [O, n]) of the n = min(r, O, D) largest singular values of W [O, D], by subspace iteration.

    Exact where r + more directions are all there are.
    """
    out, wide = weight.shape
    made = torch.Generator("cpu").manual_seed(42)
    Q = torch.randn(wide, min(r + more, out, wide), generator=made).to(weight)
    for _ in range(iterations):
        Q = torch.linalg.qr(weight.t() @ torch.linalg.qr(weight @ Q).Q).Q
    U, S, V = torch.linalg.svd(weight @ Q, full_matrices=False)
    return (S.unsqueeze(1) * V @ Q.t())[:r], U[:, :r]
