"""Real models, made once; a test that asks for one is skipped where its package cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.real.models import Unavailable, real_model


def _or_skip(name: str) -> Path:
    try:
        return real_model(name)
    except Unavailable as error:
        pytest.skip(f"real models: {error}")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, in bfloat16."""
    return _or_skip("smollm2")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, in float32."""
    return _or_skip("minilm")
