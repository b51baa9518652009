"""What autograd keeps of a training step for the backward pass, reckoned from a model's config and its sites. In bytes.

Nothing is computed, so a model may lie on the meta device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from moelora.model.fellows import READERS, groups
from moelora.model.layer import RoutedLinear
from moelora.model.quantised import form
from moelora.model.record import routed_layers
from moelora.ops import cpu
from moelora.ops.path import Machine, Shape, choose

TILE: Final = (4096, 32768)
"""Tokens and words of the vocabulary whose logits TRL's loss holds at a time: it never has them all."""


@dataclass(frozen=True)
class Kept:
    """What autograd keeps. blocks: of each transformer block. stream: a block's input. choices: of all routers, which
    are not made again when a block is recomputed. once: what is beside blocks."""

    blocks: Sequence[int]
    stream: int
    choices: int
    once: int

    def forward(self, checkpointing: bool) -> int:
        """At the end of the forward pass."""
        blocks = len(self.blocks) * self.stream + self.choices if checkpointing else sum(self.blocks)
        return self.once + blocks

    def most(self, checkpointing: bool) -> int:
        """At most: with gradient checkpointing one block at a time is there again."""
        return self.forward(checkpointing) + (max(self.blocks, default=0) if checkpointing else 0)


def kept(
    model: nn.Module,
    tokens: int,
    length: int,
    half: bool = False,
    cast: bool = False,
    machine: Machine | None = None,
) -> Kept | str:
    """What autograd keeps of a training step of T tokens in rows of ``length``, or why that is not predicted.

    half: products in half precision. cast: of parameters that stay in float32 (autocast). machine: what computes; by
    default a GPU if there is one. With a bytes per number in
    products and s in the residual stream, hidden size d, feed-forward size f, H numbers of all heads, a block keeps

        norms        4 d each, computed in float32; norms of q and k: 4 H each
        attention    a (4 H + length)    q, k, v and their mix (k, v repeated for all heads), the mask; flash: no mask
        feed-forward a f c               c = 3 if gated (gate, its activation, up), else 1; times k if routed as a whole
        experts      a d for q, k, v together, a d for gate and up, a f for the last projection: the x they read
        each site    4 h + 8 G + 20 k    h: ranks kept, all or the chosen; G scores, k choices; dense gates: 4 h + 8 G;
                                         4 G more for each loss on scores
        cast         2 per weight of its linear layers (not per token)

    per token. Dropout before experts: x once per site, and a mask. Beside the blocks: 4 d for the last norm, a d for
    the loss; a router that plans for all layers 4 d + 12 per output of its own. The loss never holds all logits
    (``loss_buffer``). Within 20 % of what PyTorch keeps, for Llama-like models with sdpa or flash attention; with
    gradient checkpointing, too.
    """
    config = _text(model)
    need = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
    missing = [name for name in need if not isinstance(getattr(config, name, None), int)]
    attention = str(getattr(config, "_attn_implementation", None) or "sdpa")
    if missing:
        return f"the model's config states no {' and no '.join(missing)}"
    if getattr(config, "is_encoder_decoder", False):
        return "the model has an encoder and a decoder"
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return "the model's feed-forward blocks are mixtures of experts themselves"
    if attention == "eager":
        return "eager attention keeps all its scores"
    if any(form(p) == "int8" for p in model.parameters()):
        return "bitsandbytes keeps the inputs of 8-bit layers, with gradient checkpointing, too"
    layers, depth = routed_layers(model), config.num_hidden_layers
    stream = 2 if half and not cast else next(model.parameters()).itemsize
    a = 2 if half else stream
    if machine is None:
        one = torch.zeros(1)
        machine = "cuda" if torch.cuda.is_available() else cpu.machine(one, None, one, one, one, None)
    copies = next((layer.router.chosen or 1 for layer in layers if layer.router.around == "ffn"), 1)
    blocks = [tokens * _block(model, config, length, a, copies)] * depth
    once = tokens * config.hidden_size * (4 + a)
    later = {path for paths in groups(layer.site.name for layer in layers) for path in paths[1:]}
    for layer in layers:
        read = 0 if layer.site.name in later and not layer.dropout.p else _read(layer, a)
        again = copies if layer.in_features == config.intermediate_size else 1
        size = tokens * (_site(layer, tokens, a, machine) + read * again)
        if layer.site.block is not None and layer.site.block < depth:
            blocks[layer.site.block] += size
        else:
            once += size
    if cast and stream > 2:
        linear = (m.weight for m in model.modules() if isinstance(m, nn.Linear) and form(m.weight) is None)
        weights = sum(weight.numel() for weight in linear) - _head(model)
        blocks = [block + 2 * weights // depth for block in blocks]
    for router in {id(layer.router): layer.router for layer in layers if layer.router.reads == "hidden"}.values():
        once += tokens * (4 * config.hidden_size + 12 * sum(p.shape[0] for p in router.parameters() if p.dim() == 2))
    choices = sum(8 * tokens * (layer.router.chosen or 0) for layer in layers)
    return Kept(blocks, tokens * config.hidden_size * stream, choices, once)


def _block(model: nn.Module, config: Any, length: int, a: int, copies: int) -> int:
    """Of a block without experts, per token. copies: of what is between its feed-forward projections."""
    d, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or d // heads
    wide, narrow = heads * head, (getattr(config, "num_key_value_heads", None) or heads) * head
    norms = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()]
    of_heads = [name for name in norms if name.rpartition(".")[2] in ("q_norm", "k_norm")]
    gated = any(name.rpartition(".")[2] in ("gate_proj", "gate_up_proj") for name, _ in model.named_modules())
    flash = "flash" in str(getattr(config, "_attn_implementation", None))
    attention = 2 * wide + (2 * narrow if flash else 2 * wide + length)
    between = config.intermediate_size * (3 if gated else 1) * copies
    normed = d * (len(norms) - len(of_heads)) + wide * len(of_heads)
    return 4 * (normed // config.num_hidden_layers) + a * (attention + between)


def _text(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _head(model: Any) -> int:
    """Weights of the output head, which the loss casts by itself."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return 0 if head is None else int(head.weight.numel())


def _site(layer: RoutedLinear, tokens: int, a: int, machine: Machine) -> int:
    """Of a site per token, in rank space: h, scores and gates."""
    factors, router = layer.experts.composed(), layer.router
    k, ranks = router.chosen, factors.B.shape[1]
    units = router.units
    planned = router.reads == "hidden"  # its scores are part of the plan
    scored = 4 * units * sum("logits" in loss.needs for loss in layer.losses.values())
    if k is None:
        return 4 * ranks + (0 if planned else 8 * units + scored)
    width = max(1, ranks // units)
    shape = Shape(tokens, layer.in_features, layer.out_features, units, width, k, "blocks", a == 2)
    chosen = factors.core is None and choose(shape, machine) != "dense"
    return 4 * (k * width if chosen else ranks) + (0 if planned else 8 * units + scored) + 20 * k


def _read(layer: RoutedLinear, a: int) -> int:
    """Of a site per token: the x that it reads, and keeps."""
    A = layer.experts.composed().A
    scores = layer.router.reads in ("x", "dropped") and any(p.requires_grad for p in layer.router.parameters())
    if not scores and (A is None or not A.requires_grad):
        return 0
    if layer.dropout.p:
        return layer.in_features * (a + 1)
    child = layer.site.name.rpartition(".")[2]
    if layer.site.in_attention and not any(child in readers for readers in READERS):
        return 0  # what comes out of the attention, which keeps it already
    return layer.in_features * a


def loss_buffer(model: nn.Module, tokens: int, half: bool = False) -> int:
    """What TRL's loss holds beside: the logits of one tile, and the gradient of the last hidden state in float32."""
    a = 2 if half else next(model.parameters()).itemsize
    width = getattr(_text(model), "hidden_size", 0) or 0
    return min(tokens, TILE[0]) * TILE[1] * a + 4 * tokens * width
