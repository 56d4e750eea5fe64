"""What a command line does to a recipe, what it prints, and how a wrong one is told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llmctl.cli.main import COMMANDS, GROUPS
from llmctl.cli.options import FLAGS
from llmctl.errors import CheckFailed, Interrupted, UserError
from llmctl.recipe.schema import RECIPES
from tests.cli.fake_stages import Calls
from tests.program import Program

# --- wrong command lines ----------------------------------------------------------------------------

WRONG: dict[str, tuple[int, str, str]] = {
    "--versoin": (2, "no such option: --versoin", "did you mean `--version`?"),
    "prtrain": (2, "no such command: prtrain", "did you mean `pretrain`?"),
    "xyzzy": (2, "no such command: xyzzy", "see `llmctl --help`"),
    "runs lst": (2, "no such command: lst", "did you mean `list`?"),
    "pretrain --max-step 3": (2, "no such option: --max-step", "did you mean `--max-steps`?"),
    "pretrain --zzz": (2, "no such option: --zzz", "see `llmctl pretrain --help`"),
    "pretrain --max-steps": (2, "--max-steps needs a value", "see `llmctl pretrain --help`"),
    "pretrain --max-steps many": (
        2,
        "--max-steps: `many` is not a whole number",
        "see `llmctl pretrain --help`",
    ),
    "pretrain --max-steps=1.5": (
        2,
        "--max-steps: `1.5` is not a whole number",
        "see `llmctl pretrain --help`",
    ),
    "generate m p --top-p x": (2, "--top-p: `x` is not a number", "see `llmctl generate --help`"),
    "pretrain --resume=yes": (2, "--resume takes no value", "see `llmctl pretrain --help`"),
    "generate": (2, "missing argument MODEL", "see `llmctl generate --help`"),
    "generate m": (2, "missing argument PROMPT", "see `llmctl generate --help`"),
    "runs show": (2, "missing argument RUN", "see `llmctl runs show --help`"),
    "recipe schema x": (2, "unexpected argument: x", "see `llmctl recipe schema --help`"),
    "tokenizer eval t": (2, "missing option --data", "see `llmctl tokenizer eval --help`"),
    "generate m two words": (2, "unexpected argument: words", "put quotes around a PROMPT of several words"),
    "pretrain a b": (
        2,
        "unexpected argument: b",
        "one MODEL at most; repeat --data for each file, or quote a pattern: --data '*.txt'",
    ),
    "pretrain --resume": (
        2,
        "--resume does not say which run to go on with",
        "name its folder with --out DIR",
    ),
    "eval --data x": (2, "missing argument MODEL", "name a run folder, a Hugging Face folder or a hub id"),
    "pretrain --device gpu": (
        1,
        "command line: device: `gpu` is not one of `auto`, `cpu`, `cuda`, `mps`",
        "did you mean `cpu`?",
    ),
    "pretrain --max-steps 0": (
        1,
        "command line: train.max_steps: should be greater than or equal to 1, not 0",
        "`llmctl recipe show pretrain` explains train.max_steps",
    ),
    "pretrain train.learning_rat=1": (
        1,
        "command line: train.learning_rat: unknown key",
        "did you mean `learning_rate`?",
    ),
    "pretrain --recipe nope": (1, "nope: no such recipe", "see `llmctl recipe list`"),
    "pretrain --recipe pretrain-5": (1, "pretrain-5: no such recipe", "did you mean `pretrain-5m`?"),
    "recipe show pretrian": (1, "pretrian: no such recipe or stage", "did you mean `pretrain`?"),
    "runs show nothing": (1, "nothing: no such run", "see `llmctl runs list`"),
    "runs list --dir nothing": (1, "nothing: no such folder", "name the folder that holds the runs"),
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_command_lines(line: str, llmctl_: Program, calls: Calls) -> None:
    code, message, hint = WRONG[line]
    ended = llmctl_(*line.split())
    assert (ended.code, ended.out) == (code, "")
    assert ended.err == f"error: {message}\nhint: {hint}\n"
    assert calls.recipe is None, "no stage may run"


def test_prompt_that_is_not_utf8(llmctl_: Program, calls: Calls) -> None:
    ended = llmctl_("generate", "m", os.fsdecode(b"ab\xff"))
    assert ended.code == 1
    assert ended.err == "error: the prompt is not UTF-8 text (character 3)\nhint: convert it to UTF-8\n"


# --- flags and words --------------------------------------------------------------------------------


def test_every_flag_names_a_field_of_its_stage() -> None:
    for stage, flags in FLAGS.items():
        kind = RECIPES["pretrain" if stage == "quickstart" else stage]
        for dotted in flags.values():
            section: object = kind()
            for name in dotted.split("."):
                assert name in type(section).model_fields, f"{stage}: {dotted}"
                section = getattr(section, name)


def test_unset_flags_leave_the_recipe_alone(llmctl_: Program, calls: Calls) -> None:
    for line, stage in (("pretrain", "pretrain"), ("tokenizer train", "tokenizer")):
        assert llmctl_(*line.split()).code == 0
        assert calls.recipe == RECIPES[stage]()


FIELDS = {
    "pretrain m --data a --data b --max-steps 5 train.learning_rate=3e-4 --seed 7 --dtype float32": {
        "base": "m",
        "data": {"train": ["a", "b"]},
        "train": {"max_steps": 5, "learning_rate": 3e-4, "seed": 7, "dtype": "float32"},
    },
    "pretrain --eval-data v --tokenizer t --out o --device cpu": {
        "data": {"eval": ["v"]},
        "tokenizer": "t",
        "out": "o",
        "device": "cpu",
    },
    # a word wins over a flag, wherever it stands
    "pretrain train.seed=1 --seed 2": {"train": {"seed": 1}},
    "tokenizer train a.txt min_frequency=3 b.txt --vocab-size 500 --kind byte-bpe": {
        "data": {"train": ["a.txt", "b.txt"]},
        "min_frequency": 3,
        "vocab_size": 500,
    },
    "generate m x=1 --temperature 0 --top-k 3 --top-p 0.5 --ignore-eos --chat generate.seed=4": {
        "base": "m",
        "generate": {
            "temperature": 0.0,
            "top_k": 3,
            "top_p": 0.5,
            "ignore_eos": True,
            "chat": True,
            "seed": 4,
        },
    },
    "eval m --data a eval.max_rows=3": {"base": "m", "eval": {"data": ["a"], "max_rows": 3}},
}


@pytest.mark.parametrize("line", FIELDS)
def test_words_and_flags_reach_the_recipe(line: str, llmctl_: Program, calls: Calls) -> None:
    assert llmctl_(*line.split()).code == 0
    expected = type(calls.recipe).model_validate(FIELDS[line])
    assert calls.recipe == expected


def test_a_prompt_may_look_like_an_override(llmctl_: Program, calls: Calls) -> None:
    assert llmctl_("generate", "m", "x=1").code == 0
    assert calls.words == {"prompt": "x=1"}


def test_resume_takes_the_saved_recipe(llmctl_: Program, calls: Calls) -> None:
    Path("r").mkdir()
    Path("r/recipe.yaml").write_text("stage: pretrain\nout: r\ntrain: {seed: 9}\n")
    for words in (("--out", "r"), ("out=r",)):
        assert llmctl_("pretrain", "--resume", *words).code == 0
        assert (calls.recipe.out, calls.recipe.train.seed) == ("r", 9)
        assert calls.words == {"resume": True, "resume_with": False, "dry_run": False}
    # a recipe that is named wins, and a run that has none yet starts from the command line
    Path("other.yaml").write_text("train: {seed: 3}\n")
    llmctl_("pretrain", "--resume", "--out", "r", "--recipe", "other.yaml")
    assert calls.recipe.train.seed == 3
    llmctl_("pretrain", "--resume", "--out", "new")
    assert calls.recipe.train.seed == 0


# --- what is printed --------------------------------------------------------------------------------


def test_results_are_data_on_stdout(llmctl_: Program, calls: Calls) -> None:
    shown = "run  runs/x\n  steps  12,345\n  loss   2.5 (nats per token, in training)\n  lost   nan\n"
    assert llmctl_("pretrain").out == shown
    assert llmctl_("pretrain", "--dry-run").out == "  loss   2.5\n  steps  12,345\n  lost   nan\n"
    assert llmctl_("eval", "m").out == "loss           1\nbits_per_byte  0.75\ntokens         20,000\n"
    assert llmctl_("tokenizer", "train", "x").out == "run  runs/tok\n  vocabulary  500\n"


def test_generate_streams_to_stdout_and_talks_on_stderr(llmctl_: Program, calls: Calls) -> None:
    ended = llmctl_("generate", "m", "p")
    assert ended.out == "one two\n"
    assert ended.err == "2 tokens, 10.0 tokens/s\n"


JSON = {
    # JSON has no NaN: a lost loss is null
    "pretrain --json": {"run": "runs/x", "metrics": {"loss": 2.5, "steps": 12345, "lost": None}},
    "pretrain --dry-run --json": {"loss": 2.5, "steps": 12345, "lost": None},
    "tokenizer train x --json": {"run": "runs/tok", "metrics": {"vocab_size": 500}},
    "generate m p --json": {"text": "one two", "tokens": [1, 2], "tokens_per_second": 10.0},
    "eval m --json": {"loss": 1.0, "bits_per_byte": 0.75, "tokens": 20000},
    "tokenizer eval t --data d --json": [{"tokenizer": "t", "bytes_per_token": 4.25, "field": "text"}],
    "tokenizer show t x --json": [
        {"id": 7, "token": "Ġa\n", "bytes": "20 61"},
        {"id": 1234, "token": "ä", "bytes": "e4"},
    ],
    "runs list --json": [],
}


@pytest.mark.parametrize("line", JSON)
def test_json_is_one_document(line: str, llmctl_: Program, calls: Calls) -> None:
    assert json.loads(llmctl_(*line.split()).out) == JSON[line]


def test_tokenizer_tables(llmctl_: Program, calls: Calls) -> None:
    shown = llmctl_("tokenizer", "show", "t", "x").out.splitlines()
    assert shown == [
        "id      token  bytes  text",
        '     7  Ġa\\n   20 61  " a"',
        '  1234  ä      e4     "\\xe4"',
    ]
    compared = llmctl_("tokenizer", "eval", "one", "two", "--data", "d", "--text-field", "body").out
    assert compared.splitlines() == [
        "                 one   two",
        "bytes per token  4.25  4.25",
        "field            body  body",
    ]


def test_help_names_every_command_in_order(llmctl_: Program) -> None:
    ended = llmctl_("--help")
    lines = ended.out.partition("Commands:")[2].splitlines()
    assert [line.split()[0] for line in lines if line.strip()] == list(COMMANDS)
    assert ended.code == 0
    assert llmctl_().out == ended.out
    for group, (_, inside) in GROUPS.items():
        text = llmctl_(group).out
        assert all(f"\n  {name} " in text for name in inside)
        assert llmctl_(group, "-h").out == text


@pytest.mark.parametrize(
    "words",
    [[name] for name in COMMANDS] + [[g, name] for g, (_, inside) in GROUPS.items() for name in inside],
    ids=" ".join,
)
def test_help_fits_a_terminal_and_is_not_cut(words: list[str], llmctl_: Program) -> None:
    ended = llmctl_(*words, "--help")
    assert ended.code == 0
    assert ended.out.startswith(f"Usage: llmctl {' '.join(words)} ")
    assert max(map(len, ended.out.splitlines())) <= 80
    assert "..." not in ended.out.partition("Commands:")[2], "a short help was cut"


def test_version(llmctl_: Program) -> None:
    from llmctl import __version__

    assert llmctl_("--version").out == f"llmctl {__version__}\n"


# --- the boundary -----------------------------------------------------------------------------------

ENDS: list[tuple[BaseException, int, str]] = [
    (UserError("x.yaml: wrong", "mend it"), 1, "error: x.yaml: wrong\nhint: mend it\n"),
    (UserError("no hint"), 1, "error: no hint\n"),
    (CheckFailed("the loss is not a number"), 3, "error: the loss is not a number\n"),
    (
        Interrupted("stopped at step 5", "add --resume"),
        130,
        "stopped at step 5\nhint: add --resume\n",
    ),
    (KeyboardInterrupt(), 130, "interrupted\n"),
    # one line stays one line, and a terminal's control codes do not pass
    (UserError("a\nb\x1b[31m\udcff"), 1, "error: a b\\x1b[31m\\udcff\n"),
    (
        ValueError("boom"),
        1,
        "internal error: ValueError: boom: this is a bug in llmctl\n"
        "hint: run it again with LLMCTL_DEBUG=1 to see the traceback, and report that\n",
    ),
]


@pytest.mark.parametrize(("error", "code", "text"), ENDS, ids=lambda x: type(x).__name__)
def test_how_errors_are_told(
    error: BaseException, code: int, text: str, llmctl_: Program, calls: Calls
) -> None:
    calls.error = error
    ended = llmctl_("pretrain")
    assert (ended.code, ended.out, ended.err) == (code, "", text)


def test_debug_shows_the_traceback(llmctl_: Program, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMCTL_DEBUG", "1")
    for error in (UserError("wrong"), ValueError("boom")):
        calls.error = error
        told = llmctl_("pretrain").err
        assert told.startswith("Traceback (most recent call last)")
        assert "in _note" in told
    assert "Traceback" in llmctl_("prtrain").err
