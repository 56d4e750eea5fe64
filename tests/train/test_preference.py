"""Learning from preferences: what is learned, from which loss, and that nothing else happens on the way."""

from __future__ import annotations

import copy
import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from llmctl.errors import CheckFailed, UserError
from llmctl.kernels.device import Compute
from llmctl.model.adapters import add_lora
from llmctl.model.checkpoint import new_model, save_model
from llmctl.recipe.preference import DpoSection, RewardSection
from llmctl.talk import SILENT
from llmctl.train.checkpoint import checkpoints
from llmctl.train.journal import DIVERGED
from llmctl.train.preference import REFERENCE, train_preferences
from llmctl.train.schedule import learning_rate
from tests.train.pairs import BAD, FLOAT, GOOD, KINDS, PAD, SPEC, flipped, job, pairs, rows_of, weights, whole

BFLOAT = Compute(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("compute", [FLOAT, BFLOAT], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(tmp_path, kind, lora, compute):
    rate = 5e-2 if lora else 1e-2
    given = job(tmp_path, kind, lora=lora, num_train_epochs=10.0, learning_rate=rate)
    clear = {"rows": pairs(21, kind, noise=0), "eval_rows": pairs(10, kind, seed=1, noise=0)}
    given = replace(given, compute=compute, **clear)
    before = weights(given)
    found = train_preferences(given, SILENT)
    assert found["eval_accuracy"] == 1.0 and found["eval_margin"] > 0.03
    assert found["steps"] == 60
    changed = [not torch.equal(a, b) for a, b in zip(before, weights(given), strict=True)]
    trained = [weight.requires_grad for weight in given.model.parameters()]
    assert changed == trained


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_labels_go_down(tmp_path, kind):
    given = replace(job(tmp_path, kind, num_train_epochs=10.0), rows=pairs(21, kind, noise=0))
    wrong = flipped(pairs(10, kind, seed=1, noise=0))
    found = train_preferences(replace(given, eval_rows=wrong), SILENT)
    assert found["eval_accuracy"] == 0.0 and found["eval_margin"] < -0.1


# --- losses and reference, computed outside --------------------------------------------------------


@torch.no_grad()
def summed_logps(model, prompt: list[int], completion: list[int]) -> float:
    """Plain transformers: one row, no padding."""
    logits = model(torch.tensor([prompt + completion])).logits[0, :-1].double()
    logps = F.log_softmax(logits, -1)[torch.arange(len(logits)), torch.tensor((prompt + completion)[1:])]
    return float(logps[len(prompt) - 1 :].sum())


def outside(folder, rows) -> torch.Tensor:
    """[rows, 2] log-probabilities of chosen and rejected under the model in a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    names = ("chosen_ids", "rejected_ids")
    return torch.tensor(
        [[summed_logps(model, row["prompt_ids"], row[name]) for name in names] for row in rows],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_reference_is_the_model_as_it_began(tmp_path, lora):
    given = job(tmp_path / "run", "dpo", lora=lora, max_steps=8)
    save_model(job(tmp_path / "x", "dpo").model, tmp_path / "base")
    train_preferences(given, SILENT)
    held = torch.load(tmp_path / "run" / REFERENCE)["logps"].double()
    want = outside(tmp_path / "base", given.rows + given.eval_rows)
    torch.testing.assert_close(held, want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_first_dpo_loss_is_ln_2(tmp_path, lora):
    train_preferences(job(tmp_path, "dpo", lora=lora, max_steps=1), SILENT)
    first = rows_of(tmp_path)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["margin"] == pytest.approx(0, abs=1e-6)


def dpo_loss(delta, lengths, section: DpoSection) -> torch.Tensor:
    """The papers' losses; `delta` is [pairs, 2] log-ratios of chosen and rejected to the reference."""
    margin = section.beta * (delta[:, 0] - delta[:, 1])
    smoothing = section.label_smoothing
    each = {
        "sigmoid": -F.logsigmoid(margin),
        "hinge": torch.relu(1 - margin),
        "robust": (-(1 - smoothing) * F.logsigmoid(margin) + smoothing * F.logsigmoid(-margin))
        / (1 - 2 * smoothing),
        "ipo": ((delta / lengths)[:, 0] - (delta / lengths)[:, 1] - 1 / (2 * section.beta)) ** 2,
    }
    return each[section.loss_type].mean()


@pytest.mark.parametrize(
    "section",
    [
        DpoSection(),
        DpoSection(beta=0.5),
        DpoSection(loss_type="hinge"),
        DpoSection(loss_type="ipo"),
        DpoSection(loss_type="robust", label_smoothing=0.2),
    ],
    ids=lambda s: f"{s.loss_type}-{s.beta}",
)
def test_dpo_losses_and_rewards_are_the_papers(tmp_path, section):
    given = replace(job(tmp_path / "run", "dpo", max_steps=6), objective=section)
    save_model(given.model, tmp_path / "base")
    found = train_preferences(given, SILENT)
    delta = outside(checkpoints(tmp_path / "run")[-1], given.eval_rows) - outside(
        tmp_path / "base", given.eval_rows
    )
    lengths = torch.tensor([[len(row["chosen_ids"]), len(row["rejected_ids"])] for row in given.eval_rows])
    assert found["eval_loss"] == pytest.approx(float(dpo_loss(delta, lengths, section)), abs=1e-5)
    rewards = section.beta * delta.mean(0)
    assert found["eval_chosen_reward"] == pytest.approx(float(rewards[0]), abs=1e-5)
    assert found["eval_rejected_reward"] == pytest.approx(float(rewards[1]), abs=1e-5)
    assert found["eval_margin"] == pytest.approx(float(rewards[0] - rewards[1]), abs=1e-5)
    assert found["eval_accuracy"] == pytest.approx(float((delta[:, 0] > delta[:, 1]).double().mean()))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gradients_of_new_tokens_are_autograds(tmp_path, tied):
    """TRL multiplies by the head's matrix itself; rows of it that are trained must not be passed over."""
    given = replace(job(tmp_path, "dpo", max_steps=1, max_grad_norm=1e9), rows=pairs(4, "dpo"), eval_rows=[])

    def model():
        language = new_model(SPEC.model_copy(update={"tie_word_embeddings": tied}), seed=0, pad_token_id=PAD)
        torch.manual_seed(0)
        return add_lora(language, r=4, alpha=8, dropout=0.0, target_modules="all-linear", tokens=[GOOD, BAD])

    mine, plain = model(), model()
    found = {}
    for name, weight in mine.named_parameters():
        if weight.requires_grad:
            weight.register_hook(lambda gradient, name=name: found.__setitem__(name, gradient.clone()))
    train_preferences(replace(given, model=mine, save=lambda folder: None), SILENT)
    deltas = []
    for row in given.rows:
        prompt = row["prompt_ids"]
        for name in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor(prompt + row[name])
            logps = F.log_softmax(plain(input_ids=ids[None]).logits[0, :-1], -1)
            deltas.append(logps[torch.arange(len(ids) - 1), ids[1:]][len(prompt) - 1 :].sum())
    delta = torch.stack(deltas).view(-1, 2)
    (
        -F.logsigmoid(0.1 * (delta[:, 0] - delta[:, 1] - (delta[:, 0] - delta[:, 1]).detach()))
    ).mean().backward()
    want = {name: weight.grad for name, weight in plain.named_parameters() if weight.requires_grad}
    assert found.keys() == {name for name, gradient in want.items() if gradient is not None}
    assert sum("token" in name for name in found) == (1 if tied else 2)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, want[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("centre", [0.0, 0.5])
def test_reward_loss_is_bradley_terry(tmp_path, centre):
    given = job(tmp_path, "reward", max_steps=3)
    given = replace(given, objective=RewardSection(center_rewards_coefficient=centre))
    found = train_preferences(given, SILENT)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoints(tmp_path)[-1]).eval()
    names = ("chosen_ids", "rejected_ids")
    with torch.no_grad():
        scores = torch.tensor(
            [[float(model(torch.tensor([row[name]])).logits) for name in names] for row in given.eval_rows]
        )
    margin = scores[:, 0] - scores[:, 1]
    want = -F.logsigmoid(margin).mean() + centre * (scores.sum(1) ** 2).mean()
    assert found["eval_loss"] == pytest.approx(float(want), abs=1e-5)
    assert found["eval_margin"] == pytest.approx(float(margin.mean()), abs=1e-5)
    assert found["eval_accuracy"] == pytest.approx(float((margin > 0).float().mean()))
    assert found["eval_mean_reward"] == pytest.approx(float(scores.mean()), abs=1e-5)


# --- rows and steps --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_cut(tmp_path, kind):
    long = {"prompt_ids": [11] * 1200, "chosen_ids": [12] * 1500 + [7], "rejected_ids": [13] * 900 + [8]}
    row = whole(long) if kind == "reward" else long
    given = job(tmp_path, kind, max_steps=1, per_device_train_batch_size=1, num_train_epochs=1.0)
    given = replace(given, rows=[row], eval_rows=[row])
    seen = []
    given.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(int(kwargs["attention_mask"].sum())), with_kwargs=True
    )
    train_preferences(given, SILENT)
    real = 1200 * 2 + 1501 + 901
    # trained on, evaluated, and for DPO each once more under the reference
    assert sum(seen) == real * (4 if kind == "dpo" else 2)
    assert rows_of(tmp_path)[0]["tokens"] == real


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_changes_nothing(tmp_path, kind):
    """21 pairs in steps of six: the last has three, which fall into micro-batches of two and one."""
    ends = []
    for batch, accumulation in ((6, 1), (2, 3), (1, 6)):
        given = job(
            tmp_path / str(batch),
            kind,
            num_train_epochs=2.0,
            learning_rate=1e-3,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )
        train_preferences(given, SILENT)
        lines = [row for row in rows_of(tmp_path / str(batch)) if "loss" in row]
        ends.append((weights(given), lines))
    assert [row["step"] for row in ends[0][1]] == list(range(1, 9))
    for mine, lines in ends[1:]:
        for a, b in zip(ends[0][0], mine, strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)
        for one, other in zip(ends[0][1], lines, strict=True):
            assert one["tokens"] == other["tokens"]
            for name in ("loss", "margin", "accuracy", "grad_norm"):
                assert one[name] == pytest.approx(other[name], abs=1e-5, rel=1e-4), name


def test_evaluation_counts_each_pair_once(tmp_path):
    """Ten rows in batches of eight and two are not two halves."""
    one = train_preferences(job(tmp_path / "a", "reward", max_steps=2), SILENT)
    other = train_preferences(
        job(tmp_path / "b", "reward", max_steps=2, per_device_eval_batch_size=3), SILENT
    )
    for name in ("eval_loss", "eval_margin", "eval_accuracy"):
        assert one[name] == pytest.approx(other[name], abs=1e-6)


def test_rate_follows_the_loops_schedule(tmp_path):
    settings = {"lr_scheduler_type": "linear", "warmup_ratio": 0.25, "min_lr_ratio": 0.2}
    given = job(tmp_path, "reward", max_steps=8, **settings)
    train_preferences(given, SILENT)
    shape = {"peak": 1e-2, "kind": "linear", "warmup_ratio": 0.25, "min_ratio": 0.2}
    found = [row["learning_rate"] for row in rows_of(tmp_path) if "loss" in row]
    assert found == pytest.approx([learning_rate(step, 8, **shape) for step in range(8)])


def test_seed_orders_the_rows(tmp_path):
    orders = []
    for number, seed in enumerate((1, 1, 2)):
        train_preferences(job(tmp_path / str(number), "reward", max_steps=7, seed=seed), SILENT)
        orders.append([row["loss"] for row in rows_of(tmp_path / str(number)) if "loss" in row])
    assert orders[0] == orders[1] != orders[2]


def test_gradients_are_clipped(tmp_path):
    """With a large epsilon AdamW's step is in proportion to the gradient, which the norm then bounds."""
    moved = []
    for norm in (1e-6, 1e6):
        given = job(tmp_path / f"{norm:g}", "reward", max_steps=1, max_grad_norm=norm, adam_epsilon=1.0)
        before = weights(given)
        train_preferences(given, SILENT)
        assert rows_of(tmp_path / f"{norm:g}")[0]["grad_norm"] > 0.1  # as it was before
        moved.append(max(float((a - b).abs().max()) for a, b in zip(before, weights(given), strict=True)))
    assert moved[0] < 1e-7 < 1e-4 < moved[1]


def test_intervals(tmp_path):
    given = job(tmp_path, "dpo", max_steps=7, logging_steps=3, eval_steps=2, save_steps=3, save_total_limit=2)
    train_preferences(given, SILENT)
    lines = rows_of(tmp_path)
    assert [row["step"] for row in lines if "loss" in row] == [3, 6, 7]
    assert [row["step"] for row in lines if "eval_loss" in row] == [2, 4, 6, 7]
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000006", "step-000007"]
    names = {"step", "epoch", "loss", "accuracy", "margin", "chosen_reward", "rejected_reward"}
    assert names <= lines[1].keys() | lines[0].keys()
    assert {"grad_norm", "learning_rate", "tokens", "tokens_per_second"} <= lines[1].keys()


# --- what must not happen --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", ["weight", "gradient"])
def test_bad_numbers_stop_the_step(tmp_path, kind, bad):
    given = job(tmp_path, kind, max_steps=8, save_steps=2)
    weight = given.model.model.layers[0].mlp.up_proj.weight
    calls = []

    def poisoned(module, args):
        calls.append(module.training)
        if sum(calls) == 5 and bad == "weight":
            weight.data[0, 0] = math.nan
        if sum(calls) == 5 and bad == "gradient":
            weight.register_hook(lambda gradient: gradient * math.inf)

    given.model.model.layers[0].register_forward_pre_hook(poisoned)
    with pytest.raises(CheckFailed) as caught:
        train_preferences(given, SILENT)
    assert caught.value.exit_code == 3
    what = "loss is nan" if bad == "weight" else "but its gradient is nan"
    assert "step 5: " in caught.value.message and what in caught.value.message
    assert caught.value.message.endswith("the last good checkpoint is step-000004")
    assert "lower train.learning_rate (now 0.01)" in caught.value.hint
    dump = json.loads((tmp_path / DIVERGED).read_text())
    assert dump["step"] == 5 and len(dump["input_ids"]) == 8
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002", "step-000004"]


def described(model) -> dict:
    """A model's configs, without what saving it fills in."""
    found = copy.deepcopy(vars(model.config))
    found |= vars(model.generation_config) if model.can_generate() else {}
    return {name: value for name, value in found.items() if name not in ("dtype", "architectures")}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_quiet_and_leaves_the_model_as_it_was(tmp_path, capfd, monkeypatch, kind):
    monkeypatch.delenv("CI", raising=False)
    sent = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **about: sent.append(about))
    given = job(tmp_path, kind, max_steps=3)
    before = described(given.model)
    level = logging.get_verbosity()
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        train_preferences(given, SILENT)
    assert capfd.readouterr() == ("", "")
    assert not [str(warning.message) for warning in told] and not sent
    assert described(given.model) == before and logging.get_verbosity() == level
    assert "forward" not in vars(given.model)
    assert {path.name for path in tmp_path.iterdir()} <= {"checkpoints", "metrics.jsonl", REFERENCE}


def test_an_adapted_head_is_refused(tmp_path):
    given = job(tmp_path, "dpo")
    given.model.lm_head = torch.nn.Sequential(given.model.lm_head)
    with pytest.raises(UserError) as caught:
        train_preferences(given, SILENT)
    assert caught.value.message == "the output head carries an adapter, which DPO would not train"
    assert caught.value.hint == "leave lm_head out of lora.target_modules"


def test_padding_is_never_read(tmp_path):
    """Another pad token, another model: no number may change."""
    ends = []
    for pad in (PAD, 9):
        given = replace(job(tmp_path / str(pad), "reward", max_steps=4), pad_id=pad)
        ends.append(train_preferences(given, SILENT))
    assert ends[0]["loss"] == ends[1]["loss"] and ends[0]["eval_margin"] == ends[1]["eval_margin"]


def test_pairs_are_as_said():
    """The helper's own promise: reward rows are the DPO rows, whole."""
    assert pairs(3, "reward") == [whole(row) for row in pairs(3, "dpo")]
