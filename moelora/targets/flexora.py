"""Flexora: a short training of one LoRA finds the blocks that need experts; then the run begins anew with these.

Paper: Wei et al., "Flexora: Flexible Low-Rank Adaptation for Large Language Models", arXiv 2408.10774 (ACL 2025), and
its released code. With a LoRA theta on every layer, scaled by the weight omega of its block, and alpha = 0 at first:

    omega = L softmax(alpha),        y = W x + 2 omega_block B A x,        L blocks
    theta minimises the loss of training batches,      alpha that of held-out batches

``unroll_steps: 0`` (as released): theta takes a step of AdamW (``lr``), then alpha one of Adam (``lr_alpha``) by its
gradient at this theta. K > 0 (as in the paper): theta takes K steps of SGD (``lr_sgd``), and alpha's gradient goes
through them (``moelora.core.unrolled``), for which attention is computed by plain products. Chosen are the blocks with
alpha > 0, or the best ``count``; if there is none, the best. They go into the run's recipe as ``blocks``, so loading
and resuming do not choose again. theta is thrown away; router, experts and ranks of the run have no part in the choice.
Batches have 8 of the run's first rows: the first ``validation`` are held out, the others trained on, again and again.

Differences from the released code: it scales by omega three times over (dropout, A and B), and its optimiser forgets
its moments every step; it draws 8 held-out batches of 200 rows anew each time; it takes 625 steps of 8 rows; dropout is
off here. Layers in no block get no experts; blocks of an encoder and a decoder share their numbers.

Recipe line: ``targets: {name: flexora, steps: 300}``
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Annotated, Any, TypeAlias, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from moelora.core.errors import ConfigError
from moelora.core.tape import Site
from moelora.core.unrolled import Params, unrolled
from moelora.targets.base import Targets, adding

Count: TypeAlias = Annotated[int, Field(ge=1)]
Rate: TypeAlias = Annotated[float, Field(gt=0)]


class Flexora(Targets):
    """blocks: what was chosen. r: of the LoRA that it is chosen with. Raises ConfigError for too few batches."""

    def __init__(
        self,
        *,
        blocks: list[int] | None = None,
        unroll_steps: Annotated[int, Field(ge=0)] = 0,
        steps: Count = 300,
        validation: Count = 8,
        count: Count | None = None,
        r: Count = 8,
        lr: Rate = 1e-4,
        lr_sgd: Rate = 0.1,
        lr_alpha: Rate = 0.01,
    ) -> None:
        self.blocks, self.unroll, self.steps, self.validation = blocks, unroll_steps, steps, validation
        self.count, self.r, self.lr, self.lr_sgd, self.lr_alpha = count, r, lr, lr_sgd, lr_alpha
        self.batches = 0 if blocks is not None else validation + steps * max(1, unroll_steps)

    def __call__(self, sites: Sequence[Site]) -> list[Site]:
        inside = [site for site in sites if site.block is not None]
        return inside if self.blocks is None else [site for site in inside if site.block in self.blocks]

    def choose(self, model: nn.Module, sites: Sequence[Site], batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        labelled = sum("labels" in batch for batch in batches)
        if labelled < max(len(batches), self.validation + 1):
            found = f"{labelled} with labels of {len(batches)} batches"
            raise ConfigError(f"targets flexora: expected more than validation ({self.validation}), found {found}")
        with sdpa_kernel(SDPBackend.MATH) if self.unroll else nullcontext(), torch.enable_grad():
            alpha = self.search(model, sites, batches)
        order = sorted(alpha, key=lambda block: -alpha[block])
        best = order[: self.count] if self.count else [block for block in order if alpha[block] > 0] or order[:1]
        return {"blocks": sorted(best)}

    def search(self, model: nn.Module, sites: Sequence[Site], batches: Sequence[Mapping[str, Any]]) -> dict[int, float]:
        """alpha of every block."""
        theta, made = dict[str, Tensor](), torch.Generator().manual_seed(0)
        for site in sites:
            like = next(model.get_submodule(site.name).parameters())
            A = (2 * torch.rand(self.r, site.in_features, generator=made) - 1) / math.sqrt(site.in_features)
            A = A.to(like.device, torch.promote_types(like.dtype, torch.float32))
            theta[f"{site.name} A"] = A.requires_grad_()
            theta[f"{site.name} B"] = A.new_zeros(site.out_features, self.r).requires_grad_()
        blocks = sorted({site.block or 0 for site in sites})
        alpha, now = torch.zeros(len(blocks)), dict[str, Any]()

        def update(site: Site, x: Tensor) -> Tensor:
            A, B = (now["theta"][f"{site.name} {half}"] for half in "AB")
            return now["omega"][blocks.index(site.block or 0)].to(B) * 2 * (x.to(A.dtype) @ A.t() @ B.t())

        def loss(theta: Params, omega: Tensor, batch: Any) -> Tensor:
            now.update(theta=theta, omega=omega)
            return cast(Tensor, model(**batch).loss)

        lower = torch.optim.AdamW(theta.values(), self.lr, weight_decay=0)
        upper = torch.optim.Adam([alpha], self.lr_alpha)
        held_out, train = batches[: self.validation], itertools.cycle(batches[self.validation :])
        with adding(model, {site.name: functools.partial(update, site) for site in sites}):
            for _ in tqdm(range(self.steps), "Choosing blocks (flexora)", leave=False, disable=None):
                if not self.unroll:
                    lower.zero_grad()
                    loss(theta, weights(alpha), next(train)).backward()
                    lower.step()
                steps = list(itertools.islice(train, self.unroll))
                moved, alpha.grad = unrolled(loss, theta, alpha, weights, steps, held_out, self.lr_sgd)
                theta = moved if self.unroll else theta
                upper.step()
        return dict(zip(blocks, alpha.tolist(), strict=True))


def weights(alpha: Tensor) -> Tensor:
    """omega [L]: their mean is one."""
    return len(alpha) * alpha.softmax(0)
