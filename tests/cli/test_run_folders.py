"""`llmctl runs verify | rm | rename | watch`, MODEL@STEP and --name."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

from llmctl import checkpoints
from llmctl.checkpoints import choose_checkpoint, list_checkpoints, seal_state
from llmctl.cli import watch
from llmctl.cli.watch import Tail, curve
from llmctl.errors import UserError
from llmctl.files import file_hash
from llmctl.runs import Run
from tests.cli.fake_stages import Calls
from tests.cli.test_runs_command import make_run
from tests.program import Program


def add_checkpoint(run: Path, step: int, text: str = "x") -> Path:
    path = run / "checkpoints" / f"step-{step:06d}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text(text)
    about = {"files": {"model.safetensors": len(text)}}
    hashes = {"model.safetensors": file_hash(path / "model.safetensors")}
    state = seal_state({"step": step, "tokens": 1, "seconds": 1.0, **about, "hashes": hashes})
    (path / "state.json").write_text(json.dumps(state))
    return path


# --- verify -----------------------------------------------------------------------------------------


def test_verify(llmctl_: Program) -> None:
    assert llmctl_("runs", "verify").out == "no runs in runs\n"
    base = make_run(Path("runs/base"), "pretrain")
    other = make_run(Path("runs/other"), "pretrain")
    saved = add_checkpoint(base, 5)
    ended = llmctl_("runs", "verify")
    assert ended.code == 0
    assert ended.out == "runs/base  ok  2 files, 5 B\nruns/other  ok  1 files, 5 B\n"
    (saved / "model.safetensors").write_text("y")
    (other / "weights.safetensors").unlink()
    ended = llmctl_("runs", "verify")
    assert ended.code == 3
    place = "runs/base/checkpoints/step-000005/model.safetensors"
    line = f"{place}: damaged: its bytes are not those that were written"
    assert ended.err == (
        f"error: {line}; 2 runs in all\n"
        "hint: copy it back from where it is whole, or make the run again with another --out\n"
    )
    assert f"  {line}\n" in ended.out and "  runs/other/weights.safetensors: is missing\n" in ended.out
    found = json.loads(llmctl_("runs", "verify", "other", "--json").out)
    assert found[0]["damaged"] == ["runs/other/weights.safetensors: is missing"]
    Path("plain").mkdir()
    assert "plain: not a run folder (no run.json)" in llmctl_("runs", "verify", "plain").err


# --- rm ---------------------------------------------------------------------------------------------


def test_rm_refuses_what_others_need(llmctl_: Program) -> None:
    base = make_run(Path("runs/base"), "pretrain")
    child = make_run(Path("runs/child"), "sft", ("model", base))
    ended = llmctl_("runs", "rm", "base", "--yes")
    assert ended.code == 1
    assert ended.err == (
        "error: runs/base: runs/child was made from it\nhint: delete that first, or add --force\n"
    )
    shutil.move(base, "runs/moved")  # known by its content
    assert "runs/child was made from it" in llmctl_("runs", "rm", "moved", "--yes").err
    count = sum(file.stat().st_size for file in Path("runs/moved").iterdir())
    freed = json.loads(llmctl_("runs", "rm", "moved", "--yes", "--force", "--json").out)
    assert freed == [{"path": "runs/moved", "bytes": count}] and not Path("runs/moved").exists()
    assert child.exists() and [path.name for path in Path("runs").iterdir()] == ["child"]


def test_rm_of_a_family_and_of_a_damaged_run(llmctl_: Program) -> None:
    base = make_run(Path("runs/base"), "pretrain")
    add_checkpoint(base, 5)
    make_run(Path("runs/child"), "sft", ("model", base / "checkpoints/step-000005"))
    assert "runs/child was made from it" in llmctl_("runs", "rm", "base", "--yes").err
    (base / "run.json").write_text("{")
    ended = llmctl_("runs", "rm", "base", "child", "--yes")
    assert ended.code == 0 and ended.out.startswith("deleted runs/base: ") and " freed\n" in ended.out
    assert list(Path("runs").iterdir()) == []


def test_rm_refuses_what_is_no_run_or_is_in_use(llmctl_: Program) -> None:
    Path("plain").mkdir()
    assert "error: plain: not a run folder" in llmctl_("runs", "rm", "plain", "--yes").err
    path = make_run(Path("runs/base"), "pretrain")
    Path("runs/link").symlink_to("base")
    assert "error: runs/link: is a link to base" in llmctl_("runs", "rm", "runs/link", "--yes").err
    make_run(path / "inner", "sft")
    assert (
        "error: runs/base: holds another run, runs/base/inner" in llmctl_("runs", "rm", "base", "--yes").err
    )
    with Run.start("sft", Path("runs/live"), "stage: sft\n"):
        ended = llmctl_("runs", "rm", "live", "--yes", "--force")
        assert ended.code == 1
        assert f"error: runs/live: the run is in use by process {os.getpid()} on " in ended.err
        assert "hint: stop it first, then run this again\n" in ended.err
        assert "the run is in use" in llmctl_("runs", "rename", "live", "dead").err
    assert Path("runs/live/run.json").exists()


def test_rm_asks(llmctl_: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_run(Path("runs/base"), "pretrain")
    ended = llmctl_("runs", "rm", "base")
    assert ended.code == 2
    assert ended.err == ("error: nobody is there to be asked\nhint: add --yes to delete without asking\n")

    class Typed(io.StringIO):
        def isatty(self) -> bool:
            return True

    for answer, stays in (("\n", True), ("", True), ("n\n", True), ("y\n", False)):
        monkeypatch.setattr(sys, "stdin", Typed(answer))
        ended = llmctl_("runs", "rm", "base")
        assert ended.err.startswith("delete runs/base (pretrain, done, ") and ended.err.endswith(")? [y/N] ")
        assert path.exists() is stays


# --- rename -----------------------------------------------------------------------------------------


def test_rename_keeps_lineage(llmctl_: Program) -> None:
    base = make_run(Path("runs/base"), "pretrain")
    saved = add_checkpoint(base, 5)
    make_run(Path("runs/child"), "sft", ("model", base))
    make_run(Path("runs/other"), "sft", ("model", saved))
    ended = llmctl_("runs", "rename", "base", "english")
    assert ended.out == (
        "runs/base is now runs/english\nmade from it, and finding it by its content: runs/child, runs/other\n"
    )
    assert "└─ model: runs/english (pretrain) moved from runs/base" in llmctl_("runs", "lineage", "child").out
    assert (
        "└─ model: runs/english/checkpoints/step-000005 (pretrain) moved from runs/base/checkpoints/step-000005"
        in llmctl_("runs", "lineage", "other").out
    )


@pytest.mark.parametrize(
    ("name", "code", "error"),
    [
        ("other", 1, "runs/other: exists already"),
        (".hidden", 2, "`.hidden` is not a name for a run"),
        ("", 2, "`` is not a name for a run"),
        ("runs/base/inner", 1, "runs/base/inner: lies inside the run itself"),
        ("x" * 300, 1, f"runs/{'x' * 35}…: no file can have so long a name"),
    ],
)
def test_rename_refuses(name: str, code: int, error: str, llmctl_: Program) -> None:
    make_run(Path("runs/base"), "pretrain")
    make_run(Path("runs/other"), "pretrain")
    ended = llmctl_("runs", "rename", "base", name)
    assert ended.code == code and ended.err.startswith(f"error: {error}\n") and "\nhint: " in ended.err
    assert Path("runs/base/run.json").exists()


# --- watch ------------------------------------------------------------------------------------------


def test_watch_writes_a_line_for_each_row_and_ends_with_the_run(
    llmctl_: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "EVERY", 0.02)
    path, began = Path("runs/live"), threading.Event()

    def work() -> None:
        with Run.start("sft", path, "stage: sft\n") as run:
            for step in range(1, 6):
                with open(path / "metrics.jsonl", "a", encoding="utf-8") as file:
                    file.write(f'{{"step": {step}, "lo')
                    file.flush()
                    began.set()
                    time.sleep(0.03)
                    file.write('ss": 2.5}\n')
            (path / "metrics.jsonl").open("ab").write(b"\xff\n")
            run.finish({})

    thread = threading.Thread(target=work)
    thread.start()
    began.wait()
    ended = llmctl_("runs", "watch", "live")
    thread.join()
    assert ended.out.splitlines() == [
        *(f"step {step}  loss 2.5" for step in range(1, 6)),
        "runs/live: done",
    ]
    rows = [json.loads(line) for line in llmctl_("runs", "watch", "live", "--json").out.splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]


def test_watch_begins_again_where_a_resumed_run_wrote_its_lines_anew(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tail = Tail(file)
    assert tail.read() == (False, [])
    file.write_text('{"step": 1}\n{"step": 2}\n')
    assert tail.read() == (True, [{"step": 1}, {"step": 2}])
    (tmp_path / "new").write_text('{"step": 1}\n{"step": 9}\n')
    os.replace(tmp_path / "new", file)
    assert tail.read() == (True, [{"step": 1}, {"step": 9}])
    assert tail.read() == (False, [])
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="not a regular file"):
        tail.read()


def test_the_page_shows_how_far_it_is(tmp_path: Path) -> None:
    from rich.console import Console

    recipe = "stage: sft\ntrain:\n  max_steps: 10\n"
    with Run.start("sft", tmp_path / "r", recipe):
        rows = [
            {"step": step, "loss": 10.0 - step, "tokens_per_second": 10.0, "tokens": step * 100}
            for step in range(1, 6)
        ]
        (tmp_path / "r" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        seen = watch.Watched(tmp_path / "r")
        seen.look()
        console = Console(width=200, file=io.StringIO())
        console.print(watch._page(seen))
        assert isinstance(console.file, io.StringIO)
        text = console.file.getvalue()
    assert "sft, running" in text and "5  50%" in text and "about 0:50 left" in text and "█▆▅▃▁" in text
    assert curve([float("nan"), 1.0, 1.0]) == " ▁▁" and curve([]) == ""
    assert len(curve([float(n) for n in range(1000)])) == watch.CURVE


# --- MODEL@STEP -------------------------------------------------------------------------------------


def test_a_checkpoint_is_chosen_by_step_best_and_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs/a")
    for step in (10, 20, 30, 40):
        add_checkpoint(run, step)
    # the lowest loss was measured where there is no checkpoint: it is not one's own
    losses = {10: 3.0, 20: 2.0, 25: 1.0, 30: 2.0}
    rows = [{"step": step, "eval_loss": loss} for step, loss in losses.items()]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 40, "loss": 0.5}])
    )
    (run / "checkpoints/step-000040/state.json").write_text("{")  # damaged: not there
    assert [(one.step, one.loss) for one in list_checkpoints(run)] == [(10, 3.0), (20, 2.0), (30, 2.0)]
    chosen = {"10": "10", "best": "20", "last": "30", "000030": "30"}
    for which, step in chosen.items():
        assert choose_checkpoint(f"runs/a@{which}") == f"runs/a/checkpoints/step-0000{step}"
    for plain in ("runs/a", "a@b", "user/name", "runs/a@x1", "@best"):
        assert choose_checkpoint(plain) == plain
    Path("runs/a@10").mkdir()
    assert choose_checkpoint("runs/a@10") == "runs/a@10"
    (run / "metrics.jsonl").unlink()
    add_checkpoint(Path("runs/b@20"), 10)
    assert choose_checkpoint("runs/b@20@last") == "runs/b@20/checkpoints/step-000010"


@pytest.mark.parametrize(
    ("where", "message", "hint"),
    [
        ("runs/no@best", "runs/no: no such folder, so it has no checkpoint @best", "see `llmctl runs list`"),
        ("runs/empty@last", "runs/empty: has no checkpoints", "leave out @last to use the model itself"),
        ("runs/a@15", "runs/a: has no checkpoint of step 15", "it has 10, 20"),
        (
            "runs/a@best",
            "runs/a: none of its checkpoints was evaluated at its own step, so none is the best",
            "name a step: 10, 20",
        ),
    ],
)
def test_checkpoints_that_are_not_there(
    where: str, message: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/empty").mkdir(parents=True)
    for step in (10, 20):
        add_checkpoint(Path("runs/a"), step)
    with pytest.raises(UserError) as caught:
        choose_checkpoint(where)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_a_recipe_names_the_checkpoint_that_was_chosen(llmctl_: Program, calls: Calls) -> None:
    add_checkpoint(Path("runs/a"), 10)
    assert llmctl_("pretrain", "runs/a@last", "--name", "new").code == 0
    assert calls.recipe.base == "runs/a/checkpoints/step-000010"
    assert calls.recipe.out == "runs/new"
    assert llmctl_("generate", "runs/a@7", "x").code == 1


def test_show_lists_checkpoints(llmctl_: Program) -> None:
    run = make_run(Path("runs/a"), "pretrain")
    for step in (10, 20):
        add_checkpoint(run, step)
    (run / "metrics.jsonl").write_text('{"step": 20, "eval_loss": 1.25}\n')
    lines = llmctl_("runs", "show", "a").out.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("checkpoints"))
    assert checkpoints.BEST in lines[begin]
    assert [line.split()[:2] for line in lines[begin + 2 : begin + 4]] == [["10", "-"], ["20", "1.25"]]
    assert lines[begin + 3].endswith("  best")
    shown = json.loads(llmctl_("runs", "show", "a", "--json").out)
    assert shown["checkpoints"][1]["eval_loss"] == 1.25 and shown["damaged"] == []


# --- --name -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--name a --out b", "--name and --out exclude each other"),
        ("--name a out=b", "--name and --out exclude each other"),
        ("--name a/b", "--name: `a/b` is not a plain name"),
        ("--name ..", "--name: `..` is not a plain name"),
    ],
)
def test_names_that_are_refused(words: str, error: str, llmctl_: Program, calls: Calls) -> None:
    ended = llmctl_("pretrain", *words.split())
    assert ended.code == 2 and ended.err.startswith(f"error: {error}\nhint: ")


def test_rm_of_one_run_named_twice(llmctl_: Program) -> None:
    path = make_run(Path("runs/base"), "pretrain")
    ended = llmctl_("runs", "rm", "base", str(path.resolve()), "--yes")
    assert ended.code == 0 and ended.out.count("deleted") == 1
    assert list(Path("runs").iterdir()) == []


@pytest.mark.parametrize("words", [("rm", ".", "--yes"), ("rename", ".", "../new")])
def test_the_folder_a_command_runs_in_stays(
    words: tuple[str, ...], llmctl_: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_run(Path("runs/base"), "pretrain").resolve()
    monkeypatch.chdir(path)
    ended = llmctl_("runs", *words)
    assert ended.code == 1
    assert ended.err == f"error: .: is where this command runs\nhint: `cd {path.parent}` first\n"
    assert path.is_dir() and not list(path.glob(".tmp-*"))
