"""Whatever files and models hold, nothing that a terminal obeys reaches it."""

from __future__ import annotations

import ast
import io
import json
import sys
from pathlib import Path

import pytest

from llmctl.cli import output, stages
from llmctl.cli.answers import JsonAnswer
from llmctl.cli.progress import PlainTalk
from llmctl.cli.quantize import print_receipt
from llmctl.cli.tune import show_answers
from tests.program import Program

PACKAGE = Path(output.__file__).parent
# a colour, a title, C1's one-character CSI, a bell, DEL, a reversal of order, an isolate, a byte that is no text
HOSTILE = "a\x1b[31mb\x1b]0;t\x07c\x9b2Jd\x7fe\u202ef\u2066g\udcffh"
SHOWN = "a\\x1b[31mb\\x1b]0;t\\x07c\\x9b2Jd\\x7fe\\u202ef\\u2066g\\udcffh"


def assert_harmless(*texts: str) -> None:
    for text in texts:
        for character in text:
            assert character.isprintable() or character in "\n\t", f"{character!r} in {text!r}"


def test_codes_and_what_needs_none() -> None:
    assert output.harmless(HOSTILE) == SHOWN
    plain = "tab\there\nnext  \u00a0 你好 é \u200d🙂"
    assert output.harmless(plain) == plain
    assert output.one_line("a\tb\nc") == "a\\tb\\nc"
    assert output.harmless("a\r\nb") == "a\nb"


def test_nothing_in_cli_prints_but_through_output() -> None:
    """`print` shows text as it is; `echo` is what `cli/` uses."""
    for file in PACKAGE.glob("*.py"):
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        raw = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert not raw or file.name == "output.py", (
            f"{file.name}:{raw[0]}: print() shows text raw; use echo()"
        )


def test_tables_listings_and_answers(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = HOSTILE.replace("\udcff", "")  # a captured stream takes no half characters
    shown = SHOWN.replace("\\udcff", "")
    output.print_table(("x", hostile), [("1", f"{hostile}\n{hostile}")])
    output.print_listing({hostile: hostile, "list": [hostile, {"a": hostile}], "in": {hostile: 1}})
    show_answers([{"prompt": hostile, "a": hostile, "b": f"{hostile}!"}])
    names = ("size_bytes", "perplexity", "tokens_per_second")
    found = {name: 1.0 for base in names for name in (base, f"{base}_before")}
    print_receipt(hostile, found | {"stop_rate_a": 1.0, "stop_rate_b": 1.0, "kept": [hostile]})
    text = capsys.readouterr().out
    assert_harmless(text)
    assert text.count(shown) >= 9
    assert text.splitlines()[1] == f"1  {shown}\\n{shown}", "a cell stays on its line"


def test_json_is_exact_and_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    value = {HOSTILE: [HOSTILE, "你好 🙂", "\U000e0041"]}
    output.print_json(value)
    text = capsys.readouterr().out
    assert_harmless(text)
    assert json.loads(text) == value and "你好 🙂" in text


def test_talk_and_bars() -> None:
    stream, seconds = io.StringIO(), iter(range(0, 1000, 10))
    talk = PlainTalk(stream, lambda: float(next(seconds)))
    talk.say(HOSTILE)
    with talk.bar(HOSTILE, 10, HOSTILE) as bar:
        bar.advance(1, **{HOSTILE: HOSTILE})
    assert_harmless(stream.getvalue())
    assert stream.getvalue().count(SHOWN) > 4


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_generated_text_is_exact_in_a_pipe_only(
    stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    to = stream()
    monkeypatch.setattr(sys, "stdout", to)
    stages._write(f"{HOSTILE}\n")
    assert to.getvalue() == f"{SHOWN if to.isatty() else HOSTILE}\n"


def test_a_run_whose_files_are_hostile(
    llmctl: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "n\x1b[2Jm\u202e"
    run = Path("runs") / name
    run.mkdir(parents=True)
    bad = HOSTILE.replace("\udcff", "")
    manifest = {
        "format": 1, "stage": bad, "status": bad, "created": bad, "updated": bad, "command": bad, "error": bad,
        "metrics": {"loss": bad, bad: bad}, "outputs": {bad: bad}, "versions": {bad: bad}, "hash": bad,
        "parents": [{"role": bad, "path": bad, "hash": bad}, {"role": bad, "path": bad, "hash": None}],
        "data": {bad: {"sources": [bad]}},
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps(manifest))
    recipe = Path(f"{name}.yaml")
    recipe.write_text(f'stage: sft\n"{bad.encode("unicode_escape").decode()}": 1\n')
    for words in (
        ["runs", "list"], ["runs", "show", str(run)], ["runs", "lineage", str(run)], ["runs", "show", bad],
        ["recipe", "check", str(recipe)], ["sft", bad, "--data", bad], [bad], ["eval", f"--{bad}"],
        ["recipe", "show", str(recipe)], ["generate", str(run), "hi"],
    ):  # fmt: skip
        outcome = llmctl(*words)
        assert outcome.out or outcome.err, words
        assert_harmless(outcome.out, outcome.err)
    assert "\\x1b[2J" in llmctl("runs", "list").out


def test_an_exchange_in_json_is_harmless() -> None:
    from dataclasses import make_dataclass

    to = io.StringIO()
    JsonAnswer(to).end(make_dataclass("Said", ["text"])(HOSTILE))
    assert_harmless(to.getvalue())
    assert json.loads(to.getvalue()) == {"text": HOSTILE}
