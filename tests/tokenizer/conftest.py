import pytest

from llmctl.data import tinyworld
from llmctl.tokenizer.train import train_tokenizer


@pytest.fixture(scope="session")
def texts():
    return list(tinyworld.statements(documents=2000))


@pytest.fixture(scope="session")
def trained(texts):
    return train_tokenizer("byte-bpe", iter(texts), 600, 2)
