"""Time per new token of X-LoRA against the length of the prefix: with a cache, without one, and in PEFT.

    python tests/bench/xlora_decode.py [--prefix 64 256 1024] [--json out/xlora_decode.json]

One Llama with random weights, the same experts and the same head everywhere. Before anything is timed, every variant's
logits are compared with the uncached ones. Times are medians (p10 to p90) in milliseconds over all decoding steps, the
variants interleaved, so that a noisy machine is noisy for all of them. PEFT has no cache for X-LoRA.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import XLoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import moelora
from moelora.model.record import routed_layers

Decode = Callable[[Tensor, int], Iterator[Tensor]]
"""From a prompt [1, S + new] and S to the logits of each of the last ``new`` positions, one by one."""

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": args.hidden, "intermediate_size": 4 * args.hidden, "num_hidden_layers": args.layers}
    more = {"num_attention_heads": args.hidden // 64, "max_position_embeddings": max(args.prefix) + args.new + 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=4096, **shape, **more)).to(args.device).eval()


def ours(args: argparse.Namespace) -> Any:
    experts = {"num_experts": args.experts, "r": args.rank, "lora_alpha": args.rank}
    router = {"name": "xlora", "xlora_depth": 2, "xlora_size": 64}
    model = moelora.adapt(base(args), {"experts": experts, "router": router, "target_modules": TARGETS}, verbose=False)
    for layer in routed_layers(model):
        nn.init.normal_(layer.experts.lora_B, std=0.02)
    return model.eval()


def theirs(args: argparse.Namespace, mine: Any) -> Any:
    """PEFT's X-LoRA with the experts and the head of ``mine``."""
    with tempfile.TemporaryDirectory() as folder:
        moelora.save(mine, Path(folder) / "adapter")
        found = sorted((Path(folder) / "adapter" / "experts").iterdir())
        model = base(args)
        model.config.use_cache = False
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=args.hidden,
            adapters={str(number): str(path) for number, path in enumerate(found)},
            xlora_depth=2,
            xlora_size=64,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(model, config).to(args.device).eval()
    pairs = zip(_linear(routed_layers(mine)[0].router.head), _linear(model.internal_xlora_classifier), strict=True)
    for own, other in pairs:
        other.load_state_dict(own.state_dict())
    return model


def _linear(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def cached(model: Any) -> Decode:
    def decode(ids: Tensor, start: int) -> Iterator[Tensor]:
        cache = model(input_ids=ids[:, :start], use_cache=True, logits_to_keep=1).past_key_values
        yield ids[:, :0]  # from here on the time counts
        for t in range(start, ids.shape[1]):
            out = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            yield out.logits[:, -1]

    return decode


def uncached(model: Any) -> Decode:
    def decode(ids: Tensor, start: int) -> Iterator[Tensor]:
        yield ids[:, :0]
        for t in range(start, ids.shape[1]):
            yield model(input_ids=ids[:, : t + 1], use_cache=False, logits_to_keep=1).logits[:, -1]

    return decode


def timed(decode: Decode, ids: Tensor, start: int) -> list[float]:
    """Milliseconds of every step."""
    found: list[float] = []
    steps = decode(ids, start)
    next(steps)
    for _ in range(start, ids.shape[1]):
        _wait(ids)
        began = time.perf_counter()
        next(steps)
        _wait(ids)
        found.append(1e3 * (time.perf_counter() - began))
    return found


def _wait(ids: Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prefix", type=int, nargs="+", default=[32, 64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--new", type=int, default=16, help="decoding steps per repetition")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, help="also write every number here")
    args = parser.parse_args()

    mine = ours(args)
    variants = {
        "base, cached": cached(base(args)),
        "moelora X-LoRA, cached": cached(mine),
        "moelora X-LoRA, uncached": uncached(mine),
        "PEFT X-LoRA, uncached": uncached(theirs(args, mine)),
    }
    ids = torch.randint(3, 4096, (1, max(args.prefix) + args.new), device=args.device)
    found: dict[str, dict[int, list[float]]] = {name: {prefix: [] for prefix in args.prefix} for name in variants}
    with torch.no_grad():
        short = ids[:, : min(args.prefix) + 4]
        logits = {name: torch.cat(list(run(short, min(args.prefix)))[1:]) for name, run in variants.items()}
        for name, values in logits.items():
            if "X-LoRA" in name:
                torch.testing.assert_close(values, logits["moelora X-LoRA, uncached"], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(logits["base, cached"], logits["moelora X-LoRA, cached"], atol=1e-2)
        for _ in range(args.repeats):
            for prefix in args.prefix:
                for name, run in variants.items():
                    found[name][prefix] += timed(run, ids[:, : prefix + args.new], prefix)

    print(
        f"Milliseconds per new token, median (p10 to p90): Llama {args.layers} x {args.hidden}, {args.experts} experts "
        f"of rank {args.rank} on all projections, batch 1, {args.device}, {torch.get_num_threads()} threads\n"
    )
    print("| prefix | " + " | ".join(variants) + " |")
    print("|---" * (1 + len(variants)) + "|")
    for prefix in args.prefix:
        cells = []
        for name in variants:
            cuts = statistics.quantiles(found[name][prefix], n=10)
            cells.append(f"{statistics.median(found[name][prefix]):.2f} ({cuts[0]:.2f} to {cuts[-1]:.2f})")
        print(f"| {prefix} | " + " | ".join(cells) + " |")
    first, last = min(args.prefix), max(args.prefix)
    growth = [statistics.median(of[last]) / statistics.median(of[first]) for of in found.values()]
    print(f"| {last} over {first} | " + " | ".join(f"{ratio:.2f}" for ratio in growth) + " |")

    if args.json is not None:
        about = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
        settings = {key: str(value) for key, value in vars(args).items() if key != "json"}
        machine = {"machine": platform.machine(), "threads": torch.get_num_threads()}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"versions": about, "settings": settings, **machine, "milliseconds": found}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
