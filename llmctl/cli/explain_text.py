"""The walk from a text to the next token as plain lines that fit a terminal."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from llmctl.cli.output import cell_width, figure, one_line, size

if TYPE_CHECKING:
    from llmctl.model.traced import Attention, Guess, Layer, Step, Table
    from llmctl.stages.explain import Walk

NARROWEST = 60  # columns; narrower terminals get lines of this width
WIDE = 96  # columns from which on there is room for the rms
HEADS = 8  # heads whose looks are told in the compact view
LEAST = 8  # columns of the name of a table at least
BAR = 24  # columns of the longest bar
CELL = 4  # columns of a cell of a map
ROUND = 2 * math.pi

POSITIONS = {
    "rope": "rotary: each layer turns pairs of channels of queries and keys, by more at each position",
    "learned": "learned: a row of a second table is added to each token's",
    "sinusoidal": "sinusoidal: waves of the position are added to each token's row",
    "relative": "relative: a learned number for the distance of query and key is added to each score",
    "alibi": "ALiBi: a number that falls with the distance of query and key is added to each score",
    "none": "none: nothing tells a token where it stands",
}


def walk_lines(walk: Walk, columns: int, layer: int | None = None, full: bool = False) -> list[str]:
    """The whole walk.

    Args:
        layer: the one told step by step, the first when None.
        full: tell every layer step by step, with a map for each head.
    """
    columns = max(columns, NARROWEST)
    layers = walk.trace.layers
    parts = [
        _head(walk),
        _tokens(walk, columns),
        _embedding(walk, columns),
        _positions(walk, columns),
        _layers(walk, columns),
    ]
    for each in layers if full else [layers[layer or 0]]:
        parts.append(_layer(walk, each, columns))
        parts.append(_maps(walk, each, columns) if full or layer is not None else _looks(walk, each, columns))
        parts.append(_routing(walk, each, columns))
    parts += [_closing(walk, columns), _next(walk, columns)]
    if not full and layer is None:
        parts.append(["--layer N tells another layer and shows its heads, --full tells all."])
    lines = [line for part in parts if part for line in [*part, ""]][:-1]
    return [short for line in lines for short in _wrapped(line, columns)]


def _wrapped(line: str, columns: int) -> list[str]:
    if cell_width(line) <= columns:
        return [line]
    return textwrap.wrap(line, columns, subsequent_indent="  ")


def _head(walk: Walk) -> list[str]:
    found, spec = walk.trace, walk.trace.spec
    heads = f"{spec.num_attention_heads} heads"
    if spec.num_key_value_heads not in (None, spec.num_attention_heads):
        heads = f"{spec.num_attention_heads} query heads, {spec.num_key_value_heads} of keys and values"
    told = [heads] if any(layer.pattern != "mamba2" for layer in found.layers) else []
    return [
        f"{walk.where}: {found.parameters:,} parameters, {found.dtype}, {size(found.bytes)}",
        ", ".join([f"{len(found.layers)} layers", *told, f"width {spec.hidden_size:,}"]),
    ]


def _tokens(walk: Walk, columns: int) -> list[str]:
    count, longest = len(walk.trace.ids), walk.trace.spec.max_position_embeddings
    words = [f"{quoted(walk.text(place))} {token}" for place, token in enumerate(walk.trace.ids)]
    return [f"1 Tokens: {count:,} of at most {longest:,}, and their ids", *_flow(words, columns)]


def _embedding(walk: Walk, columns: int) -> list[str]:
    return [
        f"2 Embedding: a row of {walk.trace.spec.hidden_size:,} numbers for each token",
        *_steps(walk, [walk.trace.embedding], columns, ""),
    ]


def _positions(walk: Walk, columns: int) -> list[str]:
    kind, turns = walk.trace.spec.position, walk.trace.turns.tolist()
    lines = [f"3 Positions, {POSITIONS[kind]}"]
    if turns:
        lines.append(
            f"  the first of {len(turns)} pairs goes round in {figure(ROUND / turns[0])} tokens, "
            f"the last in {figure(ROUND / turns[-1])}"
        )
    if walk.trace.positions.tables:
        lines += _steps(walk, [walk.trace.positions], columns, "")
    return lines


def _layers(walk: Walk, columns: int) -> list[str]:
    """A line a layer."""
    found = walk.trace
    rows = [["layer", "pattern", "weights", "share", "stream", "looks at", "would say"]]
    for layer in found.layers:
        assert layer.guess is not None
        stream = [step.rms for step in layer.steps if step.what == "residual" and step.rms is not None][-1:]
        rows.append(
            [
                str(layer.index),
                layer.pattern,
                f"{layer.parameters:,}",
                percent(walk.share(layer.parameters)),
                f"{stream[0]:.3g}" if stream else "-",
                _looked_at(walk, layer),
                _said(walk, layer.guess),
            ]
        )
    last = quoted(walk.text(len(found.ids) - 1))
    intro = (
        f"4 Layers: the rms of the stream each leaves, where {last} looks most on average over its heads, and "
        "what would come next were it the last layer"
    )
    return [intro, *_aligned(rows, columns, {0, 2, 3, 4})]


def _looked_at(walk: Walk, layer: Layer) -> str:
    if not layer.attention:
        return "-"
    mean = layer.attention[0].weights[:, -1].mean(0)
    place = int(mean.argmax())
    return f"{quoted(walk.text(walk.first + place))} {percent(float(mean[place]))}"


def _said(walk: Walk, guess: Guess) -> str:
    return f"{quoted(walk.texts[int(guess.ids[-1, 0])])} {percent(float(guess.shares[-1, 0]))}"


def _layer(walk: Walk, layer: Layer, columns: int) -> list[str]:
    return [
        f"Layer {layer.index} ({layer.pattern}): {layer.parameters:,} parameters, {size(layer.bytes)}, "
        f"{percent(walk.share(layer.parameters))} of the model",
        *_steps(walk, layer.steps, columns, f"model.layers.{layer.index}."),
    ]


def _steps(walk: Walk, steps: Iterable[Step], columns: int, above: str) -> list[str]:
    """A line for each step, and one more for each further table it reads."""
    wide = columns >= WIDE
    rows = [["step", "weights", "shape", "size", "share", "gives", "rms"]]
    for step in steps:
        gives = shape(step.shape) if step.shape else ""
        rms = f"{step.rms:.3g}" if step.rms is not None else ""
        rows += [["", *_cells(walk, table, above), "", ""] for table in step.tables] or [
            ["", step.said, *[""] * 5]
        ]
        first = rows[-max(len(step.tables), 1)]
        first[0], first[5], first[6] = step.what, gives, rms
    rows = [row if wide else row[:-1] for row in rows]
    tables = [row for row in rows if row[2]]
    widths = [max(cell_width(row[i]) for row in (tables if 0 < i < 5 else rows)) for i in range(len(rows[0]))]
    rest = sum(widths[2:5]) + 6
    longest = max([0, *(cell_width(row[1]) for row in rows if not row[2])])
    widths[1] = max(widths[1], longest - rest)
    widths[1] = max(LEAST, min(widths[1], columns - 2 * len(widths) - sum(widths) + widths[1]))
    room = widths[1] + rest
    return [
        _row(row, widths, {3, 4, 6})
        if row[2]
        else _row([row[0], row[1], *row[5:]], [widths[0], room, *widths[5:]], {3})
        for row in rows
    ]


def _cells(walk: Walk, table: Table, above: str) -> list[str]:
    name = table.name.removeprefix(above).removesuffix(".weight")
    name = re.sub(r"^(self_attn|cross_attn|mlp|model)\.", "", name)
    return [name, shape(table.shape), size(table.bytes), percent(walk.share(table.parameters))]


def _looks(walk: Walk, layer: Layer, columns: int) -> list[str]:
    """Where the last token looks, a line a head."""
    lines = []
    for each in layer.attention:
        lines.append(f"Where {quoted(walk.text(len(walk.trace.ids) - 1))} looks in layer {layer.index}")
        for head in range(min(each.heads, HEADS)):
            row = each.weights[head, -1]
            places = row.topk(min(3, len(row))).indices.tolist()
            told = [
                f"{quoted(walk.text(walk.first + place))} {percent(float(row[place]))}" for place in places
            ]
            lines.append(_fit(f"  head {head:<3} {'   '.join(told)}", columns))
        if each.heads > HEADS:
            lines.append(f"  and {each.heads - HEADS} more heads: --layer {layer.index}")
    return lines


def _maps(walk: Walk, layer: Layer, columns: int) -> list[str]:
    """Every head's weights in percent: a row a query, a column a key."""
    lines = []
    count = min(walk.trace.window, (columns - 20) // CELL)
    for each in layer.attention:
        lines.append(
            f"Attention weights of layer {layer.index} in percent: a row for each query, a column for each key, "
            "a blank where the mask hides it"
        )
        if count < len(walk.trace.ids):
            lines.append(f"  the last {count} of {len(walk.trace.ids):,} tokens")
        for head in range(each.heads):
            lines += ["", *_map(walk, each, head, count)]
    return lines


def _map(walk: Walk, each: Attention, head: int, count: int) -> Iterator[str]:
    first = len(walk.trace.ids) - count
    names = "".join(f"{place:>{CELL}}" for place in range(first, first + count))
    yield f"  {_pad(f'head {head}', 18)}{names}"
    weights = each.weights[head, -count:, -count:].tolist()
    allowed = each.allowed[head if len(each.allowed) > 1 else 0, -count:, -count:].tolist()
    for query, (row, seen) in enumerate(zip(weights, allowed, strict=True)):
        cells = (f"{100 * w:>{CELL}.0f}" if s else " " * CELL for w, s in zip(row, seen, strict=True))
        label = f"{first + query:>4} {quoted(walk.text(first + query))}"
        yield f"  {_pad(_fit(label, 17), 18)}{''.join(cells)}".rstrip()


def _routing(walk: Walk, layer: Layer, columns: int) -> list[str]:
    if layer.routing is None:
        return []
    load, shares = layer.routing.load.tolist(), layer.routing.shares[-1].tolist()
    longest = max(load) or 1.0
    last = quoted(walk.text(len(walk.trace.ids) - 1))
    lines = [f"Experts of layer {layer.index}: their share of the work, and the router's shares for {last}"]
    chosen = [] if layer.routing.chosen is None else layer.routing.chosen[-1].tolist()
    for expert, (share, own) in enumerate(zip(load, shares, strict=True)):
        bar = "█" * round(BAR * share / longest)
        mark = "  chosen" if expert in chosen else ""
        lines.append(
            _fit(f"  {expert:>3}  {percent(share):>6}  {bar:<{BAR}}  {percent(own):>6}{mark}", columns)
        )
    return lines


def _closing(walk: Walk, columns: int) -> list[str]:
    intro = "5 Final norm, and the logits: a number for each entry of the vocabulary"
    return [intro, *_steps(walk, walk.trace.closing, columns, "")]


def _next(walk: Walk, columns: int) -> list[str]:
    lines = ["6 Next token: the softmax of the logits"]
    highest = walk.next[0].probability
    wide = max(cell_width(quoted(each.text)) for each in walk.next)
    for each in walk.next:
        bar = "█" * max(1, round(BAR * each.probability / highest))
        told = f"{_pad(quoted(each.text), wide)}  id {each.id:<6} logit {each.logit:.3f}"
        lines.append(_fit(f"  {percent(each.probability):>6}  {bar:<{BAR}}  {told}", columns))
    rest = max(0.0, 1 - sum(each.probability for each in walk.next))
    others = len(walk.trace.logits) - len(walk.next)
    return [*lines, f"  {percent(rest):>6}  the other {others:,}"] if others else lines


# --- words and columns ------------------------------------------------------------------------------


def quoted(text: str) -> str:
    """A token in quotes, line breaks and such written out."""
    return '"' + one_line(text) + '"'


def percent(share: float) -> str:
    """100 %, 12 %, 3.4 %, 0.02 %: two digits that mean something."""
    value = 100 * share
    if value < 0.005:
        return "0 %"
    digits = 0 if value >= 9.95 else 1 if value >= 0.995 else 2
    return f"{value:.{digits}f} %"


def shape(sizes: Iterable[int]) -> str:
    """[8, 5, 64]"""
    return f"[{', '.join(map(str, sizes))}]"


def _flow(words: list[str], columns: int) -> list[str]:
    """Words side by side, in lines that fit."""
    lines, line = [], ""
    for word in words:
        if line and cell_width(line) + 3 + cell_width(word) > columns:
            lines.append(line)
            line = ""
        line = f"{line}   {word}" if line else f"  {word}"
    return [*lines, line]


def _aligned(rows: list[list[str]], columns: int, right: set[int]) -> list[str]:
    wide = [max(cell_width(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [_fit(_row(row, wide, right), columns) for row in rows]


def _row(cells: list[str], widths: list[int], right: frozenset[int] | set[int] = frozenset()) -> str:
    padded = []
    for i, (cell, width) in enumerate(zip(cells, widths, strict=False)):
        text = _fit(cell, width)
        padded.append(" " * (width - cell_width(text)) + text if i in right else _pad(text, width))
    return "  " + "  ".join(padded).rstrip()


def _pad(text: str, width: int) -> str:
    return text + " " * (width - cell_width(text))


def _fit(text: str, width: int) -> str:
    """The text, or its beginning and an ellipsis."""
    if cell_width(text) <= width:
        return text
    while text and cell_width(text) > width - 1:
        text = text[:-1]
    return text + "…"
