"""Data sets on the hub: `owner/name`, or `owner/name:GLOB` for some of the files."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from llmctl.errors import UserError, one_of
from llmctl.locate import download

NAME = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<glob>.+))?")
# What a repository of data holds beside its data.
ABOUT = ("dataset_info", "dataset_infos", "README", "LICENSE", "requirements")
SPLIT = re.compile(r"(?:^|[/_.-])(train|test|valid|validation|val|dev|eval)(?=[/_.-]|$)", re.IGNORECASE)


def is_hub_name(source: str) -> bool:
    """Whether a name that is not on this machine can only mean the hub: not if its folder is here."""
    found = NAME.fullmatch(source)
    return found is not None and not Path(source.split("/")[0]).is_dir()


@cache
def dataset_files(source: str, endings: tuple[str, ...]) -> tuple[Path, ...]:
    """The data files that `source` names, downloaded, sorted by their paths.

    Args:
        endings: of the files that can be read, as ".jsonl.gz".

    Raises UserError: as `locate.download`; no file matches; or files of several splits, of which one
    must be chosen.
    """
    found = NAME.fullmatch(source)
    if found is None:
        raise ValueError(f"{source} is no name on the hub")
    name, glob = found["id"], found["glob"]
    wanted = [glob] if glob else [f"*{ending}" for ending in endings]
    folder = download(name, wanted, "dataset", "name a file or folder, or a data set on the hub")
    # the folder also holds what earlier runs have fetched of the repository
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    paths = [p for p in paths if any(fnmatchcase(p, pattern) for pattern in wanted) and _is_data(p, endings)]
    if not paths:
        raise UserError(
            f"{source}: no data files in it",
            f"known are {one_of(list(endings))}; look at its page on the hub",
        )
    splits = sorted({word.lower() for path in paths for word in SPLIT.findall(path)})
    if glob is None and len(splits) > 1:
        raise UserError(
            f"{source}: has the splits {one_of(splits)}",
            f"choose files of it by a pattern, as in '{name}:*{splits[-1]}*'",
        )
    return tuple(folder / path for path in paths)


def _is_data(path: str, endings: tuple[str, ...]) -> bool:
    file = path.rsplit("/", 1)[-1]
    return (
        file.lower().endswith(endings)
        and not path.startswith(".")
        and "/." not in path
        and file.split(".")[0] not in ABOUT
    )
