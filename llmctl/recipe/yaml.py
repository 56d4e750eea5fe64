"""YAML as recipes need it: `3e-4` is a number, a repeated key is an error, `yes` is a word.

What is dumped here loads here as it was, and in any other YAML reader as well.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from llmctl.errors import UserError
from llmctl.files import read_bounded

MOST_DIGITS = 400  # of a whole number; Python itself reads 4,300
MOST_BYTES = 1 << 20  # of a recipe
MOST_VALUES = 100_000  # in a recipe, where a name (`*anchor`) counts as all it stands for
DEEPEST = 50  # sections and lists inside each other


class _Loader(yaml.SafeLoader):
    """A SafeLoader of our own, so that its rules do not change PyYAML's for others."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        # as soon as it is read: the scanner's time grows with the square of the depth
        if self.depth > DEEPEST:
            raise UserError("nested too deeply", f"no recipe has more than {DEEPEST} levels")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or our own rules would read as something else."""


# PyYAML's resolvers follow YAML 1.1, where `on` is true, `3e-4` a string and `1:30` the number 90.
# Ours follow the YAML 1.2 core schema.
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9][0-9_]*$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))

# Line breaks to YAML, ordinary characters to PyYAML's dumper, which would write them as they are.
_ODD_BREAKS = re.compile("[\x85\u2028\u2029\ufeff]")


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise UserError(f"line {line}: key {key!r} is not a word", "quote it if it is meant as text")
        if key in seen:
            raise UserError(f"line {line}: `{key}` was already set on line {seen[key]}", "keep one of them")
        seen[key] = line
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    # decimal only: YAML 1.1 would read `010` as eight
    digits = str(loader.construct_scalar(node)).replace("_", "")
    if len(digits) > MOST_DIGITS:
        line = node.start_mark.line + 1
        raise UserError(
            f"line {line}: a number of {len(digits):,} digits", "no field takes so large a number"
        )
    return int(digits)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse_yaml(text: str, name: str) -> Any:
    """Parse one YAML document.

    Args:
        text: the document.
        name: what to call it in errors, a path or `--flag`.

    Raises:
        UserError: not YAML (with the line), or a repeated key.
    """
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
        _count(value, {}, 0)
        return value
    except UserError as error:
        raise UserError(f"{name}: {error.message}", error.hint) from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = (error.problem or "cannot be parsed").rstrip(".")
        raise UserError(f"{name}: line {line}: {problem}", "check indentation, colons and quotes") from None
    except RecursionError:
        raise UserError(f"{name}: nested too deeply", f"no recipe has more than {DEEPEST} levels") from None
    # what the constructors of YAML's tags (`!!timestamp x`) make of other values
    except (ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{name}: a value does not fit its tag ({error})", "leave out tags such as !!float"
        ) from None
    except yaml.YAMLError as error:
        raise UserError(
            f"{name}: not valid YAML: {str(error).splitlines()[0]}", "remove characters that are not text"
        ) from None


def _count(value: Any, known: dict[int, int], depth: int) -> int:
    """How many values there are in a value. Raises UserError for too many, or too deep."""
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) in known:
        return known[id(value)]
    if depth >= DEEPEST:
        raise UserError("nested too deeply", f"no recipe has more than {DEEPEST} levels")
    inside = value.values() if isinstance(value, dict) else value
    total = 1 + sum(_count(one, known, depth + 1) for one in inside)
    if total > MOST_VALUES:
        raise UserError(f"more than {MOST_VALUES:,} values", "a recipe has some dozens")
    known[id(value)] = total
    return total


def dump_yaml(value: Any, *, one_line: bool = False) -> str:
    """`value` as YAML with its keys in order; `one_line` writes lists and sections in brackets.

    Text with line breaks in it becomes a quoted text with escapes on one line if `one_line` asks for it.
    """
    options: dict[str, Any] = {"default_flow_style": True, "width": float("inf")} if one_line else {}
    text = _dumped(value, options | {"allow_unicode": True})
    if _ODD_BREAKS.search(text):
        text = _dumped(value, options)
    if not one_line:
        return text
    text = text.removesuffix("\n...\n").rstrip("\n")
    return _dumped(value, options | {"default_style": '"'}).rstrip("\n") if "\n" in text else text


def _dumped(value: Any, options: dict[str, Any]) -> str:
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, **options))


def read_yaml(path: Path) -> Any:
    """Parse a YAML file. Raises UserError if it is missing, a folder, too large, unreadable or not UTF-8."""
    try:
        text = read_bounded(path, MOST_BYTES).decode()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "see `llmctl recipe list`") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a recipe file", "name the file inside it") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it", f"chmod u+r {path}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})", "save the file as UTF-8") from None
    except OSError as error:
        said = (error.strerror or str(error)).lower()
        raise UserError(f"{path}: cannot be read ({said})", "check the disk it lies on") from None
    return parse_yaml(text, str(path))
