"""`llmctl tokenizer train`, `eval` and `show`."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from llmctl.data.readers import Account, documents
from llmctl.data.sources import total_bytes
from llmctl.errors import UsageError, named_in
from llmctl.files import disk_errors, sync_file
from llmctl.recipe.load import dump_recipe
from llmctl.recipe.schema import TokenizerRecipe
from llmctl.runs import Run, RunResult, check_out, default_out
from llmctl.talk import Talk
from llmctl.tokenizer.evaluate import evaluate_tokenizer
from llmctl.tokenizer.kinds import kind_named
from llmctl.tokenizer.load import fingerprint, load_tokenizer
from llmctl.tokenizer.show import pieces
from llmctl.tokenizer.template import TEMPLATES, stop_ids, template_hash
from llmctl.tokenizer.train import train_tokenizer

STAGE = "tokenizer"
MB = 1e6
SAMPLE = 1_000_000  # characters, from the start of the data, on which the tokenizer is measured


def run(recipe: TokenizerRecipe, talk: Talk) -> RunResult:
    """Learn a tokenizer and write it as a Hugging Face folder.

    The run folder is made last, when the tokenizer is complete, so no error leaves half of one.

    Raises:
        UserError: the data or the output folder cannot be used, or `vocab_size` is too small.
    """
    begin = time.monotonic()
    out = Path(recipe.out) if recipe.out else default_out(STAGE)
    check_out(out, resumable=False)
    if not recipe.data.train:
        raise UsageError("no data to learn from", "name files, for example `llmctl tokenizer train TEXT.txt`")
    kind_named(recipe.kind, recipe.vocab_size, recipe.min_frequency)
    stream = _Stream(recipe, talk)
    tokenizer = train_tokenizer(
        recipe.kind,
        stream.texts(),
        recipe.vocab_size,
        recipe.min_frequency,
        TEMPLATES[recipe.chat_template],
        talk,
    )
    for line in stream.account.lines():
        talk.say(line)
    metrics = {
        "vocab_size": len(tokenizer),
        "bytes": stream.bytes,
        "seconds": round(time.monotonic() - begin, 3),
    }
    measured = evaluate_tokenizer(tokenizer, iter(stream.sample))
    metrics |= {name: measured[name] for name in ("bytes_per_token", "unknown_rate", "round_trip")}
    with _written_beside(tokenizer, out) as finished:
        fields = {
            "parents": [],
            "data": {"sources": recipe.data.train, "text_hash": stream.digest.hexdigest()}
            | stream.account.to_json(),
            "tokenizer": fingerprint(tokenizer),
            "template": template_hash(tokenizer),
            "stop_ids": stop_ids(tokenizer),
        }
        with Run.start(STAGE, out, dump_recipe(recipe), **fields) as opened:
            with disk_errors(out):
                for file in sorted(finished.iterdir()):
                    os.replace(file, out / file.name)
            opened.finish(metrics)
    return RunResult(out, metrics)


@named_in("data", {"data.text_field=": "--text-field ", "data.text_field": "--text-field"})
def evaluate(where: list[str], data: list[str], text_field: str) -> list[dict[str, Any]]:
    """One row of measurements a tokenizer, on the same documents; see `evaluate_tokenizer`.

    Raises:
        UserError: a tokenizer or the data cannot be opened.
    """
    if not where:
        raise UsageError("no tokenizer to measure", "name one or more: folders or hub ids")
    tokenizers = [(name, load_tokenizer(name)) for name in where]
    rows = []
    for name, tokenizer in tokenizers:
        texts = (document.text for document in documents(data, text_field, Account()))
        rows.append({"tokenizer": name, "vocab_size": len(tokenizer), **evaluate_tokenizer(tokenizer, texts)})
    return rows


def show(where: str, text: str) -> list[tuple[int, str, bytes]]:
    """(id, entry of the vocabulary, bytes) of every token of `text`."""
    return pieces(load_tokenizer(where), text)


class _Stream:
    """The texts of a recipe's data on their way to the trainer: counted, hashed, a sample kept."""

    def __init__(self, recipe: TokenizerRecipe, talk: Talk) -> None:
        self.recipe = recipe
        self.talk = talk
        self.account = Account()
        self.digest = hashlib.sha256()
        self.bytes = 0
        self.sample: list[str] = []

    def texts(self) -> Iterator[str]:
        """Every text once, with progress in megabytes of input."""
        data = self.recipe.data
        size = total_bytes(data.train)
        kept = 0
        done = 0
        with self.talk.bar("reading", size and size / MB, "MB") as bar:
            for document in documents(data.train, data.text_field, self.account):
                raw = document.text.encode()
                self.bytes += len(raw)
                self.digest.update(raw)
                self.digest.update(b"\xff" if document.ends else b"")  # a byte that no UTF-8 text has
                if kept < SAMPLE:
                    self.sample.append(document.text[: SAMPLE - kept])
                    kept += len(document.text)
                yield document.text
                now = self.account.input_bytes or self.bytes
                bar.advance((now - done) / MB)
                done = now
        self.talk.say(f"read {self.bytes / MB:,.1f} MB of text; learning the vocabulary")


@contextlib.contextmanager
def _written_beside(tokenizer: PreTrainedTokenizerFast, out: Path) -> Iterator[Path]:
    """A temporary folder on the same disk with the tokenizer's files, so that a full disk is met early."""
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".tmp-{out.name}-"))
    try:
        with disk_errors(out):
            tokenizer.save_pretrained(folder)
            for file in folder.iterdir():
                sync_file(file)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
