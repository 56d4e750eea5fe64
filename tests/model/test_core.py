"""Contracts of the core, over the tables of variants."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

from llmctl.engine.generate import generate
from llmctl.model import recompute_activations
from llmctl.model.attention import GroupedQueryAttention
from llmctl.model.checkpoint import new_model
from llmctl.model.context import Context, packed_context, padded_context, plain_context
from llmctl.model.experts import EXPERTS
from llmctl.model.ffn import FFNS
from llmctl.model.init import role_of
from llmctl.model.leaves import leaves
from llmctl.model.mixers import ATTENTIONS, MIXERS
from llmctl.model.norms import NORMS
from llmctl.model.patterns import PATTERNS, pattern_of
from llmctl.model.positions import POSITIONS
from llmctl.model.rope import ROPE_TYPES
from llmctl.model.state import TokenState
from llmctl.plan.size import flops_per_token, parameters
from llmctl.recipe import experts as experts_vocabulary
from llmctl.recipe import model as vocabulary
from llmctl.recipe import rope as rope_vocabulary
from llmctl.recipe.model import ModelSection
from tests.model import contract
from tests.model.variants import (
    CROSSED,
    LAYERS,
    LENGTH,
    MIXTURES,
    SINGLE,
    SIZES,
    VARIANTS,
    goes_together,
    ids,
)
from tests.model.variants import make as make_variant

# kinds of layers that are patterns alone
PREDICATES = [
    f"layer-{name}"
    for name, layer in (LAYERS | MIXTURES).items()
    if not {*layer.get("pattern", ())} & {*get_args(vocabulary.Mixer)}
]


def make(name: str):
    return make_variant(VARIANTS[name])


@pytest.fixture(params=SINGLE)
def model(request):
    return make(request.param)


# crossed, they take minutes
NAMES = [*SINGLE, *(pytest.param(name, marks=pytest.mark.slow) for name in CROSSED)]


@pytest.mark.parametrize("promise", contract.PROMISES)
@pytest.mark.parametrize("name", NAMES)
def test_contract(name, promise):
    contract.PROMISES[promise](make(name))


@pytest.mark.parametrize("name", NAMES)
def test_save_load_is_exact(name, tmp_path):
    contract.save_and_load(make(name), tmp_path)


def test_tables_hold_what_the_vocabulary_names():
    for names, table in (
        (vocabulary.Norm, NORMS),
        (vocabulary.Position, POSITIONS),
        (vocabulary.Attention, ATTENTIONS),
        (vocabulary.Pattern, PATTERNS),
        (vocabulary.Mixer, MIXERS),
    ):
        assert set(get_args(names)) == set(table)
    assert set(get_args(vocabulary.Ffn)) == {*FFNS, "none"}
    for kinds, field, table in (
        (rope_vocabulary.RopeParameters, "rope_type", ROPE_TYPES),
        (experts_vocabulary.Experts, "kind", EXPERTS),
    ):
        options = get_args(get_args(kinds)[0])
        assert {get_args(kind.model_fields[field].annotation)[0] for kind in options} == set(table)


def test_every_entry_of_every_table_is_tried():
    layers = {
        part
        for layer in (LAYERS | MIXTURES).values()
        for entry in layer.get("pattern", ["full"])
        for part in entry.split("+")
    }
    assert layers == {*PATTERNS, *MIXERS}
    specs = [ModelSection(**(SIZES | variant)) for variant in SINGLE.values()]
    for field, table in (("norm", NORMS), ("position", POSITIONS), ("attention", ATTENTIONS)):
        assert {getattr(spec, field) for spec in specs} == set(table)
    assert {spec.rope_parameters.rope_type for spec in specs} == set(ROPE_TYPES)
    # the others look ahead, and are tried in encoders
    assert {spec.experts.kind for spec in specs if spec.experts} == {*EXPERTS} - {"slots", "expert_choice"}


def test_what_does_not_go_together_is_refused():
    """The crossing leaves out nothing but what a recipe cannot say."""
    for (mixer, layer), position in itertools.product(
        (LAYERS | MIXTURES | {"mla": SINGLE["mla"]}).items(), POSITIONS
    ):
        spec = SIZES | layer | {"position": position}
        if goes_together(mixer, position):
            ModelSection(**spec)
        else:
            with pytest.raises(ValueError, match=r"position must be rope|take no score bias|adds to scores"):
                ModelSection(**spec)
    assert len(CROSSED) > 400


# what a careless change would do, and which promise it breaks
def _blind_to_time(self, pattern):
    return pattern.sees(self.queries.column().position, self.keys.row().position)


_append = TokenState.append


def _confused(self, *new):
    keys, values = _append(self, *new)
    return keys.roll(1, dims=2), values


def _one_document(position_ids, by_span=True):
    return plain_context(position_ids.shape[1])


BREAKAGES = {
    "no future leak": ("layer-band", Context, "mask", _blind_to_time),
    "cached decoding": ("mqa", TokenState, "append", _confused),
    "packed row": ("mqa", "llmctl.model.context.packed_context", None, _one_document),
    "planned sizes": ("biases", "llmctl.plan.size.norm_size", None, lambda model, width=None: 1),
}


@pytest.mark.parametrize("promise", BREAKAGES)
def test_a_breakage_is_caught(promise, monkeypatch):
    name, where, attribute, broken = BREAKAGES[promise]
    contract.PROMISES[promise](make(name))
    if attribute is None:
        monkeypatch.setattr(where, broken)
    else:
        monkeypatch.setattr(where, attribute, broken)
    with pytest.raises(AssertionError):
        contract.PROMISES[promise](make(name))


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


def test_planner_counts_flops_of_the_products():
    from torch.utils.flop_counter import FlopCounterMode

    model = make("mqa")
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
        if not all(type(layer.self_attn) is GroupedQueryAttention for layer in model.model.layers):
            pytest.skip("a learned prefix is keys and values")
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
        torch.manual_seed(3)  # a noisy router draws
        loss = model(input_ids=ids(), attention_mask=torch.ones_like(ids()), labels=ids()).loss
        loss.backward()
        found.append((loss, [w.grad.clone() for w in model.parameters() if w.grad is not None]))
    (loss, grads), (loss2, grads2) = found
    torch.testing.assert_close(loss, loss2)
    assert all(grad.any() for grad in grads)
    for a, b in zip(grads, grads2, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_sampling_during_training_with_checkpointing_remembers_its_past():
    model = make("mqa")
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
    assert found == wanted and len(wanted) >= 4


# matrices that are no products of activations, and routers, whose few numbers decide too much to be rounded
TABLES = ("embed_tokens.weight", "embed_types.weight", "positions.weight", "gate.weight", "gate.noise.weight")


def test_leaves_are_all_matrices_but_the_embedding(model):
    inside = {f"{leaf.name}.weight" for leaf in leaves(model)}
    matrices = {name for name, w in model.named_parameters(remove_duplicate=False) if w.dim() == 2}
    tables = {name for name in matrices if name.endswith(TABLES)}
    assert matrices - inside == tables and inside <= matrices
    for leaf in leaves(model):
        assert leaf.shape == tuple(leaf.module.weight.shape)
        assert leaf.kind == ("head" if leaf.name == "lm_head" else "linear")


def test_initialisation_has_a_role_for_every_parameter_and_follows_the_seed():
    first, same, other = (new_model(ModelSection(**(SIZES | VARIANTS["biases"])), seed) for seed in (1, 1, 2))
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
@pytest.mark.parametrize("name", PREDICATES)
def test_contexts_agree_with_the_definition(name):
    """Every shortcut a context takes shows the same tokens as its dense mask."""
    spec = ModelSection(**(SIZES | VARIANTS[name])).resolved()
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 2, 3, 0]])
    mask = torch.tensor([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1]])
    contexts = [
        plain_context(8),
        plain_context(1, past=7),
        plain_context(3, past=5),
        packed_context(positions),
        packed_context(torch.tensor([[2, 3, 4, 5] * 2] * 2)),
        padded_context(mask, 8),
        padded_context(mask.flip(1), 8, positions),
        padded_context(mask, 2),
    ]
    for ctx, layer in itertools.product(contexts, range(spec.num_hidden_layers)):
        pattern = pattern_of(spec, layer)
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


def test_a_learned_prefix_does_not_fit_other_mixers():
    from transformers import DynamicCache

    model = make("layer-attention-and-state")
    with pytest.raises(ValueError, match="keys and values, which `mamba2` layers do not keep"):
        model(ids(), past_key_values=DynamicCache())


MISUSE = {
    "exactly one of": {},
    "output_attentions": {"input_ids": ids(), "output_attentions": True},
    "4-dimensional": {"input_ids": ids(), "attention_mask": torch.ones(2, 1, LENGTH, LENGTH)},
}


@pytest.mark.parametrize("message", MISUSE)
def test_misuse_is_a_value_error(message):
    with pytest.raises(ValueError, match=message):
        make("mqa")(**MISUSE[message])


@torch.no_grad()
def test_hidden_states_and_logits_to_keep():
    model = make("mqa")
    out = model(ids(), output_hidden_states=True)
    assert len(out.hidden_states) == SIZES["num_hidden_layers"] + 1
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)
    torch.testing.assert_close(model(ids(), logits_to_keep=3).logits, out.logits[:, -3:])
