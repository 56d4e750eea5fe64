"""Claim: pretraining here is at least as fast as a bare loop over transformers' Llama, and faster than its Trainer.

Five ways to train the same model on the same rows with the same threads, in turn, several rounds:

    llmctl             the loop of `llmctl pretrain`, in the precision that `auto` picks here
    llmctl compiled    the same with train.torch_compile=true, compilation not counted
    bare               a minimal loop over LlamaForCausalLM: bf16 autocast, fused AdamW, clipping, nothing else
    bare auto          the same loop in the precision that `auto` picks here
    trainer            transformers.Trainer with its own defaults (float32 on CPU)

llmctl keeps the documents of a row apart; the others let attention run across them.

Prints tokens per second of each round, medians, and the ratios. Run it on a quiet machine:

    python benchmarks/pretrain_vs_hf.py --rounds 5 --steps 8
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timing import interleaved, options, ratio, report, summary
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from llmctl.data.batches import Batches, Laid
from llmctl.data.packing import cut, pack
from llmctl.kernels.device import Compute, pick_compute
from llmctl.model import LlmctlForCausalLM, compile_blocks
from llmctl.model.checkpoint import new_model
from llmctl.model.families import write_config
from llmctl.recipe.model import ModelSection
from llmctl.recipe.schema import TrainSection
from llmctl.talk import SILENT
from llmctl.train.loop import Job, train
from llmctl.train.losses import LOSSES

LENGTH = 256
SPEC = ModelSection(
    vocab_size=8192, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, max_position_embeddings=512
)


def rows(seed: int, documents: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random documents of realistic lengths (log-normal around 350 tokens): ids and document offsets."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(5.8, 1.0, documents), 8, 8000).astype(np.int64)
    ids = random.integers(3, SPEC.vocab_size, int(lengths.sum()), dtype=np.int64)
    return ids.astype(np.uint16), np.concatenate([[0], np.cumsum(lengths)])


def batches(rows_per_batch: int) -> Batches:
    ids, starts = rows(0, 3000, LENGTH)
    pieces = cut(starts, LENGTH, "split")
    return Batches(
        Laid(ids, pieces, pack(pieces.length, LENGTH)),
        max_length=LENGTH,
        batch_size=rows_per_batch,
        accumulation=1,
        seed=0,
        pad_id=0,
    )


def llmctl_way(data: Batches, steps: int, device: str, compiled: bool = False) -> float:
    compute = pick_compute(device, "auto")
    model = new_model(SPEC, 0).to(compute.device)
    if compiled:
        compile_blocks(model)
        _trained(model, data, 2, compute)  # compiles
    return _trained(model, data, steps, compute)


def _trained(model: LlmctlForCausalLM, data: Batches, steps: int, compute: Compute) -> float:
    """Seconds of the steps alone: the other ways write no checkpoint either."""
    settings = TrainSection(
        max_steps=steps, save_steps=10**6, logging_steps=10**6, threads=torch.get_num_threads()
    )
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            model, data, LOSSES["causal_lm"], settings, compute, Path(folder), lambda _: None, lambda _: None
        )
        found = train(job, SILENT)
    return found["tokens"] / found["tokens_per_second"]


def hf_model() -> LlamaForCausalLM:
    from llmctl.model.config import LlmctlConfig

    name, fields = write_config(LlmctlConfig.of(SPEC.resolved()))
    assert name == "llama"
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**fields))


def bare_way(data: Batches, steps: int, device: str, dtype: str = "bfloat16") -> float:
    compute = pick_compute(device, dtype)
    model = hf_model().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    started = time.perf_counter()
    for step in range(steps):
        found = data.step(step)[0]
        batch = {name: found[name].to(device) for name in ("input_ids", "labels")}
        with compute.autocast():
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def trainer_way(data: Batches, steps: int, device: str) -> float:
    flat = [
        {"input_ids": batch["input_ids"][row], "labels": batch["labels"][row]}
        for step in range(steps)
        for batch in data.step(step)
        for row in range(batch["input_ids"].shape[0])
    ]
    per_device = len(flat) // steps
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=per_device, report_to=[], save_strategy="no",
            disable_tqdm=True, use_cpu=device == "cpu",
        )  # fmt: skip
        trainer = Trainer(hf_model(), arguments, train_dataset=flat)
        started = time.perf_counter()
        trainer.train()
        return time.perf_counter() - started


WAYS: dict[str, Callable[[Batches, int, str], float]] = {
    "llmctl": llmctl_way,
    "llmctl compiled": partial(llmctl_way, compiled=True),
    "bare": bare_way,
    "bare auto": partial(bare_way, dtype="auto"),
    "trainer": trainer_way,
}


def main() -> None:
    parser = options(__doc__, rounds=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    data = batches(given.rows)
    tokens = given.rows * LENGTH * given.steps
    for way in WAYS.values():
        way(data, 1, given.device)  # warm-up
    sides = {
        name: (lambda way=way: tokens / way(data, given.steps, given.device)) for name, way in WAYS.items()
    }
    speeds = interleaved(sides, given.rounds, show=",.0f")
    ratios = {
        f"{ours}/{other}": ratio(speeds[ours], speeds[other])
        for ours in ("llmctl", "llmctl compiled")
        for other in ("bare", "bare auto", "trainer")
    }
    report({**{name: summary(s) for name, s in speeds.items()}, **ratios})


if __name__ == "__main__":
    main()
