"""`llmctl runs watch`: the metrics of a run while they come."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.cli.options import AsJson
from llmctl.cli.output import can_draw, duration, figure
from llmctl.cli.runs import Folder, RunName, find_run
from llmctl.errors import UserError
from llmctl.manifest import METRICS, read_manifest
from llmctl.reading import LINE_LIMIT, Unreadable, parse_row
from llmctl.runs import status_of

if TYPE_CHECKING:
    from rich.console import RenderableType

EVERY = 0.5  # seconds between two looks
BARS = "▁▂▃▄▅▆▇█"
CURVE = 48  # columns of a curve
LAST = (
    "loss",
    "eval_loss",
    "eval_bits_per_byte",
    "eval_accuracy",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
)


def watch(run: RunName, folder: Folder = None, as_json: AsJson = False) -> None:
    """Show the metrics of RUN while it runs.

    On a terminal the figures and curves are drawn anew as they come; a pipe gets a line for each new line of
    metrics, from the first on. It ends when the run ends, or with Ctrl-C, which leaves the run alone.
    """
    path = find_run(run, folder)
    seen = Watched(path)
    seen.look()
    try:
        if as_json or not can_draw(sys.stdout):
            _write(seen, as_json)
        else:
            _draw(seen)
    except KeyboardInterrupt:
        return
    if not as_json:
        print(f"{path}: {seen.status}" + (f": {seen.error}" if seen.error else ""))


class Watched:
    """What is known of a run so far.

    Attributes:
        rows: of metrics.jsonl; new: those since the look before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.new: list[dict[str, Any]] = []
        self.manifest: dict[str, Any] = {}
        self.status, self.error = "unknown", ""
        self._tail = Tail(path / METRICS)

    def look(self) -> None:
        """Read what is new. Raises UserError if it is no run, or a file of it cannot be read."""
        # the status first: the lines of a run that has ended are all there
        self.manifest = read_manifest(self.path)
        self.status = status_of(self.path, self.manifest)
        self.error = self.manifest.get("error") or ""
        fresh, self.new = self._tail.read()
        if fresh:
            self.rows = []
        self.rows += self.new

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.status != "running"

    @property
    def share(self) -> float | None:
        """How much of the run is done, by its steps or epochs; None if the recipe does not say."""
        fields = (self.manifest.get("recipe") or {}).get("fields", {})
        last = self.rows[-1] if self.rows else {}
        epoch = next((row["epoch"] for row in reversed(self.rows) if "epoch" in row), None)
        for done, whole in (
            (last.get("step"), fields.get("train.max_steps")),
            (epoch, fields.get("train.num_train_epochs")),
        ):
            if done is not None and type(whole) in (int, float) and whole > 0:
                return float(min(1.0, done / whole))
        return None


class Tail:
    """The new lines of a growing file. One that was written anew, as a resumed run does, is read from its beginning."""

    def __init__(self, file: Path) -> None:
        self._file, self._at, self._identity = file, 0, (0, 0)

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """Whether it is another file than before, and the complete new lines that can be read.

        Raises UserError for what is not a regular file.
        """
        try:
            if not self._file.exists():
                return False, []  # not yet
            if not self._file.is_file():
                raise Unreadable("not a regular file")
            about = self._file.stat()
            fresh = (about.st_dev, about.st_ino) != self._identity or about.st_size < self._at
            if fresh:
                self._at, self._identity = 0, (about.st_dev, about.st_ino)
            return fresh, list(self._lines())
        except (Unreadable, OSError) as error:
            raise UserError(f"{self._file}: {error}", "`llmctl runs verify` looks at the run") from None

    def _lines(self) -> Iterator[dict[str, Any]]:
        with open(self._file, "rb") as file:
            file.seek(self._at)
            while (line := file.readline(LINE_LIMIT)).endswith(b"\n"):
                self._at += len(line)
                try:
                    yield parse_row(line, numbers=True)
                except Unreadable:
                    continue


def _write(seen: Watched, as_json: bool) -> None:
    """One line for each new row."""
    while True:
        for row in seen.new:
            if as_json:
                print(json.dumps(row), flush=True)
            else:
                print("  ".join(f"{name} {figure(value)}" for name, value in row.items()), flush=True)
        if seen.ended:
            return
        time.sleep(EVERY)
        seen.look()


def _draw(seen: Watched) -> None:
    from rich.console import Console
    from rich.live import Live

    with Live(_page(seen), console=Console(), refresh_per_second=4, transient=False) as live:
        while not seen.ended:
            time.sleep(EVERY)
            seen.look()
            live.update(_page(seen))


def _page(seen: Watched) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    last = seen.rows[-1]["step"] if seen.rows else 0
    table.add_row(Text(str(seen.path)), Text(f"{seen.manifest.get('stage')}, {seen.status}"), Text(""))
    share = seen.share
    table.add_row(Text("step"), Text(f"{last:,}" + (f"  {share:.0%}" if share else "")), Text(_left(seen)))
    for name in LAST:
        values = [row[name] for row in seen.rows if name in row]
        if values:
            table.add_row(Text(name), Text(figure(values[-1])), Text(curve(values)))
    return table


def _left(seen: Watched) -> str:
    """How long it will take at the speed so far, by the tokens the run has counted."""
    share, rows = seen.share, [row for row in seen.rows if row.get("tokens_per_second")]
    if seen.ended or not share or not rows or "tokens" not in rows[-1]:
        return ""
    spent = rows[-1]["tokens"] / rows[-1]["tokens_per_second"]
    return f"about {duration(spent * (1 - share) / share)} left"


def curve(values: list[float], columns: int = CURVE) -> str:
    """A line of bars for the values from first to last, each the mean of its share of them; blank where not finite."""
    count = min(columns, len(values))
    means = []
    for number in range(count):
        part = values[number * len(values) // count : (number + 1) * len(values) // count]
        means.append(sum(part) / len(part))
    finite = [value for value in means if abs(value) < float("inf")]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((v - low) * scale)] if abs(v) < float("inf") else " " for v in means)
