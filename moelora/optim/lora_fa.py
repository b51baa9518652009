"""LoRA-FA: A stays frozen, and the gradient of B is corrected so that its step follows the full gradient best.

Paper: Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", arXiv
2308.03303; the correction is that of PEFT's optimiser. For every pair s B A with the gradient G of its update:

    dB = s G A^T                          as backward gives it
    b  = (1/s^2) dB (A A^T + d I)^-1      s b A is then G projected onto the rows of A

which is the b that minimises ||s b A - G||; torch's optimiser gets it. d = ridge * trace(A A^T) / r. Shapes: A [r, D],
B and b [O, r]. A pair is what one gate multiplies, so under SMoRA every rank is one.

Defaults: ridge 1e-8; PEFT adds 1e-8 without regard to the size of A.

Differences from PEFT's code: it multiplies in bfloat16 where the machine can, here in the gradient's precision; its
AdamW is transformers' old one, here it is training.optim, with its own decay and epsilon.

Recipe line: ``optim: {name: lora_fa}`` with ``experts: {train: B}``
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from moelora.core.errors import ConfigError
from moelora.core.step import Now
from moelora.optim.base import Pair, PairOptim, inverse, trained_names


class LoRAFA(PairOptim):
    """B by its least squares, A at rest. ridge: relative to the mean of the diagonal of A A^T.

    Raises ConfigError for experts whose A trains (``experts.train`` has to be B), or whose update is no sum of pairs.
    """

    trains = ("lora_B",)

    def __init__(self, *, ridge: Annotated[float, Field(ge=0)] = 1e-8) -> None:
        self.ridge = ridge

    def check(self, experts: Any) -> None:
        super().check(experts)
        if "lora_A" in trained_names(experts):
            raise ConfigError(
                "optim lora_fa keeps A as it is, and experts.train trains it; set experts: {train: B}, or choose optim "
                "altlora, which trains both in turns"
            )

    def change(self, pair: Pair, now: Now) -> tuple[Tensor, Tensor]:
        dB = pair.dB @ inverse(pair.A @ pair.A.mT, self.ridge)
        return pair.dA, dB / pair.scale.view(-1, 1, 1) ** 2
