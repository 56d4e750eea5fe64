"""Adapters of other programs open here as PEFT opens them, and ours there: kind x family x tied or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmctl.errors import UserError
from llmctl.model.adapter_file import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llmctl.model.adapters import (
    add_lora,
    attach,
    fold,
    load_adapter_weights,
    refused_elsewhere,
    save_adapter,
)
from llmctl.model.checkpoint import load_model, save_model
from llmctl.model.open import open_config, open_folded, open_model
from tests.model import foreign
from tests.model.adapted import logits, shaken
from tests.model.foreign import EXPERTS, FAMILIES, KINDS, MORE, by_peft, tokens

CLOSE = 2e-4  # of the largest logit: rounding, which sharp attention makes larger; what is left out moves them by 0.02
# by default every kind on one family, and a few on the others
QUICK = {("llama", kind) for kind in KINDS} | {(family, "bias-all") for family in FAMILIES}
QUICK |= {("mixtral", "experts"), ("gpt2", "both-tied"), ("gemma2", "embedding"), ("phi3", "dora")}
MATRIX = [
    pytest.param(
        family,
        kind,
        tied,
        id=f"{family}-{kind}-{'tied' if tied else 'own'}",
        marks=[] if (family, kind) in QUICK and tied else [pytest.mark.slow],
    )
    for family in FAMILIES
    for kind in KINDS
    for tied in (True, False)
    if family in EXPERTS or not kind.startswith("experts")
]


OWN_HEADS = {  # kinds after which the two tables of a tied base differ
    "embedding", "head", "both", "dora-embedding", "whole-embedding", "whole-head", "whole-both", "rows-apart",
    "rows-head", "grown-whole", "grown-embedding",
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the bases."""
    return tmp_path_factory.mktemp("bases")


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(("family", "kind", "tied"), MATRIX)
def test_it_opens_as_peft_opens_it(family: str, kind: str, tied: bool, bases: Path, tmp_path: Path) -> None:
    """As it is, folded, and saved; its loss too, which is taken without the logits."""
    where, rows = foreign.base(bases, family, tied), KINDS[kind].rows
    folder = foreign.adapter(tmp_path / "a", where, family, kind)
    x = tokens(rows)
    wanted = logits(by_peft(where, folder, rows), x)
    found = open_model(folder)
    assert distance(logits(found, x), wanted) < CLOSE
    with torch.no_grad():
        loss = found(input_ids=x, labels=x, skip_logits=True).loss
    expected = torch.nn.functional.cross_entropy(wanted[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    assert open_config(folder).vocab_size == wanted.shape[-1]

    save_model(open_folded(folder), tmp_path / "folded")
    for opened in (
        load_model(tmp_path / "folded"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "folded"),
    ):
        assert distance(logits(opened, x), wanted) < CLOSE
    if tied:
        written = json.loads((tmp_path / "folded" / "config.json").read_text())
        # PEFT ties nothing where the table has a name it does not know
        apart = kind in OWN_HEADS or (kind.endswith("-tied") and foreign.table(family) != "embed_tokens")
        assert written["tie_word_embeddings"] is not apart
    if rows is None:  # the adapter matters
        assert distance(logits(load_model(where), x), wanted) > 0.02


@pytest.mark.parametrize(
    ("targets", "tied"),
    [
        ("all-linear", True),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in (("all-linear", False), ("some", True), ("some", False))
        ),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_ours_opens_in_peft(family: str, targets: str, tied: bool, bases: Path, tmp_path: Path) -> None:
    """With equal logits; here to the last bit, and in a run that goes on."""
    where = foreign.base(bases, family, tied)
    some = {"gpt2": ["o_proj", "k_proj"], "mamba2": ["in_proj"]}.get(family, ["o_proj", "down_proj"])

    def made(seed: int) -> torch.nn.Module:
        wanted = some if targets == "some" else targets
        rows = foreign.TRAINED if targets == "some" else ()
        model = add_lora(
            load_model(where), r=3, alpha=7, dropout=0.1, target_modules=wanted, tokens=rows, base=str(where)
        )
        shaken(model, seed)
        return model.eval()

    model, x = made(1), tokens(None)
    (tmp_path / "a").mkdir()
    save_adapter(model, tmp_path / "a")
    expected = logits(model, x)
    again = attach(load_model(where), tmp_path / "a")
    assert torch.equal(logits(again, x), expected)
    assert distance(logits(fold(again), x), expected) < CLOSE
    resumed = made(2)
    load_adapter_weights(resumed, tmp_path / "a")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    if refused_elsewhere(model):
        assert family == "mamba2" and targets == "all-linear"
        with pytest.raises(ValueError, match="out_proj"):
            by_peft(where, tmp_path / "a")
    else:
        assert distance(logits(by_peft(where, tmp_path / "a"), x), expected) < CLOSE


def test_an_adapter_of_a_run_before_names_were_translated(bases: Path, tmp_path: Path) -> None:
    """Runs used to write the core's names, whatever the family."""
    where = foreign.base(bases, "phi3", False)
    model = add_lora(
        load_model(where), r=3, alpha=7, dropout=0.0, target_modules="all-linear", base=str(where)
    )
    shaken(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(UserError, match=r"the base has no model\.layers\.0\.mlp\.gate_proj\)"):
        attach(load_model(where), tmp_path)  # no run of ours: this is an adapter for a Llama
    (tmp_path / "run.json").write_text("{}")
    found = attach(load_model(where), tmp_path)
    assert torch.equal(logits(found, tokens(None)), logits(model, tokens(None)))


@pytest.mark.parametrize("names", [("w1", "w3", "w2"), ("w1",)])
def test_experts_as_transformers_4_had_them(names: tuple[str, ...], bases: Path, tmp_path: Path) -> None:
    """A module for each expert. Against the definition, W + alpha / r * b a in the checkpoint's own tensors."""
    where = foreign.base(bases, "mixtral", False)
    weights, random = load_file(where / "model.safetensors"), torch.Generator().manual_seed(1)
    chosen = [n for n in weights if n.split(".")[-2] in (*names, "gate") and ".block_sparse_moe." in n]
    adapter = {}
    for name in chosen:
        outputs, inputs = weights[name].shape
        a, b = (torch.randn(*size, generator=random) * 0.2 for size in ((2, inputs), (outputs, 2)))
        module = f"base_model.model.{name.removesuffix('.weight')}"
        adapter |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        weights[name] = weights[name] + 6 / 2 * b @ a
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6}
    settings |= {"target_modules": [*names, "gate"], "base_model_name_or_path": str(where)}
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(settings))
    save_file(adapter, tmp_path / ADAPTER_WEIGHTS)
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "config.json").write_text((where / "config.json").read_text())
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    wanted = logits(AutoModelForCausalLM.from_pretrained(changed), tokens(None))
    assert distance(logits(open_model(tmp_path), tokens(None)), wanted) < CLOSE
    assert distance(logits(open_folded(tmp_path), tokens(None)), wanted) < CLOSE


# --- what is refused ----------------------------------------------------------------------------------


def refused(folder: Path) -> tuple[str, str]:
    """Message after the folder, and hint, of an adapter that does not open."""
    with pytest.raises(UserError) as caught:
        open_folded(folder)
    return caught.value.message.removeprefix(str(folder)), caught.value.hint


FIELDS = {
    "layer_replication": ([[0, 1]], "/adapter_config.json: layer_replication: [[0, 1]] is not supported"),
    "use_qalora": (True, "/adapter_config.json: use_qalora: true is not supported"),
    "not_known_yet": ("x", '/adapter_config.json: not_known_yet: "x" is not supported'),
    "init_lora_weights": (
        "loftq",
        "/adapter_config.json: init_lora_weights: loftq belongs to a base whose weights it has changed",
    ),
    "r": ("many", '/adapter_config.json: r: "many" is no number'),
    "peft_type": ("VERA", ": adapter of kind VERA is not supported"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_fields_that_are_not_honoured(field: str, bases: Path, tmp_path: Path) -> None:
    value, message = FIELDS[field]
    folder = foreign.adapter(tmp_path / "a", foreign.base(bases, "llama", True), "llama", "rslora")
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert refused(folder)[0] == message


def test_a_bias_where_the_base_has_none(bases: Path, tmp_path: Path) -> None:
    """It works as it is, and cannot be folded in."""
    where = foreign.base(bases, "llama", True)
    KINDS["lora-bias"] = foreign._of(lora_bias=True)
    folder = foreign.adapter(tmp_path / "a", where, "llama", "lora-bias")
    del KINDS["lora-bias"]
    wanted = logits(by_peft(where, folder), tokens(None))
    assert distance(logits(open_model(folder), tokens(None)), wanted) < CLOSE
    message, hint = refused(folder)
    assert message == (
        "adapter_config.json: lora_bias adds a bias to model.layers.0.self_attn.q_proj, which has none, "
        "so it cannot be folded in"
    )
    assert hint == "every command but merge, quantize and training uses the adapter as it is"


def test_rows_that_nobody_has(bases: Path, tmp_path: Path) -> None:
    """An embedding table that has grown, and a head of its own that was not saved with it."""
    folder = foreign.adapter(tmp_path / "a", foreign.base(bases, "llama", False), "llama", "grown-rows")
    weights = load_file(folder / ADAPTER_WEIGHTS)
    del weights["base_model.model.lm_head.weight"]
    save_file(weights, folder / ADAPTER_WEIGHTS)
    assert refused(folder) == (
        f": the adapter needs {MORE} entries of the vocabulary, its base has {MORE - 2}, "
        f"and lm_head has no row for token {MORE - 2} in either",
        "save the adapter again with PEFT's save_pretrained(..., save_embedding_layers=True)",
    )


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            "gpt2",
            r"\(unexpected: base_model\.model\.transformer\.h\.0\.attn\.c_attn\.lora_A\.weight; the base has no ",
        ),
        (
            "gemma2",
            r"\(base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight has shape \[2, 60\], "
            r"but this base and r ask for \[2, 64\]\)",
        ),
    ],
)
def test_an_adapter_for_another_base_says_why(other: str, says: str, bases: Path, tmp_path: Path) -> None:
    folder = foreign.adapter(tmp_path / "a", foreign.base(bases, other, True), other, "rslora")
    where, path = foreign.base(bases, "llama", True), folder / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(where)}))
    with pytest.raises(UserError, match=says) as caught:
        open_model(folder)
    assert caught.value.hint == (
        f"was it trained on {where}? base_model_name_or_path in its adapter_config.json says so"
    )


def test_a_pickled_adapter(bases: Path, tmp_path: Path) -> None:
    folder = foreign.adapter(tmp_path / "a", foreign.base(bases, "llama", True), "llama", "rslora")
    (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")
    assert refused(folder) == (
        ": adapter_model.bin is a pickle, which can run code, and is not read",
        "save the adapter again as adapter_model.safetensors: PEFT's save_pretrained does",
    )
