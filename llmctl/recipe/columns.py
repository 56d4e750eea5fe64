"""Which column of the data plays which role: `prompt=question,response=answer`, or a mapping in a recipe."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from llmctl.errors import nearest, one_of
from llmctl.recipe.base import Mistake

# The keys of all formats (`data.formats.FORMATS`), and `response`, the answer to a prompt in a conversation.
ROLES = (
    *("prompt", "response", "system", "input", "history", "chosen", "rejected"),
    *("instruction", "output", "messages", "conversations", "completion", "label", "tools", "text"),
)
# Each of these names the same thing in another format, so a mapping has one of them at most.
SAME = (("prompt", "instruction"), ("response", "output", "completion"), ("messages", "conversations"))
FORM = "write it as --columns prompt=question,response=answer"


def _columns(value: Any) -> Any:
    """The mapping that a text of the command line or a section of a recipe stands for."""
    if value is None:
        return {}
    if isinstance(value, str):
        value = _parsed(value)
    if not isinstance(value, dict) or not all(isinstance(v, str) and v for v in value.values()):
        raise Mistake(f"`{value}` does not name a column for each role", FORM)
    for role in value:
        if role not in ROLES:
            close = nearest(str(role), list(ROLES))
            shown = f"did you mean `{close}`?" if close else f"the roles are {one_of(list(ROLES))}"
            raise Mistake(f"`{role}` is not a role", shown)
    for column in value.values():
        if list(value.values()).count(column) > 1:
            raise Mistake(f"the column `{column}` has two roles", "give each column one role")
    for names in SAME:
        if len(both := [role for role in names if role in value]) > 1:
            raise Mistake(f"`{both[0]}` and `{both[1]}` are one role", f"keep one: {both[0]}=COLUMN")
    return value


def _parsed(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in text.split(","):
        role, equals, column = (part.strip() for part in word.partition("="))
        if not (role and equals and column):
            raise Mistake(f"`{word}` is not of the form ROLE=COLUMN", FORM)
        if role in found:
            raise Mistake(f"the role `{role}` is given twice", "give each role one column")
        found[role] = column
    return found


def as_option(columns: dict[str, str]) -> str:
    """The mapping as `--columns` takes it."""
    return ",".join(f"{role}={column}" for role, column in columns.items())


Columns = Annotated[dict[str, str], BeforeValidator(_columns)]
