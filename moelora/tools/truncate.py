"""Cut experts that were trained for it (``ranks: dylora``) down to their first ranks: any number, after one training.

    Delta_e = (lora_alpha / b) B_e[:, :b] A_e[:b]

From then on the model is evaluated, saved and exported so. Nothing is removed: another rank may follow.

    model = moelora.load(base, "out/run")
    truncate(model, 4)
"""

from __future__ import annotations

from torch import nn

from moelora.core.errors import ConfigError
from moelora.model.record import adaptation, routed_layers
from moelora.ranks.dylora import DyLoRA


def truncate(model: nn.Module, rank: int) -> None:
    """Evaluate, save and export every expert at its first ``rank`` ranks, with the scale of that rank.

    Raises ConfigError for a rank that the experts do not have, or experts that were not trained by ranks: dylora.
    """
    record, layers = adaptation(model), routed_layers(model)
    for layer in layers:
        if not isinstance(layer.experts.allocator, DyLoRA):
            raise ConfigError(
                f"experts trained with ranks: {record.config.ranks['name']} do not work at their first {rank} ranks; "
                "only ranks: dylora trains for that (an export with --rank cuts by singular values)"
            )
    most = layers[0].experts.r
    if not 1 <= rank <= most:
        raise ConfigError(f"truncated to rank {rank}: expected 1 to {most}, the rank of these experts")
    for layer in layers:
        layer.experts.allocator.eval_rank = rank
    record.config = record.config.model_copy(update={"ranks": {**record.config.ranks, "eval_rank": rank}})
