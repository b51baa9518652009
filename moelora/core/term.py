"""Product: an auxiliary term with a mean over the tokens of all processes in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Product:
    """``sum_u f_u P_u + rest``, where f is a mean over the tokens of all processes, and P over those of this one.

    counted: [G] what f is the mean of, summed over this process's tokens; tokens: [1], how many; both without gradient.
    P: [G]. rest: a scalar, or None. Gradients are averaged over processes, so a local P is enough: the sum is the
    product over the global batch.
    """

    counted: Tensor
    tokens: Tensor
    P: Tensor
    rest: Tensor | None = None

    def alone(self) -> Tensor:
        """The term over the tokens of this process."""
        return self._over(self.counted, self.tokens)

    def _over(self, counted: Tensor, tokens: Tensor) -> Tensor:
        value = (counted / tokens.clamp(min=1) * self.P).sum()
        return value if self.rest is None else value + self.rest


def settled(terms: Sequence[Tensor | Product], together: bool) -> list[Tensor]:
    """Terms as scalars. together: by all processes in the same order, with one reduction for all of them."""
    products = [term for term in terms if isinstance(term, Product)]
    if not together or not products:
        return [term.alone() if isinstance(term, Product) else term for term in terms]
    flat = torch.cat([part.to(products[0].P) for product in products for part in (product.counted, product.tokens)])
    torch.distributed.all_reduce(flat)
    sums = iter(flat.split([size for product in products for size in (len(product.counted), 1)]))
    return [
        term._over(next(sums).to(term.P), next(sums).to(term.P)) if isinstance(term, Product) else term
        for term in terms
    ]
