"""Run folders: who may write one, what its manifest says, and how a parent is found again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmctl import lock, runs, signals
from llmctl.errors import Interrupted, UserError
from llmctl.lock import Lock
from llmctl.runs import Run, check_out, find_parent, find_runs, folder_hash, read_manifest, status_of

RECIPE = "stage: pretrain\nout: r\ntrain:\n  seed: 1\n  save_steps: 5\n"


def manifest(path: Path) -> dict[str, Any]:
    return read_manifest(path)


# --- the lock ---------------------------------------------------------------------------------------


@pytest.fixture
def sleeper() -> Iterator[int]:
    """The pid of another live process."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process.pid
    process.kill()
    process.wait()


def write_lock(folder: Path, **owner: Any) -> None:
    (folder / lock.LOCK).write_text(json.dumps(owner))


def test_a_lock_is_taken_and_given_back(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "new"), Lock(tmp_path / "new")
    first.acquire()
    assert second.holder() == (os.getpid(), socket.gethostname())
    with pytest.raises(UserError) as caught:
        second.acquire()
    assert caught.value.message == f"{tmp_path / 'new'}: the run is in use by process {os.getpid()}"
    assert caught.value.hint == "wait for it, or stop it, then run the same command again"
    second.release()  # it never had the lock, so this must not free it
    assert first.file.exists()
    first.release()
    second.acquire()


def test_a_live_process_keeps_its_lock(tmp_path: Path, sleeper: int) -> None:
    write_lock(tmp_path, pid=sleeper, host=socket.gethostname(), started=lock._started(sleeper))
    with pytest.raises(UserError, match=f"in use by process {sleeper}"):
        Lock(tmp_path).acquire()


def test_a_reused_pid_is_not_the_owner(tmp_path: Path, sleeper: int) -> None:
    began = lock._started(sleeper)
    assert began is not None
    write_lock(tmp_path, pid=sleeper, host=socket.gethostname(), started=began - 100)
    assert Lock(tmp_path).holder() is None
    Lock(tmp_path).acquire()


def test_a_dead_process_loses_its_lock(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write_lock(tmp_path, pid=process.pid, host=socket.gethostname(), started=lock._started(process.pid))
    assert Lock(tmp_path).holder() is not None
    process.kill()
    # not waited for yet: a zombie holds nothing either
    while Lock(tmp_path).holder() is not None:
        pass
    process.wait()
    Lock(tmp_path).acquire()


def test_a_process_on_another_host_may_live(tmp_path: Path) -> None:
    write_lock(tmp_path, pid=1, host="elsewhere", started=0.0)
    with pytest.raises(UserError) as caught:
        Lock(tmp_path).acquire()
    assert caught.value.message == f"{tmp_path}: the run is locked by process 1 on elsewhere"
    assert caught.value.hint == f"if that process is gone, delete {tmp_path / lock.LOCK}"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', '{"pid": 1, "host": "h"}'])
def test_a_lock_nobody_finished_writing_is_taken_over(text: str, tmp_path: Path) -> None:
    (tmp_path / lock.LOCK).write_text(text)
    Lock(tmp_path).acquire()


# --- where a run may be written ---------------------------------------------------------------------


def test_check_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_out(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    file, full = tmp_path / "file", tmp_path / "full"
    file.touch()
    full.mkdir()
    check_out(full)
    (full / "x").touch()
    with pytest.raises(UserError) as caught:
        check_out(full, resume=True)
    assert caught.value.message == f"{full}: not a run, so there is nothing to resume"
    assert caught.value.hint == "choose another --out"
    with pytest.raises(UserError) as caught:
        check_out(full, resumable=False)
    assert caught.value.hint == "choose another --out"
    run = tmp_path / "run"
    run.mkdir()
    for name in (".tmp-run.json-x", "run.lock", "recipe.yaml", "run.json", "model.safetensors"):
        (run / name).touch()  # each of these is a state that a killed process may leave
        check_out(run, resume=True)
    wrong = {
        file: (f"{file}: is a file, but --out names a folder", "choose another name"),
        file / "b": (f"{file}: is a file, so {file / 'b'} cannot be made", "choose another --out"),
        full: (
            f"{full}: the folder is not empty",
            "choose another --out, or add --resume to go on with it",
        ),
    }
    for path, expected in wrong.items():
        with pytest.raises(UserError) as caught:
            check_out(path)
        assert (caught.value.message, caught.value.hint) == expected
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError) as caught:
        check_out(tmp_path / "a" / "b")
    assert caught.value.message == f"{tmp_path}: no permission to write"


def test_default_out_is_the_next_free_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert runs.default_out("eval") == Path("runs/eval-001")
    Path("runs/eval-001").mkdir(parents=True)
    assert runs.default_out("eval") == Path("runs/eval-002")


# --- statuses ---------------------------------------------------------------------------------------


def test_a_run_that_finishes(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with Run.start("pretrain", path, RECIPE, seed=1) as run:
        assert manifest(path)["status"] == "running"
        assert status_of(path, manifest(path)) == "running"
        (path / "model.safetensors").write_text("weights")
        (path / "config.json").write_text("{}")
        (path / "metrics.jsonl").write_text("{}")
        (path / "notes.md").write_text("not a result")
        run.finish({"loss": 1.5})
    done = manifest(path)
    assert done["status"] == status_of(path, done) == "done"
    assert (done["stage"], done["seed"], done["metrics"]) == ("pretrain", 1, {"loss": 1.5})
    assert done["versions"]["python"]
    assert done["outputs"].keys() == {"model.safetensors", "config.json"}
    assert done["hash"] == folder_hash(path)
    assert (path / "recipe.yaml").read_text() == RECIPE
    assert not (path / lock.LOCK).exists()


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (KeyboardInterrupt(), "interrupted", None),
        (Interrupted("saved"), "interrupted", None),
        (UserError("x: wrong"), "failed", "x: wrong"),
        (ValueError("boom"), "failed", "boom"),
    ],
)
def test_a_run_that_ends_early(error: BaseException, status: str, told: str | None, tmp_path: Path) -> None:
    path = tmp_path / "r"
    with pytest.raises(type(error)), Run.start("pretrain", path, RECIPE):
        raise error
    assert (manifest(path)["status"], manifest(path)["error"]) == (status, told)
    Lock(path).acquire()


def test_a_run_without_a_result_failed(tmp_path: Path) -> None:
    with Run.start("pretrain", tmp_path, RECIPE):
        pass
    assert manifest(tmp_path)["status"] == "failed"
    assert manifest(tmp_path)["error"] == "the stage ended without a result"


def test_a_full_disk_does_not_hide_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise UserError("the disk is full")

    with pytest.raises(ValueError, match="the cause"), Run.start("pretrain", tmp_path, RECIPE):
        monkeypatch.setattr(runs, "write_json", full)
        raise ValueError("the cause")
    assert manifest(tmp_path)["status"] == "running"
    assert not (tmp_path / lock.LOCK).exists()
    assert status_of(tmp_path, manifest(tmp_path)) == "crashed"


def test_killed_runs_are_crashed(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom llmctl.runs import Run\n"
        f"Run.start('pretrain', Path(sys.argv[1]), {RECIPE!r})\nos.kill(os.getpid(), 9)"
    )
    path = tmp_path / "r"
    assert subprocess.run([sys.executable, "-c", script, path]).returncode == -9
    assert (path / lock.LOCK).exists()
    assert manifest(path)["status"] == "running"
    assert status_of(path, manifest(path)) == "crashed"
    with Run.start("pretrain", path, RECIPE, resume=True) as run:
        run.finish({})
    assert len(manifest(path)["resumed"]) == 1


# --- resuming ---------------------------------------------------------------------------------------


def started(path: Path) -> Path:
    with pytest.raises(KeyboardInterrupt), Run.start("pretrain", path, RECIPE):
        raise KeyboardInterrupt
    return path


def test_resume_keeps_when_it_was_made(tmp_path: Path) -> None:
    path = started(tmp_path / "r")
    created = manifest(path)["created"]
    freed = RECIPE.replace("save_steps: 5", "save_steps: 9").replace("out: r", "out: elsewhere")
    with Run.start("pretrain", path, freed, resume=True) as run:
        run.finish({})
    assert manifest(path)["created"] == created
    assert manifest(path)["error"] is None


@pytest.mark.parametrize(
    ("stage", "text", "message", "hint"),
    [
        (
            "pretrain",
            RECIPE.replace("seed: 1", "seed: 2"),
            "train.seed was 1 when the run began, and is 2 now",
            "resume with the same recipe, add --resume-with to go on with the new values, "
            "or start a new run with another --out",
        ),
        (
            "pretrain",
            RECIPE + "model:\n  hidden_size: 8\n",
            "model.hidden_size was None when the run began, and is 8 now",
            "resume with the same recipe, or start a new run with another --out",
        ),
        ("eval", RECIPE, "holds a `pretrain` run, not `eval`", "choose another --out"),
    ],
)
def test_resume_refuses_another_run(stage: str, text: str, message: str, hint: str, tmp_path: Path) -> None:
    path = started(tmp_path / "r")
    before = (path / "run.json").read_bytes()
    with pytest.raises(UserError) as caught:
        Run.start(stage, path, text, resume=True)
    assert caught.value.message in (f"{path}: {message}",)
    assert caught.value.hint == hint
    assert (path / "run.json").read_bytes() == before
    assert (path / "recipe.yaml").read_text() == RECIPE
    assert not (path / lock.LOCK).exists()


def test_a_folder_with_something_in_it_needs_resume(tmp_path: Path) -> None:
    path = started(tmp_path / "r")
    with pytest.raises(UserError, match="the folder is not empty"):
        Run.start("pretrain", path, RECIPE)
    assert manifest(path)["status"] == "interrupted"


# --- parents ----------------------------------------------------------------------------------------


def test_find_runs_skips_checkpoints_and_hidden_folders(tmp_path: Path) -> None:
    for name in ("b", "a/deep", "a/deep/checkpoints/step-1", ".tmp-c", "plain/x"):
        (tmp_path / name).mkdir(parents=True)
        if not name.startswith("plain"):
            (tmp_path / name / "run.json").write_text("{}")
    assert [str(p.relative_to(tmp_path)) for p in find_runs(tmp_path)] == ["a/deep", "b"]
    assert list(find_runs(tmp_path / "nowhere")) == []


def test_a_parent_is_found_by_content(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    path = root / "a"
    with Run.start("pretrain", path, RECIPE) as run:
        (path / "model.safetensors").write_text("weights")
        run.finish({})
    parent = {"role": "base", "path": str(path), "hash": folder_hash(path)}
    assert find_parent(parent, root) == path
    shutil.move(path, root / "moved")
    assert find_parent(parent, root) == root / "moved"
    # a copy without its manifest is still the same content
    shutil.copytree(root / "moved", tmp_path / "copy", ignore=shutil.ignore_patterns("run.json"))
    assert find_parent(parent | {"path": str(tmp_path / "copy")}, root) == tmp_path / "copy"
    shutil.rmtree(root / "moved")
    assert find_parent(parent, root) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "{path}: not a run folder (no run.json)"),
        (
            "{",
            "{path}/run.json: not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
            "(char 1))",
        ),
        ("[]", "{path}/run.json: not a manifest"),
    ],
)
def test_damaged_manifests(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read_manifest(tmp_path)
    assert caught.value.message == message.format(path=tmp_path)
    assert caught.value.hint


def test_processes_that_race_for_a_stale_lock_do_not_both_get_it(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from llmctl.errors import UserError; from llmctl.lock import Lock\n"
        "try: Lock(Path(sys.argv[1])).acquire(); print('held', flush=True); sys.stdin.read()\n"
        "except UserError: print('refused', flush=True)"
    )
    write_lock(tmp_path, pid=2**22 + 1, host=socket.gethostname(), started=1.0)
    words = [sys.executable, "-c", script, str(tmp_path)]
    racers = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(6)
    ]
    try:
        said = [racer.stdout.readline().strip() for racer in racers if racer.stdout is not None]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    assert sorted(said) == ["held"] + ["refused"] * 5


def test_finished_metrics_are_those_of_the_same_run_only(tmp_path: Path) -> None:
    path = tmp_path / "r"
    assert runs.finished_metrics("pretrain", path, RECIPE) is None
    with Run.start("pretrain", path, RECIPE) as run:
        assert runs.finished_metrics("pretrain", path, RECIPE) is None
        run.finish({"loss": 1.0})
    assert runs.finished_metrics("pretrain", path, RECIPE) == {"loss": 1.0}
    with pytest.raises(UserError, match="holds a `pretrain` run, not `tokenizer`"):
        runs.finished_metrics("tokenizer", path, RECIPE)
    with pytest.raises(UserError, match=r"train\.seed was 1 when the run began, and is 2 now"):
        runs.finished_metrics("pretrain", path, RECIPE.replace("seed: 1", "seed: 2"))


# --- beginning anew where a run died ----------------------------------------------------------------


def test_a_run_that_ended_without_a_result_is_begun_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), Run.start("merge", out, "a: 1\n", afresh=True):
        (out / "model.safetensors").touch()
        (out / "final").mkdir()
        (out / ".tmp-final-x").mkdir()
        raise KeyboardInterrupt
    assert read_manifest(out)["status"] == "interrupted"
    for stage in ("quantize", None):  # another command's, and a command that would go on with --resume
        with pytest.raises(UserError, match="out: the folder is not empty"):
            check_out(out, resumable=False, afresh=stage)
    (out / "notes.md").touch()
    with pytest.raises(UserError, match="out: the folder is not empty"):
        check_out(out, resumable=False, afresh="merge")  # a file of the user's
    (out / "notes.md").unlink()
    check_out(out, resumable=False, afresh="merge")
    with Run.start("merge", out, "a: 2\n", afresh=True) as run:
        assert sorted(path.name for path in out.iterdir()) == ["recipe.yaml", "run.json", "run.lock"]
        run.finish({})
    with pytest.raises(UserError, match="out: the folder is not empty"):
        check_out(out, resumable=False, afresh="merge")  # a result is not replaced


def test_an_error_that_a_library_made_of_an_interruption_marks_it_interrupted(tmp_path: Path) -> None:
    run = Run.start("merge", tmp_path / "out", "a: 1\n")
    with pytest.raises(RuntimeError), signals.interruptible(), run:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except KeyboardInterrupt:
            raise RuntimeError("import failed") from None
    assert read_manifest(tmp_path / "out")["status"] == "interrupted"
    assert not signals.was_interrupted()
