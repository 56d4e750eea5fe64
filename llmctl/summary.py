"""A run in plain words: what it is, what it was made from, how it went, and what to do next.

`llmctl runs show`, the table after a stage, report.html and the model card all say it by this one module. It
takes what a manifest holds and believes nothing of it: a field of the wrong type is passed over.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from llmctl.figures import duration, figure, size

Lines = list[tuple[str, str]]

ADAPTER = "adapter_model.safetensors"
TRAINING = ("pretrain", "sft", "reward", "dpo")  # the stages that take optimizer steps, and resume
FEW = 6  # layers that are named; run.json lists them all
UNFINISHED = ("failed", "interrupted", "crashed")

# stage -> what its result is
RESULTS = {
    "tokenizer": "tokenizer",
    "pretrain": "language model, pretrained on text",
    "sft": "model trained to answer, from conversations (SFT)",
    "reward": "reward model, trained on preferences",
    "dpo": "model trained on preferences (DPO)",
    "merge": "adapter folded into its base",
    "convert": "model written in another form",
    "quantize": "quantized model",
}
ROLES = {"model": "base model", "base": "base model", "tokenizer": "tokenizer"}

# metric -> its name; what is not here is shown under its own name
NAMES = {
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "bytes_per_token": "bytes per token",
    "vocab_size": "vocabulary",
    "bytes": "bytes of text",
    "unknown_rate": "unknown tokens",
    "round_trip": "texts restored",
    "effect": "adapter moves base by",
    "top1": "same next token",
    "decided_top1": "same, if decided",
    "kl": "divergence (KL)",
    "parameters": "parameters",
    "trained_parameters": "trained parameters",
    "bits_per_weight": "bits per weight",
    "same_answers": "same answers",
    "best_step": "best step",
    "quantized": "quantized layers",
}
NATS = ("effect", "kl")
SHARES = ("unknown_rate", "round_trip", "top1", "decided_top1", "same_answers")
# told in a line of their own, or only in the manifest
TOLD = (
    *("loss", "steps", "tokens", "seconds", "tokens_per_second", "answers", "kept", "failed", "trained_parameters"),
    *("eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_tokens", "eval_bytes", "eval_rows"),
    *("eval_accuracy", "eval_accuracy_low", "eval_accuracy_high", "eval_pairs", "eval_shorter_wins"),
    *("eval_margin", "eval_chosen_reward", "eval_rejected_reward", "eval_chosen_logps", "eval_rejected_logps"),
    *("size_bytes", "size_bytes_before", "perplexity", "perplexity_before", "perplexity_a", "perplexity_b"),
    *("tokens_per_second_before", "stop_rate_a", "stop_rate_b", "method", "bits", "group_size", "path"),
    *("kl_error", "max_kl", "noise_kl", "noise_top1", "noise_lead", "decided", "rows", "written_kl", "allowed_kl"),
)  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """The parts of a page about a run; each a list of (name, text).

    Attributes:
        title: name of the folder and its stage.
        following: (command, what it does), for who wants to go on.
    """

    title: str
    what: Lines
    made_from: Lines
    went: Lines
    following: Lines = field(default_factory=list)

    def sections(self) -> list[tuple[str, Lines]]:
        """(heading, lines) of all parts that say something, but for what follows."""
        parts = [("what it is", self.what), ("made from", self.made_from), ("how it went", self.went)]
        return [(heading, lines) for heading, lines in parts if lines]


def summarize(
    folder: str, manifest: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], size_bytes: int | None = None
) -> Summary:
    """The summary of a run.

    Args:
        folder: the run's folder, as it is to be written in commands.
        manifest: as read; `status` is that of now.
        rows: of metrics.jsonl.
        size_bytes: of the whole folder.
    """
    stage = str(manifest.get("stage") or "run")
    return Summary(
        f"{PurePath(folder).name} ({stage})",
        _what(folder, stage, manifest, size_bytes),
        _made_from(manifest),
        _went(stage, manifest, rows),
        following(folder, manifest),
    )


def _what(folder: str, stage: str, manifest: Mapping[str, Any], size_bytes: int | None) -> Lines:
    result = RESULTS.get(stage, stage)
    precision = ", on a base of four bits" if manifest.get("base_precision") == "nf4" else ""
    if is_adapter(manifest):
        result += f"; adapter (LoRA{precision})"
    lines = [("folder", folder), ("result", result), ("status", _status(manifest))]
    trained = _number(mapping(manifest.get("metrics")).get("trained_parameters"))
    if trained is not None:
        lines.append(("trained", f"{trained:,.0f} parameters"))
    if isinstance(manifest.get("needs_merging"), str):
        lines.append(("other programs", f"open it once it is merged: {manifest['needs_merging']}"))
    if isinstance(manifest.get("device"), str):
        lines.append(("device", manifest["device"]))
    if size_bytes is not None:
        lines.append(("on disk", size(size_bytes)))
    if manifest.get("command"):
        lines.append(("command", f"llmctl {manifest['command']}"))
    return lines


def _status(manifest: Mapping[str, Any]) -> str:
    status = str(manifest.get("status") or "unknown")
    at = manifest.get("finished") if status in ("done", "refused") else manifest.get("updated")
    text = f"{status}, {moment(at)}" if isinstance(at, str) else status
    if manifest.get("accepted"):
        text += ", accepted though its check refused it"
    return text


def moment(stamp: str) -> str:
    """A manifest's time stamp without its T and its seconds: 2026-05-01 12:30 +0200."""
    date, _, time = stamp.partition("T")
    return f"{date} {time[:5]} {time[8:]}".strip() if time else stamp


def _made_from(manifest: Mapping[str, Any]) -> Lines:
    lines: Lines = []
    for parent in parents(manifest):
        role = str(parent.get("role") or "parent")
        lines.append((ROLES.get(role, role), str(parent.get("path"))))
    data = mapping(manifest.get("data"))
    if "sources" in data:  # of a tokenizer
        lines.append(("text", _data(data, data)))
    quantized = manifest.get("stage") == "quantize"
    uses = (
        {"train": "calibrated on", "eval": "measured on"}
        if quantized
        else {"train": "trained on", "eval": "held out"}
    )
    for use, name in uses.items():
        about = mapping(data.get(use))
        if about:
            same = use == "eval" and about.get("sources") == mapping(data.get("train")).get("sources")
            lines.append((name, _data(about, mapping(about.get("account")), held_from_training=same)))
    seed = _number(manifest.get("seed"))
    return [*lines, ("seed", f"{seed:.0f}")] if seed is not None else lines


def _data(about: Mapping[str, Any], account: Mapping[str, Any], held_from_training: bool = False) -> str:
    """Records, tokens and sources of one data set."""
    noun = str(account.get("noun") or "document")
    kept, read = _number(account.get("kept")), _number(account.get("read"))
    parts = []
    if held_from_training:
        rows = _number(about.get("rows"))
        parts.append(f"{rows:,.0f} rows of the same data" if rows is not None else "part of the same data")
    else:
        if kept is not None:
            parts.append(f"{kept:,.0f} {noun}{'' if kept == 1 else 's'}")
        if kept is not None and read is not None and read > kept:
            parts.append(f"{read - kept:,.0f} of {read:,.0f} dropped")
    tokens, trained = _number(about.get("tokens")), _number(about.get("trained_tokens"))
    if tokens is not None:
        parts.append(f"{tokens:,.0f} tokens")
    if trained is not None and trained != tokens:
        parts.append(f"{trained:,.0f} of them in answers")
    counted = ", ".join(parts)
    named = "" if held_from_training else ", ".join(sources(about))
    return ": ".join(part for part in (named, counted) if part)


def sources(about: Mapping[str, Any]) -> list[str]:
    """What a data set of a manifest was read from."""
    found = about.get("sources")
    return [str(one) for one in found] if isinstance(found, list) else []


def _went(stage: str, manifest: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Lines:
    metrics = mapping(manifest.get("metrics"))
    unit = "per pair" if stage in ("reward", "dpo") else "nats per token"
    lines: Lines = []
    if manifest.get("status") != "done":
        lines += [("error", str(manifest["error"]))] if manifest.get("error") else []
        refused = manifest.get("refused")
        lines += [("refused", str(one)) for one in refused] if isinstance(refused, list) else []
    steps = _number(metrics.get("steps")) or _number(rows[-1].get("step") if rows else None)
    if steps is not None:
        lines.append(("steps", f"{steps:,.0f}"))
    for name, key, note in (
        ("loss", "loss", f"{unit}, in training"),
        ("held-out loss", "eval_loss", unit),
        ("perplexity", "eval_perplexity", "held out"),
        ("bits per byte", "eval_bits_per_byte", "held out"),
    ):
        change = _change(rows, key, metrics)
        lines += [(name, f"{change} ({note})")] if change else []
    lines += _preferences(metrics) + _before_after(metrics)
    lines += [(NAMES.get(name, name.replace("_", " ")), _value(name, value)) for name, value in metrics.items()
              if name not in TOLD and not isinstance(value, (dict, list))]  # fmt: skip
    return [*lines, *_time(stage, metrics)]


def _change(rows: Sequence[Mapping[str, Any]], key: str, metrics: Mapping[str, Any]) -> str | None:
    """`2.31 → 1.92` from the first measurement to the last; one number where there is only one."""
    found = [value for row in rows if (value := _number(row.get(key))) is not None]
    last = _number(metrics.get(key))
    if last is None:
        last = found[-1] if found else None
    if last is None:
        return None
    return f"{figure(found[0])} → {figure(last)}" if len(found) > 1 else figure(last)


def _preferences(metrics: Mapping[str, Any]) -> Lines:
    accuracy, low, high, pairs, shorter = (
        _number(metrics.get(f"eval_{name}"))
        for name in ("accuracy", "accuracy_low", "accuracy_high", "pairs", "shorter_wins")
    )
    if accuracy is None:
        return []
    of = f" of {pairs:,.0f} held-out pairs" if pairs is not None else ""
    around = f" (95 %: {low:.1%} to {high:.1%})" if low is not None and high is not None else ""
    lines = [("preferred", f"the chosen answer in {accuracy:.1%}{of}{around}")]
    if shorter is not None:
        lines.append(("by length alone", f"{shorter:.1%}, by taking the shorter answer"))
    return lines


def _before_after(metrics: Mapping[str, Any]) -> Lines:
    lines: Lines = []
    for name, before, after in (
        ("weights", "size_bytes_before", "size_bytes"),
        ("perplexity", "perplexity_before", "perplexity"),
        ("perplexity", "perplexity_a", "perplexity_b"),
        ("answers that end", "stop_rate_a", "stop_rate_b"),
        ("decoding", "tokens_per_second_before", "tokens_per_second"),
    ):
        was, now = _number(metrics.get(before)), _number(metrics.get(after))
        if was is not None and now is not None:
            unit = " tokens/s" if name == "decoding" else ""
            shown = size if name == "weights" else (lambda x: f"{x:.0%}") if "end" in name else figure
            lines.append((name, f"{shown(was)} → {shown(now)}{unit}"))
        elif now is not None and name == "perplexity":
            lines.append((name, figure(now)))
    method, bits, kept = (metrics.get(name) for name in ("method", "bits", "kept"))
    if isinstance(kept, list):
        more = f" and {len(kept) - FEW} more" if len(kept) > FEW else ""
        lines.append(("in full", (", ".join(map(str, kept[:FEW])) or "no linear layer") + more))
    return [("method", f"{method}, {bits} bits"), *lines] if method and bits else lines


def _time(stage: str, metrics: Mapping[str, Any]) -> Lines:
    seconds, tokens, speed = (
        _number(metrics.get(name)) for name in ("seconds", "tokens", "tokens_per_second")
    )
    if seconds is None:
        return []
    text = f"{duration(seconds)} ({seconds:.1f} s)" if seconds < 60 else duration(seconds)
    if speed is not None and tokens is not None:
        text += f", {tokens:,.0f} tokens trained, {speed:,.0f} tokens/s"
    return [("training time" if stage in TRAINING else "time", text)]


def _value(name: str, value: Any) -> str:
    number = _number(value)
    if number is not None and name in SHARES:
        return f"{number:.2%}"
    if number is not None and name in NATS:
        return f"{figure(number)} nats per token"
    return figure(value)


def following(folder: str, manifest: Mapping[str, Any]) -> Lines:
    """(command, what it does): what one does with a run of this stage in this state."""
    stage, status, at = str(manifest.get("stage")), str(manifest.get("status")), shlex.quote(folder)
    if status == "running":
        return [(f"llmctl runs watch {at}", "follow it")]
    if status in UNFINISHED:
        if stage in TRAINING:
            return [(f"llmctl {stage} --out {at} --resume", "go on from its last checkpoint")]
        again = manifest.get("command")
        return (
            [(f"llmctl {again}", "run it again, with another --out or without this folder")] if again else []
        )
    if status == "refused":
        command = manifest.get("command")
        return [(f"llmctl {command} --accept", "take it as it is, if that is expected")] if command else []
    if status != "done":
        return []
    return _after(stage, at, manifest)


def _after(stage: str, at: str, manifest: Mapping[str, Any]) -> Lines:
    if stage == "tokenizer":
        return [
            (f"llmctl tokenizer show {at} 'Some text.'", "how it cuts text"),
            (f"llmctl pretrain --tokenizer {at} --data FILE", "train a model with it"),
        ]
    data = mapping(manifest.get("data"))
    named = sources(mapping(data.get("eval"))) or sources(mapping(data.get("train")))
    files = " ".join(f"--data {shlex.quote(one)}" for one in named) if 0 < len(named) <= 2 else "--data FILE"
    base = next((str(one.get("path")) for one in parents(manifest) if one.get("role") == "model"), None)
    compare = [(f"llmctl compare {shlex.quote(base)} {at} {files}", "beside its base")] if base else []
    if stage == "reward":
        return [(f"llmctl score {at} {files}", "rank answers with it")]
    if stage == "pretrain":
        return [
            (f"llmctl generate {at} 'Once upon a time'", "let it write"),
            (f"llmctl eval {at} --data FILE", "measure it on other text"),
            (f"llmctl sft {at} --data FILE", "teach it to answer"),
        ]
    if stage == "convert":
        return [(f"llmctl generate {at} 'Once upon a time'", "let it write")]
    chat = (f"llmctl chat {at}", "talk to it")
    if is_adapter(manifest):
        return [chat, (f"llmctl merge {at}", "one model, without the adapter"), *compare]
    push = (f"llmctl push {at} USER/NAME", "publish it on the hub")
    if stage == "quantize":
        return [chat, *compare, push]
    return [chat, (f"llmctl quantize {at} --eval-data FILE", "make it smaller"), *compare, push]


def is_adapter(manifest: Mapping[str, Any]) -> bool:
    """Whether the result of a run is an adapter on a base, as far as its manifest tells."""
    return ADAPTER in mapping(manifest.get("outputs"))


def parents(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a manifest says the run was made from."""
    found = manifest.get("parents")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    """The value if it is a finite number of a size that can be shown."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) < 1e300 and math.isfinite(value) else None
