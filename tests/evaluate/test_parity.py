"""How far apart two models are, against all their logits at once in plain torch."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from llmctl.evaluate import parity as module
from llmctl.evaluate.parity import Parity, parity
from llmctl.evaluate.perplexity import Score
from llmctl.kernels.device import Compute
from llmctl.model import LlmctlForCausalLM
from llmctl.model.checkpoint import load_model
from llmctl.model.vocabulary import grow_vocabulary
from tests.model.adapted import ROWS, TOKENS, adapted, base, inner

FLOAT = Compute(torch.device("cpu"), torch.float32)
BFLOAT = Compute(torch.device("cpu"), torch.bfloat16)
Batch = dict[str, torch.Tensor]


def batches(rows: int = 5, length: int = 30) -> list[Batch]:
    """Two batches of two documents a row, of which only some places are labels."""
    random = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2):
        ids = torch.randint(0, ROWS, (rows, length), generator=random)
        labels = ids.masked_fill(torch.rand(ids.shape, generator=random) < 0.4, -100)
        labels[:, 0] = labels[:, length // 2] = -100
        positions = torch.arange(length) % (length // 2)
        found.append({"input_ids": ids, "labels": labels, "position_ids": positions.expand(ids.shape)})
    return found


@torch.no_grad()
def plainly(a: torch.nn.Module, b: torch.nn.Module, data: list[Batch]) -> dict[str, float]:
    """The figures by their definitions, one document at a time, in double precision."""
    log_a, log_b, labels = [], [], []
    for batch in data:
        half = batch["input_ids"].shape[1] // 2
        for part in (slice(0, half), slice(half, 2 * half)):
            wanted = batch["labels"][:, part][:, 1:]
            for model, found in ((a, log_a), (b, log_b)):
                logits = model(input_ids=batch["input_ids"][:, part]).logits[:, :-1, :ROWS].double()
                found.append(logits.log_softmax(-1)[wanted != -100])
            labels.append(wanted[wanted != -100])
    one, two, label = torch.cat(log_a), torch.cat(log_b), torch.cat(labels)
    kl = F.kl_div(two, one, reduction="none", log_target=True).sum(-1)
    return {
        "top1": float((one.argmax(-1) == two.argmax(-1)).double().mean()),
        "kl": float(kl.mean()),
        "max_kl": float(kl.max()),
        "perplexity_a": math.exp(F.nll_loss(one, label)),
        "perplexity_b": math.exp(F.nll_loss(two, label)),
        "tokens": len(label),
    }


@pytest.fixture
def models(tmp_path: Path) -> tuple[LlmctlForCausalLM, LlmctlForCausalLM]:
    """A model, and the same with weights a little off."""
    one, two = (load_model(base(tmp_path / name)) for name in "ab")
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in two.parameters():
            weight.add_(torch.randn(weight.shape, generator=random) * 0.05)
    return one, two


@pytest.mark.parametrize("size", [3, 512])
def test_the_figures_are_those_of_all_logits(
    size: int, models: tuple[LlmctlForCausalLM, LlmctlForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLICE", size)
    found, expected = parity(*models, batches(), FLOAT).figures(), plainly(*models, batches())
    assert found.pop("kl_error") > 0
    assert found == pytest.approx(expected, rel=1e-4)
    assert 0.2 < expected["top1"] < 0.95 and expected["kl"] > 0.01
    assert expected["max_kl"] > 2 * expected["kl"]


def test_the_order_of_two_models_matters(models: tuple[LlmctlForCausalLM, LlmctlForCausalLM]) -> None:
    """KL(a, b) is what one pays, in nats, for taking b for a."""
    there, back = (
        parity(*models, batches(), FLOAT).figures(),
        parity(*models[::-1], batches(), FLOAT).figures(),
    )
    assert back["kl"] == pytest.approx(plainly(*models[::-1], batches())["kl"], rel=1e-4)
    assert there["kl"] != pytest.approx(back["kl"], rel=1e-3)
    assert there["perplexity_a"] == pytest.approx(back["perplexity_b"])


def test_a_model_and_itself(models: tuple[LlmctlForCausalLM, LlmctlForCausalLM]) -> None:
    found = parity(models[0], models[0], batches(), FLOAT).figures()
    assert (found["top1"], found["kl"], found["max_kl"]) == (1.0, 0.0, 0.0)
    assert found["perplexity_a"] == found["perplexity_b"]


def test_bfloat16_is_near(models: tuple[LlmctlForCausalLM, LlmctlForCausalLM]) -> None:
    found, expected = parity(*models, batches(), BFLOAT).figures(), plainly(*models, batches())
    assert found["kl"] == pytest.approx(expected["kl"], rel=0.1)
    assert found["perplexity_b"] == pytest.approx(expected["perplexity_b"], rel=0.05)
    assert parity(models[0], models[0], batches(), BFLOAT).figures()["kl"] == 0


def test_an_adapter_and_its_base(tmp_path: Path) -> None:
    """The adapter's own head is used, trained rows and all; transformers computes the base."""
    model = inner(adapted(base(tmp_path / "b"), tokens=TOKENS))
    plain = load_model(tmp_path / "b")
    found = parity(plain, model, batches(), FLOAT).figures()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    del found["kl_error"]
    assert found == pytest.approx(plainly(theirs, model, batches()), rel=1e-4)


def test_a_larger_vocabulary(models: tuple[LlmctlForCausalLM, LlmctlForCausalLM]) -> None:
    """Only tokens that both have are compared."""
    small, large = models
    grow_vocabulary(large, ROWS + 3)
    expected, found = plainly(small, large, batches()), parity(small, large, batches(), FLOAT).figures()
    del found["kl_error"]
    assert found == pytest.approx(expected, rel=1e-4)
    assert parity(small, small, batches(), FLOAT).figures()["kl"] == 0


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("where", ["all", "one"])
def test_numbers_that_are_none(
    which: int, where: str, models: tuple[LlmctlForCausalLM, LlmctlForCausalLM]
) -> None:
    """One NaN among thousands of logits is enough; it is not lost in a maximum or a mean."""
    with torch.no_grad():
        if where == "all":
            models[which].model.norm.weight[2] = torch.nan
        else:  # the token is read at a few places only
            table = models[which].model.embed_tokens
            models[which].lm_head.weight = torch.nn.Parameter(table.weight.detach().clone())
            table.weight[int(batches()[1]["input_ids"][0, 3])] = torch.nan
    found = parity(*models, batches(), FLOAT).figures()
    assert math.isnan(found["kl"]) and math.isnan(found["max_kl"])
    assert math.isnan(found["perplexity_" + "ab"[which]])
    assert not math.isnan(found["perplexity_" + "ba"[which]])


def test_figures_of_extremes() -> None:
    def of(kl: list[float], a: float, b: float) -> Parity:
        columns = [torch.tensor(kl, dtype=torch.float64), torch.arange(len(kl)) > 0]
        columns += [torch.full((len(kl),), nats, dtype=torch.float64) for nats in (a, b)]
        return Parity(*columns, torch.zeros(len(kl), dtype=torch.int64))

    assert of([], 0, 0).figures()["kl"] == 0
    found = of([-1e-10] * 10, 1e4, 0.5).figures()
    assert math.isnan(found.pop("kl_error"))  # of one row nothing is known
    assert found == pytest.approx({
        "top1": 0.9, "kl": 0.0, "max_kl": 0.0, "perplexity_a": math.inf, "perplexity_b": math.exp(0.5), "tokens": 10,
    }, abs=1e-9)  # fmt: skip
    assert math.isnan(Score(math.nan, math.nan, 5, 10).figures()["perplexity"])


def test_noise_is_what_rounding_moves_and_near_ties_are_not_decided(
    models: tuple[LlmctlForCausalLM, LlmctlForCausalLM],
) -> None:
    """A model rounded to bfloat16 is within the noise of itself; one with other weights is not."""
    one, other = models
    rounded = copy.deepcopy(one).to(torch.bfloat16).float()
    near, far = (
        parity(one, two, batches(), FLOAT, rounded=torch.bfloat16).figures() for two in (rounded, other)
    )
    assert near["noise_kl"] == far["noise_kl"] > 0 and near["noise_lead"] > 0
    assert near["kl"] < 3 * near["noise_kl"] and near["decided_top1"] == 1
    assert far["kl"] > 10 * far["noise_kl"] and far["decided_top1"] < 0.95
    assert 0.5 < near["decided"] < 1
    lead = plain_leads(one)
    assert near["decided"] == pytest.approx(float((lead > near["noise_lead"]).double().mean()), abs=1e-3)


@torch.no_grad()
def plain_leads(model: LlmctlForCausalLM) -> torch.Tensor:
    """By how much the likeliest token leads, at every label."""
    found = []
    for batch in batches():
        out = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[:, :-1]
        top = out.log_softmax(-1).topk(2).values
        found.append((top[..., 0] - top[..., 1])[batch["labels"][:, 1:] != -100])
    return torch.cat(found)


def test_the_error_of_the_mean_goes_by_rows(models: tuple[LlmctlForCausalLM, LlmctlForCausalLM]) -> None:
    made = parity(*models, batches(), FLOAT)
    assert len(made.row.unique()) == 10
    rows = [made.kl[made.row == row] for row in made.row.unique()]
    mean = float(made.kl.mean())
    by_hand = math.sqrt(sum(float((row - mean).sum()) ** 2 for row in rows) * 10 / 9) / len(made.kl)
    assert made.figures()["kl_error"] == pytest.approx(by_hand)


def test_enough_tokens_are_enough(models: tuple[LlmctlForCausalLM, LlmctlForCausalLM]) -> None:
    """Whole rows, up to the one that reaches the number."""
    data = batches()
    counts = [int((row[1:] != -100).sum()) for row in data[0]["labels"]]
    for wanted, rows in ((1, 1), (counts[0], 1), (counts[0] + 1, 2), (sum(counts) + 1, 6)):
        made = parity(*models, data, FLOAT, max_tokens=wanted)
        assert len(made.row.unique()) == rows
    assert len(made.kl) == sum(counts) + int((data[1]["labels"][0, 1:] != -100).sum())
