"""What text stages share: a tokenizer that fits the model, and data cut into rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from llmctl.data.batches import Batches, Laid, eval_batches, split_holdout
from llmctl.data.packing import Pieces, Rows, cut, pack, text_bytes, unpacked
from llmctl.data.shards import Encoder, Shards, open_shards
from llmctl.errors import UserError, one_of
from llmctl.evaluate.perplexity import Score, score
from llmctl.kernels.device import Compute
from llmctl.locate import locate
from llmctl.model import LlmctlForCausalLM, compile_blocks, recompute_activations
from llmctl.model.adapter_file import is_adapter
from llmctl.model.open import base_of, open_config
from llmctl.recipe.model import ModelSection
from llmctl.recipe.schema import DataSection, TrainSection
from llmctl.runs import Parent, folder_hash, run_of
from llmctl.talk import SILENT, Talk, rows_told
from llmctl.tokenizer.load import FILES, TOKENIZER, encode_batch, fingerprint, load_tokenizer
from llmctl.tokenizer.template import template_hash


def parent(role: str, where: str) -> dict[str, Any]:
    """A manifest entry for a folder that a run is made from; a hub id has no hash of its own."""
    path = Path(where).expanduser()
    return vars(Parent(role, str(path), folder_hash(path) if path.is_dir() else ""))


def token_ids(tokenizer: PreTrainedTokenizerFast, stop: list[int]) -> dict[str, Any]:
    """bos, eos and pad ids as a model config holds them; `stop` are all ids that end a generation."""
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": stop[0] if len(stop) == 1 else stop or None,
        "pad_token_id": tokenizer.pad_token_id,
    }


def open_tokenizer(where: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a model; of an adapter that was saved without one, its base's.

    Raises UserError as `load_tokenizer`, and as `base_of`.
    """
    folder = locate(where, FILES, "tokenizer")
    if is_adapter(folder) and not (folder / TOKENIZER).is_file():
        return open_tokenizer(base_of(folder))
    return load_tokenizer(where)


def fitting_tokenizer(where: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a model that is used as it is.

    Raises UserError: config or tokenizer cannot be read, they do not fit each other, or the tokenizer is not the
    one of the run.
    """
    config = open_config(where)  # first: a broken config.json would look like a broken tokenizer
    tokenizer = open_tokenizer(where)
    refuse_mismatch(tokenizer, config.vocab_size, where)
    refuse_swapped_tokenizer(tokenizer, where)
    return tokenizer


def refuse_mismatch(tokenizer: PreTrainedTokenizerFast, vocab_size: int, where: str) -> None:
    """Raise UserError if the tokenizer can give ids that the model has no row for."""
    needed = highest_id(tokenizer) + 1
    if needed > vocab_size and is_adapter(Path(where).expanduser()):
        raise UserError(
            f"{where}: the tokenizer needs {needed:,} rows, but the base and the adapter have {vocab_size:,}",
            "save the adapter again with PEFT's save_pretrained(..., save_embedding_layers=True)",
        )
    if needed > vocab_size:
        beyond = [token for token, number in tokenizer.get_vocab().items() if number >= vocab_size]
        added = tokenizer.get_added_vocab()
        names = one_of(sorted(beyond, key=added.__getitem__)) if set(beyond) <= added.keys() else None
        raise UserError(
            f"{where}: the tokenizer needs {needed:,} rows, but the model has vocab_size {vocab_size:,}"
            + (f": none for {names}" if names else ""),
            "take what was added out of the tokenizer's files, or give the model rows for it"
            if names
            else "use the tokenizer the model was trained with",
        )


def refuse_swapped_tokenizer(tokenizer: PreTrainedTokenizerFast, where: str) -> None:
    """Raise UserError if a run folder, or a checkpoint in one, holds another tokenizer or template than it was made with."""
    manifest = run_of(Path(where))
    if manifest is None:
        return
    for name, found in (("tokenizer", fingerprint(tokenizer)), ("template", template_hash(tokenizer))):
        # a template that is missing is said where one is needed
        if name in manifest and found is not None and manifest[name] != found:
            shown = "tokenizer" if name == "tokenizer" else "chat template"
            raise UserError(
                f"{where}: the {shown} is not the one this run was made with",
                "copy it back from the run's parent, or from the folder's last checkpoint",
            )


def row_length(asked: int | None, longest: int, field: str) -> int:
    """Tokens in a row: as asked, or all the model takes. Raises UserError if it takes fewer."""
    if asked is not None and asked > longest:
        raise UserError(
            f"{field} is {asked}, but the model's max_position_embeddings is {longest}",
            f"lower {field}, or give the model a longer context",
        )
    return asked or longest


def scored_length(asked: int | None, spec: ModelSection, field: str, talk: Talk) -> int:
    """As `row_length`, for text that is only read: positions that go on may go beyond the model's context."""
    longest = spec.max_position_embeddings
    if asked is None or asked <= longest or spec.position == "learned":
        return row_length(asked, longest, field)
    talk.say(
        f"{field} is {asked}, beyond the model's max_position_embeddings of {longest}: it may not have learned to read that far"
    )
    return asked


def highest_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The largest id the tokenizer can give, added tokens included."""
    return max(tokenizer.get_vocab().values())


def encoder_of(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    """The tokenizer as the data package needs it."""
    return Encoder(
        partial(encode_batch, tokenizer),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        highest_id(tokenizer) + 1,
        fingerprint(tokenizer),
    )


@dataclass
class TextRows:
    """Documents of one data set, cut into pieces and laid into rows."""

    shards: Shards
    pieces: Pieces
    rows: Rows
    max_length: int

    @property
    def laid(self) -> Laid:
        """The rows without where they came from."""
        return Laid(self.shards.ids, self.pieces, self.rows)

    @property
    def ended(self) -> np.ndarray:
        """Whether each piece goes to the end of its document, bool [P]."""
        return self.pieces.start + self.pieces.length == self.shards.doc_start[self.pieces.doc + 1]

    def bytes(self, max_rows: int | None = None) -> float:
        """UTF-8 bytes that the labels of the first `max_rows` rows stand for."""
        count = len(self.rows) if max_rows is None else min(max_rows, len(self.rows))
        chosen = self.rows.pieces[: self.rows.offsets[count]]
        each = text_bytes(self.pieces.take(chosen), self.shards.doc_start, self.shards.doc_bytes)
        return float(each.sum())

    def manifest(self, sources: list[str]) -> dict[str, Any]:
        """What a manifest records of the data."""
        return {
            "sources": sources,
            "fingerprint": self.shards.fingerprint,
            "documents": int(self.shards.doc_bytes.size),
            "rows": len(self.rows),
            "tokens": self.pieces.trained_tokens,
            "bytes": round(self.bytes()),
            "cut": self.pieces.counts,
            "account": self.shards.account.to_json(),
        }


def text_rows(
    data: DataSection, tokenizer: PreTrainedTokenizerFast, max_length: int, seed: int, talk: Talk
) -> tuple[TextRows, TextRows | None]:
    """Training rows, and evaluation rows from `data.eval` or held out of the training documents.

    Says what was read, kept, dropped and cut.

    Raises UserError: see `data.readers.documents` and `data.packing.cut`.
    """
    encoder = encoder_of(tokenizer)
    shards = open_shards(data.train, data.text_field, encoder, data.cache_dir, talk)
    pieces = cut(shards.doc_start, max_length, data.overlong, shards.where)
    tell(shards, pieces, max_length, talk)
    lay = partial(_laid, packing=data.packing, max_length=max_length)
    if data.eval:
        held = open_shards(data.eval, data.text_field, encoder, data.cache_dir, talk)
        held_pieces = cut(held.doc_start, max_length, data.overlong, held.where)
        tell(held, held_pieces, max_length, talk)
        return lay(shards, pieces), lay(held, held_pieces)
    kept, held_out = split_holdout(pieces, data.eval_fraction, seed)
    kept = replace(kept, counts=pieces.counts)  # what was cut was cut before the split
    return lay(shards, kept), lay(shards, held_out) if len(held_out) else None


def tell(shards: Shards, pieces: Pieces, max_length: int, talk: Talk) -> None:
    """Say what was read, kept, dropped and cut."""
    for line in [*shards.account.lines(), *pieces.lines(max_length)]:
        talk.say(line)


def _laid(shards: Shards, pieces: Pieces, *, packing: bool, max_length: int) -> TextRows:
    rows = pack(pieces.length, max_length) if packing else unpacked(len(pieces))
    return TextRows(shards, pieces, rows, max_length)


def training_batches(text: TextRows, data: DataSection, train: TrainSection, pad_id: int) -> Batches:
    """Rows as the loop takes them."""
    return Batches(
        text.laid,
        max_length=text.max_length,
        batch_size=train.per_device_train_batch_size,
        accumulation=train.gradient_accumulation_steps,
        seed=train.seed,
        pad_id=pad_id,
        isolate=data.isolate_documents,
    )


def for_training(model: LlmctlForCausalLM, settings: TrainSection, compute: Compute) -> LlmctlForCausalLM:
    """The passes over a model that `train.*` asks for, and the move to its device."""
    if settings.gradient_checkpointing:
        recompute_activations(model)
    if settings.torch_compile:
        compile_blocks(model)
    return model.to(compute.device)


def pad_id_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """An id to fill rows with; its label is masked by position, so any id does where there is no pad."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def score_rows(
    model: LlmctlForCausalLM,
    text: TextRows,
    tokenizer: PreTrainedTokenizerFast,
    compute: Compute,
    batch_size: int,
    max_rows: int | None = None,
    talk: Talk = SILENT,
) -> Score:
    """Score a model on rows; every document's tokens are predicted from that document alone."""
    laid = replace(text.laid, ended=None if tokenizer.eos_token_id is None else text.ended)
    batches = eval_batches(laid, batch_size=batch_size, pad_id=pad_id_of(tokenizer), max_rows=max_rows)
    rows = min(len(laid.rows), max_rows or len(laid.rows))
    return score(model, rows_told(batches, rows, "scoring", talk), text.bytes(max_rows), compute)


def completion_pairs(
    tokenizer: PreTrainedTokenizerFast, texts: list[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) texts as ids, the prompt after BOS.

    Both are encoded together and cut where the prompt's own ids end, so the completion is tokenized
    as it would be in running text.

    Raises ValueError if a prompt's last token would swallow the beginning of its completion.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts = encode_batch(tokenizer, [prompt for prompt, _ in texts])
    wholes = encode_batch(tokenizer, [prompt + completion for prompt, completion in texts])
    pairs = []
    for (prompt, _), before, whole in zip(texts, prompts, wholes, strict=True):
        if whole[: len(before)] != before:
            raise ValueError(f"the prompt {prompt!r} does not end at a token of the whole")
        pairs.append((bos + before, whole[len(before) :]))
    return pairs
