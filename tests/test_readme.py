"""The Chinese README against the English one: the same commands, the same links, in the same order."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGLISH, CHINESE = "README.md", "README.zh-CN.md"


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    """The lines of all console blocks, without the comments, which are translated."""
    blocks = re.findall(r"```console\n(.*?)```", page, re.S)
    lines = [line.split("  #")[0].rstrip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def targets(page: str) -> list[str]:
    """What the page links to and shows, but for the other language."""
    found = re.findall(r"\]\(([^)#\s]+)", page)
    return [target for target in found if not target.startswith("README")]


def outputs(page: str) -> list[str]:
    """Blocks that show what a command printed."""
    return re.findall(r"^```\n(.*?)^```$", re.sub(r"```console\n.*?```", "", page, flags=re.S), re.S | re.M)


def figures(page: str) -> list[str]:
    """Inline code: flags, fields, files, exact in both languages."""
    prose = re.sub(r"```.*?```", "", page, flags=re.S)
    return sorted(re.findall(r"`([^`]+)`", prose))


@pytest.mark.parametrize("part", [commands, targets, outputs, figures], ids=lambda part: part.__name__)
def test_both_readmes_say_the_same(part: Callable[[str], list[str]]) -> None:
    english = part(text(ENGLISH))
    assert english, "nothing to compare"
    assert part(text(CHINESE)) == english


def test_both_have_the_same_headings() -> None:
    levels = [
        re.findall(r"^#+(?= )", re.sub(r"```.*?```", "", text(n), flags=re.S), re.M)
        for n in (ENGLISH, CHINESE)
    ]
    assert levels[0] == levels[1]


def test_each_links_to_the_other() -> None:
    for here, there in ((ENGLISH, CHINESE), (CHINESE, ENGLISH)):
        assert f"]({there})" in "".join(text(here).splitlines()[:3])
