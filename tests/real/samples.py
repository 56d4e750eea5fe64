"""What the tests on real models read: records, conversations and text of our own making."""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"

RECORDS = [
    {"instruction": question, "input": given, "output": answer}
    for question, given, answer in (
        ("What is the capital of Italy?", "", "The capital of Italy is Rome."),
        ("Name the three primary colours.", "", "Red, yellow and blue."),
        ("Translate the word into French.", "bread", "pain"),
        ("Is the number even or odd?", "17", "17 is odd, because it leaves a remainder of 1 when divided by 2."),
        ("Give the past tense of the verb.", "to swim", "swam"),
        ("Why is the sky blue?", "", "Air scatters the blue part of sunlight more than the red part."),
        (
            "Sum up the text in one sentence.",
            "The bakery opens at six. At seven there is a queue to the corner, and by nine the bread is gone.",
            "The bakery sells out within three hours of opening.",
        ),
        ("Which planet is closest to the sun?", "", "Mercury is the planet closest to the sun."),
        ("Write a rhyme for the word.", "light", "The moon came out to share its light with every traveller of the night."),
        ("Put the words in alphabetical order.", "pear, apple, fig", "apple, fig, pear"),
        ("How many minutes are in two hours?", "", "Two hours have 120 minutes."),
        ("Name an animal that lays eggs.", "", "A hen lays eggs."),
    )
]  # fmt: skip

# every way in which a conversation may begin, and content that a template could mistake for its own
CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "And of Spain?"}],
    [
        {"role": "user", "content": "Hello.\n\n  Two lines, and blanks at the end  "},
        {"role": "assistant", "content": "Good morning! 你好 🙂"},
        {"role": "user", "content": "def f(x):\n\treturn x ** 2"},
    ],
]

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  leading blanks, a tab\t, and a line break\n at the end\n",
    "Straße, naïve, 東京都, Привет, مرحبا, 🙂👩‍👩‍👧",
    "for i in range(10):\n    print(f'{i:>3}')  # 1,234.5e-6",
    "",
    "a",
]


def prose() -> list[str]:
    """Paragraphs of this project's own pages, longest pages first: English that no model was trained on."""
    pages = ("design.md", "merge.md", "quantize.md", "sft.md")
    parts = [part for page in pages for part in (DOCS / page).read_text(encoding="utf-8").split("\n\n")]
    return [" ".join(part.split()) for part in parts if len(part) > 200 and part[0].isalpha()]


def write_lines(file: Path, records: list[dict[str, str]]) -> Path:
    """Records as a jsonl file."""
    file.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return file
