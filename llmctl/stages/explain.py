"""`llmctl explain MODEL TEXT`: the walk from a text to the next token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from llmctl.errors import UserError
from llmctl.kernels.device import pick_device
from llmctl.kernels.threads import use_threads
from llmctl.model.open import open_config, open_model
from llmctl.model.trace import trace
from llmctl.model.traced import Attention, Guess, Layer, Step, Table, Trace
from llmctl.stages.generate import prompt_ids
from llmctl.stages.text import fitting_tokenizer
from llmctl.talk import Talk
from llmctl.tokenizer.spell import spelled_alone

GUESSES = 10
DIGITS = 6  # of a number in JSON


@dataclass
class Candidate:
    """A possible next token."""

    id: int
    text: str
    logit: float
    probability: float


@dataclass
class Walk:
    """A traced pass, and words for its tokens.

    Attributes:
        texts: id -> text, of every id that is shown.
        next: the likeliest next tokens, the first first.
    """

    where: str
    trace: Trace
    texts: dict[int, str]
    next: list[Candidate]

    def text(self, place: int) -> str:
        """The token at a place of the text."""
        return self.texts[self.trace.ids[place]]

    @property
    def first(self) -> int:
        """The place of the first token of the window."""
        return len(self.trace.ids) - self.trace.window

    def share(self, parameters: int) -> float:
        """As a share of the model's parameters."""
        return parameters / self.trace.parameters


def run(where: str, text: str, device: str, talk: Talk, layer: int | None = None) -> Walk:
    """Read the text, after BOS if the model has one, and tell what each step does.

    The weights are those that `generate` uses: in the checkpoint's own precision, adapters at work on their
    base, quantized layers as they are stored.

    Args:
        layer: one that will be asked for, and must be there.

    Raises UserError: an empty text, one that is longer than the context, a model that predicts no next
    token, or as `open_model`.
    """
    if not text:
        raise UserError("the text is empty", 'give some: llmctl explain MODEL "Once upon a time"')
    stack = open_config(where).spec.stack
    if stack != "decoder":
        raise UserError(
            f"{where}: the walk ends in a next token, which a model with stack `{stack}` does not predict",
            "`llmctl explain MODEL --size` takes any model",
        )
    _refuse_layer(layer, open_config(where).spec.num_hidden_layers)
    tokenizer = fitting_tokenizer(where)
    ids = prompt_ids(tokenizer, text, False, where)
    longest = open_config(where).max_position_embeddings
    if len(ids) > longest:
        raise UserError(
            f"the text has {len(ids):,} tokens, but the model's context is {longest:,}", "shorten the text"
        )
    place = pick_device(device)
    use_threads("auto", "threads", place, talk)
    model = open_model(where, None, place, exact=True)
    if place.type == "cpu" and model.dtype == torch.float16:
        talk.say("float16 weights are computed with as float32 on a CPU")
        model = model.float()
    found = trace(model, ids, GUESSES)
    _refuse_overflow(found, where)
    likeliest = found.logits.topk(min(GUESSES, len(found.logits))).indices.tolist()
    shown = {*ids, *likeliest}
    for guess in [found.lens, *(layer.guess for layer in found.layers)]:
        assert guess is not None
        shown |= set(guess.ids.flatten().tolist())
    texts = spelled_alone(tokenizer, shown)
    shares = found.logits.double().softmax(-1)
    candidates = [Candidate(i, texts[i], float(found.logits[i]), float(shares[i])) for i in likeliest]
    return Walk(where, found, texts, candidates)


def _refuse_overflow(found: Trace, where: str) -> None:
    """Raise UserError, naming the first step that gives NaN or infinity: there would be nothing to show after it."""
    named = [("embedding", found.embedding)]
    named += [(f"layer {layer.index}", step) for layer in found.layers for step in layer.steps]
    named += [("end", step) for step in found.closing]
    for place, step in named:
        if step.rms is not None and not math.isfinite(step.rms):
            told = step.what if place == step.what else f"{place}, {step.what}"
            raise UserError(
                f"{where}: {told}: gives numbers that are not finite",
                "the weights are damaged, or training has diverged; an earlier checkpoint may be whole",
            )


def _refuse_layer(layer: int | None, layers: int) -> None:
    if layer is not None and not 0 <= layer < layers:
        raise UserError(f"--layer is {layer}, but the layers are 0 to {layers - 1}", "name one of these")


def as_json(walk: Walk, maps: Callable[[Tensor], Any] | None = None) -> dict[str, Any]:
    """Everything as plain values: dicts, lists, numbers of six digits.

    `maps` writes the maps of attention, [H, W, W]; nested lists when None.
    """
    write = maps or _numbers
    found = walk.trace
    return {
        "model": {
            "path": walk.where,
            "parameters": found.parameters,
            "bytes": found.bytes,
            "dtype": found.dtype,
            "architecture": found.spec.model_dump(mode="json", exclude_none=True),
        },
        "tokens": [{"id": token, "text": walk.texts[token]} for token in found.ids],
        "window": {"first": walk.first, "tokens": found.window},
        "embedding": _step(walk, found.embedding) | {"rows": _numbers(found.rows)},
        "positions": _step(walk, found.positions)
        | {"kind": found.spec.position, "turns": _numbers(found.turns)},
        "lens": _guess(walk, found.lens),
        "layers": [_layer(walk, layer, write) for layer in found.layers],
        "closing": [_step(walk, step) for step in found.closing],
        "parts": parts(found),
        "next": [asdict(candidate) for candidate in walk.next],
    }


def parts(found: Trace) -> dict[str, dict[str, int]]:
    """Parameters and bytes of embedding, attention, ffn, norm and head; a tied head has none of its own."""
    sums = {name: {"parameters": 0, "bytes": 0} for name in ("embedding", "attention", "ffn", "norm", "head")}
    steps = [("embedding", found.embedding), ("embedding", found.positions)]
    steps += [(_part(step), step) for layer in found.layers for step in layer.steps]
    steps += [("norm" if step.what == "norm" else "head", step) for step in found.closing]
    seen = set()
    for part, step in steps:
        for table in step.tables:
            if table.name not in seen:
                sums[part]["parameters"] += table.parameters
                sums[part]["bytes"] += table.bytes
            seen.add(table.name)
    return sums


def _part(step: Step) -> str:
    first = step.module.partition(".")[0]
    return "attention" if first.endswith("attn") else "ffn" if first == "mlp" else "norm"


def _layer(walk: Walk, layer: Layer, maps: Callable[[Tensor], Any]) -> dict[str, Any]:
    assert layer.guess is not None
    routing = layer.routing
    return {
        "layer": layer.index,
        "pattern": layer.pattern,
        "parameters": layer.parameters,
        "bytes": layer.bytes,
        "share": walk.share(layer.parameters),
        "steps": [_step(walk, step) for step in layer.steps],
        "attention": [_attention(each, maps) for each in layer.attention],
        "routing": routing
        and {
            "shares": _numbers(routing.shares),
            "chosen": None if routing.chosen is None else routing.chosen.tolist(),
            "load": _numbers(routing.load),
        },
        "lens": _guess(walk, layer.guess),
    }


def _step(walk: Walk, step: Step) -> dict[str, Any]:
    tables = [_table(walk, table) for table in step.tables]
    return {**asdict(step), "tables": tables}


def _table(walk: Walk, table: Table) -> dict[str, Any]:
    return {**asdict(table), "share": walk.share(table.parameters)}


def _attention(each: Attention, maps: Callable[[Tensor], Any]) -> dict[str, Any]:
    drawn = ("scores", "allowed", "weights")
    plain = {name: value for name, value in vars(each).items() if name not in drawn}
    plain["earlier"] = _numbers(each.earlier)
    return plain | {name: maps(getattr(each, name)) for name in drawn}


def _guess(walk: Walk, guess: Guess) -> list[dict[str, Any]]:
    """For each token of the window what would follow it: the likeliest, and at the last place all that are kept."""
    last = len(guess.ids) - 1
    return [
        {
            "ids": row[: None if place == last else 1],
            "texts": [walk.texts[i] for i in row[: None if place == last else 1]],
            "probabilities": shares[: None if place == last else 1],
        }
        for place, (row, shares) in enumerate(zip(guess.ids.tolist(), _numbers(guess.shares), strict=True))
    ]


def _numbers(values: Tensor) -> Any:
    """Nested lists; floats with as many digits as mean something."""
    if not values.dtype.is_floating_point:
        return values.tolist()
    return _rounded(values.double().tolist())


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.{DIGITS}g}")
