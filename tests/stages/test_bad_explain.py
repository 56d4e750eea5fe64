"""`llmctl explain` told what it cannot do, through the real command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.program import Program
from tests.stages.bad_input import WEIGHTS, Bad, cases, check, file, folder, told

EXAMPLE = 'llmctl explain MODEL "Once upon a time"'

WORDS = {
    "no model": Bad("explain", "missing argument MODEL", f"for example {EXAMPLE}", code=2),
    "no text": Bad(
        "explain base", "missing argument TEXT", f"for example {EXAMPLE}; --size needs none", code=2
    ),
    "text without quotes": Bad(
        "explain base Once upon",
        "unexpected argument: upon",
        "put quotes around a TEXT of several words",
        code=2,
    ),
    "json and a page": Bad(
        "explain base Ada --json --html x.html",
        "--html has no use here: --json prints everything",
        "leave out --html",
        code=2,
    ),
    "json of a layer": Bad(
        "explain base Ada --json --layer 1",
        "--layer has no use here: --json prints everything",
        "leave out --layer",
        code=2,
    ),
    "a full page": Bad(
        "explain base Ada --full --html x.html",
        "--full has no use here: a page shows every layer",
        "leave out --full",
        code=2,
    ),
    "tokens without size": Bad(
        "explain base Ada --tokens 5",
        "--tokens has no use here: it goes with --size",
        "leave out --tokens",
        code=2,
    ),
    "a recipe without size": Bad(
        "explain --recipe pretrain-5m",
        "--recipe has no use here: it goes with --size",
        "leave out --recipe",
        code=2,
    ),
    "a page of sizes": Bad(
        "explain base --size --html x.html",
        "--html has no use here: --size prints a table",
        "leave out --html",
        code=2,
    ),
    "no such layer": Bad(
        "explain base Ada --layer 2", "--layer is 2, but the layers are 0 to 1", "name one of these"
    ),
    "no such folder": Bad(
        "explain no/such/folder Ada",
        "no/such/folder: no such folder",
        "name a folder with a model, or a hub id",
    ),
    "a recipe has no weights": Bad(
        "explain x.yaml Ada",
        "x.yaml: is a file, but a model is a folder",
        "name the folder it lies in",
        file("x.yaml", "stage: pretrain\n"),
    ),
    "a shipped recipe has no weights": Bad(
        "explain pretrain-5m Ada",
        "pretrain-5m: a recipe, which has no weights",
        "train it first; --size says what it will cost",
    ),
    "a page without a name": Bad("explain base Ada --html=", "--html is empty", "name a file", code=2),
    "a page with too long a name": Bad(
        f"explain base Ada --html {'x' * 300}",
        f"{'x' * 40}…: no file can have so long a name",
        "name another",
    ),
    "a model with too long a name": Bad(
        f"explain {'x' * 300} Ada", f"{'x' * 40}…: no file can have so long a name", "name another"
    ),
    "no device": Bad(
        "explain base Ada --device tpu",
        "--device: `tpu` is not one of `auto`, `cpu`, `cuda`, `mps`",
        "leave it out",
    ),
    "a page that is a folder": Bad(
        "explain base Ada --html x", "x: is a folder", "name a file in it", folder("x")
    ),
    "a page under a file": Bad(
        "explain base Ada --html data.jsonl/x.html",
        "data.jsonl/x.html: a file stands where a folder belongs",
        "name another file with --html",
    ),
}

SIZES = {
    "nothing named": Bad(
        "explain --size", "missing argument MODEL", "name a model or a recipe, or --recipe FILE", code=2
    ),
    "two names": Bad(
        "explain base tok --size",
        "unexpected argument: tok",
        "one MODEL at most; repeat --data for each file, or quote a pattern: --data '*.txt'",
        code=2,
    ),
    "a model and a recipe": Bad(
        "explain base --size --recipe pretrain-5m",
        "MODEL and --recipe both name a model",
        "leave out one of them",
        code=2,
    ),
    "no vocabulary": Bad(
        "explain pretrain-5m --size",
        "pretrain-5m: model.vocab_size is unset, and no tokenizer says how many entries there are",
        "add model.vocab_size=8192, or tokenizer=DIR",
    ),
    "a recipe of another stage": Bad(
        "explain --size --recipe x.yaml",
        "x.yaml: this recipe is for stage `sft`, not `pretrain`",
        "run `llmctl sft`",
        file("x.yaml", "stage: sft\n"),
    ),
    "a field of a model that has its sizes": Bad(
        "explain base --size model.hidden_size=8",
        "model.hidden_size=8: sets a field of a recipe, but base is a model that has its sizes",
        "leave it out, or name a recipe",
    ),
    "tokens beyond the context": Bad(
        "explain base --size --tokens 65", "--tokens is 65, but the model's context is 64", "lower --tokens"
    ),
    "no tokens": Bad("explain base --size --tokens 0", "--tokens is 0", "name 1 or more", code=2),
}


@cases(WORDS)
def test_words(bad: Bad, stocked: Path, llmctl: Program) -> None:
    check(bad, stocked, llmctl)


@cases(SIZES)
def test_size(bad: Bad, stocked: Path, llmctl: Program) -> None:
    check(bad, stocked, llmctl)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.1.mlp.up_proj.weight", "layer 1, widen"),
        ("model.norm.weight", "end, norm"),
    ],
)
@pytest.mark.parametrize("flag", ["--json", "--full", "--html=x.html"])
def test_numbers_that_are_not_finite(
    name: str, place: str, flag: str, stocked: Path, llmctl: Program
) -> None:
    weights = load_file(stocked / "base" / WEIGHTS)
    weights[name][:] = float("nan")
    save_file(weights, stocked / "base" / WEIGHTS, metadata={"format": "pt"})
    error = f"base: {place}: gives numbers that are not finite"
    hint = "the weights are damaged, or training has diverged; an earlier checkpoint may be whole"
    told(llmctl("explain", "base", "Ada", flag), Bad("", error, hint))
    assert not (stocked / "x.html").exists()


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("", Bad("", "the text is empty", f"give some: {EXAMPLE}")),
        (
            "z" * 80,
            Bad("", "the text has 81 tokens, but the model's context is 64", "shorten the text"),
        ),
        ("a\udcff", Bad("", "the text is not UTF-8 (character 2)", "convert it to UTF-8")),
    ],
    ids=["empty", "long", "bytes"],
)
def test_text(text: str, bad: Bad, stocked: Path, llmctl: Program) -> None:
    told(llmctl("explain", "base", text), bad)
