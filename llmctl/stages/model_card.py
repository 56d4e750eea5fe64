"""The model card that `llmctl push` writes: what the model is, what it was made from, how to use it. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmctl.errors import UserError
from llmctl.files import read_json
from llmctl.runs import METRICS, RECIPE, find_parent, read_manifest
from llmctl.summary import Lines, is_adapter, parents, summarize

CARD = "README.md"
LOCAL = re.compile(
    r"(?<![\w.:/])(?:~|/[\w.@+-]+)(?:/[\w.@+-]+)+"
)  # an absolute path, or one below the home folder
DEPTH = 12  # generations that a card tells of

USES = {
    "peft": """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")""",
    "reward": """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")""",
    "tokenizer": """\
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")""",
    "model": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")""",
}
CHAT = """

messages = [{"role": "user", "content": "Hello!"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=64)[0]))"""


def model_card(name: str, run: Path, manifest: Mapping[str, Any], base: str | None) -> str:
    """The card in Markdown. Paths of this machine are cut down to the name of the file.

    Args:
        name: of the repository.
        base: the hub id of the base, if it has one.
    """
    summary = summarize(str(run), manifest, _rows(run / METRICS))
    parts = [
        _head(manifest, base),
        f"# {name.rpartition('/')[2]}",
        f"{_first(summary.what, 'result').capitalize()}. Made with llmctl.",
        "## How to use it",
        _use(name, run, manifest),
        _section("Made from", summary.made_from),
        _section("How it went", [line for line in summary.went if line[0] != "training time"]),
        f"## Lineage\n\n```\n{portable(chr(10).join(lineage(run)))}\n```",
        _recipe(run),
        _receipt(run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def portable(text: str) -> str:
    """A text without the folders of this machine: of an absolute path its last part is left."""
    return LOCAL.sub(lambda found: found[0].rpartition("/")[2], text)


def _rows(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    rows = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows


def _first(lines: Lines, name: str) -> str:
    return next((text for key, text in lines if key == name), "")


def _head(manifest: Mapping[str, Any], base: str | None) -> str:
    stage = str(manifest.get("stage"))
    fields = [f"library_name: {'peft' if is_adapter(manifest) else 'transformers'}"]
    if base is not None:
        relation = {"quantize": "quantized"}.get(stage, "adapter" if is_adapter(manifest) else "finetune")
        fields += [f"base_model: {base}", f"base_model_relation: {relation}"]
    if stage not in ("tokenizer", "reward"):
        fields.append("pipeline_tag: text-generation")
    return "\n".join(["---", *fields, "tags:", "- llmctl", f"- {stage}", "---"])


def _use(name: str, run: Path, manifest: Mapping[str, Any]) -> str:
    stage = str(manifest.get("stage"))
    kind = "peft" if is_adapter(manifest) else stage if stage in USES else "model"
    code, notes = USES[kind].format(name=name), []
    if kind in ("model", "peft") and (run / "chat_template.jinja").is_file():
        code += CHAT
    config = read_json(run / "config.json") if (run / "config.json").is_file() else {}
    if config.get("model_type") == "llmctl":
        code = "import llmctl.model  # registers the architecture; llmctl must be installed\n" + code
    if "quantization_config" in config:
        notes.append("It needs `pip install compressed-tensors`.")
    if isinstance(manifest.get("needs_merging"), str):
        notes.append(f"Other programs open it only once merged ({manifest['needs_merging']}).")
    if stage != "tokenizer":
        command = "score" if stage == "reward" else "chat"
        notes.append(f"On a command line: `llmctl {command} {name}`.")
    return "\n\n".join([f"```python\n{code}\n```", *notes])


def _section(heading: str, lines: Lines) -> str:
    if not lines:
        return ""
    rows = [f"| {_cell(name)} | {_cell(text)} |" for name, text in lines]
    return "\n".join([f"## {heading}", "", "| | |", "|---|---|", *rows])


def _cell(text: str) -> str:
    """A text that stays inside one cell of a table and is no markup."""
    line = " ".join(portable(text).split())
    return line.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def lineage(run: Path, depth: int = 0) -> list[str]:
    """The run and what it was made from, a line each, set in by generation; parents are found by their hash."""
    try:
        manifest = read_manifest(run)
    except UserError:
        return [f"{'  ' * depth}{run.name}"]
    digest = str(manifest.get("hash") or "")[:12]
    lines = [f"{'  ' * depth}{run.name} ({manifest.get('stage')}{f', {digest}' if digest else ''})"]
    for parent in parents(manifest) if depth < DEPTH else []:
        path = str(parent.get("path"))
        found = find_parent(dict(parent)) if parent.get("hash") else None
        if found is not None:
            lines += lineage(found, depth + 1)
        else:
            lines.append(
                f"{'  ' * (depth + 1)}{path} ({'elsewhere' if parent.get('hash') else 'from the hub'})"
            )
    return lines


def _recipe(run: Path) -> str:
    file = run / RECIPE
    if not file.is_file():
        return ""
    text = portable(file.read_text(encoding="utf-8", errors="replace")).strip()
    return f"## Recipe\n\n```yaml\n{text.replace('```', '')}\n```"


def _receipt(run: Path) -> str:
    """The card that a stage wrote by itself, such as the receipt of a quantization, without its head."""
    file = run / CARD
    if not file.is_file():
        return ""
    text = portable(file.read_text(encoding="utf-8", errors="replace"))
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL).strip()
    return "## Receipt\n\n" + re.sub(r"\A# .*\n+", "", body)
