"""docs/rerun.py on small pages of its own, and the walkthrough's figures against its text."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "docs" / "rerun.py"

# Stands for llmctl: `make --out DIR NUMBER` writes a run, `say WORD…` prints, `fail N` ends with status N.
FAKE = """
import json, pathlib, sys
verb, *words = sys.argv[1:]
if verb == "make":
    out = pathlib.Path(words[words.index("--out") + 1])
    out.mkdir(parents=True)
    score = float(words[-1])
    (out / "run.json").write_text(json.dumps({"status": "done", "data": {"kept": 7}, "metrics": {"score": score}}))
    pathlib.Path("made.txt").open("a").write(f"{out}\\n")
elif verb == "say":
    print(" ".join(words).replace(" / ", "\\n"))
else:
    sys.exit(int(words[0]))
"""

PAGE = """# Page

Prose with `code`.

## First part

```console
# a comment
llmctl make --out runs/a \\
    --fast 0.5
llmctl say score 12.0 % / steps 1,024
```

The score of 0.5.

<!-- check: runs/a score = 0.5 ± 0.01 -->
<!-- check: stdout steps = 1,024 -->

```yaml
llmctl is: not a command
```

## Second part

```console
cat notes.txt | llmctl say
```
"""


def script() -> ModuleType:
    """docs/rerun.py, which is a script and no package."""
    spec = importlib.util.spec_from_file_location("rerun", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rerun"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


RERUN = script()


def run(folder: Path, page: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The script on a page, with the stand-in for llmctl, in folder/work."""
    (folder / "page.md").write_text(page, encoding="utf-8")
    (folder / "fake.py").write_text(FAKE, encoding="utf-8")
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "notes.txt").write_text("a note", encoding="utf-8")
    command = [sys.executable, str(SCRIPT), "--page", "page.md", "--data", "data", "--work", "work"]
    fake = ["--llmctl", f"{sys.executable} {folder / 'fake.py'}"]
    return subprocess.run([*command, *fake, *words], cwd=folder, capture_output=True, text=True, check=False)


def test_parse() -> None:
    steps = RERUN.parse(PAGE)
    assert [(step.section, step.command, step.line) for step in steps] == [
        ("First part", "llmctl make --out runs/a --fast 0.5", 9),
        ("First part", "llmctl say score 12.0 % / steps 1,024", 11),
        ("Second part", "cat notes.txt | llmctl say", 26),
    ]
    assert [len(step.checks) for step in steps] == [0, 2, 0]
    first, second = steps[1].checks
    assert (first.source, first.key, first.stated, first.spread) == ("runs/a", "score", "0.5", 0.01)
    assert (second.source, second.key, second.stated, second.spread) == ("stdout", "steps", "1,024", None)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("<!-- check: runs/a score 0.5 -->", "line 5: not a check: <!-- check: runs/a score 0.5 -->"),
        ("<!-- check: runs/a score = half -->", "line 5: not a check"),
        ("<!-- check: runs/a score = 0.5 ± -->", "line 5: not a check"),
        ("<!-- check runs/a score = 0.5 -->", "line 5: not a check"),
        ("<!-- check: runs/a score = 0.5", "line 5: not a check"),
        ("<!-- check: stdout = 0.5 -->", "line 5: no key of stdout"),
        ("<!-- check: exit code = 3 -->", "line 5: exit has no keys"),
        ("<!-- check: stdout score ≤ 0.5 ± 0.1 -->", "line 5: a spread around a bound"),
        ("## Next\n<!-- check: exit = 3 -->", "line 6: a check without a command above it in its section"),
    ],
)
def test_a_malformed_check_stops_before_any_command(tmp_path: Path, line: str, words: str) -> None:
    page = f"## Part\n```console\nllmctl make --out runs/a 1\n```\n{line}\n"
    ended = run(tmp_path, page)
    assert ended.returncode == 1
    assert f"error: {words}" in ended.stderr
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("printed", "key", "found"),
    [
        ('{"a": {"b": 2}}', "a.b", 2.0),
        ('[{"x": 1}, {"x": 0.25}]', "1.x", 0.25),
        ('[{"x": 1}]', "1.x", None),
        ('{"a": "words"}', "a", None),
        ('{"a": 1}', "b", None),
        ("loss  1.5\nscore       0.9463\n", "score", 0.9463),
        ("rows  1,024", "rows", 1024.0),
        ("kl  2.5e-07", "kl", 2.5e-7),
        ("right  94.6 %", "right", 0.946),
        ("right  94.6%", "right", 0.946),
        ("score_low  0.5", "score", None),
        ("score", "score", None),
        ("score  none", "score", None),
        ("", "score", None),
    ],
)
def test_figure(printed: str, key: str, found: float | None) -> None:
    assert RERUN.figure(printed, key) == (None if found is None else pytest.approx(found))


@pytest.mark.parametrize(
    ("stated", "found", "ok"),
    [
        ("= 1.763 ± 0.02", 1.783, True),
        ("= 1.763 ± 0.02", 1.7831, False),
        ("= 1.763 ± 0.02", 1.7429, False),
        ("= 1.76", 1.7649, True),
        ("= 1.76", 1.7651, False),
        ("= 1,024", 1024.0, True),
        ("= 1,024", 1025.0, False),
        ("= 94.6 % ± 1", 0.9555, True),
        ("= 94.6 % ± 1", 0.957, False),
        ("= -0.8 % ± 1", -0.01, True),
        ("≤ 1e-5", 9e-6, True),
        ("≤ 1e-5", 1.1e-5, False),
        ("≥ 90 %", 0.9, True),
        ("≥ 90 %", 0.899, False),
        ("= 1 ± 5", None, False),
        ("= 1 ± 5", float("nan"), False),
    ],
)
def test_judge(stated: str, found: float | None, ok: bool) -> None:
    check = RERUN.parse_check(f"<!-- check: stdout x {stated} -->", 1)
    assert RERUN.judge(check, found).ok is ok


def test_a_page_whose_figures_are_right(tmp_path: Path) -> None:
    ended = run(tmp_path, PAGE)
    assert ended.returncode == 0, ended.stderr
    assert "ok   runs/a score = 0.5 ± 0.01, found 0.5\n" in ended.stdout
    assert "ok   stdout steps = 1,024, found 1024\n" in ended.stdout
    assert "3 commands in " in ended.stdout and "2 figures, 0 outside" in ended.stdout
    report = json.loads((tmp_path / "work" / "rerun.json").read_text(encoding="utf-8"))
    assert [entry["section"] for entry in report] == ["First part", "First part", "Second part"]
    assert report[1]["checks"][0]["found"] == 0.5
    assert report[0]["seconds"] > 0


def test_what_is_no_metric_is_read_from_the_manifest(tmp_path: Path) -> None:
    ended = run(tmp_path, PAGE.replace("runs/a score = 0.5 ± 0.01", "runs/a data.kept = 7"))
    assert ended.returncode == 0 and "ok   runs/a data.kept = 7, found 7\n" in ended.stdout


def test_a_figure_outside(tmp_path: Path) -> None:
    ended = run(tmp_path, PAGE.replace("= 0.5 ±", "= 0.48 ±").replace("= 1,024 -->", "= 1,024 ± 1 -->"))
    assert ended.returncode == 3
    assert "NOT  runs/a score = 0.48 ± 0.01, found 0.5\n" in ended.stdout
    assert "3 commands in " in ended.stdout and "2 figures, 1 outside" in ended.stdout


def test_a_figure_that_is_not_there(tmp_path: Path) -> None:
    ended = run(tmp_path, PAGE.replace("runs/a score", "runs/b score"))
    assert ended.returncode == 3
    assert "NOT  runs/b score = 0.5 ± 0.01, found missing\n" in ended.stdout


def test_a_command_that_fails(tmp_path: Path) -> None:
    page = PAGE.replace("llmctl say score", "llmctl fail 4 # say score")
    ended = run(tmp_path, page)
    assert ended.returncode == 1
    assert "error: line 11: exit code 4: llmctl fail 4 # say score" in ended.stderr
    assert "llmctl make --out runs/a" in ended.stdout and "cat notes.txt" not in ended.stdout
    report = json.loads((tmp_path / "work" / "rerun.json").read_text(encoding="utf-8"))
    assert [entry["line"] for entry in report] == [9]


def test_a_status_that_the_page_states(tmp_path: Path) -> None:
    page = "## Part\n```console\nllmctl fail 3\n```\n<!-- check: exit = 3 -->\n"
    assert run(tmp_path, page).returncode == 0
    other = tmp_path / "other"
    other.mkdir()
    ended = run(other, page.replace("fail 3", "say yes"))
    assert ended.returncode == 1
    assert "error: line 3: exit code 0: llmctl say yes" in ended.stderr


def test_keep_skips_what_is_done(tmp_path: Path) -> None:
    assert run(tmp_path, PAGE).returncode == 0
    refused = run(tmp_path, PAGE)
    assert refused.returncode == 1
    assert "error: work: not empty; choose another folder, or --keep what is there" in refused.stderr
    ended = run(tmp_path, PAGE, "--keep")
    assert ended.returncode == 0, ended.stderr
    assert "kept  llmctl make --out runs/a" in ended.stdout
    assert "kept  llmctl say" not in ended.stdout
    assert (tmp_path / "work" / "made.txt").read_text(encoding="utf-8") == "runs/a\n"


def test_keep_remembers_what_a_run_printed(tmp_path: Path) -> None:
    page = "## Part\n```console\nllmctl make --out runs/a 1; llmctl say score 7\n```\n"
    page += "<!-- check: stdout score = 7 -->\n"
    assert run(tmp_path, page).returncode == 0
    ended = run(tmp_path, page, "--keep")
    assert ended.returncode == 0 and "kept  llmctl make" in ended.stdout


def test_a_part(tmp_path: Path) -> None:
    ended = run(tmp_path, PAGE, "--only", "second")
    assert ended.returncode == 0 and "1 commands in " in ended.stdout and "runs/a" not in ended.stdout
    steps = RERUN.parse(PAGE)
    assert RERUN.chosen(steps, "first", None) == steps[:2]
    assert RERUN.chosen(steps, None, "First") == steps
    assert RERUN.chosen(steps, None, "second") == steps[2:]
    for words, number in (("part", 2), ("third", 0)):
        with pytest.raises(RERUN.PageError) as caught:
            RERUN.chosen(steps, words, None)
        there = f"'{words}' fits {number} sections; there are: First part, Second part"
        assert str(caught.value) == there


def test_write_puts_what_was_found_into_the_page(tmp_path: Path) -> None:
    page = PAGE.replace("= 0.5 ±", "= 0.48 ±").replace(
        "score of 0.5.", "score of 0.48, not 0.481; 12.0 % is wrong."
    )
    page = page.replace("= 1,024 -->", "= 9 -->\n<!-- check: stdout score = 11.0 % ± 2 -->")
    page = page.replace("not 0.481", "not 0.481, in 9 steps, at 11.0 % of them")
    page += "\nHere 0.48 is another one.\n<!-- check: exit = 0 -->\n"
    ended = run(tmp_path, page, "--write")
    assert ended.returncode == 3, ended.stderr
    written = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "The score of 0.50, not 0.481, in 1,024 steps, at 12.0 % of them; 12.0 % is wrong.\n" in written
    assert "<!-- check: runs/a score = 0.50 ± 0.01 -->" in written
    assert "<!-- check: stdout steps = 1,024 -->\n<!-- check: stdout score = 12.0 % ± 2 -->" in written
    assert "Here 0.48 is another one." in written and "--fast 0.5" in written
    other = tmp_path / "other"
    other.mkdir()
    again = run(other, written, "--write")
    assert again.returncode == 0 and (other / "page.md").read_text(encoding="utf-8") == written
    report = json.loads((other / "work" / "rerun.json").read_text(encoding="utf-8"))
    assert report[1]["printed"] == "score 12.0 %\nsteps 1,024\n"


def test_write_refuses_two_figures_by_one_number(tmp_path: Path) -> None:
    page = "## Part\n```console\nllmctl say a 1 / b 2\n```\nBoth are 3.\n"
    page += "<!-- check: stdout a = 3 -->\n<!-- check: stdout b = 3 -->\n"
    ended = run(tmp_path, page, "--write")
    assert ended.returncode == 1
    assert "error: line 7: two figures of the section are stated as 3\n" in ended.stderr
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == page


# --- the walkthrough --------------------------------------------------------------------------------

PAGES = {
    name: SCRIPT.with_name(name).read_text(encoding="utf-8")
    for name in ("walkthrough.md", "walkthrough-real.md")
}
STEPS = {name: RERUN.parse(text) for name, text in PAGES.items()}
LIFECYCLE = ("pretrain", "sft", "reward", "dpo", "merge", "int8", "gptq4")
TRAINING = ("pretrain", "sft", "reward", "dpo")
TRAININGS = {"walkthrough.md": 7, "walkthrough-real.md": 2}


def sections(text: str) -> dict[str, str]:
    """What a reader sees under each heading."""
    parts = re.split(r"^#+ (.*)$", RERUN.visible(text), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("page", PAGES)
def test_every_section_states_a_figure(page: str) -> None:
    stated = {step.section for step in STEPS[page] if step.checks}
    assert {step.section for step in STEPS[page]} == stated


@pytest.mark.parametrize(
    ("page", "step"),
    [
        pytest.param(page, step, id=f"{page} line {step.line}")
        for page, steps in STEPS.items()
        for step in steps
        if step.checks
    ],
)
def test_figures_stand_in_the_text(page: str, step: Any) -> None:
    """A checked number is one that the reader sees, in its unit, in the same section."""
    text = sections(PAGES[page])[step.section]
    figures = [check for check in step.checks if check.source != "exit"]
    assert not [f"line {check.line}: {check.stated}" for check in figures if not stands(check, text)]


def stands(check: Any, text: str) -> bool:
    """Whether the number of a check is in a text: the whole number, and its unit if it has one."""
    return re.search(RERUN.number_pattern(check.stated, check.percent), text) is not None


def test_a_number_stands_in_a_text_as_a_whole() -> None:
    check = RERUN.parse_check("<!-- check: stdout x = 1.76 ± 0.1 -->", 1)
    share = RERUN.parse_check("<!-- check: stdout x = 50 % -->", 1)
    assert stands(check, "it was 1.76.") and stands(check, "| 1.76 |") and stands(share, "| 50 % |")
    assert not any(stands(check, text) for text in ("1.763", "11.76", "1,1.76", "1.76,5", "1.76 %"))
    assert not stands(share, "50 steps") and not stands(share, "0.50 %")


@pytest.mark.parametrize("page", PAGES)
def test_every_training_is_repeatable(page: str) -> None:
    trainings = [step.command for step in STEPS[page] if step.command.split()[:2][-1] in TRAINING]
    assert len(trainings) >= TRAININGS[page]
    assert not [command for command in trainings if "train.threads=1" not in command]


@pytest.mark.parametrize("page", PAGES)
def test_checked_runs_are_made_before(page: str) -> None:
    made: set[str] = set()
    for step in STEPS[page]:
        made.update(re.findall(r"--out (\S+)", step.command))
        if step.command == "llmctl quickstart":
            made.update(f"runs/quickstart/{name}" for name in LIFECYCLE)
        for check in step.checks:
            assert check.source in made | {"stdout", "exit"}, f"line {check.line}"
