"""Every hint that names a command, a flag or a recipe field names one that exists where it is printed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from llmctl.cli.main import app
from llmctl.cli.options import FLAGS
from llmctl.errors import UserError, named_in
from llmctl.recipe.columns import ROLES
from llmctl.recipe.load import dotted_fields
from llmctl.recipe.schema import RECIPES
from tests.program import Program

PACKAGE = Path(__file__).resolve().parent.parent / "llmctl"
ERRORS = {"UserError", "UsageError", "CheckFailed", "Interrupted", "Bad", "Mistake", "TooLittle"}
FIELDS = {stage: set(dotted_fields(kind)) for stage, kind in RECIPES.items()}
SECTIONS = {field.partition(".")[0] for fields in FIELDS.values() for field in fields if "." in field}
OF_MODULE = {"evaluate": "eval"} | {stage: stage for stage in RECIPES}
# fields of the stage that made what this one was given
ELSEWHERE = {"merge": {"train.learning_rate"}}


def hints() -> Iterator[tuple[Path, int, str]]:
    """(file, line, text) of each hint in the source; what is filled in is `{}`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for call in ast.walk(tree):
            name = getattr(getattr(call, "func", None), "id", None)
            if isinstance(call, ast.Call) and name in ERRORS and len(call.args) > 1:
                yield from ((path, call.lineno, text) for text in texts(call.args[1], named))


def texts(node: ast.expr, named: dict[str, ast.expr]) -> Iterator[str]:
    """The texts an expression may be; `named` are the constants of its module."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Name) and node.id in named:
        yield from texts(named[node.id], {})
    else:
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.expr):
                yield from texts(inner, named)


def commands(command: object, name: str = "") -> Iterator[tuple[str, set[str]]]:
    """(words, flags) of every command."""
    yield name, {option for param in command.params for option in param.opts}
    for inner, below in getattr(command, "commands", {}).items():
        yield from commands(below, f"{name} {inner}".strip())


COMMANDS = dict(commands(typer.main.get_command(app)))
HINTS = list(hints())


def test_there_are_hints_to_follow() -> None:
    assert len(HINTS) > 150
    assert sum("--" in text for _, _, text in HINTS) > 30
    assert sum("`llmctl " in text for _, _, text in HINTS) > 20


def test_every_command_in_a_hint_exists() -> None:
    for path, line, text in HINTS:
        for words in re.findall(r"`llmctl ([^`]*)`", text):
            named = re.match(r"(?:[a-z]+ ?)*", words.replace("{}", " ").partition(" -")[0])
            assert named is not None
            if "{}" in words.split()[0]:
                continue
            found = [name for name in COMMANDS if name and f"{words} ".startswith(f"{name} ")]
            assert found, f"{path}:{line}: llmctl {words}"
            assert max(found, key=len) not in ("tokenizer", "data", "runs", "recipe"), (
                f"{path}:{line}: a group"
            )
            for option in re.findall(r"(?<!\S)--[a-z-]+", words):
                assert option in COMMANDS[max(found, key=len)], f"{path}:{line}: {words}"


def test_every_flag_in_a_hint_exists() -> None:
    everywhere = set().union(*COMMANDS.values())
    for path, line, text in HINTS:
        stage = OF_MODULE.get(path.stem) if path.parent.name == "stages" else None
        outside = re.sub(r"`[^`]*`", "", text)
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", outside):
            assert option in everywhere, f"{path}:{line}: {option}"
            own = COMMANDS["tokenizer train" if stage == "tokenizer" else stage] if stage else everywhere
            assert option in own, f"{path}:{line}: {option} is no flag of {stage}"


def test_every_field_in_a_hint_exists() -> None:
    pattern = re.compile(rf"(?<![\w/.])((?:{'|'.join(sorted(SECTIONS))})\.[a-z_0-9]+(?:\.[a-z_0-9]+)*)")
    seen = 0
    for path, line, text in HINTS:
        stage = OF_MODULE.get(path.stem) if path.parent.name == "stages" else None
        for field in pattern.findall(text):
            if field.endswith((".py", ".md", ".json", ".txt", ".yaml", ".jinja")):
                continue
            seen += 1
            stages = [stage] if stage else list(RECIPES)
            known = set().union(*(FIELDS[one] for one in stages)) | ELSEWHERE.get(stage or "", set())
            assert field in known, f"{path}:{line}: {field}"
        for field in re.findall(r"(?<![\w.])([a-z_]+)=[a-zA-Z0-9]", text):
            top = set().union(*FIELDS.values(), ROLES)
            assert field in top or path.name in ("text.py", "adapter_fit.py"), f"{path}:{line}: {field}="
    assert seen > 25


def test_flags_of_a_stage_are_its_commands_own() -> None:
    for stage, flags in FLAGS.items():
        name = "tokenizer train" if stage == "tokenizer" else stage
        assert {f"--{flag.replace('_', '-')}" for flag in flags} <= COMMANDS[name]


@pytest.mark.parametrize("section", ["eval", "compare"])
def test_hints_of_readers_name_the_fields_of_the_command(section: str) -> None:
    with pytest.raises(UserError) as caught, named_in(section):
        raise UserError(
            "data.max_length is 5", "set data.text_field=a; choose another template with --template"
        )
    assert caught.value.message == f"{section}.max_length is 5"
    assert caught.value.hint == f"set {section}.text_field=a; put another chat template beside its tokenizer"
    assert {f"{section}.text_field", f"{section}.max_length", f"{section}.columns"} <= FIELDS[section]


def test_the_field_of_text_is_named_as_tokenizer_eval_takes_it(
    llmctl: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"body": "one two"}\n' * 20)
    (tmp_path / "a.txt").write_text("one two three " * 50)
    assert (
        llmctl("tokenizer", "train", "a.txt", "--out", "tok", "--kind", "char", "--vocab-size", "60").code
        == 0
    )
    ended = llmctl("tokenizer", "eval", "tok", "--data", "a.jsonl")
    assert ended.code == 1
    hint = ended.err.splitlines()[-1].removeprefix("hint: say which field holds the text, as in ")
    assert hint.startswith("--text-field ")
    assert llmctl("tokenizer", "eval", "tok", "--data", "a.jsonl", "--text-field", "body").code == 0
