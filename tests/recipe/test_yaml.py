"""What plain YAML scalars mean in a recipe."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llmctl.errors import UserError
from llmctl.recipe.yaml import parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000", 1000),
        ("010", 10),
        ("+3", 3),
        ("-3", -3),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        ("1e", "1e"),
        ("e4", "e4"),
        ("1.2.3", "1.2.3"),
        ("2024-01-02", "2024-01-02"),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("~", None),
        ("null", None),
        ("", None),
        ("'3e-4'", "3e-4"),
        ("[1, a, 2.0]", [1, "a", 2.0]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
        ("&x {a: 1}", {"a": 1}),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    parsed = parse_yaml(text, "test")
    assert parsed == value
    assert type(parsed) is type(value)


def test_not_a_number() -> None:
    assert math.isnan(parse_yaml(".nan", "test"))
    assert parse_yaml("-.inf", "test") == -math.inf


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{a: 1, a: 2}", "f: line 1: `a` was already set on line 1"),
        ("b:\n  a: 1\n  c: 2\n  a: 3", "f: line 4: `a` was already set on line 2"),
        ("true: 1", "f: line 1: key True is not a word"),
        ("{[a]: 3}", "f: line 1: key [] is not a word"),
        ("a: *b", "f: line 1: found undefined alias 'b'"),
        ("a: 1\n---\nb: 2", "f: line 2: but found another document"),
        (
            "!!python/object:os.system x",
            "f: line 1: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object:os.system'",
        ),
    ],
)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "f")
    assert caught.value.message == message
    assert caught.value.hint


def test_other_users_of_pyyaml_are_left_alone() -> None:
    import yaml

    assert yaml.safe_load("yes") is True
    assert yaml.safe_load("3e-4") == "3e-4"
