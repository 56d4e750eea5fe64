"""Chat templates in Jinja, in the dialect of Hugging Face: compiled once, rendered many times.

transformers' own functions copy every message, build a context of all globals and call a macro for each
answer, at three times the cost; a test holds that the text is the same.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# No text can hold what is written with it, because no one knows it beforehand.
NONCE = secrets.token_hex(8)
BEGIN, END = f"\ue0f5{NONCE}\ue0f5", f"\ue0f6{NONCE}\ue0f6"
# what running a template may raise: Jinja's own errors, and those of the Python methods it calls
FAULTS = (
    TemplateError, TypeError, LookupError, ValueError, ArithmeticError, AttributeError, RecursionError,
)  # fmt: skip

Message = dict[str, Any]
MARK = "zqmarkqz"  # a word that no template writes of its own accord


class ChatTemplate:
    """A compiled template.

    Args:
        names: what it may read besides the conversation: `bos_token` and its like.

    Attributes:
        marked: it says with `generation` marks what the assistant writes.

    Raises TemplateSyntaxError: not Jinja, or a filter or test that does not exist.
    """

    def __init__(self, source: str, names: Mapping[str, Any]) -> None:
        template = _compiled(source)
        self.marked = bool(re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", source))
        self._root, self._blocks = template.root_render_func, template.blocks
        self._shared = {**template.globals, **names, "documents": None}

    def render(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, generation: bool = False
    ) -> str:
        """The text, with BEGIN and END where the marks stand; `parted` takes them out.

        Args:
            generation: end with what makes the assistant begin.

        Raises one of `FAULTS`.
        """
        given = {"messages": messages, "tools": tools, "add_generation_prompt": generation}
        # what `Template.render` does, without going through the globals every time
        return "".join(self._root(Context(ENVIRONMENT, self._shared | given, None, self._blocks)))


def parted(text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text without marks, and the [start, end) in characters that they enclosed."""
    before, *rest = text.split(BEGIN)
    found, spans, length = [before], [], len(before)
    for part in rest:
        inside, _, after = part.partition(END)
        spans.append((length, length + len(inside)))
        found += [inside, after]
        length += len(inside) + len(after)
    return "".join(found), tuple(spans)


def variables_of(source: str) -> set[str]:
    """What a template reads of what it is given. Raises TemplateSyntaxError."""
    return meta.find_undeclared_variables(ENVIRONMENT.parse(source))


def first_line(error: Exception) -> str:
    """What an error says, as part of a sentence, and the line of the template it comes from if it comes from one."""
    lines = str(error).strip().splitlines()
    said = lines[0][:1].lower() + lines[0][1:].rstrip(".") if lines else type(error).__name__
    line = _line_of(error)
    return said if line is None else f"{said} (line {line} of the template)"


def _line_of(error: Exception) -> int | None:
    if isinstance(error, TemplateSyntaxError):
        return error.lineno
    found, step = None, error.__traceback__
    while step is not None:
        # Jinja compiles to Python, and keeps beside it which line was made from which; where its own `render`
        # was called, it has already put the template's lines into the traceback
        names = step.tb_frame.f_globals
        if "__jinja_template__" in names:
            found = names["__jinja_template__"].get_corresponding_lineno(step.tb_lineno)
        elif "__jinja_exception__" in names:
            found = step.tb_lineno
        step = step.tb_next
    return found


class _Marks(Extension):
    """`{% generation %}` … `{% endgeneration %}`: what stands between them is the assistant's."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own convention)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in (BEGIN, END))
        return nodes.Scope([begin, *body, end]).set_lineno(line)


class _Namespace(Namespace):
    """Jinja's, which may hold nothing whose name leads to Python's insides."""

    def __init__(*args: Any, **named: Any) -> None:  # a value may be called `self`
        self, given = args[0], dict(*args[1:], **named)
        for name in given:
            _refuse_private(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: str) -> None:
    if name.startswith("_"):
        raise SecurityError(f"a chat template may not write `{name}`")


class _Dict:
    """`dict(…)`, without the attributes of Python's own."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:
        return dict(*args, **named)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Marks, loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return made


ENVIRONMENT = _environment()


@lru_cache(maxsize=64)  # the long ones take 50 ms, and several objects look at each
def _compiled(source: str) -> Template:
    return ENVIRONMENT.from_string(source)
