"""Contracts of the core, over the tables of variants."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

from llmctl.engine.generate import generate
from llmctl.model import recompute_activations
from llmctl.model.attention import ATTENTIONS
from llmctl.model.checkpoint import new_model
from llmctl.model.context import packed_context, padded_context, plain_context
from llmctl.model.ffn import FFNS
from llmctl.model.init import role_of
from llmctl.model.leaves import leaves
from llmctl.model.norms import NORMS
from llmctl.model.patterns import PATTERNS
from llmctl.model.positions import POSITIONS, ROPE_TYPES
from llmctl.plan.size import flops_per_token, kv_cache_bytes, parameters, total_parameters
from llmctl.recipe import model as vocabulary
from llmctl.recipe.model import ModelSection

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
WINDOW = 6
# every entry of every table at least once, and the combinations that share code
VARIANTS = {
    "plain": {},
    "mqa": {"num_key_value_heads": 1},
    "gqa-untied": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "sliding": {"pattern": ["sliding"], "sliding_window": WINDOW},
    "mixed-pattern": {"pattern": ["full", "sliding"], "sliding_window": WINDOW},
    "qk-norm-wide": {"qk_norm": True, "head_dim": 12},
    "biases": {"attention_bias": "all", "mlp_bias": True},
    "qkv-bias": {"attention_bias": "qkv"},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "llama3-rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}
LENGTH = 3 * WINDOW + 2


def make(name: str):
    torch.manual_seed(0)
    model = new_model(ModelSection(**SIZES, **VARIANTS[name]), seed=1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


@pytest.fixture(params=VARIANTS)
def model(request):
    return make(request.param)


def ids(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(2))


def test_tables_hold_what_the_vocabulary_names():
    from typing import get_args

    for names, table in (
        (vocabulary.Norm, NORMS),
        (vocabulary.Position, POSITIONS),
        (vocabulary.Attention, ATTENTIONS),
        (vocabulary.Pattern, PATTERNS),
        (vocabulary.Ffn, FFNS),
    ):
        assert set(get_args(names)) == set(table)
    kinds = (vocabulary.RopeDefault, vocabulary.RopeLinear, vocabulary.RopeLlama3)
    assert {get_args(kind.model_fields["rope_type"].annotation)[0] for kind in kinds} == set(ROPE_TYPES)


def test_shape_and_finite_gradients(model):
    out = model(ids(), labels=ids())
    assert out.logits.shape == (2, LENGTH, SIZES["vocab_size"])
    out.loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.any(), name


@torch.no_grad()
def test_later_tokens_do_not_leak(model):
    x = ids()
    changed = x.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % SIZES["vocab_size"]
    assert torch.equal(model(x).logits[:, :11], model(changed).logits[:, :11])
    assert not torch.allclose(model(x).logits[:, 11:], model(changed).logits[:, 11:], atol=1e-3)


@torch.no_grad()
def test_row_of_a_batch_equals_single(model):
    x = ids(4)
    together = model(x).logits
    for row in range(4):
        torch.testing.assert_close(together[row], model(x[row : row + 1]).logits[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_engine_decodes_what_the_full_forward_says(model):
    prompt = ids(1, 5)[0].tolist()
    tokens = list(generate(model, prompt, LENGTH, lambda logits: logits.argmax(-1)))
    full = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    chosen = full.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
    # equal up to rounding: the chosen token is the likeliest of the full forward as well
    torch.testing.assert_close(chosen, full.max(1).values, atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_engine_stops_at_a_stop_id(model):
    prompt = ids(1, 5)[0].tolist()
    tokens = list(generate(model, prompt, 10, lambda logits: logits.argmax(-1)))
    stop = tokens[3]
    assert (
        list(generate(model, prompt, 10, lambda logits: logits.argmax(-1), {stop}))
        == tokens[: tokens.index(stop) + 1]
    )


def test_save_load_is_exact(model, tmp_path):
    from llmctl.model.checkpoint import load_model, save_model

    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config.spec.model_copy(update={"family": "auto"}) == model.config.spec
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, model(ids()).logits)


def test_planner_counts_every_parameter(model):
    spec = model.config.spec
    assert total_parameters(spec) == sum(weight.numel() for weight in model.parameters())
    assert set(parameters(spec)) == {"embedding", "attention", "ffn", "norm", "head"}


def test_planner_knows_the_cache(model):
    states = model.model.init_states(3, 10)
    held = sum(state.keys.nbytes + state.values.nbytes for state in states)
    assert held == 3 * kv_cache_bytes(model.config.spec, 10, states[0].keys.element_size())


def test_planner_counts_flops_of_the_products():
    from torch.utils.flop_counter import FlopCounterMode

    model = make("plain")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids(1))
    spec = model.config.spec
    attention = flops_per_token(spec, LENGTH) - 2 * (
        parameters(spec)["attention"] + parameters(spec)["ffn"] + parameters(spec)["embedding"]
    )
    products = LENGTH * (flops_per_token(spec, LENGTH) - attention)
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    assert products == counted


@pytest.mark.parametrize("cached", [False, True])
def test_gradient_checkpointing_changes_nothing(model, cached):
    """With a cache too: a checkpoint that dropped it would silently not train a learned prefix."""
    if cached:
        model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        with torch.no_grad():
            model.prompt_encoder.default.embedding.weight.normal_()
    found = []
    for checkpointing in (False, True):
        inner = model.get_base_model() if cached else model
        if checkpointing:
            recompute_activations(inner)
        model.train()
        model.zero_grad()
        loss = model(input_ids=ids(), attention_mask=torch.ones_like(ids()), labels=ids()).loss
        loss.backward()
        found.append((loss, [w.grad.clone() for w in model.parameters() if w.requires_grad]))
    (loss, grads), (loss2, grads2) = found
    torch.testing.assert_close(loss, loss2)
    assert all(grad.any() for grad in grads)
    for a, b in zip(grads, grads2, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_sampling_during_training_with_checkpointing_remembers_its_past():
    model = make("plain")
    expected = model.generate(ids(1, 5), max_new_tokens=8, do_sample=False, eos_token_id=None)
    recompute_activations(model)
    model.train()
    assert torch.equal(
        model.generate(ids(1, 5), max_new_tokens=8, do_sample=False, eos_token_id=None), expected
    )


def test_lora_reaches_every_linear_leaf(model):
    wanted = {leaf.name for leaf in leaves(model) if leaf.kind == "linear"}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    found = {
        name.split("base_model.model.")[1]
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A")
    }
    assert found == wanted and len(wanted) == 14


def test_leaves_are_all_matrices_but_the_embedding(model):
    inside = {f"{leaf.name}.weight" for leaf in leaves(model)}
    matrices = {name for name, w in model.named_parameters(remove_duplicate=False) if w.dim() == 2}
    assert matrices - inside == {"model.embed_tokens.weight"} and inside <= matrices
    for leaf in leaves(model):
        assert leaf.shape == tuple(leaf.module.weight.shape)
        assert leaf.kind == ("head" if leaf.name == "lm_head" else "linear")


def test_initialisation_has_a_role_for_every_parameter_and_follows_the_seed():
    first, same, other = (new_model(ModelSection(**SIZES, **VARIANTS["biases"]), seed) for seed in (1, 1, 2))
    for (name, a), b, c in zip(first.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        role = role_of(name)
        if role in ("one", "zero"):
            assert (a == (1.0 if role == "one" else 0.0)).all()
        else:
            assert not torch.equal(a, c)
            deviation = 0.02 / (2 if role == "residual" else 1)  # sqrt(2 * two layers)
            assert float(a.std()) == pytest.approx(deviation, rel=0.15), name


def test_unknown_parameter_has_no_role():
    with pytest.raises(KeyError, match=r"no initialisation for parameter model\.thing"):
        role_of("model.thing")


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "mixed-pattern"])
def test_contexts_agree_with_the_definition(name):
    """Every shortcut a context takes shows the same tokens as its dense mask."""
    spec = ModelSection(**SIZES, **VARIANTS[name]).resolved()
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 2, 3, 0]])
    mask = torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]])
    contexts = [
        plain_context(8),
        plain_context(1, past=7),
        plain_context(3, past=5),
        packed_context(positions),
        padded_context(mask, 8),
        padded_context(mask, 2),
    ]
    for ctx, kind in itertools.product(contexts, PATTERNS):
        if kind == "sliding" and spec.sliding_window is None:
            continue
        pattern = PATTERNS[kind](spec)
        seen, truth = ctx.visible(pattern), ctx.mask(pattern)
        T, S = truth.shape[1:]
        if seen.path == "open":
            assert truth.all()
        elif seen.path == "causal":
            assert torch.equal(truth, torch.ones(1, T, S, dtype=torch.bool).tril())
        elif seen.path == "spans":
            number = torch.repeat_interleave(torch.arange(len(seen.spans)), torch.tensor(seen.spans)).view(
                -1, T
            )
            same = (number[:, :, None] == number[:, None]) & torch.ones(T, T, dtype=torch.bool).tril()
            assert torch.equal(truth, same)
        else:
            assert torch.equal(seen.mask[:, 0], truth)
        assert truth.any(-1).all(), "a query that sees nothing would be NaN"


MISUSE = {
    "exactly one of": {},
    "output_attentions": {"input_ids": ids(), "output_attentions": True},
    "4-dimensional": {"input_ids": ids(), "attention_mask": torch.ones(2, 1, LENGTH, LENGTH)},
}


@pytest.mark.parametrize("message", MISUSE)
def test_misuse_is_a_value_error(message):
    with pytest.raises(ValueError, match=message):
        make("plain")(**MISUSE[message])


@torch.no_grad()
def test_hidden_states_and_logits_to_keep():
    model = make("plain")
    out = model(ids(), output_hidden_states=True)
    assert len(out.hidden_states) == SIZES["num_hidden_layers"] + 1
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    torch.testing.assert_close(model(ids(), logits_to_keep=3).logits, out.logits[:, -3:])
