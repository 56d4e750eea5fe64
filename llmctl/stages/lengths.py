"""How long the records of a data set are in tokens, before anything is cut."""

from __future__ import annotations

from typing import Any

from llmctl.data.formats import Example
from llmctl.data.shapes import Labelled, Preference
from llmctl.data.statistics import Spread
from llmctl.stages.encode import Encoder
from llmctl.stages.labelled import encoded_labelled
from llmctl.stages.pairs import encoded_pairs


class Lengths:
    """Lengths of rows in tokens.

    Args:
        context: tokens of the longest row that fits the model.
    """

    def __init__(self, encoder: Encoder, context: int) -> None:
        self.encoder, self.context = encoder, context
        self.spreads: dict[str, Spread] = {}
        self.trained, self.longer, self.all = 0, 0, 0

    def add(self, batch: list[Example]) -> None:
        """Encode some examples and count them."""
        pairs = [example for example in batch if isinstance(example.shape, Preference)]
        labelled = [example for example in batch if isinstance(example.shape, Labelled)]
        others = [example for example in batch if not isinstance(example.shape, (Preference, Labelled))]
        for pair in encoded_pairs(self.encoder, pairs):
            lengths = {"chosen": len(pair.chosen_ids), "rejected": len(pair.rejected_ids)}
            self._count(len(pair.prompt_ids), lengths, pair.longest)
        for pair in encoded_labelled(self.encoder, labelled):
            self._count(len(pair.prompt_ids), {"answer": len(pair.chosen_ids)}, pair.longest)
        for row in self.encoder.rows(others):
            # the first token of a row is predicted by nothing
            trained = sum(end - max(start, 1) for start, end in row.spans)
            self._count(len(row.ids) - trained, {"answer": trained}, len(row.ids), row.is_text)

    def _count(self, prompt: int, answers: dict[str, int], longest: int, is_text: bool = False) -> None:
        parts = {} if is_text else {"prompt": prompt, **answers}
        for name, length in {**parts, "row": longest}.items():
            self.spreads.setdefault(name, Spread()).add(length)
        self.trained += sum(answers.values())
        self.all += prompt + sum(answers.values())
        self.longer += longest > self.context

    def report(self, size: int) -> dict[str, Any]:
        """Spreads of prompt, answers and rows; `size` are the bytes of all text."""
        lengths = {name: spread.summary() for name, spread in self.spreads.items()}
        return {
            "lengths": lengths,
            "trained": self.trained,
            "context": self.context,
            "longer_than_context": self.longer,
            "tokens_per_byte": self.all / size if size else None,
        }
