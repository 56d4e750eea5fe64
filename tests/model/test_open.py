"""MODEL as every command takes it: adapters find the base they were trained on, and only that one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmctl.errors import UserError
from llmctl.model.adapters import ADAPTER_CONFIG, TASKS, add_lora, attach, fold
from llmctl.model.checkpoint import load_model, save_model
from llmctl.model.hf import LlmctlForCausalLM
from llmctl.model.nf4 import round_nf4
from llmctl.model.open import (
    base_of,
    open_base,
    open_config,
    open_folded,
    open_model,
    stored_dtype,
)
from llmctl.model.vocabulary import grow_vocabulary
from llmctl.runs import folder_hash
from tests.model.adapted import ROWS, adapted, base, logits, saved, shaken

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(folder: Path, where: Path, **fields: Any) -> Path:
    """An adapter folder as the run that trained it on `where` would have left it."""
    parents = [{"role": "model", "path": str(where), "hash": folder_hash(where)}]
    (folder / "run.json").write_text(json.dumps({"stage": "sft", "parents": parents, **fields}))
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The run folder `a` of an adapter, whose base is `b`; both named by relative paths."""
    model = adapted(base(tmp_path / "b"))
    expected = logits(model)
    folder = run(saved(model, tmp_path / "a"), Path("b"))
    torch.save(expected, tmp_path / "expected.pt")
    return folder


def expected() -> torch.Tensor:
    """The logits that the adapter of `made` had when it was saved."""
    return torch.load("expected.pt")


def moved_into_config(adapter: Path, where: str | None) -> None:
    """Write down another base in an adapter's config."""
    path = adapter / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": where}))


# --- what is opened ---------------------------------------------------------------------------------


def test_a_whole_model_opens_as_itself(tmp_path: Path) -> None:
    base(tmp_path / "b")
    for opened in (open_model("b"), open_folded(tmp_path / "b")):
        assert type(opened) is LlmctlForCausalLM and torch.equal(logits(opened), logits(load_model("b")))
    assert open_model("b", torch.bfloat16).dtype == torch.bfloat16
    assert open_config("b").vocab_size == ROWS


def test_an_adapter_opens_on_its_base(made: Path) -> None:
    opened = open_model("a")
    assert type(opened) is LlmctlForCausalLM and not opened.training
    assert torch.equal(logits(opened), expected())
    assert not torch.allclose(logits(open_base(made)), expected(), atol=0.1)
    assert torch.equal(logits(open_base(made)), logits(load_model("b")))
    folded = open_folded("a")
    torch.testing.assert_close(logits(folded), expected(), atol=1e-5, rtol=1e-5)
    assert list(folded.state_dict()) == list(load_model("b").state_dict())


def test_the_adapter_says_what_ends_a_generation(made: Path) -> None:
    assert open_model("a").generation_config.eos_token_id == 2  # the base's
    (made / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    for opened in (open_model("a"), open_folded("a")):
        assert opened.generation_config.eos_token_id == [2, 5]
    assert open_base(made).generation_config.eos_token_id == 2


def test_precision(made: Path, tmp_path: Path) -> None:
    """Adapters are folded in float32 and rounded once, whatever the precision that is asked for."""
    half = open_model("a", torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    folded = open_folded("a", torch.bfloat16)
    once = fold(attach(load_model("b", torch.float32), made)).to(torch.bfloat16)
    for (name, a), b in zip(folded.named_parameters(), once.parameters(), strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b), name
    assert stored_dtype(made) == torch.float32
    save_model(load_model("b", torch.bfloat16), tmp_path / "half")
    run(made, Path("half"))
    assert stored_dtype(made) == torch.bfloat16
    assert open_model("a").dtype == torch.float32


def test_adapters_on_adapters(made: Path, tmp_path: Path) -> None:
    """The second is trained on the first, folded; it needs both folders."""
    second = add_lora(open_folded("a"), r=2, alpha=4, dropout=0.0, target_modules=["v_proj"], base="a")
    shaken(second, seed=9)
    wanted = logits(second)
    folder = run(saved(second.eval(), tmp_path / "two"), Path("a"))
    assert torch.equal(logits(open_model("two")), wanted)
    torch.testing.assert_close(logits(open_folded("two")), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(open_base(folder)), expected(), atol=1e-5, rtol=1e-5)
    assert stored_dtype(folder) == torch.float32
    assert open_config("two").hidden_size == 16
    shutil.move("b", "elsewhere")
    with pytest.raises(UserError, match=r"^a: its base b is not there$"):
        open_model("two")


def test_a_base_that_grew(tmp_path: Path) -> None:
    """New rows are made again when the adapter is opened, and then overwritten by the trained ones."""
    base(tmp_path / "b", tied=False)
    grown = load_model("b")
    grow_vocabulary(grown, ROWS + 2)
    save_model(grown, tmp_path / "grown")
    model = adapted(tmp_path / "grown", tokens=[ROWS, ROWS + 1])
    x = torch.tensor([[1, ROWS, 4, ROWS + 1, 5]])
    wanted = logits(model, x)
    folder = run(saved(model, tmp_path / "a"), Path("b"), vocab_size=ROWS + 2)
    assert torch.equal(logits(open_model("a"), x), wanted)
    assert open_config("a").vocab_size == ROWS + 2 == open_base(folder).config.vocab_size
    assert open_config("b").vocab_size == ROWS


def test_a_base_in_four_bits(made: Path) -> None:
    run(made, Path("b"), base_precision="nf4")
    rounded = load_model("b")
    round_nf4(rounded)
    assert torch.equal(logits(open_base(made)), logits(rounded))
    assert torch.equal(logits(open_model("a")), logits(attach(rounded, made)))
    assert not torch.allclose(logits(open_model("a")), expected(), atol=1e-2)


# --- where the base is ------------------------------------------------------------------------------


def test_a_checkpoint_of_the_run_has_the_same_base(made: Path) -> None:
    step = made / "checkpoints" / "step-000003"
    step.mkdir(parents=True)
    for name in (ADAPTER_CONFIG, "adapter_model.safetensors"):
        shutil.copy(made / name, step / name)
    assert base_of(step) == "b"
    assert torch.equal(logits(open_model(step)), expected())


def test_from_another_folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The relative path of the manifest leads nowhere, but the config has the whole one."""
    (tmp_path / "sub").mkdir()
    moved_into_config(made, "b")
    monkeypatch.chdir(tmp_path / "sub")
    with pytest.raises(UserError, match="its base b is not there"):
        open_model("../a")
    moved_into_config(made, str(tmp_path / "b"))
    assert base_of(Path("../a")) == str(tmp_path / "b")


@pytest.mark.parametrize("decoy", [False, True])
def test_a_base_that_moved_is_found_by_its_content(decoy: bool, made: Path) -> None:
    """Anywhere under runs/, whatever it is called; what lies in its old place is not taken for it."""
    shutil.move("b", "runs/deep/renamed")
    Path("runs/deep/renamed/run.json").write_text("{}")
    if decoy:
        shutil.copytree("runs/deep/renamed", "b", ignore=shutil.ignore_patterns("run.json"))
        flip(Path("b"))
    assert base_of(made) == "runs/deep/renamed"
    assert torch.equal(logits(open_model("a")), expected())


def flip(model: Path) -> None:
    """Change one weight a little."""
    found = load_file(model / WEIGHTS)
    found["model.norm.weight"][3] += 1e-3
    save_file(found, model / WEIGHTS, metadata={"format": "pt"})


GONE = "put it back; a run folder is found by its content anywhere under runs/"
CHANGED = "put the base back, or train the adapter again on this one"


def refused(error: str, hint: str) -> None:
    """Assert that `a` opens neither as a model nor as a config."""
    for open_it in (open_model, open_folded, open_config):
        with pytest.raises(UserError) as caught:
            open_it("a")
        assert (caught.value.message, caught.value.hint) == (error, hint)


def test_a_base_that_is_gone(made: Path) -> None:
    shutil.rmtree("b")
    refused("a: its base b is not there", GONE)


def test_a_base_that_changed(made: Path) -> None:
    flip(Path("b"))
    refused("a: b is not the base this adapter was trained on, or has changed since", CHANGED)


def test_a_base_with_another_tokenizer_has_changed(made: Path) -> None:
    Path("b/tokenizer.json").write_text("{}")
    refused("a: b is not the base this adapter was trained on, or has changed since", CHANGED)


# --- adapters that no run of ours made --------------------------------------------------------------


def test_a_foreign_adapter_names_its_base_in_its_config(made: Path) -> None:
    (made / "run.json").unlink()
    moved_into_config(made, "b")
    assert torch.equal(logits(open_model("a")), expected())
    flip(Path("b"))  # nothing is known of the weights it was trained on
    assert not torch.equal(logits(open_model("a")), expected())
    moved_into_config(made, None)
    refused(
        "a: the adapter does not say which model it belongs to",
        "set base_model_name_or_path in its adapter_config.json",
    )
    moved_into_config(made, "./nowhere")
    refused("./nowhere: no such folder", "name a folder with a model, or a hub id")


def test_a_foreign_adapter_of_another_model(made: Path, tmp_path: Path) -> None:
    (made / "run.json").unlink()
    base(tmp_path / "wide", hidden_size=32)
    moved_into_config(made, "wide")
    with pytest.raises(UserError, match=r"^a: the adapter does not fit this base \(base_model.* has shape "):
        open_model("a")


def test_a_reward_adapter_is_no_language_model(made: Path) -> None:
    path = made / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": TASKS["reward"]}))
    for open_it in (open_model, open_folded):
        with pytest.raises(UserError) as caught:
            open_it("a")
        assert caught.value.message == "a: holds an adapter of a reward model, not of a language model"
        assert caught.value.hint == "`llmctl score` reads it; give a language model here"
