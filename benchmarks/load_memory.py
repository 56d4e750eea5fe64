"""Claim: loading a model needs at most 1.1 times the memory of its checkpoint, whatever its tensors look like on disk.

Writes checkpoints of random bfloat16 weights in shards: Llama's, whose tensors are the core's; Phi-3's, which are
cut in two or three; GPT-2's, which are transposed, so that none can stay as it lies in the file. Each is loaded in
a process of its own, which then reads every weight once. Resident memory is counted as Linux does: anonymous
pages are memory that the process asked for, file pages are parts of the checkpoint that the system has in memory
anyway and may drop. Both are told, less what the imports needed, as multiples of the checkpoint:

    peak      most of both together, while loading
    asked     anonymous pages when it is loaded
    used      most of both together, after every weight was read

Linux only. A checkpoint of 7B shape needs 14 GB of disk and about as much free memory:

    python benchmarks/load_memory.py
    python benchmarks/load_memory.py --full --families phi3
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BOUND = 1.1
SHARD = 2 * 10**9  # bytes
# Llama 2's shape; GPT-2's rows have the same width and four times that inside
WIDE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "phi3": {"family": "phi3"},
    "gpt2": {
        "family": "gpt2",
        "norm": "layernorm",
        "position": "learned",
        "ffn": "gelu_tanh",
        "attention_bias": "all",
        "mlp_bias": True,
        "intermediate_size": 16384,
    },
}
WAYS = ("as stored", "to float32", "transformers")


def write(folder: Path, fields: dict[str, Any], size: float) -> int:
    """A checkpoint of about `size` bytes, in shards; returns its bytes."""
    import torch
    from safetensors.torch import save_file

    from llmctl.model import LlmctlForCausalLM
    from llmctl.model.config import LlmctlConfig
    from llmctl.model.keymap import to_disk
    from llmctl.recipe.model import ModelSection

    def on_disk(layers: int) -> tuple[Any, dict[str, Any]]:
        spec = ModelSection.model_validate(WIDE | fields | {"num_hidden_layers": layers}).resolved()
        with torch.device("meta"):
            model = LlmctlForCausalLM(LlmctlConfig.of(spec)).bfloat16()
        config, rules = model.disk_form()
        return config, to_disk(model.state_dict(), rules)

    one, two = (sum(tensor.nbytes for tensor in on_disk(layers)[1].values()) for layers in (1, 2))
    config, tensors = on_disk(max(1, round((size - one) / (two - one)) + 1))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if filled and filled + tensor.nbytes > SHARD:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    files = {}
    for number, names in enumerate(shards):
        file = f"model-{number}.safetensors"
        values = {name: torch.randn(tensors[name].shape, dtype=torch.bfloat16) * 0.02 for name in names}
        save_file(values, folder / file, {"format": "pt"})
        files |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return sum(tensor.nbytes for tensor in tensors.values())


def measure(folder: str, way: str) -> None:
    """In a process of its own: load, read every weight, print bytes and seconds."""
    import torch
    from transformers import AutoModelForCausalLM

    from llmctl.model.checkpoint import load_model

    torch.set_grad_enabled(False)
    before = memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    started = time.perf_counter()
    if way == "transformers":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    else:
        model = load_model(folder, torch.float32 if way == "to float32" else None)
    seconds, loaded = time.perf_counter() - started, memory()
    Path("/proc/self/clear_refs").write_text("5")
    for weight in model.parameters():
        for row in weight.view(-1).split(1 << 24):
            row.float().sum()
    used = memory()
    base = before["RssAnon"] + before["RssFile"]
    print(
        json.dumps(
            {
                "peak": loaded["VmHWM"] - base,
                "asked": loaded["RssAnon"] - before["RssAnon"],
                "file": loaded["RssFile"] - before["RssFile"],
                "used": used["VmHWM"] - base,
                "seconds": seconds,
            }
        )
    )


def memory() -> dict[str, int]:
    """Bytes of this process by kind, and the most it had at once (VmHWM)."""
    rows = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {row[0][:-1]: int(row[1]) * 1024 for row in rows if row[0] in ("RssAnon:", "RssFile:", "VmHWM:")}


def available() -> int:
    """Bytes that a process can have without pushing others out."""
    rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return next(int(row[1]) * 1024 for row in rows if row[0] == "MemAvailable:")


def main() -> int:
    """Write, load and print; 1 if a load needed more than the claim says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of a checkpoint (default 4)")
    parser.add_argument("--full", action="store_true", help="13.5 GB, the size of 7B parameters")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--dir", help="where to write (default: the system's temporary folder)")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return 0
    size = 13.5e9 if args.full else args.gigabytes * 1e9
    place = Path(args.dir or tempfile.gettempdir())
    if shutil.disk_usage(place).free < 1.1 * size + SHARD:
        parser.error(f"{place} has no room for {size / 1e9:.1f} GB; name another with --dir")
    worst = 0.0
    print(f"{'':28}{'GB':>7}{'peak':>8}{'asked':>8}{'file':>8}{'used':>8}{'seconds':>9}")
    for family in args.families:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            held = write(Path(folder) / "model", FAMILIES[family], size)
            for way in args.ways:
                # what is loaded as float32 is twice as large: that is what it is held against
                whole = held * (2 if way == "to float32" else 1)
                if available() < 1.2 * whole:
                    print(
                        f"{family}, {way}: left out, for it needs {1.2 * whole / 1e9:.0f} GB of free memory"
                    )
                    continue
                command = [sys.executable, __file__, "--measure", str(Path(folder) / "model"), way]
                answer = subprocess.run(command, capture_output=True, text=True, check=False)
                if answer.returncode:
                    print(f"{family}, {way}: {answer.stderr.strip().splitlines()[-1]}")
                    continue
                found = json.loads(answer.stdout.splitlines()[-1])
                shown = "".join(f"{found[name] / whole:8.2f}" for name in ("peak", "asked", "file", "used"))
                print(f"{f'{family}, {way}':28}{held / 1e9:7.2f}{shown}{found['seconds']:9.1f}", flush=True)
                if way != "transformers":
                    worst = max(worst, found["peak"] / whole, found["used"] / whole)
    print(f"worst of ours: {worst:.2f} (claim: at most {BOUND})")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
