"""Training twins of known chat templates, out of TRL's package data.

TRL ships the templates of many models, and beside a model's own one that says with `generation` marks what the
assistant writes. The files are read where the package lies; TRL itself, which takes seconds to import, is not.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

FOLDER, SUFFIX, TRAINING = "chat_templates", ".jinja", "_training"


@cache
def shipped() -> dict[str, str] | None:
    """Name -> text of the templates that TRL ships, twins included; None where TRL is not installed."""
    found = find_spec("trl")
    for place in (found.submodule_search_locations or []) if found else []:
        folder = Path(place) / FOLDER
        if folder.is_dir():
            return {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder.glob(f"*{SUFFIX}"))}
    return None


def twin_of(source: str) -> tuple[str, str] | None:
    """The name of a known template and the text of its training twin; None if there is none.

    Line ends and white space around the whole do not count: they differ between the places where templates
    are stored (`chat_template.jinja`, `tokenizer_config.json`), and a template of which they are all that
    differs renders the same but for white space, which is compared for every record.
    """
    known = shipped() or {}
    wanted = normalized(source)
    for name, text in known.items():
        if (twin := known.get(f"{name}{TRAINING}")) is not None and normalized(text) == wanted:
            return name, twin
    return None


def is_twin(source: str) -> bool:
    """Whether a template is one of TRL's training twins."""
    wanted = normalized(source)
    return any(
        name.endswith(TRAINING) and normalized(text) == wanted for name, text in (shipped() or {}).items()
    )


def normalized(source: str) -> str:
    """A template as it is compared."""
    return source.replace("\r\n", "\n").strip()
