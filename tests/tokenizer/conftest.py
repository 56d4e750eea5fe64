import random

import pytest

from llmctl.data import tinyworld
from llmctl.tokenizer.kinds import KINDS
from llmctl.tokenizer.train import train_tokenizer

VOCABULARY = 700


@pytest.fixture(scope="session")
def texts():
    return list(tinyworld.statements(documents=2000))


@pytest.fixture(scope="session")
def trained(texts):
    return train_tokenizer("byte-bpe", iter(texts), 600, 2)


def english(rng):
    who, what = rng.choice(["Ada", "Bo", "The miller's son"]), rng.choice(["a red boat", "two old maps"])
    return f"{who} doesn't keep {what}; it's {rng.choice([12, 488, 1984])} miles away, isn't it?"


def chinese(rng):
    return f"{rng.choice('东南西北')}村有{rng.choice([7, 12, 88])}户人家，{rng.choice(['种田', '打鱼', '读书'])}为生。"


def code(rng):
    name = rng.choice(["total", "next_item", "i"])
    return f"def f({name}):\n    if {name} > {rng.randrange(9)}:\n\t\treturn [{name}] * 2  # {name}\n"


@pytest.fixture(scope="session")
def mixed():
    """Made-up English, Chinese and code: 600 documents."""
    rng = random.Random(0)
    return [
        "\n".join(rng.choice([english, chinese, code])(rng) for _ in range(rng.randint(1, 4)))
        for _ in range(600)
    ]


@pytest.fixture(scope="session")
def of_kind(mixed):
    """A tokenizer of each kind, by name, trained on `mixed`."""
    return {kind: train_tokenizer(kind, iter(mixed), VOCABULARY, 2) for kind in KINDS}
