"""What is said of how layers mix tokens."""

from __future__ import annotations

from typing import get_args

import pytest

from llmctl.kernels.attention import PATHS
from llmctl.model.paths import OWN, WORDS, mixing_paths, said
from llmctl.recipe.model import Mixer
from tests.model.variants import LAYERS, make

FOUND = {
    "full": "tokens are mixed in 2 layers by causal attention",
    "sliding": "tokens are mixed in 2 layers by attention by blocks of keys",
    "routing": "tokens are mixed in 2 layers by sorted clusters",
    "lsh": "tokens are mixed in 2 layers by sorted buckets",
    "mamba2": "tokens are mixed in 2 layers by a scan in chunks",
}


@pytest.mark.parametrize("kind", FOUND)
def test_it_is_said_which_path_runs(kind):
    assert said(mixing_paths(make(LAYERS[kind]).model, 256)) == FOUND[kind]


def test_several_paths_in_one_model():
    model = make({"pattern": ["full", "dilated"], "sliding_window": 9, "dilation": 20})
    assert said(mixing_paths(model.model, 256)) == (
        "tokens are mixed in 1 layer by causal attention, 1 layer by attention under a dense mask"
    )


def test_every_path_has_its_words():
    assert {*WORDS, "spans"} == set(PATHS) and set(OWN) == set(get_args(Mixer))
