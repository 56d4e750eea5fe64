"""Claim: making checked, masked rows of conversations runs at 90 % or more of the speed of the tokenizer alone.

    rows      `Encoder.rows`: render the template, tokenize, find the answers, check every row
    alone     `encode_batch_fast` on the same rendered texts, all at once, and nothing else
    ids       the same, and the ids taken out as lists, without which nothing can be done with them
    batches   the ids, as many texts at a time as `rows` takes, which spares the memory of a whole data set

Examples are read before the clock starts. Prints MB of rendered text a second by wall time and by CPU time of all
threads, and the ratios within the rounds; on a machine with other work only the CPU time means something:

    python benchmarks/tokenize_rows.py alpaca.json --tokenizer runs/tok
    TOKENIZERS_PARALLELISM=false python benchmarks/tokenize_rows.py alpaca.json --tokenizer runs/tok
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from timing import line, options, ratio, report, summary

from llmctl.data.document import Account
from llmctl.data.formats import Example, examples
from llmctl.data.shapes import Conversation
from llmctl.data.statistics import BATCH
from llmctl.stages.encode import Encoder
from llmctl.tokenizer.choose import choose_template
from llmctl.tokenizer.load import load_tokenizer

MB = 10**6
Sides = dict[str, Callable[[], object]]


def read(path: str, most: int) -> list[Example]:
    """Up to `most` conversations of a file."""
    found = []
    for example in examples([path], "text", Account()):
        if isinstance(example.shape, Conversation):
            found.append(example)
        if len(found) == most:
            break
    return found


def sides_of(found: list[Example], where: str, template: str) -> tuple[Sides, int]:
    """What is timed, and the bytes of rendered text."""
    tokenizer = load_tokenizer(where)
    choose_template(tokenizer, template)
    renderer, backend = Encoder(tokenizer).renderer, tokenizer.backend_tokenizer
    texts = [renderer.render(one.shape.messages, one.shape.tools).text for one in found]
    sides: Sides = {
        "rows": lambda: list(Encoder(tokenizer).rows(found)),
        "alone": lambda: backend.encode_batch_fast(texts, add_special_tokens=False),
        "ids": lambda: [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)],
        "batches": lambda: [
            one.ids
            for at in range(0, len(texts), BATCH)
            for one in backend.encode_batch_fast(texts[at : at + BATCH], add_special_tokens=False)
        ],
    }
    same = [row.ids for row in Encoder(tokenizer).rows(found)] == sides["ids"]()
    print(
        f"{len(texts):,} rows, {sum(map(len, texts)):,} characters; ids are {'the same' if same else 'OTHERS'}"
    )
    return sides, sum(len(text.encode()) for text in texts)


def speeds(sides: Sides, size: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """MB/s of each side, round by round, by wall and by CPU time."""
    found: dict[str, dict[str, list[float]]] = {
        clock: {name: [] for name in sides} for clock in ("wall", "cpu")
    }
    for number in range(rounds):
        for name, work in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            kept = work()
            found["wall"][name].append(size / MB / (time.perf_counter() - wall))
            found["cpu"][name].append(size / MB / (time.process_time() - cpu))
            del kept  # freeing it belongs to no side
        print(
            f"round {number + 1}: " + "  ".join(f"{name} {found['wall'][name][-1]:.2f}" for name in sides),
            flush=True,
        )
    return found


def main() -> None:
    parser = options(__doc__, rounds=9)
    parser.add_argument("data", help="a file of conversations, such as an Alpaca json")
    parser.add_argument("--tokenizer", required=True, metavar="DIR")
    parser.add_argument("--template", default="auto")
    parser.add_argument("--most", type=int, default=20_000, help="rows (default 20000)")
    given = parser.parse_args()
    sides, size = sides_of(read(given.data, given.most), given.tokenizer, given.template)
    found = speeds(sides, size, given.rounds)
    result: dict[str, object] = {"parallel": os.environ.get("TOKENIZERS_PARALLELISM", "true")}
    for clock, by_side in found.items():
        for name, values in by_side.items():
            print(line(f"{clock}: {name}", summary(values), unit="MB/s"))
        ratios = {f"rows/{name}": ratio(by_side["rows"], by_side[name]) for name in sides if name != "rows"}
        for name, one in ratios.items():
            print(line(f"{clock}: {name}", one))
        result[clock] = {"MB_per_s": {name: summary(values) for name, values in by_side.items()}, **ratios}
    report({"rounds": given.rounds, "template": given.template, **result})


if __name__ == "__main__":
    main()
