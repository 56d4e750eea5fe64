"""`llmctl quickstart --model M --data FILE`: a tiny lifecycle for real, going on with it, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmctl.cli.main import main
from llmctl.cli.options import command_line
from llmctl.errors import CheckFailed, Interrupted
from llmctl.runs import read_manifest
from llmctl.stages import dpo, merge, own, own_plan, quantize, sft
from llmctl.stages.own_measure import FIGURES
from tests.program import Outcome, Program
from tests.stages.bad_input import snapshot

OUT = Path("runs/base-quickstart")
WORDS = [
    "quickstart",
    "--model",
    "base",
    "--data",
    "talks.jsonl",
    "--pairs",
    "pairs.jsonl",
    "--device",
    "cpu",
]
STEPS = ["sft", "dpo", "merge", "int8"]
STAGES: dict[str, Any] = {"sft": sft, "dpo": dpo, "merge": merge, "int8": quantize}


def write_pairs(file: Path, rows: int = 24) -> None:
    """Short pairs about numbers, each with its own prompt."""
    pairs = [
        {"prompt": f"Who is {n}?", "chosen": f"It is {n}.", "rejected": f"{n} is it."} for n in range(rows)
    ]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def quick(patch: pytest.MonkeyPatch) -> None:
    """Learning rates that move a tiny model in a few steps."""
    as_it_is = own_plan.Settings.sft  # the usual rate of so small a model still needs more steps
    patch.setattr(own_plan, "RAISED", 50.0)
    patch.setattr(
        own_plan.Settings, "sft", lambda self: as_it_is(self) | {"train.learning_rate": 1e-2}, raising=True
    )


@pytest.fixture
def asking(stocked: Path, talks: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`stocked` with `talks.jsonl` and `pairs.jsonl`, where tiny models learn fast."""
    shutil.copy(talks, stocked / "talks.jsonl")
    write_pairs(stocked / "pairs.jsonl")
    quick(monkeypatch)
    return stocked


@pytest.fixture(scope="module")
def finished(corpus: Path, base: Path, talks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `talks.jsonl`, `pairs.jsonl`, and the quickstart on them, interrupted once in dpo."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(base, folder / "base")
    shutil.copy(talks, folder / "talks.jsonl")
    write_pairs(folder / "pairs.jsonl")
    before = Path.cwd()
    os.chdir(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            quick(patch)
            as_it_is = dpo.run

            def interrupted(*words: Any, **more: Any) -> Any:
                raise Interrupted("dpo: interrupted at step 3 of 9", "add --resume")

            patch.setattr(dpo, "run", interrupted)
            with pytest.raises(SystemExit) as left:
                main(WORDS)
            assert left.value.code == 130
            assert [path.name for path in sorted(OUT.iterdir())] == [
                "data",
                "plan.json",
                "quickstart.json",
                "sft",
            ]
            (OUT / "after-interruption.json").write_text(json.dumps(snapshot(OUT / "sft")))
            patch.setattr(dpo, "run", as_it_is)
            with pytest.raises(SystemExit) as left:
                main([*WORDS, "--json"])
            assert left.value.code in (None, 0)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def done(finished: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `finished`, in which the program runs."""
    shutil.copytree(finished, here, dirs_exist_ok=True)
    quick(monkeypatch)
    return here


def test_a_tiny_lifecycle(done: Path, llmctl: Program) -> None:
    assert snapshot(done / OUT / "sft") == json.loads((done / OUT / "after-interruption.json").read_text())
    before = snapshot(done)
    ended = llmctl(*WORDS, "--json")
    assert ended.code == 0, ended.err
    assert snapshot(done) == before, "what is done is kept"
    found = json.loads(ended.out)
    rows = {row["stage"]: row for row in found["rows"]}
    assert list(rows) == ["base", *STEPS]
    assert all(set(row) == {"stage", "seconds", "measuring", *FIGURES} for row in rows.values())
    assert rows["sft"]["loss"] < rows["base"]["loss"]
    assert rows["merge"]["loss"] == pytest.approx(rows["dpo"]["loss"], abs=1e-3)
    assert rows["int8"]["size_bytes"] < rows["merge"]["size_bytes"]
    assert [row["preference_accuracy"] is not None for row in rows.values()] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert all(0 <= row["stop_rate"] <= 1 and row["asked"] == 10 for row in rows.values())
    assert found["receipts"]["merge"]["kl"] < 1e-4 < found["receipts"]["merge"]["effect"]
    assert not found["refused"] and found["model"] == str(OUT / "int8")
    for name in STEPS:
        assert read_manifest(done / OUT / name)["status"] == "done"


def test_what_is_said(done: Path, llmctl: Program) -> None:
    ended = llmctl(*WORDS)
    lines = ended.err.splitlines()
    assert ended.code == 0
    assert [line.partition(": ")[0] for line in lines if line.startswith("step ")] == [
        f"step {number} of 5" for number in range(1, 6)
    ]
    assert f"{OUT}/merge: done before; kept" in lines
    assert any(
        line.startswith("data: 30 rows to train on, ") and "10 rows to evaluate on; " in line
        for line in lines
    )
    assert any(line.startswith("sft: 5 epochs, about ") for line in lines)
    assert any(line.startswith("dpo: 6 steps at a rate of 2.5e-3: ") for line in lines)
    assert any(line.startswith("time on this machine: less than a minute to train") for line in lines)
    assert "warning: none of the 22 pairs has" not in ended.err
    assert any("none of the 24 pairs has a prompt of the answers" in line for line in lines)
    commands = [line for line in lines if line.startswith("$ llmctl ")]
    assert [command.split()[2] for command in commands] == ["sft", "dpo", "merge", "quantize"]
    table = ended.out.splitlines()
    assert table[0].split() == ["model", "time", "size", "loss", "exact", "match", "stops", "preferred"]
    assert [line.split()[0] for line in table[1:6]] == ["base", *STEPS]
    assert not [line for line in table[:12] if len(line) > 100]
    assert [line.split()[0] for line in table[-4:]] == [">", "before", "now", "right"]


def test_no_question_is_trained_on_and_measured_on(done: Path) -> None:
    train, held = (
        {
            json.loads(line)["messages"][0]["content"]
            for line in (done / OUT / "data" / name).read_text().splitlines()
        }
        for name in ("train.jsonl", "heldout.jsonl")
    )
    assert len(train) == 30 and len(held) == 10 and not train & held


@pytest.mark.parametrize("name", STEPS)
def test_a_printed_command_does_what_the_step_did(
    name: str, done: Path, llmctl: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    as_it_is = own.load_recipe
    monkeypatch.setattr(own, "load_recipe", lambda *words: given.append(as_it_is(*words)) or given[-1])
    command = json.loads(llmctl(*WORDS, "--json").out)["commands"][name]
    taken: list[Any] = []

    def noted(recipe: Any, *words: Any, **more: Any) -> None:
        taken.append(recipe)
        raise CheckFailed("noted")

    monkeypatch.setattr(STAGES[name], "run", noted)
    assert llmctl(*command.split()[1:]).code == 3
    assert taken == [given[STEPS.index(name)]]


def test_a_refused_merge_leaves_what_is_good(
    done: Path, llmctl: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("merge", "int8"):
        shutil.rmtree(done / OUT / name)

    def refuses(recipe: Any, talk: Any) -> Any:
        raise CheckFailed("the merged model is not what the adapter is: divergence 3")

    monkeypatch.setattr(merge, "run", refuses)
    ended = llmctl(*WORDS)
    assert ended.code == 3
    assert "step 5 of 5: int8 is left out: merge was refused" in ended.err
    assert ended.err.splitlines()[-2] == (
        f"error: merge was refused by its own check; what is good is {OUT}/dpo"
    )
    assert ended.err.splitlines()[-1].startswith(
        f"hint: if the difference is acceptable: llmctl merge {OUT}/dpo --out {OUT}/merge "
    )
    assert ended.err.splitlines()[-1].endswith(" --accept; then run this again")
    assert "refused: the merged model is not what the adapter is: divergence 3" in ended.out
    assert "not made: merge was refused" in ended.out
    assert f"the model: {OUT}/dpo" in ended.out


def test_a_refused_quantization_is_told_again_and_can_be_accepted(done: Path, llmctl: Program) -> None:
    shutil.rmtree(done / OUT / "int8")
    plan = done / OUT / "plan.json"
    command = json.loads(llmctl(*WORDS, "--dry-run", "--json").out)["commands"]["int8"].split()[1:]
    assert llmctl(*command, "compare.max_kl=1e-12").code == 3
    for _ in range(2):
        ended = llmctl(*WORDS)
        assert ended.code == 3 and f"refused: {OUT}/int8: its own check refused it: divergence" in ended.err
        assert f"the model: {OUT}/merge" in ended.out
    assert llmctl(*command, "compare.max_kl=1e-12", "--accept").code == 0
    ended = llmctl(*WORDS)
    assert ended.code == 0 and f"the model: {OUT}/int8" in ended.out
    assert plan.is_file()


def test_other_inputs_need_another_folder(done: Path, llmctl: Program) -> None:
    before = snapshot(done / OUT)
    ended = llmctl(*WORDS, "--minutes", "3")
    assert ended.err.splitlines() == [
        f"error: {OUT}: --minutes is not what it was when this quickstart began",
        "hint: put it back to go on, or begin anew with another --out",
    ]
    with (done / "talks.jsonl").open("a") as file:
        file.write('{"instruction": "More?", "output": "Yes."}\n')
    assert f"error: {OUT}: --data is not what it was when this quickstart began" in llmctl(*WORDS).err
    assert snapshot(done / OUT) == before
    other = llmctl("quickstart", "--out", str(OUT))
    assert f"error: {OUT}: holds a quickstart on data of one's own" in other.err


def test_a_dry_run_leaves_nothing(asking: Path, llmctl: Program) -> None:
    before = snapshot(asking)
    ended = llmctl(*WORDS, "--minutes", "0.0001", "--dry-run")
    assert ended.code == 0, ended.err
    assert snapshot(asking) == before
    assert [line.split()[1] for line in ended.out.splitlines()] == ["sft", "dpo", "merge", "quantize"]
    assert "--max-steps 1 " in ended.out
    assert "sft: 1 steps (bounded by --minutes 0.0001), " in ended.err


def test_an_interruption_of_the_trial_says_so(
    asking: Path, llmctl: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*words: Any) -> Any:
        raise Interrupted("/tmp/trial: interrupted at step 1 of 3; the state was saved", "add --resume")

    monkeypatch.setattr(sft, "run", interrupted)
    before = snapshot(asking)
    ended = llmctl(*WORDS)
    assert ended.code == 130 and snapshot(asking) == before
    assert ended.err.splitlines()[-2:] == [
        "interrupted before anything was written",
        "hint: run the same command again",
    ]


# --- bad input ---------------------------------------------------------------------------------------


def rows(name: str, *records: dict[str, Any]) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / name).write_text("".join(json.dumps(one) + "\n" for one in records)) and None
    )


def ask(n: int) -> dict[str, str]:
    return {"question": f"What is {n}?", "answer": f"{n} it is."}


BAD: dict[str, tuple[str, Callable[[Path], object] | None, str, str]] = {
    "no data": (
        "--model base",
        None,
        "--data is missing",
        "write llmctl quickstart --model MODEL --data answers.json [--pairs pairs.json] [--eval heldout.json]",
    ),
    "no model": (
        "--data talks.jsonl",
        None,
        "--model is missing",
        "write llmctl quickstart --model MODEL --data answers.json [--pairs pairs.json] [--eval heldout.json]",
    ),
    "no time": (
        "--model base --data talks.jsonl --minutes 0",
        None,
        "--minutes: 0 is no time to train",
        "give a number above 0, or leave it out",
    ),
    "a model that is not there": (
        "--model ./nowhere --data talks.jsonl",
        None,
        "./nowhere: no such folder",
        "name a folder with a model, or a hub id",
    ),
    "few rows": (
        "--model base --data few.jsonl",
        rows("few.jsonl", *(ask(n) for n in range(7))),
        "few.jsonl: 7 rows are too few to train on and to measure what that changed",
        "give at least 8; a few hundred are usual",
    ),
    "one question": (
        "--model base --data same.jsonl",
        rows("same.jsonl", *(ask(1) | {"answer": str(n)} for n in range(9))),
        "same.jsonl: all rows ask the same question, so none can be held out for evaluation",
        "name other rows with --eval",
    ),
    "pairs as data": (
        "--model base --data pairs.jsonl",
        None,
        "pairs.jsonl:1: is a pair of answers (`preference`), but --data takes one answer a question",
        "name the file with --pairs",
    ),
    "text as data": (
        "--model base --data data.jsonl",
        None,
        "data.jsonl:1: is no question with an answer: the record is `text`",
        "`llmctl pretrain MODEL --data FILE` trains on plain text",
    ),
    "answers as pairs": (
        "--model base --data talks.jsonl --pairs ask.jsonl",
        rows("ask.jsonl", *(ask(n) for n in range(9))),
        "ask.jsonl:1: no pair of answers: the record is `alpaca`",
        "a pair has `prompt`, `chosen` and `rejected`; docs/data.md lists the formats",
    ),
    "pairs of one prompt": (
        "--model base --data talks.jsonl --pairs one.jsonl",
        rows("one.jsonl", *({"prompt": "Who?", "chosen": f"{n}.", "rejected": "No."} for n in range(9))),
        "all pairs have the same prompt, so none can be held out for evaluation",
        "give more data, name evaluation data in data.eval, or set data.eval_fraction=0",
    ),
    "a folder of something else": (
        "--model base --data talks.jsonl --out tok",
        None,
        "tok: the folder holds something else (chat_template.jinja)",
        "choose another --out",
    ),
    "columns that are not there": (
        "--model base --data talks.jsonl --columns prompt=q,response=a",
        None,
        "talks.jsonl:1: no column `q`, which is the prompt; there is `instruction`, `input`, `output`",
        "mend the record, or name another column",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, asking: Path, llmctl: Program) -> None:
    words, make, error, hint = BAD[name]
    if make is not None:
        make(asking)
    before = snapshot(asking)
    ended: Outcome = llmctl("quickstart", *words.split())
    assert ended.err.splitlines()[-2:] == [f"error: {error}", f"hint: {hint}"], ended.err
    assert ended.code in (1, 2) and not ended.out and "Traceback" not in ended.err
    assert snapshot(asking) == before


def test_a_command_line_is_one_a_shell_takes() -> None:
    fields = {
        "base": "my model",
        "method": "lora",
        "data.train": ["a b.json", "c"],
        "data.columns": {"prompt": "q"},
    }
    written = command_line("sft", fields | {"train.learning_rate": 5e-5, "device": None})
    assert written == (
        "llmctl sft 'my model' --lora --data 'a b.json' --data c --columns prompt=q train.learning_rate=5e-05"
    )
