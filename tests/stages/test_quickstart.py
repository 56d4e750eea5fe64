"""`llmctl quickstart`: what reaches which stage, what is kept and what is made anew; and a tiny lifecycle for real."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmctl.errors import Interrupted, UserError
from llmctl.lock import Lock
from llmctl.recipe.load import dump_recipe
from llmctl.runs import Run, RunResult, finished_metrics, read_manifest
from llmctl.stages import chat, evaluate, lifecycle, quickstart
from llmctl.stages.lifecycle import FIGURES, STEPS
from llmctl.stages.text import parent
from llmctl.talk import SILENT
from tests.program import Program
from tests.stages.bad_input import snapshot
from tests.stages.conftest import FEW, SMALL

TRAINED = {name for name, step in STEPS.items() if step.trains}
MADE_FROM = {name: step.made_from for name, step in STEPS.items() if step.made_from}
QUESTIONS = 1000


class Fakes:
    """Stages that only leave a run folder, and note what they were told.

    Attributes:
        began: the steps that did work, in order; `resumed` those that were told to go on.
        recipes: by step, the last it was given.
        dies: the step that ends in the middle of its work, as if by `how`.
        content: what the weights hold, beyond what they were made from.
        right: by step, how many questions its model answers.
    """

    def __init__(self) -> None:
        self.began: list[str] = []
        self.resumed: list[str] = []
        self.recipes: dict[str, Any] = {}
        self.asked: list[Any] = []
        self.talked: list[Any] = []
        self.dies, self.how = "", KeyboardInterrupt()
        self.content: dict[str, str] = {}
        self.right = {"pretrain": 20, "sft": 950, "dpo": 940, "merge": 940, "int8": 941, "gptq4": 930}

    def stage(self, name: str) -> Callable[..., RunResult]:
        def run(recipe: Any, talk: Any, **more: bool) -> RunResult:
            step, out, resume = STEPS[name], Path(recipe.out), more.get("resume", False)
            self.recipes[name] = recipe
            saved = dump_recipe(recipe.model_copy(update={"out": None}))
            if resume and (found := finished_metrics(step.stage, out, saved)) is not None:
                return RunResult(out, found)
            self.began.append(name)
            self.resumed += [name] if resume else []
            where = getattr(recipe, step.into, None)
            parents = [parent("model", where)] if where else []
            with Run.start(step.stage, out, saved, resume=resume, parents=parents) as opened:
                (out / "half").write_text("begun")
                if name == self.dies:
                    raise self.how
                file = out / step.size.replace("*", "model")
                file.write_text(name + self.content.get(name, "") + str([one["hash"] for one in parents]))
                opened.finish(metrics := {"eval_loss": 0.5, "eval_accuracy": 0.9, "seconds": 0.01} | ENDS)
            return RunResult(out, metrics)

        return run

    def evaluate(self, recipe: Any, talk: Any) -> dict[str, Any]:
        self.asked.append(recipe)
        right = self.right[Path(recipe.base).name]
        matches = [int(number < right) for number in range(QUESTIONS)]
        share = {"exact_match": right / QUESTIONS, "exact_match_low": 0.0, "exact_match_high": 1.0}
        return {"loss": 0.25, "perplexity": 1.284, "matches": matches, **share}

    def begin(self, recipe: Any, talk: Any) -> Any:
        self.talked.append(recipe)
        return self

    def ask(self, text: str) -> Any:
        return chat.Exchange(text, f"answer to {text}", "stop", 5, 5, 256, 100.0)


ENDS = {"eval_accuracy_low": 0.85, "eval_accuracy_high": 0.95}


@pytest.fixture
def fakes(here: Path, monkeypatch: pytest.MonkeyPatch) -> Fakes:
    made = Fakes()
    for name, step in STEPS.items():
        monkeypatch.setitem(STEPS, name, dataclasses.replace(step, run=made.stage(name)))
    monkeypatch.setattr(evaluate, "run", made.evaluate)
    monkeypatch.setattr(chat, "begin", made.begin)
    return made


class Said:
    """A talk that keeps what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    bar = SILENT.bar


def again(**more: Any) -> list[str]:
    """Run in the folder `o`; what was said."""
    said = Said()
    quickstart.run(**{"out": "o", "seed": None, "device": None, "talk": said} | more)
    return said.lines


# --- what reaches which stage ------------------------------------------------------------------------


def test_seed_device_and_parents_reach_every_stage(fakes: Fakes) -> None:
    again(seed=7, device="cpu")
    assert fakes.began == list(STEPS) and not fakes.resumed
    for name, recipe in fakes.recipes.items():
        assert recipe.out == f"o/{name}"
        assert getattr(recipe, "device", "cpu") == "cpu"
        assert not hasattr(recipe, "train") or recipe.train.seed == 7
        assert name == "tokenizer" or getattr(recipe, STEPS[name].into) == f"o/{MADE_FROM[name]}"
    assert {name for name, recipe in fakes.recipes.items() if hasattr(recipe, "train")} == TRAINED
    assert [recipe.base for recipe in fakes.asked] == [f"o/{name}" for name in fakes.right]
    for recipe in fakes.asked:
        assert recipe.device == "cpu" and recipe.eval.answers and recipe.eval.data == [lifecycle.QUESTIONS]
    (talked,) = fakes.talked
    assert (talked.base, talked.device, talked.chat.seed) == ("o/gptq4", "cpu", 7)
    assert (talked.chat.temperature, talked.chat.history) == (0.0, False)


def test_without_flags_the_recipes_decide(fakes: Fakes) -> None:
    quickstart.run(None, None, None, SILENT)
    for name, recipe in fakes.recipes.items():
        assert recipe.out == f"runs/quickstart/{name}"
        assert getattr(recipe, "device", "auto") == "auto"
        assert name not in TRAINED or recipe.train.seed == 0


def test_bad_seeds_are_refused_before_any_work(fakes: Fakes) -> None:
    with pytest.raises(UserError, match=r"train\.seed: should be greater than or equal to 0, not -1"):
        again(seed=-1)
    assert not fakes.began and not Path("o").exists()


# --- the rows ----------------------------------------------------------------------------------------


def test_rows(fakes: Fakes) -> None:
    found = quickstart.run("o", None, None, SILENT)
    rows = {row["stage"]: row for row in found["rows"]}
    assert list(rows) == list(STEPS)
    for row in rows.values():
        assert set(row) == {"stage", "seconds", "measuring", *FIGURES} - {"matches"}
        assert 0 <= row["seconds"] < 60 and row["size_bytes"] > 0
    column = {name: [row[name] for row in rows.values()] for name in FIGURES if name != "matches"}
    assert column["exact_match"] == [None, 0.02, 0.95, None, 0.94, 0.94, 0.941, 0.93]
    assert column["loss"] == [None, 0.5, 0.25, 0.5, 0.25, 0.25, 0.25, 0.25]  # of text and of pairs: theirs
    assert [value and round(value, 2) for value in column["perplexity"]] == [
        None,
        1.65,
        *[1.28, None],
        *[1.28] * 4,
    ]
    assert column["preference_accuracy"] == [None, None, None, 0.9, 0.9, None, None, None]
    assert column["preference_accuracy_low"][3:5] == [0.85, 0.85]
    assert column["change_from"] == [None, None, "pretrain", None, "sft", "dpo", "merge", "merge"]
    assert [value and round(value, 3) for value in column["change"]][2:] == [
        0.93,
        None,
        -0.01,
        0.0,
        0.001,
        -0.01,
    ]
    assert column["change_low"][4] < -0.01 < column["change_high"][4] < 0
    assert found["seconds"] == sum(row["seconds"] + row["measuring"] for row in rows.values())
    assert 10e6 < found["peak_memory_bytes"] < 1e12
    assert found["model"] == "o/gptq4"
    assert found["exchange"]["answer"] == f"answer to {found['exchange']['prompt']}"
    assert found["exchange"]["expected"].endswith(".")


# --- running it again --------------------------------------------------------------------------------


def test_what_is_done_is_kept(fakes: Fakes) -> None:
    first = quickstart.run("o", None, None, SILENT)
    before, asked = snapshot(Path("o")), len(fakes.asked)
    fakes.began.clear()
    assert quickstart.run("o", None, None, SILENT) == first | {
        "peak_memory_bytes": first["peak_memory_bytes"]
    }
    assert not fakes.began and len(fakes.asked) == asked and snapshot(Path("o")) == before


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("trace", ["a kill", "a kill before the manifest", "Ctrl-C"])
def test_after_a_kill(name: str, trace: str, fakes: Fakes) -> None:
    """The stages before are kept; a training goes on, and another stage begins in a clean folder."""
    fakes.dies = name
    with pytest.raises(KeyboardInterrupt):
        again()
    run = Path("o") / name
    manifest = read_manifest(run)
    assert manifest["status"] == "interrupted"
    if trace == "a kill":
        (run / "run.json").write_text(json.dumps(manifest | {"status": "running"}))
    elif trace == "a kill before the manifest":
        for file in run.iterdir():
            file.unlink()
        (run / "recipe.yaml").write_text("")
        left = Path("o") / f".tmp-{name}-x"
        left.mkdir()
    before = list(STEPS).index(name)
    assert fakes.began == list(STEPS)[: before + 1]
    fakes.began.clear()
    fakes.dies = ""
    again()
    assert fakes.began == list(STEPS)[before:]
    assert fakes.resumed == ([name] if name in TRAINED else [])
    assert read_manifest(run)["status"] == "done"
    assert not list(Path("o").glob(".tmp-*"))


def test_an_interrupted_training_says_how_to_go_on(fakes: Fakes) -> None:
    fakes.dies, fakes.how = "sft", Interrupted("o/sft: interrupted at step 3 of 9", "add --resume")
    with pytest.raises(Interrupted) as raised:
        again()
    assert raised.value.message == "o/sft: interrupted at step 3 of 9"
    assert raised.value.hint == "run the same command again to go on"


def test_work_before_an_interruption_counts(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 10))
    monkeypatch.setattr(quickstart.time, "perf_counter", lambda: next(now))
    fakes.dies = "dpo"
    with pytest.raises(KeyboardInterrupt):
        again()
    fakes.dies = ""
    rows = {row["stage"]: row for row in quickstart.run("o", None, None, SILENT)["rows"]}
    assert (rows["sft"]["seconds"], rows["dpo"]["seconds"]) == (10, 20)


def test_what_was_made_from_something_else_is_made_anew(fakes: Fakes) -> None:
    again()
    fakes.began.clear()
    for file in (Path("o") / "dpo").iterdir():
        file.unlink()
    fakes.content["dpo"] = "other weights"
    said = again()
    assert fakes.began == ["dpo", "merge", "int8", "gptq4"]
    assert "o/merge: was made from another dpo; making it anew" in said
    fakes.began.clear()
    fakes.right["merge"] = 900  # a model that is the same is not asked again
    rows = {row["stage"]: row for row in quickstart.run("o", None, None, SILENT)["rows"]}
    assert not fakes.began and rows["merge"]["exact_match"] == 0.94


def test_another_seed_needs_another_folder(fakes: Fakes) -> None:
    again(seed=1)
    with pytest.raises(UserError, match=r"o/pretrain: train\.seed was 1 when the run began, and is 2 now"):
        again(seed=2)


# --- folders of something else -----------------------------------------------------------------------


def foreign(kind: str) -> None:
    """Put something at `o`."""
    out = Path("o")
    if kind == "file":
        out.write_text("")
        return
    (out / "merge").mkdir(parents=True)
    if kind == "something else":
        (out / "thesis.txt").write_text("")
    elif kind == "no run":
        (out / "merge" / "model.safetensors").write_text("")
    elif kind == "another stage":
        (out / "merge" / "run.json").write_text('{"stage": "dpo", "status": "done"}')


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("file", "o: is a file, but --out names a folder"),
        ("something else", "o: the folder holds something else (thesis.txt)"),
        ("no run", "o/merge: not a run, so there is nothing to resume"),
        ("another stage", "o/merge: holds a `dpo` run, not `merge`"),
    ],
)
def test_what_is_not_ours_is_refused_and_left_alone(kind: str, message: str, fakes: Fakes) -> None:
    foreign(kind)
    before = snapshot(Path("o")) if Path("o").is_dir() else {}
    with pytest.raises(UserError) as raised:
        again()
    assert raised.value.message == message and raised.value.hint.startswith("choose another")
    after = snapshot(Path("o")) if Path("o").is_dir() else {}
    assert {name: after[name] for name in before} == before


def test_one_at_a_time(fakes: Fakes) -> None:
    lock = Lock(Path("o"))
    lock.acquire()
    with pytest.raises(UserError, match="o: the run is in use by process"):
        again()
    lock.release()
    assert not fakes.began


# --- for real, in small ------------------------------------------------------------------------------


@pytest.fixture
def tiny(corpus: Path, talks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage as it is, on a smaller world."""
    pairs = talks.parent / "pairs.jsonl"
    rows = [{"prompt": f"Who is {n}?", "chosen": f"It is {n}.", "rejected": f"{n} is it."} for n in range(12)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = dict(word.split("=") for word in FEW if not word.startswith("train.sample"))
    one = {name: json.loads(value) if value[0].isdigit() else value for name, value in few.items()}
    world = {"data.train": [str(corpus)]}
    size = {name: int(value) for name, value in (word.split("=") for word in SMALL)}
    fields: dict[str, dict[str, Any]] = {
        "tokenizer": world | {"vocab_size": 300},
        "pretrain": world | size | {"data.max_length": 64, "train.max_steps": 4, "train.threads": 1},
        "sft": one | {"data.train": [str(talks)]},
        "reward": one | {"data.train": [str(pairs)], "data.eval": [str(pairs)]},
        "dpo": one | {"data.train": [str(pairs)], "data.eval": [str(pairs)]},
        "merge": {},
        "int8": {"compare.data": [str(talks)]},
        "gptq4": {
            "compare.data": [str(talks)],
            "quantize.calibration": [str(talks)],
            "quantize.group_size": 16,
        },
    }
    monkeypatch.setattr(lifecycle, "QUESTIONS", str(talks))
    for name, step in STEPS.items():
        monkeypatch.setitem(STEPS, name, dataclasses.replace(step, fields={**step.fields, **fields[name]}))


def test_a_tiny_lifecycle(tiny: None, here: Path, llmctl: Program) -> None:
    first = llmctl("quickstart", "--json")
    assert first.code == 0, first.err
    found = json.loads(first.out)
    assert [row["stage"] for row in found["rows"]] == list(STEPS)
    assert "1/8 tokenizer" not in first.out and "step 8 of 8: gptq4" in first.err
    for name in STEPS:
        assert read_manifest(here / "runs/quickstart" / name)["status"] == "done"
    asked = json.loads(
        llmctl("eval", found["model"], "--data", lifecycle.QUESTIONS, "--answers", "--json").out
    )
    last = found["rows"][-1]
    assert (last["loss"], last["exact_match"]) == (asked["loss"], asked["exact_match"])
    assert last["size_bytes"] < found["rows"][-2]["size_bytes"] < found["rows"][-3]["size_bytes"]

    second = llmctl("quickstart")
    assert second.code == 0 and "runs/quickstart/merge: done before; kept\n" in second.err
    lines = second.out.splitlines()
    assert lines[0].split() == ["stage", "time", "size", "loss", "exact", "match", "change", "preferred"]
    assert [line.split()[0] for line in lines[1:9]] == list(STEPS)
    assert f"> {found['exchange']['prompt']}" in lines
    assert not [line for line in lines[:-1] if len(line) > 80]
