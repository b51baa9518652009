"""Tensors that an engine holds in parts, as wholes: DeepSpeed ZeRO-1 to ZeRO-3, or none of them.

Everything here is called by all processes together. One tensor is gathered at a time, and of the base model none but
what is asked for: an adapter can be saved where the model does not fit one device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from moelora.core.errors import OutputError


def gathered(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """For as long as it lasts, parameters partitioned by ZeRO-3 are whole, to be read."""
    held = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not held:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(held)
    return context


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, of a trained one as the optimiser has it; the tensor itself where it is whole."""
    if tensor.requires_grad and (hasattr(tensor, "_z3_optimizer") or hasattr(tensor, "_hp_mapping")):
        from deepspeed.utils import safe_get_full_fp32_param

        value: Tensor = safe_get_full_fp32_param(tensor)
        return value.view(getattr(tensor, "ds_shape", tensor.shape))
    if hasattr(tensor, "ds_id"):
        with gathered([tensor]):
            return tensor.detach().clone()
    return tensor.detach()


def wholes(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """All of them on the CPU; nothing where ``keep`` is False: a process that only helps to gather.

    Raises OutputError, in all processes, for one that holds a number that is not finite: no loader would take it.
    """
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if not torch.isfinite(value).all():
            raise OutputError(f"{name} holds a number that is not finite; it is not saved")
        if keep:
            found[name] = value.cpu()
    return found
