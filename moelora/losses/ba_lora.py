"""BA-LoRA: keeps what a model writes near what its base would, varied, and simple.

    L = consistency T^2 KL(p_base || p)  -  diversity H(p)  -  svd (sigma_1 + ... + sigma_k) / ||Z||_F

Paper: Chang et al., "BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large
Language Models", arXiv 2408.04556, version 6 (ICLR 2026), its form for text. Z [M, V] are the logits of the M tokens
that count (``tokens: answers``: those whose prediction carries loss), in float32, sigma their singular values; p is
softmax(Z / T) for the first part and softmax(Z) for the second, over its ``top`` likeliest words where that is given;
both are means over tokens. p_base is the base model's, without experts: one more pass of it in every step of training,
without gradients, with such dropout as it has. The paper starts experts by ``init: pissa``, which leaves p_base alone.

Defaults: consistency 0.025, diversity 0.005, svd 0.005, k 10, as in the paper; T (temperature) and the number of words
are not in what was read of it: 1 and all of them, as in the released code, are ours.

Differences from the released code: its base is what PiSSA has left of the model; its singular values are those of all
positions, padding too. Its form for classification, with covariances between classes, is not here.

The singular values are of one micro-batch of one process: the third part differs by how a step is cut into these. It
holds the micro-batch's logits, and those of the base, in float32: 4 M V bytes several times over.

Recipe line: ``losses: {ba_lora: {weight: 1.0, tokens: answers}}`` with ``init: {name: pissa}``
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from moelora.core.directions import top_directions
from moelora.losses.base import Loss, token_entropy

Part: TypeAlias = Annotated[float, Field(ge=0)]
Count: TypeAlias = Annotated[int, Field(ge=1)]


class BALoRA(Loss):
    """consistency, diversity, svd: how much of each; a part of 0 is not computed. k: singular values that are kept up.
    temperature: T. top: of how many words the entropy is."""

    reads = "logits"

    def __init__(
        self,
        weight: float,
        tokens: Literal["all", "answers"] = "all",
        *,
        consistency: Part = 0.025,
        diversity: Part = 0.005,
        svd: Part = 0.005,
        k: Count = 10,
        temperature: Annotated[float, Field(gt=0)] = 1.0,
        top: Count | None = None,
    ) -> None:
        super().__init__(weight, tokens)
        self.consistency, self.diversity, self.svd = consistency, diversity, svd
        self.k, self.temperature, self.top = k, temperature, top

    def of_logits(self, logits: Tensor, base: Callable[[], Tensor]) -> Tensor:
        total = logits.sum() * 0
        if not len(logits):
            return total
        if self.consistency:
            theirs, ours = ((z / self.temperature).log_softmax(-1) for z in (base(), logits))
            apart = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
            total = total + self.consistency * self.temperature**2 * apart
        if self.diversity:
            likely = logits if self.top is None else logits.topk(min(self.top, logits.shape[-1]), -1).values
            total = total - self.diversity * token_entropy(likely.softmax(-1)).mean()
        if self.svd:
            total = total - self.svd * leading(logits, self.k) / logits.norm()
        return total


def leading(Z: Tensor, k: int) -> Tensor:
    """The sum of the k largest singular values of Z [M, V]. Its gradient is that of U^T Z V's trace, U and V fixed."""
    with torch.no_grad():
        right, U = top_directions(Z, k)
        V = F.normalize(right)
    return torch.einsum("mi,mv,iv->", U, Z, V)
