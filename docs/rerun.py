"""Run the commands of a page in docs/ as they stand there, and hold the page's figures against what comes out.

python docs/rerun.py --data DIR                     the whole of walkthrough.md, in a fresh folder
python docs/rerun.py --data DIR --only "closed"     the section with these words in its heading
python docs/rerun.py --keep --work walk --from "…"  from a section on, in a folder where runs lie already
python docs/rerun.py --page FILE --data DIR --write another page, whose figures are replaced by those that came out

Every ```console block is run, line by line. Under it the page states figures, in comments that Markdown hides:

    <!-- check: runs/base eval_bits_per_byte = 1.763 ± 0.02 -->    a metric of a run, or all else in its run.json
    <!-- check: stdout exact_match = 94.6 % ± 1.5 -->              a key of what the last command printed
    <!-- check: stdout 1.bytes_per_token ≤ 3.7 -->                 JSON: names and indices, joined by dots
    <!-- check: exit = 3 -->                                       the last command's status; 0 if not stated

Without a spread the figure must come out as it is printed. --write puts what was found in place of what is stated with `=`, in the
comments and in the text of their sections; bounds, pictures and quotations stay, and the report (JSON) has what each command
printed. Exit codes: 0 every figure is within its spread,
1 a command failed or the page cannot be read, 2 wrong flags, 3 a figure is outside.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent / "walkthrough.md"
CHECK = re.compile(
    r"<!-- check: (?P<source>\S+)(?P<key> \S+)? (?P<relation>[=≤≥]) "
    r"(?P<stated>-?[\d,]*\.?\d+(?:e-?\d+)?)(?P<percent> %)?(?: ± (?P<spread>\d*\.?\d+))? -->"
)
NUMBER = re.compile(r"(-?[\d,]*\.?\d+(?:e-?\d+)?)(\s?%)?$")
PRINTED = 4000  # characters of what a command printed that go into the report
KEPT = ".rerun"  # in the work folder: what each command printed, by the hash of its words


class PageError(Exception):
    """The page cannot be read, or a command of it failed; the text says where."""


@dataclass(frozen=True)
class Check:
    """One figure of the page: where it is read, and what it must be. `stated` is as the page prints it."""

    source: str
    key: str
    relation: str
    stated: str
    percent: bool
    spread: float | None
    line: int


@dataclass
class Step:
    """One command with the figures stated under its block; they belong to the block's last command."""

    section: str
    command: str
    line: int
    checks: list[Check] = field(default_factory=list)

    @property
    def status(self) -> int:
        """The exit status that the page states."""
        return next((int(check.stated) for check in self.checks if check.source == "exit"), 0)


@dataclass
class Verdict:
    """A stated figure beside the one that was found; None if it is not there."""

    check: Check
    found: float | None
    ok: bool


# --- the page ---------------------------------------------------------------------------------------


def parse(text: str) -> list[Step]:
    """The commands of a page in order. Raises PageError for a check that is none, or has no command."""
    steps: list[Step] = []
    section, block = "", ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            block = "" if block else line[3:].strip() or "text"
        elif block == "console":
            add_line(steps, section, line, number)
        elif not block and line.startswith("#"):
            section = line.lstrip("# ")
        elif not block and line.startswith("<!-- check"):
            if not steps or steps[-1].section != section:
                raise PageError(f"line {number}: a check without a command above it in its section")
            steps[-1].checks.append(parse_check(line, number))
    return steps


def add_line(steps: list[Step], section: str, line: str, number: int) -> None:
    """One line of a block: a command, or the next part of one that a backslash goes on with."""
    if steps and steps[-1].command.endswith("\\"):
        steps[-1].command = f"{steps[-1].command[:-1].rstrip()} {line.strip()}"
    elif line.strip() and not line.startswith("#"):
        steps.append(Step(section, line.strip(), number))


def parse_check(line: str, number: int) -> Check:
    """Raises PageError for a line that states no figure."""
    match = CHECK.fullmatch(line.strip())
    if match is None:
        raise PageError(f"line {number}: not a check: {line.strip()}")
    source, key, spread = match["source"], (match["key"] or "").strip(), match["spread"]
    if (source == "exit") == bool(key):
        raise PageError(f"line {number}: {'exit has no keys' if key else f'no key of {source}'}")
    if spread and match["relation"] != "=":
        raise PageError(f"line {number}: a spread around a bound")
    return Check(
        source,
        key,
        match["relation"],
        match["stated"],
        bool(match["percent"]),
        float(spread) if spread else None,
        number,
    )


def visible(text: str) -> str:
    """The page as a reader sees it: without comments and console blocks."""
    return re.sub(r"```console\n.*?```|<!--.*?-->", "", text, flags=re.S)


def chosen(steps: list[Step], only: str | None, start: str | None) -> list[Step]:
    """The steps of one section, or from one on. Raises PageError unless the words fit exactly one heading."""
    words = only or start
    if words is None:
        return steps
    headings = list(dict.fromkeys(step.section for step in steps))
    fitting = [heading for heading in headings if words.lower() in heading.lower()]
    if len(fitting) != 1:
        raise PageError(f"{words!r} fits {len(fitting)} sections; there are: {', '.join(headings)}")
    first = next(index for index, step in enumerate(steps) if step.section == fitting[0])
    return [step for step in steps[first:] if not only or step.section == fitting[0]]


# --- figures ----------------------------------------------------------------------------------------


def number_in(text: str) -> float | None:
    """`1,024` as 1024.0, `94.6 %` as 0.946; None for what is no number."""
    match = NUMBER.match(text.strip())
    if match is None:
        return None
    return float(match[1].replace(",", "")) / (100 if match[2] else 1)


def figure(printed: str, key: str) -> float | None:
    """The number under a key of what a command printed: JSON, or a listing of `key  value` lines."""
    try:
        found: Any = json.loads(printed)
    except json.JSONDecodeError:
        values = [line.split(maxsplit=1) for line in printed.splitlines() if line.startswith(f"{key} ")]
        return number_in(values[-1][1]) if values and len(values[-1]) == 2 else None
    for part in key.split("."):
        if isinstance(found, list) and part.isdigit() and int(part) < len(found):
            found = found[int(part)]
        elif isinstance(found, dict) and part in found:
            found = found[part]
        else:
            return None
    return float(found) if isinstance(found, int | float) else None


def judge(check: Check, found: float | None) -> Verdict:
    """Whether a figure is what the page states, in the page's unit and, without a spread, its digits."""
    if found is None:
        return Verdict(check, None, False)
    found *= 100 if check.percent else 1
    stated = float(check.stated.replace(",", ""))
    if check.relation != "=":
        return Verdict(check, found, found <= stated if check.relation == "≤" else found >= stated)
    decimals = len(check.stated.partition(".")[2])
    near = 0.5 * 10**-decimals * (1 + 1e-9) if check.spread is None else check.spread + 1e-9
    return Verdict(check, found, abs(found - stated) <= near)


def judged(step: Step, work: Path, printed: str, status: int) -> list[Verdict]:
    """All figures of a step that has run."""
    verdicts = []
    for check in step.checks:
        if check.source == "exit":
            verdicts.append(judge(check, float(status)))
            continue
        manifest = work / check.source / "run.json"
        if check.source == "stdout":
            found = figure(printed, check.key)
        else:
            text = manifest.read_text(encoding="utf-8") if manifest.is_file() else "{}"
            found = figure(text, f"metrics.{check.key}")
            found = figure(text, check.key) if found is None else found
        verdicts.append(judge(check, found))
    return verdicts


def printed_as(check: Check, found: float) -> str:
    """A number found, with the digits in which the page states it."""
    mantissa, exponent, _ = check.stated.partition("e")
    decimals, comma = len(mantissa.partition(".")[2]), "" if exponent or abs(found) < 1000 else ","
    return f"{found:{comma}.{decimals}{'e' if exponent else 'f'}}"


def rewritten(text: str, entries: list[dict[str, Any]]) -> str:
    """The page with the figures that were found, in the checks and wherever their sections print them.

    Raises PageError if a section states two figures by one number, and they are two now.
    """
    lines, found_at = text.splitlines(keepends=True), {}
    for one in (one for entry in entries for one in entry["checks"]):
        check = Check(**one["check"])
        found = math.nan if one["found"] is None else one["found"]
        if math.isfinite(found) and check.relation == "=" and check.source != "exit":
            found_at[check.line] = check, printed_as(check, found)
    starts = [at for at, fenced in enumerate(_fenced(lines)) if not fenced and lines[at].startswith("#")]
    borders = sorted({0, *starts, len(lines)})
    for first, last in pairwise(borders):
        new: dict[tuple[str, bool], str] = {}
        for at in range(first, last):
            if at + 1 not in found_at:
                continue
            check, figure = found_at[at + 1]
            if new.setdefault((check.stated, check.percent), figure) != figure:
                raise PageError(f"line {check.line}: two figures of the section are stated as {check.stated}")
            lines[at] = lines[at].replace(f"= {check.stated}", f"= {figure}", 1)
        lines[first:last] = _replaced("".join(lines[first:last]), new).splitlines(keepends=True)
    return "".join(lines)


def _fenced(lines: list[str]) -> Iterator[bool]:
    """For each line whether it is inside a block of code."""
    inside = False
    for line in lines:
        inside ^= line.startswith("```")
        yield inside


def _replaced(section: str, new: dict[tuple[str, bool], str]) -> str:
    """All numbers of a section's visible text at once, so that none is replaced twice."""
    if not new:
        return section
    pattern = re.compile("|".join(f"({number_pattern(*key)})" for key in new))
    figures = [figure.replace("-", "−") for figure in new.values()]
    parts = re.split(r"(```console\n.*?```|<!--.*?-->)", section, flags=re.S)
    parts[::2] = [pattern.sub(lambda match: figures[match.lastindex - 1], part) for part in parts[::2]]
    return "".join(parts)


def number_pattern(stated: str, percent: bool) -> str:
    """A regular expression without groups for a number as a text prints it: as a whole, and before its unit if it has one."""
    after = r"(?= ?%)" if percent else r"(?![\d,.]*\d)(?! ?%)"
    return rf"(?<![\d.,−]){re.escape(stated.replace('-', '−'))}{after}"


# --- commands ---------------------------------------------------------------------------------------


def prepare(work: Path, data: Path | None, command: str | None, keep: bool) -> dict[str, str]:
    """Link the data into the work folder, and put the `llmctl` that is asked for first on the PATH.

    Returns the environment of the commands. Raises PageError for a work folder that is not empty.
    """
    work.mkdir(parents=True, exist_ok=True)
    if not keep and any(work.iterdir()):
        raise PageError(f"{work}: not empty; choose another folder, or --keep what is there")
    own = work / KEPT
    own.mkdir(exist_ok=True)
    for file in sorted(data.iterdir()) if data else []:
        link = work / file.name
        if not link.exists():
            link.symlink_to(file.resolve())
    environment = dict(os.environ)
    if command:
        (own / "llmctl").write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
        (own / "llmctl").chmod(0o755)
        environment["PATH"] = f"{own.resolve()}{os.pathsep}{environment.get('PATH', '')}"
    return environment


def done_before(command: str, work: Path) -> bool:
    """Whether the run that a command writes is there and done."""
    words = shlex.split(command)
    if "--out" not in words[:-1] or "--dry-run" in words:
        return False
    manifest = work / words[words.index("--out") + 1] / "run.json"
    return manifest.is_file() and json.loads(manifest.read_text(encoding="utf-8")).get("status") == "done"


def perform(step: Step, work: Path, environment: dict[str, str], keep: bool) -> tuple[float | None, str, int]:
    """Run a command, or take what it printed before.

    Returns seconds (None if it was kept), its stdout, and its exit status. Raises PageError if it fails.
    """
    printed = work / KEPT / f"{sha256(step.command.encode()).hexdigest()[:12]}.out"
    if keep and done_before(step.command, work):
        return None, printed.read_text(encoding="utf-8") if printed.is_file() else "", step.status
    started = time.perf_counter()
    ended = subprocess.run(
        ["bash", "-c", step.command], cwd=work, env=environment, stdout=subprocess.PIPE, check=False
    )
    seconds = time.perf_counter() - started
    text = ended.stdout.decode("utf-8", errors="replace")
    printed.write_text(text, encoding="utf-8")
    if ended.returncode != step.status:
        raise PageError(f"line {step.line}: exit code {ended.returncode}: {step.command}")
    return seconds, text, ended.returncode


def rerun(steps: list[Step], work: Path, environment: dict[str, str], keep: bool) -> Iterator[dict[str, Any]]:
    """Run the steps and print each as it ends; one entry a step, with its seconds and verdicts."""
    for step in steps:
        sys.stderr.write(f"\n$ {step.command}\n")
        seconds, printed, status = perform(step, work, environment, keep)
        verdicts = judged(step, work, printed, status)
        entry = {"section": step.section, "command": step.command, "line": step.line, "seconds": seconds}
        entry["printed"] = printed[-PRINTED:]
        took = "kept" if seconds is None else f"{seconds:.1f} s"
        print(f"{took:>9}  {step.command}")
        for verdict in verdicts:
            print(f"{'':>9}  {told(verdict)}")
        sys.stdout.flush()
        yield {**entry, "checks": [asdict(verdict) for verdict in verdicts]}


def told(verdict: Verdict) -> str:
    """One line: ok or NOT, what was stated with its spread, what was found."""
    check = verdict.check
    stated = f"{check.relation} {check.stated}{' %' if check.percent else ''}"
    spread = f" ± {check.spread:g}" if check.spread is not None else ""
    found = "missing" if verdict.found is None else f"{verdict.found:.6g}"
    name = f"{check.source} {check.key}".strip()
    return f"{'ok ' if verdict.ok else 'NOT'}  {name} {stated}{spread}, found {found}"


def main() -> int:
    """Run the page; the exit code of the module's docstring."""
    words = argparse.ArgumentParser(description="run the commands of a page and check its figures")
    words.add_argument("--page", type=Path, default=PAGE, help="page to run")
    words.add_argument("--data", type=Path, help="folder of the data files that the page names")
    words.add_argument("--work", type=Path, help="folder to run in, empty; a temporary one when unset")
    words.add_argument("--llmctl", help="command to run as llmctl; the one on the PATH when unset")
    words.add_argument("--write", action="store_true", help="put the figures found into the page")
    part = words.add_mutually_exclusive_group()
    part.add_argument("--only", help="words of the one section to run")
    part.add_argument("--from", dest="start", help="words of the section to begin with")
    words.add_argument("--keep", action="store_true", help="skip commands whose --out is a run that is done")
    words.add_argument(
        "--report", type=Path, help="JSON file to write; rerun.json in the work folder when unset"
    )
    given = words.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="rerun-"))
    entries: list[dict[str, Any]] = []
    failed = False
    try:
        steps = chosen(parse(given.page.read_text(encoding="utf-8")), given.only, given.start)
        environment = prepare(work, given.data, given.llmctl, given.keep)
        for entry in rerun(steps, work, environment, given.keep):
            entries.append(entry)  # one at a time: those before a failure are reported too
        if given.write:
            page = given.page.read_text(encoding="utf-8")
            given.page.write_text(rewritten(page, entries), encoding="utf-8")
    except (PageError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        failed = True
    return 1 if failed and not entries else close(entries, given.report or work / "rerun.json", failed)


def close(entries: list[dict[str, Any]], report: Path, failed: bool) -> int:
    """Write the report, print the last line, and return the exit code."""
    report.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    checks = [check for entry in entries for check in entry["checks"]]
    outside = sum(not check["ok"] for check in checks)
    seconds = sum(entry["seconds"] or 0 for entry in entries)
    print(f"{len(entries)} commands in {seconds:.0f} s, {len(checks)} figures, {outside} outside; {report}")
    return 1 if failed else 3 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
