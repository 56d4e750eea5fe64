"""Learning a tokenizer from a stream of texts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TypeVar

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from llmctl.errors import UserError
from llmctl.talk import SILENT, Bar, Talk
from llmctl.tokenizer.kinds import BOS, EOS, PAD, TURN_END, TURN_START, UNKNOWN, kind_named
from llmctl.tokenizer.template import CHATML

BATCH = 256  # texts handed over at a time
Result = TypeVar("Result")


def train_tokenizer(
    kind: str,
    texts: Iterator[str],
    vocab_size: int,
    min_frequency: int,
    chat_template: str | None = CHATML,
    talk: Talk = SILENT,
) -> PreTrainedTokenizerFast:
    """Learn a vocabulary from texts, which are read once and not kept.

    Ctrl-C is obeyed at once, also while merges are learned. What the data cannot fill stays out:
    the result may be smaller than `vocab_size`, which is said; so are characters that got no entry.

    Raises:
        UserError: see `kind_named`; `vocab_size` is too small for the text, or there is no text at all.
    """
    chosen = kind_named(kind, vocab_size, min_frequency)
    seen = _Seen()
    learned = _obeying_ctrl_c(
        lambda stop: chosen.learn(_batches(texts, seen, stop), vocab_size, min_frequency), seen, talk
    )
    size = learned.tokenizer.get_vocab_size()
    if size < vocab_size:
        talk.say(f"the data fills only {size:,} of {vocab_size:,} entries; the vocabulary has {size:,}")
    if learned.left_out:
        fate = f"becomes {UNKNOWN}" if chosen.unknown else "is written in bytes"
        share = learned.left_out.total() / seen.characters
        talk.say(f"characters without an entry: {len(learned.left_out):,}; {share:.2%} of the text {fate}")
    return wrap(learned.tokenizer, chat_template)


def wrap(tokenizer: Tokenizer, chat_template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer of ours as transformers knows it, special tokens named."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN if tokenizer.token_to_id(UNKNOWN) is not None else None,
        extra_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )


class _Seen:
    """How much text went by, and whether that was all."""

    characters = 0
    all = False


class _Stopped(Exception):
    """Raised inside the worker when nobody waits for it any more."""


def _batches(texts: Iterator[str], seen: _Seen, stop: threading.Event) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        if stop.is_set():
            raise _Stopped
        seen.characters += len(text)
        batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if seen.characters == 0:
        raise UserError("there is no text to learn a tokenizer from", "name files with text in them")
    yield batch
    seen.all = True


def _obeying_ctrl_c(work: Callable[[threading.Event], Result], seen: _Seen, talk: Talk) -> Result:
    """Run `work` in a thread and wait for it, with a bar once all text was read.

    The library learns merges in one long call during which Python handles no signal. In the main
    thread that would make Ctrl-C wait for minutes; a waiting main thread hears it at once. The
    abandoned thread is a daemon and ends with the process.
    """
    outcome: list[Result] = []
    failure: list[BaseException] = []
    stop, done = threading.Event(), threading.Event()

    def run() -> None:
        try:
            outcome.append(work(stop))
        except BaseException as error:  # handed to the waiting thread below
            failure.append(error)
        finally:
            done.set()

    threading.Thread(target=run, daemon=True, name="tokenizer training").start()
    try:
        with ExitStack() as stack:
            bar: Bar | None = None
            while not done.wait(timeout=0.1):  # in slices: Windows would not hear Ctrl-C
                if seen.all and bar is None:
                    bar = stack.enter_context(talk.bar("learning the vocabulary", None, ""))
                if bar is not None:
                    bar.advance(0)
    except BaseException:
        stop.set()
        raise
    if failure:
        raise failure[0]
    return outcome[0]
