"""What a folder without a model holds instead, for the message where a model was asked for."""

from __future__ import annotations

from pathlib import Path

from llmctl.errors import UserError
from llmctl.runs import CHECKPOINTS, run_of

MODEL_CONFIGS = ("config.json", "adapter_config.json")
DATA = (".jsonl", ".csv", ".parquet", ".txt", ".md", ".gz", ".zst")


def refuse_other_folder(folder: Path) -> None:
    """Raise UserError for a folder that is known to hold something else than a model.

    A run that is not finished, a tokenizer, token shards, data, nothing. Any other folder passes: what opens it says
    what is missing.
    """
    try:
        if any((folder / name).is_file() for name in MODEL_CONFIGS):
            return
        names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    except PermissionError:  # what opens it says so
        return
    made = run_of(folder) or {}
    if made.get("stage") == "tokenizer" or (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder}: is a tokenizer, not a model",
            f"`llmctl pretrain --tokenizer {folder}` makes a model for it",
        )
    if made.get("status") in ("running", "interrupted", "failed"):
        raise _unfinished(folder, str(made.get("stage")), str(made["status"]))
    if not names:
        raise UserError(
            f"{folder}: the folder is empty", "name a run folder, a Hugging Face folder or a hub id"
        )
    if {"meta.json", "ids.bin"} <= set(names):
        raise UserError(
            f"{folder}: holds token shards, not a model",
            "name a run folder, a Hugging Face folder or a hub id",
        )
    if any(name.endswith(DATA) for name in names) and not made:
        raise UserError(f"{folder}: holds data, not a model", f"data is named with --data {folder}")


def _unfinished(folder: Path, stage: str, status: str) -> UserError:
    state = "is still running" if status == "running" else f"is not finished ({status})"
    steps = sorted(path for path in (folder / CHECKPOINTS).glob("step-*") if path.is_dir())
    again = f"`llmctl {stage} --resume --out {folder}` goes on with it"
    if not steps:
        return UserError(f"{folder}: the {stage} run {state} and has no checkpoint yet", again)
    return UserError(
        f"{folder}: the {stage} run {state}, so it holds no model yet",
        f"its newest checkpoint is one: {steps[-1]}; {again}",
    )
