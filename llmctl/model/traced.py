"""What a watched pass leaves behind (`trace.py`): steps, tables, maps of attention, guesses.

Shape legend: H query heads, T tokens, W the last of them (the window), S keys, E hidden width, V vocabulary,
X experts, k guesses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from llmctl.model.packed import PackedLinear
from llmctl.recipe.model import ModelSection


@dataclass(frozen=True)
class Table:
    """A parameter table.

    Attributes:
        name: dotted, as in the checkpoint; `*` stands for the numbers of several alike.
        shape: [out, in] of a matrix; led by how many they are if there are several.
        dtype: such as `float32`, or `int4`.
        bytes: in memory; of packed integers as they are stored, with their scales.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    bytes: int


@dataclass
class Step:
    """Something a layer does.

    Attributes:
        what: in a word or two, such as `queries`.
        module: dotted name in its layer, such as `self_attn.q_proj`; empty for plain arithmetic.
        tables: the parameters it reads.
        shape: of what it gives, without the row axis; empty if it gives nothing.
        rms: root of the mean square of what it gives; None where that says nothing.
        said: the formula, or why there is nothing to show.
    """

    what: str
    module: str = ""
    tables: list[Table] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    rms: float | None = None
    said: str = ""


@dataclass
class Attention:
    """Where the last W tokens look, head by head.

    Attributes:
        module: the mixer, such as `self_attn`.
        scale: what q · k is multiplied by.
        scores: [H, W, W], q · k · scale with any soft cap and bias of positions, before the mask.
        allowed: [H or 1, W, W], False where the mask hides a key.
        weights: [H, W, W], after mask and softmax.
        earlier: [H, W], the weight on keys before the window, which the maps leave out.
        hidden, pairs: how many pairs of all T queries and S keys the mask hides, and how many there are; over
            all heads if each has a mask of its own.
        deviation: largest difference between weights · values and what the mixer gave, as a share of the
            largest number there.
    """

    module: str
    heads: int
    kv_heads: int
    scale: float
    scores: Tensor
    allowed: Tensor
    weights: Tensor
    earlier: Tensor
    hidden: int
    pairs: int
    deviation: float


@dataclass
class Routing:
    """Which experts work.

    Attributes:
        shares: [W, X], the router's probabilities of each token over the experts (or over their slots).
        chosen: [W, K], the experts of each token; None where all work on it.
        load: [X], the share of the work that each expert got; the mean of `shares` where all work alike.
    """

    shares: Tensor
    chosen: Tensor | None
    load: Tensor


@dataclass
class Guess:
    """The next token after each of the last W, were the model to stop here: `ids` and `shares` [W, k]."""

    ids: Tensor
    shares: Tensor


@dataclass
class Layer:
    """A block: its steps in order, and the stream [W, E] it leaves."""

    index: int
    pattern: str
    parameters: int
    bytes: int
    steps: list[Step] = field(default_factory=list)
    attention: list[Attention] = field(default_factory=list)
    routing: Routing | None = None
    stream: Tensor | None = None
    guess: Guess | None = None


@dataclass
class Trace:
    """A whole pass.

    Attributes:
        window: how many of the last tokens the maps show.
        embedding: the rows that were looked up.
        positions: the tables that tell positions, if there are any.
        rows: [W, some channels] of what enters the first block.
        turns: radians by which each pair of channels is turned from one position to the next (rotary
            embeddings); empty without, or for a single token.
        closing: final norm and head.
        lens: the guess from the embedding alone.
        logits: [V] after the last token.
        parameters, bytes: of the whole model, a tied table counted once.
        dtype: such as `float32`, or `int4 and float32`.
    """

    spec: ModelSection
    ids: list[int]
    window: int
    embedding: Step
    positions: Step
    rows: Tensor
    turns: Tensor
    layers: list[Layer]
    closing: list[Step]
    lens: Guess
    logits: Tensor
    parameters: int
    bytes: int
    dtype: str


def tables_of(prefix: str, module: nn.Module, recurse: bool = True) -> list[Table]:
    """The parameter tables of a module, packed ones included, each once; `recurse`: and of those inside it."""
    found, seen = [], set()
    for name, inner in module.named_modules(prefix=prefix):
        if isinstance(inner, PackedLinear):
            shape = (inner.out_features, inner.in_features)
            count = inner.out_features * inner.in_features
            found.append(Table(f"{name}.weight", shape, f"int{inner.bits}", count, inner.stored_bytes))
        for own, weight in inner.named_parameters(recurse=False):
            if weight not in seen:  # a tied table
                dtype = str(weight.dtype).removeprefix("torch.")
                found.append(
                    Table(f"{name}.{own}", tuple(weight.shape), dtype, weight.numel(), weight.nbytes)
                )
            seen.add(weight)
        if not recurse:
            break
    return found


def alike(tables: Iterable[Table], above: str) -> list[Table]:
    """Tables below `above.NUMBER` as one each for all numbers: `above.*.gate_proj.weight` [X, out, in]."""
    groups: dict[str, list[Table]] = {}
    for table in tables:
        inside = table.name.removeprefix(f"{above}.").partition(".")[2]
        groups.setdefault(inside, []).append(table)
    return [
        Table(
            f"{above}.*.{inside}",
            (len(each), *each[0].shape),
            each[0].dtype,
            sum(table.parameters for table in each),
            sum(table.bytes for table in each),
        )
        for inside, each in groups.items()
    ]
