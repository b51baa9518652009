"""ExactBuffers: buffers follow the device, never a cast."""

from __future__ import annotations

import torch
from torch import nn

from moelora.core.module import ExactBuffers


class Part(ExactBuffers):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("bias", torch.full((2,), 1 / 3))
        self.inner = nn.BatchNorm1d(2)


def test_a_cast_leaves_buffers_alone() -> None:
    exact = torch.full((2,), 1 / 3)
    for cast in (lambda m: m.to(torch.bfloat16), nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        model = cast(nn.Sequential(Part()))
        assert model[0].bias.dtype == torch.float32
        assert torch.equal(model[0].bias, exact)
        assert model[0].weight.dtype != torch.float32  # parameters are cast


def test_only_own_buffers_are_kept() -> None:
    model = Part().to(torch.bfloat16)
    assert model.inner.running_mean.dtype == torch.bfloat16


def test_buffers_follow_the_device() -> None:
    model = Part().to("meta")
    assert model.bias.device.type == "meta" and model.bias.dtype == torch.float32


def test_buffers_follow_device_and_cast_at_once() -> None:
    model = Part().to("meta", torch.bfloat16)
    assert model.bias.device.type == "meta" and model.bias.dtype == torch.float32


def test_a_moved_buffer_is_still_a_buffer() -> None:
    model = Part().to(torch.bfloat16)
    assert "bias" in dict(model.named_buffers()) and "bias" in model.state_dict()
