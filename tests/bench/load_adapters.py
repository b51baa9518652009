"""Many adapters as frozen experts of a large model: seconds and peak memory of attaching and loading, and PEFT's.

The base model has Llama-3-8B's shape (or --layers fewer blocks of it) in bfloat16. Its weights are never written, so
they take no memory, and what is measured is above the base. Adapters are LoRAs of all seven linear layers of a block,
random, as PEFT lays them out, in a folder that is filled once (--folder). Each case runs in a process of its own.

    python tests/bench/load_adapters.py --folder out/adapters --out docs/bench/load_adapters.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SHAPES = {
    **{"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 1024), "self_attn.v_proj": (4096, 1024)},
    **{"self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (4096, 14336), "mlp.up_proj": (4096, 14336)},
    "mlp.down_proj": (14336, 4096),
}
CASES = ("meta", "moelora", "peft")


def base(layers: int, device: str) -> Any:
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    return model if device == "meta" else model.to_empty(device=device)


def make(folder: Path, number: int, rank: int, layers: int, dtype: torch.dtype) -> None:
    """One adapter, unless it is there."""
    if (folder / "adapter_config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(number)
    tensors = {}
    for block in range(layers):
        for name, (wide, out) in SHAPES.items():
            key = f"base_model.model.model.layers.{block}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, wide, generator=generator).to(dtype) / 64
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=generator).to(dtype) / 64
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "task_type": "CAUSAL_LM", "bias": "none",
        "target_modules": sorted(name.rpartition(".")[2] for name in SHAPES), "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def meta(model: Any, folders: list[Path], rank: int) -> None:
    import moelora

    experts = {"num_experts": len(folders), "r": rank, "train": "none"}
    moelora.adapt(model, {"router": "meteora", "experts": experts}, verbose=False)


def ours(model: Any, folders: list[Path], rank: int) -> None:
    import moelora

    experts = {"num_experts": len(folders), "r": rank, "train": "none", "adapters": [str(f) for f in folders]}
    moelora.adapt(model, {"router": "static", "experts": experts}, verbose=False)


def peft(model: Any, folders: list[Path], rank: int) -> None:
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(model, folders[0], adapter_name="a0", low_cpu_mem_usage=True)
    for number, folder in enumerate(folders[1:], 1):
        wrapped.load_adapter(folder, adapter_name=f"a{number}", low_cpu_mem_usage=True)


def measure(case: str, folders: list[Path], rank: int, layers: int) -> dict[str, float]:
    importlib.import_module("moelora")  # imports are not measured
    importlib.import_module("peft")
    torch.set_num_threads(2)
    run: Callable[..., None] = {"meta": meta, "moelora": ours, "peft": peft}[case]
    model = base(layers, "meta" if case == "meta" else "cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    run(model, folders, rank)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the adapters are, or are made")
    parser.add_argument("--adapters", type=int, default=28)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    name = f"{given.dtype}_r{given.rank}_l{given.layers}"
    folders = [given.folder / f"{name}_{number}" for number in range(given.adapters)]
    if given.case:
        print(json.dumps(measure(given.case, folders, given.rank, given.layers)))
        return
    for number, folder in enumerate(folders):
        make(folder, number, given.rank, given.layers, getattr(torch, given.dtype))
    size = sum((folder / "adapter_model.safetensors").stat().st_size for folder in folders)
    found: dict[str, Any] = {"adapters": given.adapters, "rank": given.rank, "layers": given.layers, "bytes": size}
    print(f"{given.adapters} adapters of rank {given.rank}, {given.dtype}, {given.layers} blocks: {size / 1e9:.2f} GB")
    for case in CASES:
        command = [sys.executable, __file__, *sys.argv[1:], "--case", case]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        found[case] = json.loads(out)
        peak = found[case]["peak_bytes"]
        print(f"{case:8} {found[case]['seconds']:7.1f} s   peak {peak / 1e9:6.2f} GB = {peak / size:.2f} x adapters")
    if given.out is not None:
        given.out.write_text(json.dumps({given.dtype: found, "torch": torch.__version__}, indent=1) + "\n")


if __name__ == "__main__":
    main()
