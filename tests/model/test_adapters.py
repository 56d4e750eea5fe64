"""LoRA: where it goes, what of it is trained, and that a saved adapter is the one that was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmctl.errors import UserError
from llmctl.evaluate.perplexity import score
from llmctl.kernels.device import Compute
from llmctl.model import LlmctlForCausalLM
from llmctl.model.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    add_lora,
    attach,
    fold,
    load_adapter_weights,
    narrow_frozen,
    target_names,
)
from llmctl.model.checkpoint import load_model, new_model, save_model
from llmctl.model.leaves import leaves
from llmctl.model.steps import after_step
from tests.model.adapted import TOKENS, adapted, base, ids, inner, logits, saved, shaken, spec

FLOAT = Compute(torch.device("cpu"), torch.float32)
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
TRAINED = pytest.mark.parametrize("tokens", [None, TOKENS], ids=["lora", "lora-and-tokens"])
LINEAR = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
LISTED = ", ".join(f"`{name}`" for name in LINEAR)

# --- where it goes ----------------------------------------------------------------------------------


@TIED
def test_all_linear_is_every_leaf_but_the_head(tied: bool) -> None:
    model = new_model(spec(tied), 0)
    before = {leaf.name: leaf.kind for leaf in leaves(model)}
    assert target_names(model, "all-linear") == LINEAR
    add_lora(model, r=2, alpha=4, dropout=0.0, target_modules="all-linear", base="b")
    adapters = {
        name.removesuffix(".lora_A.default") for name, _ in model.named_modules() if "lora_A.d" in name
    }
    assert adapters == {name for name, kind in before.items() if kind == "linear"}
    assert set(before) - adapters == {"lm_head"} and len(adapters) == 14


def test_named_leaves_get_it_and_no_others() -> None:
    model = new_model(spec(), 0)
    found = add_lora(model, r=3, alpha=4, dropout=0.0, target_modules=["q_proj", "up_proj"], base="b")
    trained = {name: list(w.shape) for name, w in found.named_parameters() if w.requires_grad}
    assert len(trained) == 2 * 2 * 2
    assert all(".q_proj.lora_" in name or ".up_proj.lora_" in name for name in trained)
    assert trained["base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight"] == [3, 16]
    assert trained["base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"] == [32, 3]


@pytest.mark.parametrize(
    ("wanted", "error", "hint"),
    [
        (["q_prj"], f"`q_prj` matches no layer; there is {LISTED}", "did you mean `q_proj`?"),
        (
            ["q_proj", "c_attn"],
            f"`c_attn` matches no layer; there is {LISTED}",
            "`all-linear` takes them all",
        ),
        (["all_linear"], f"`all_linear` matches no layer; there is {LISTED}", "did you mean `all-linear`?"),
        (
            ["embed_tokens"],
            f"`embed_tokens` matches no layer; there is {LISTED}",
            "`all-linear` takes them all",
        ),
        (
            ["lm_head"],
            "`lm_head` is the output head, which stays as it is",
            f"name layers inside the blocks: {LISTED}",
        ),
    ],
)
def test_names_that_cannot_be_adapted(wanted: list[str], error: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        target_names(new_model(spec(), 0), wanted)
    assert (caught.value.message, caught.value.hint) == (f"lora.target_modules: {error}", hint)


@TIED
def test_a_wrapped_head_is_a_head_still(tied: bool, tmp_path: Path) -> None:
    """Passes walk the leaves after PEFT has put its own modules around some."""
    model = inner(adapted(base(tmp_path / "b", tied), tokens=TOKENS))
    heads = [leaf for leaf in leaves(model) if leaf.kind == "head"]
    assert len(heads) == 1 and heads[0].name.startswith("lm_head.")


@TIED
@TRAINED
def test_frozen_weights_in_bfloat16_change_no_result(
    tied: bool, tokens: list[int] | None, tmp_path: Path
) -> None:
    """Loss and gradients under autocast, to the last bit; matrices are half as large."""
    found = {}
    for narrow in (False, True):
        model = adapted(base(tmp_path / f"{narrow}", tied, attention_bias="all"), tokens=tokens)
        if narrow:
            narrow_frozen(model.get_base_model(), torch.bfloat16)
        dtypes = {name: weight.dtype for name, weight in model.named_parameters()}
        narrowed = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
        assert bool(narrowed) is narrow
        assert all(".base_layer." in name and ".layers." in name for name in narrowed)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids(), labels=ids(), skip_logits=True, use_cache=False).loss
        loss.backward()
        grads = {name: w.grad for name, w in model.named_parameters() if w.requires_grad}
        found[narrow] = loss, grads
    assert torch.equal(found[True][0], found[False][0])
    for name, grad in found[False][1].items():
        assert grad.any() and torch.equal(found[True][1][name], grad), name


# --- what it computes -------------------------------------------------------------------------------


@TIED
@TRAINED
def test_saved_adapters_come_back_bit_for_bit(tied: bool, tokens: list[int] | None, tmp_path: Path) -> None:
    model = adapted(base(tmp_path / "b", tied), tokens=tokens)
    folder = saved(model, tmp_path / "a")
    assert {path.name for path in folder.iterdir()} == {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    opened = attach(load_model(tmp_path / "b"), folder)
    assert torch.equal(logits(opened), logits(model))
    assert not any(weight.requires_grad for weight in opened.parameters()) and not opened.training

    again = adapted(tmp_path / "b", tokens=tokens)
    shaken(again, seed=5)
    load_adapter_weights(again, folder)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "fields",
    [
        {"pattern": ["routing"], "routing": {"num_clusters": 3, "decay": 0.1}},
        {
            "experts": {
                "kind": "sparse", "num_experts": 4, "correction_bias": True, "bias_update_rate": 0.1,
                "moe_intermediate_size": 16,
            }
        },
    ],
    ids=["centroids", "correction-bias"],
)  # fmt: skip
def test_what_moves_outside_the_gradient_stays_under_an_adapter(
    fields: dict[str, object], tmp_path: Path
) -> None:
    """An adapter holds its matrices alone, so what was trained would not be what is opened."""
    save_model(new_model(spec(**fields), seed=0), tmp_path / "b")
    model = adapted(tmp_path / "b").train()
    for _ in range(3):
        model(input_ids=ids(), labels=ids()).loss.backward()
        after_step(model)
    opened = attach(load_model(tmp_path / "b"), saved(model, tmp_path / "a"))
    assert torch.equal(logits(opened), logits(model.eval()))


@TIED
@TRAINED
@pytest.mark.parametrize("fields", [{}, {"attention_bias": "qkv"}, {"qk_norm": True}], ids=str)
def test_plain_peft_opens_it(
    tied: bool, tokens: list[int] | None, fields: dict[str, object], tmp_path: Path
) -> None:
    """On transformers' own model of the base, with no word of ours."""
    model = adapted(base(tmp_path / "b", tied, **fields), tokens=tokens)
    folder = saved(model, tmp_path / "a")
    named = json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    theirs = AutoModelForCausalLM.from_pretrained(named)
    assert not isinstance(theirs, LlmctlForCausalLM)
    without = logits(theirs)
    found = logits(PeftModel.from_pretrained(theirs, folder))
    torch.testing.assert_close(found, logits(model), atol=1e-5, rtol=1e-5)
    assert (found - without).abs().mean() > 0.1  # the adapter matters


@TIED
@TRAINED
def test_folding_keeps_the_logits(tied: bool, tokens: list[int] | None, tmp_path: Path) -> None:
    model = adapted(base(tmp_path / "b", tied), tokens=tokens)
    expected = logits(model)
    folded = fold(model)
    assert (logits(folded) - expected).abs().max() <= 1e-5 * expected.abs().max()
    plain = load_model(tmp_path / "b")
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in folded.modules()] == [type(module) for module in plain.modules()]
    assert (folded.lm_head.weight is folded.model.embed_tokens.weight) is tied
    assert not folded.head_reads_as_matrix
    assert all(weight.requires_grad for weight in folded.parameters())


def test_alpha_over_r_is_the_scale(tmp_path: Path) -> None:
    """Against the definition: W + alpha / r * B A (arXiv:2106.09685, section 4.1)."""
    model = adapted(base(tmp_path / "b"), r=3, alpha=7, target_modules=["q_proj"])
    weights = dict(model.named_parameters())
    plain, folded = load_model(tmp_path / "b"), fold(model)
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        a, b = (weights[f"base_model.model.{name}.lora_{part}.default.weight"] for part in "AB")
        expected = plain.get_parameter(f"{name}.weight") + 7 / 3 * b @ a
        torch.testing.assert_close(folded.get_parameter(f"{name}.weight"), expected)


# --- trained tokens ---------------------------------------------------------------------------------


@TIED
def test_the_fused_loss_sees_trained_rows(tied: bool, tmp_path: Path) -> None:
    """Loss and gradients without all logits, with them, and on a whole model of the same weights."""
    # in float64: sums of float32 in another order differ by more than the bounds on some processors
    model = adapted(base(tmp_path / "b", tied), tokens=TOKENS).double()
    deltas = {name: w for name, w in model.named_parameters() if "trainable_tokens_delta" in name}
    assert len(deltas) == (1 if tied else 2)
    assert all(w.requires_grad is ("lora_" in n or n in deltas) for n, w in model.named_parameters())
    found = {}
    for fused in (True, False):
        model.zero_grad()
        out = model(input_ids=ids(), labels=ids(), skip_logits=fused, use_cache=False)
        assert (out.logits is None) is fused
        out.loss.backward()
        found[fused] = out.loss, {name: w.grad.clone() for name, w in deltas.items()}
        assert all((w.grad is not None) is w.requires_grad for w in model.parameters())
    torch.testing.assert_close(found[True][0], found[False][0])

    whole = fold(adapted(tmp_path / "b", tokens=TOKENS).double()).requires_grad_(True)
    loss = whole(input_ids=ids(), labels=ids()).loss
    loss.backward()
    torch.testing.assert_close(found[True][0], loss)
    for name in deltas:
        table = whole.lm_head if "lm_head" in name else whole.model.embed_tokens
        for fused in (True, False):
            torch.testing.assert_close(found[fused][1][name], table.weight.grad[TOKENS], atol=1e-6, rtol=1e-4)


@TIED
def test_scores_see_trained_rows(tied: bool, tmp_path: Path) -> None:
    """`evaluate.perplexity` on the adapter, against the loss of plain PEFT on transformers' model."""
    model = adapted(base(tmp_path / "b", tied), tokens=TOKENS, target_modules=["q_proj"])
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "b"), saved(model, tmp_path / "a")
    )
    positions = torch.arange(ids().shape[1]).expand(ids().shape)
    batch = {"input_ids": ids(), "labels": ids(), "position_ids": positions}
    found = score(inner(model), [batch], 1.0, FLOAT).figures()
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids(), labels=ids()).loss
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5)
    without = score(load_model(tmp_path / "b"), [batch], 1.0, FLOAT).figures()
    assert abs(found["loss"] - without["loss"]) > 0.05


# --- files that are no good -------------------------------------------------------------------------


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """A change of the tensors of an adapter folder."""

    def rewrite(folder: Path) -> None:
        found = load_file(folder / ADAPTER_WEIGHTS)
        change(found)
        save_file(found, folder / ADAPTER_WEIGHTS)

    return rewrite


def settings(**values: object) -> Callable[[Path], None]:
    """A change of entries in the config of an adapter folder."""

    def rewrite(folder: Path) -> None:
        path = folder / ADAPTER_CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return rewrite


NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
ROW = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
AGAIN = "copy the adapter again"
WHOLE = "was it trained on {base}? base_model_name_or_path in its adapter_config.json says so"
# what is done to a folder -> message after its path, hint
DAMAGED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no weights": (lambda a: (a / ADAPTER_WEIGHTS).unlink(), f": no {ADAPTER_WEIGHTS}", AGAIN),
    "cut short": (
        lambda a: (a / ADAPTER_WEIGHTS).write_bytes((a / ADAPTER_WEIGHTS).read_bytes()[:-100]),
        f"/{ADAPTER_WEIGHTS}: damaged or cut short (Error while deserializing header: "
        "incomplete metadata, file not fully covered)",
        AGAIN,
    ),
    "not JSON": (
        lambda a: (a / ADAPTER_CONFIG).write_text("{"),
        f"/{ADAPTER_CONFIG}: not valid JSON (Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1))",
        "copy or download the model again",
    ),
    "another kind": (
        settings(peft_type="IA3"),
        ": adapter of kind IA3 is not supported",
        "LoRA adapters are",
    ),
    "no kind": (settings(peft_type=None), ": adapter of kind None is not supported", "LoRA adapters are"),
    "a weight missing": (
        tensors(lambda found: found.pop(NAME)),
        f": the adapter does not fit this base (missing: {NAME})",
        WHOLE,
    ),
    "rows missing": (
        tensors(lambda found: found.pop(ROW)),
        f": the adapter does not fit this base (missing: {ROW})",
        WHOLE,
    ),
    "a weight too many": (
        tensors(
            lambda found: found.update(
                {
                    NAME.replace("layers.1", "layers.2"): torch.zeros(4, 16),
                    NAME.replace("layers.1", "layers.2").replace("lora_A", "lora_B"): torch.zeros(16, 4),
                }
            )
        ),
        f": the adapter does not fit this base (unexpected: {NAME.replace('layers.1', 'layers.2')}; "
        "the base has no model.layers.2.self_attn.q_proj)",
        WHOLE,
    ),
    "another shape": (
        tensors(lambda found: found.update({NAME: torch.zeros(4, 15)})),
        f": the adapter does not fit this base ({NAME} has shape [4, 15], but this base and r ask for [4, 16])",
        WHOLE,
    ),
    "another rank": (
        settings(r=5),
        ": the adapter does not fit this base (base_model.model.model.layers.0.mlp.down_proj.lora_A.weight has shape "
        "[4, 32], but this base and r ask for [5, 32])",
        WHOLE,
    ),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_adapters(how: str, tmp_path: Path) -> None:
    damage, error, hint = DAMAGED[how]
    base(tmp_path / "b")
    folder = saved(adapted(tmp_path / "b", tokens=TOKENS), tmp_path / "a")
    attach(load_model(tmp_path / "b"), folder)
    damage(folder)
    with pytest.raises(UserError) as caught:
        attach(load_model(tmp_path / "b"), folder)
    hint = hint.format(base=tmp_path / "b")
    assert (caught.value.message, caught.value.hint) == (f"{folder}{error}", hint)


@pytest.mark.parametrize(
    "how", ["no weights", "cut short", "a weight missing", "rows missing", "another shape"]
)
def test_damaged_checkpoints_are_not_gone_on_with(how: str, tmp_path: Path) -> None:
    """A resumed run reads its adapter in place; half of one must not pass."""
    damage, error, hint = DAMAGED[how]
    base(tmp_path / "b")
    model = adapted(tmp_path / "b", tokens=TOKENS)
    folder = saved(model, tmp_path / "a")
    damage(folder)
    with pytest.raises(UserError) as caught:
        load_adapter_weights(model, folder)
    hint = hint.format(base=tmp_path / "b")
    assert (caught.value.message, caught.value.hint) == (f"{folder}{error}", hint)


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"hidden_size": 32}])
def test_an_adapter_of_another_model_is_refused(fields: dict[str, int], tmp_path: Path) -> None:
    folder = saved(adapted(base(tmp_path / "b")), tmp_path / "a")
    other = base(tmp_path / "other", **fields)
    with pytest.raises(
        UserError,
        match=r": the adapter does not fit this base \((missing: |unexpected: |base_model.* has shape )",
    ) as caught:
        attach(load_model(other), folder)
    assert caught.value.hint == WHOLE.format(base=tmp_path / "b")
