"""`llmctl push` and `llmctl pull`, by the real client against a hub on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from llmctl.runs import CHECKPOINTS, Parent, Run, folder_hash
from tests.fake_hub import READER, TOKEN, Hub, serve
from tests.program import Program

HOME = "/home/ada/secret"  # a folder of the user that no card may name


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub, and the client set up for it, in an empty folder."""
    found = Hub()
    server = serve(found)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, "")
    monkeypatch.setattr(constants, "ENDPOINT", found.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield found
    server.shutdown()
    server.server_close()


def make_run(
    name: str, stage: str = "merge", weights: str = "model", parent: str | None = None, **more: Any
) -> Path:
    """A finished run with all that a training leaves behind."""
    path = Path("runs") / name
    above = [] if parent is None else [asdict(Parent("model", parent, folder_hash(Path(parent))))]
    data = {
        "train": {
            "sources": [f"{HOME}/answers.json"],
            "tokens": 300,
            "account": {"kept": 12, "read": 13, "noun": "record"},
        }
    }
    with Run.start(
        stage, path, f"stage: {stage}\ndata:\n  train: [{HOME}/answers.json]\n", parents=above, data=data
    ) as run:
        (path / f"{weights}.safetensors").write_bytes(b"weights of " + name.encode())
        (path / "config.json").write_text('{"model_type": "llama"}')
        (path / "chat_template.jinja").write_text("{{ messages }}")
        (path / "metrics.jsonl").write_text('{"step": 10, "loss": 3.5}\n{"step": 20, "loss": 1.25}\n')
        (path / "report.html").write_text("<p>")
        (path / CHECKPOINTS / "step-000020").mkdir(parents=True)
        (path / CHECKPOINTS / "step-000020" / "optimizer.pt").write_bytes(b"moments")
        for file, text in more.items():
            (path / f"{file}.json").write_text(text)
        run.finish({"loss": 1.25, "steps": 20, "seconds": 9.0})
    return path


def test_what_is_pushed(hub: Hub, llmctl: Program) -> None:
    make_run("base", "pretrain")
    make_run("mine", parent="runs/base")
    ended = llmctl("push", "mine", "ada/mine", "--private")
    assert ended.code == 0, ended.err
    assert ended.out.endswith(f"\npushed to {hub.url}/ada/mine (private)\n")
    files = hub.repositories["ada/mine"]
    assert sorted(files) == ["README.md", "chat_template.jinja", "config.json", "model.safetensors"]
    assert files["model.safetensors"] == b"weights of mine"
    assert hub.private["ada/mine"]


def test_a_public_repository_is_the_account_s_default(hub: Hub, llmctl: Program) -> None:
    make_run("mine")
    assert llmctl("push", "runs/mine", "ada/mine").code == 0
    assert not hub.private["ada/mine"]


def test_the_card(hub: Hub, llmctl: Program) -> None:
    make_run("base", "pretrain")
    make_run("mine", parent="runs/base")
    llmctl("push", "mine", "ada/mine")
    card = hub.repositories["ada/mine"]["README.md"].decode()
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llmctl", "merge"],
    }
    assert HOME not in card
    for part in (
        'AutoModelForCausalLM.from_pretrained("ada/mine")',
        "| trained on | answers.json: 12 records, 1 of 13 dropped, 300 tokens |",
        "| loss | 3.5 → 1.25 (nats per token, in training) |",
        "mine (merge, ",
        "  base (pretrain, ",
        "train: [answers.json]",
    ):
        assert part in body, part


def test_a_dry_run_uploads_nothing(hub: Hub, llmctl: Program) -> None:
    make_run("mine")
    ended = llmctl("push", "mine", "ada/mine", "--dry-run", "--json")
    told = json.loads(ended.out)
    assert [one["name"] for one in told["files"]] == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
    ]
    assert told["files"][3]["bytes"] == len(b"weights of mine")
    assert told["card"].startswith("---\nlibrary_name: transformers\n") and hub.asked == []
    assert "would push to" in llmctl("push", "mine", "ada/mine", "--dry-run").out


def test_an_adapter_names_its_base_on_the_hub(hub: Hub, llmctl: Program) -> None:
    make_run("base", "pretrain")
    config = json.dumps({"base_model_name_or_path": f"{HOME}/runs/base", "r": 8})
    make_run("lora", "sft", "adapter_model", parent="runs/base", adapter_config=config)
    ended = llmctl("push", "lora", "ada/lora")
    assert (ended.code, ended.err) == (
        1,
        "error: runs/lora: an adapter, whose base runs/base is a folder here\n"
        "hint: merge it first: `llmctl merge runs/lora`; or say with --base USER/NAME where its base is on the hub\n",
    )
    assert llmctl("push", "lora", "ada/lora", "--base", "ada/base").code == 0
    files = hub.repositories["ada/lora"]
    assert json.loads(files["adapter_config.json"]) == {"base_model_name_or_path": "ada/base", "r": 8}
    card = files["README.md"].decode()
    assert "base_model: ada/base\nbase_model_relation: adapter\n" in card and "AutoPeftModel" in card


def state(path: Path, **fields: Any) -> None:
    file = path / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def damage(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"weights of minf")


REFUSED = {
    "failed": (
        lambda path: state(path, status="failed", stage="sft"),
        "runs/mine: the run is failed, so it has no result to push",
        "`llmctl sft --out runs/mine --resume` goes on with it",
    ),
    "refused": (
        lambda path: state(path, status="refused", refused=["too far"]),
        "runs/mine: its own check refused it: too far",
        "the `llmctl merge` command that made it takes it with --out runs/mine --accept",
    ),
    "changed": (
        damage,
        "runs/mine/model.safetensors: has changed since the run wrote it",
        "put it back, or make the run anew; only intact runs are pushed",
    ),
    "lost": (
        lambda path: (path / "model.safetensors").unlink(),
        "runs/mine/model.safetensors: is missing",
        "put it back, or make the run anew; only intact runs are pushed",
    ),
    "no outputs": (
        lambda path: state(path, outputs=None),
        "runs/mine: its manifest names no result files",
        "run it again, then push",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_pushed(case: str, hub: Hub, llmctl: Program) -> None:
    change, message, hint = REFUSED[case]
    change(make_run("mine"))
    ended = llmctl("push", "mine", "ada/mine")
    assert (ended.code, ended.err) == (1, f"error: {message}\nhint: {hint}\n")
    assert hub.asked == []


NAMES = {
    "mine": ("mine: does not say whose repository it is", "name the account too: USER/mine"),
    "a/b/c": ("a/b/c: not a name on the hub (", "names look like `user/name`"),
    "ada/x--y": ("ada/x--y: not a name on the hub (", "names look like `user/name`"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("words", [("push", "mine"), ("pull",)])
def test_names(name: str, words: tuple[str, ...], hub: Hub, llmctl: Program) -> None:
    make_run("mine")
    ended = llmctl(*words, name)
    message, hint = NAMES[name]
    assert (
        ended.code == 1
        and ended.err.startswith(f"error: {message}")
        and ended.err.endswith(f"hint: {hint}\n")
    )


LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
RIGHTS = (
    "take a token with that right (https://huggingface.co/settings/tokens), and a name of your own account"
)


@pytest.mark.parametrize(
    ("token", "message", "hint"),
    [
        ("hf_unknown", "ada/mine: the hub does not accept the token", LOGIN),
        (READER, "ada/mine: the token has no permission to write to it", RIGHTS),
    ],
)
def test_tokens(
    token: str, message: str, hint: str, hub: Hub, llmctl: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("mine")
    monkeypatch.setenv("HF_TOKEN", token)
    ended = llmctl("push", "mine", "ada/mine")
    assert ended.code == 1 and ended.err.endswith(f"error: {message}\nhint: {hint}\n")
    assert hub.repositories == {}


def test_without_a_token(hub: Hub, llmctl: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("mine")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    ended = llmctl("push", "mine", "ada/mine")
    assert ended.code == 1 and ended.err.endswith(f"error: no token for the hub\nhint: {LOGIN}\n")


def test_a_repository_that_exists(hub: Hub, llmctl: Program) -> None:
    make_run("mine")
    hub.repositories["ada/mine"] = {"notes.txt": b"keep me", "config.json": b"{}"}
    ended = llmctl("push", "mine", "ada/mine")
    assert ended.code == 1 and ended.err.endswith(
        "error: ada/mine: the repository exists on the hub\n"
        "hint: choose another name, or add --update to put these files over those there\n"
    )
    assert hub.repositories["ada/mine"]["config.json"] == b"{}"
    assert llmctl("push", "mine", "ada/mine", "--update").code == 0
    assert hub.repositories["ada/mine"]["notes.txt"] == b"keep me"
    assert json.loads(hub.repositories["ada/mine"]["config.json"]) == {"model_type": "llama"}


@pytest.mark.parametrize("words", [("push", "mine", "ada/mine"), ("pull", "ada/mine")])
def test_no_network(
    words: tuple[str, ...], hub: Hub, llmctl: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("mine")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    ended = llmctl(*words)
    assert ended.code == 1 and ended.err.endswith(
        "error: ada/mine: the hub cannot be reached (http://127.0.0.1:9)\n"
        "hint: check the network, then run it again\n"
    )


# --- pull --------------------------------------------------------------------------------------------

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "README.md": b"# A model",
    "LICENSE": b"terms",
    "pytorch_model.bin": b"pickle",
    "modeling_own.py": b"import os",
    "onnx/config.json": b"{}",
    "optimizer.pt": b"pickle",
}
PULLED = ["LICENSE", "README.md", "config.json", "model.safetensors", "tokenizer.json"]


def there(folder: Path) -> list[str]:
    found = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in found if not name.startswith(".cache"))


def test_what_is_pulled(hub: Hub, llmctl: Program) -> None:
    hub.repositories["ada/mine"] = dict(FILES)
    ended = llmctl("pull", "ada/mine", "--dry-run")
    assert ended.code == 0 and ended.out.endswith("\nwould pull into models/mine\n")
    assert not Path("models").exists()
    ended = llmctl("pull", "ada/mine")
    assert ended.code == 0, ended.err
    assert there(Path("models/mine")) == PULLED
    assert Path("models/mine/model.safetensors").read_bytes() == b"weights"
    hub.repositories["ada/mine"]["README.md"] = b"# Another"
    assert llmctl("pull", "ada/mine").code == 0, "pulling again brings what changed"
    assert Path("models/mine/README.md").read_bytes() == b"# Another"


def test_pickles_only_when_asked_for(hub: Hub, llmctl: Program) -> None:
    hub.repositories["ada/old"] = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    ended = llmctl("pull", "ada/old", "here")
    assert (ended.code, ended.err) == (
        1,
        "error: ada/old: its weights are only there as pickles (pytorch_model.bin), which can run code\n"
        "hint: if you trust it, add --allow-pickle, then `llmctl convert DIR --allow-pickle` makes safetensors of it\n",
    )
    assert llmctl("pull", "ada/old", "here", "--allow-pickle").code == 0
    assert there(Path("here")) == ["config.json", "pytorch_model.bin"]


def test_what_is_not_pulled(hub: Hub, llmctl: Program) -> None:
    hub.repositories["ada/data"] = {"rows.jsonl": b"{}"}
    hub.repositories["ada/mine"] = dict(FILES)
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    for words, message, hint in (
        (
            ("ada/none",),
            "ada/none: no such model on the hub",
            "check the spelling; a private model needs `hf auth login`",
        ),
        (
            ("ada/data",),
            "ada/data: holds no model (no config.json)",
            "name the repository of a model or tokenizer",
        ),
        (
            ("ada/mine", "full"),
            "full: the folder is not empty, and nothing was pulled into it before",
            "name another folder: llmctl pull NAME DIR",
        ),
        (
            ("ada/mine", "full/notes.txt"),
            "full/notes.txt: is a file",
            "name another folder: llmctl pull NAME DIR",
        ),
    ):
        ended = llmctl("pull", *words)
        assert (ended.code, ended.err) == (1, f"error: {message}\nhint: {hint}\n")


def test_a_round_trip(hub: Hub, llmctl: Program) -> None:
    run = make_run("mine")
    llmctl("push", "mine", "ada/mine")
    assert llmctl("pull", "ada/mine", "back").code == 0
    for name in ("model.safetensors", "config.json", "chat_template.jinja"):
        assert (Path("back") / name).read_bytes() == (run / name).read_bytes()
