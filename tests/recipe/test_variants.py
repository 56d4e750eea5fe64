"""The tables of variants against the vocabulary, the model and the recipe check: nothing is missing, nothing is made up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

from llmctl.errors import UserError
from llmctl.recipe import experts, model, papers, rope
from llmctl.recipe.goes_with import needs, needs_in_words, refused, refused_in_words, settings
from llmctl.recipe.load import load_recipe
from llmctl.recipe.model import ModelSection
from llmctl.recipe.papers import Paper
from llmctl.recipe.schema import PretrainRecipe
from llmctl.recipe.variants import AXES, OPTIONS, find_axis
from llmctl.recipe.words import WORDS

SMALL = ["model.vocab_size=61", "model.num_hidden_layers=2"]
STAR_TRANSFORMER = "1902.09113"  # of a mixture, not of a kind
ALL = [(axis, name) for axis, chosen in AXES.items() for name in chosen.variants]


def tags(union: Any, field: str) -> tuple[str, ...]:
    """The names of a tagged choice."""
    kinds = get_args(get_args(union)[0])
    return tuple(get_args(kind.model_fields[field].annotation)[0] for kind in kinds)


VOCABULARY = {
    "stack": get_args(model.StackKind),
    "position": get_args(model.Position),
    "rope_type": tags(rope.RopeParameters, "rope_type"),
    "norm": get_args(model.Norm),
    "norm_placement": get_args(model.NormPlacement),
    "attention": get_args(model.Attention),
    "pattern": get_args(model.Pattern),
    "mixer": get_args(model.Mixer),
    "ffn": get_args(model.Ffn),
    "experts": tags(experts.Experts, "kind"),
    "family": get_args(model.Family),
}


@pytest.mark.parametrize("axis", VOCABULARY)
def test_every_name_of_the_vocabulary_has_one_entry(axis: str) -> None:
    assert tuple(AXES[axis].variants) == VOCABULARY[axis]


def test_no_choice_of_a_model_is_left_out() -> None:
    """Each field that takes one of several words is an axis or an option, those of sections too."""
    known = {axis.field for axis in AXES.values()} | {f"model.{option}" for option in OPTIONS}
    found = set(choices(ModelSection))
    assert {"model.norm", "model.attention_bias", "model.experts.routing"} <= found <= known


def choices(kind: type[BaseModel], above: str = "model.") -> Iterator[str]:
    """Paths of the fields that are one of several words; the tag of one kind of a tagged choice is none."""
    for name, field in kind.model_fields.items():
        for part in leaves(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from choices(part, f"{above}{name}.")
        if get_origin(field.annotation) is Literal and len(get_args(field.annotation)) > 1:
            yield f"{above}{name}"


def leaves(annotation: Any) -> list[Any]:
    """The plain types inside unions and Annotated."""
    if isinstance(annotation, type) or not get_args(annotation):
        return [annotation]
    return [leaf for part in get_args(annotation) for leaf in leaves(part)]


@pytest.mark.parametrize(("axis", "name"), ALL)
def test_the_recipe_words_ask_for_it(axis: str, name: str) -> None:
    words = [*SMALL, *AXES[axis].variants[name].words]
    spec = load_recipe(PretrainRecipe, None, {}, words).model
    assert spec is not None and spec == ModelSection.model_validate(settings(words))
    spec = spec.resolved()
    if axis == "heads":
        assert spec.num_key_value_heads == {"mha": spec.num_attention_heads, "gqa": 2, "mqa": 1}[name]
    elif axis in ("pattern", "mixer"):
        assert spec.pattern == [name]
    elif axis == "options":
        assert value_of(spec, f"model.{name}") != value_of(ModelSection(), f"model.{name}")
    else:
        assert value_of(spec, AXES[axis].field) == name


def value_of(spec: ModelSection, path: str) -> Any:
    """The value of a field; None inside a section that is not there."""
    value: Any = spec
    for part in path.split(".")[1:]:
        value = None if value is None else getattr(value, part)
    return value


@pytest.mark.parametrize(("axis", "name"), ALL)
def test_every_entry_is_one_plain_sentence(axis: str, name: str) -> None:
    does = AXES[axis].variants[name].does
    assert does[0] == does[0].lower() and not does.endswith(".") and "\n" not in does
    assert len(does) <= 110


def test_model_tables_agree() -> None:
    from llmctl.model.block import PLACEMENTS
    from llmctl.model.experts import EXPERTS
    from llmctl.model.families import FAMILIES
    from llmctl.model.ffn import FFNS
    from llmctl.model.mixers import ATTENTIONS, MIXERS
    from llmctl.model.norms import NORMS
    from llmctl.model.patterns import PATTERNS
    from llmctl.model.positions import POSITIONS
    from llmctl.model.rope import ROPE_TYPES

    tables = {
        "norm": NORMS,
        "norm_placement": PLACEMENTS,
        "position": POSITIONS,
        "rope_type": ROPE_TYPES,
        "attention": ATTENTIONS,
        "pattern": PATTERNS,
        "mixer": MIXERS,
        "ffn": {**FFNS, "none": None},
        "experts": EXPERTS,
        "family": {"auto": None, **FAMILIES, "llmctl": None},
    }
    assert {axis: set(table) for axis, table in tables.items()} == {
        axis: set(AXES[axis].variants) for axis in tables
    }


@pytest.mark.parametrize("name", [name for name in AXES["family"].variants if name not in ("auto", "llmctl")])
def test_a_family_is_written_as_itself(name: str) -> None:
    from llmctl.model.config import LlmctlConfig
    from llmctl.model.families import write_config

    spec = ModelSection.model_validate(settings(AXES["family"].variants[name].words)).resolved(vocab_size=61)
    assert write_config(LlmctlConfig.of(spec, pad_token_id=1))[0] == name
    others = spec.model_copy(update={"family": "auto"})
    found = write_config(LlmctlConfig.of(others, pad_token_id=1))[0]
    assert found == {"phi3": "llama"}.get(name, name), "another family comes first and says the same"


@pytest.mark.parametrize(
    ("axis", "name", "needed"),
    [
        ("norm", "layernorm", ""),
        ("pattern", "dilated", "sliding_window, dilation"),
        ("rope_type", "linear", "rope_parameters.factor"),
        ("mixer", "mamba2", ""),
        ("experts", "slots", "stack=encoder"),
        ("ffn", "none", "pattern=[mamba2]"),
        ("options", "experts.noisy", "experts.kind=sparse"),
        ("options", "experts.routing", "experts.kind=soft, stack=encoder"),
        ("family", "mistral", ""),
    ],
)
def test_needs(axis: str, name: str, needed: str) -> None:
    assert needs_in_words(axis, name) == needed


@pytest.mark.parametrize(
    ("axis", "name", "with_"),
    [
        ("norm", "layernorm", ""),
        ("position", "none", "rope_type other than default; attention mla"),
        ("position", "alibi", "rope_type other than default; attention mla; any mixer"),
        ("attention", "mla", "position other than rope; heads other than mha; any mixer"),
        (
            "mixer",
            "mamba2",
            "stack other than decoder; position relative, alibi; rope_type other than default; attention mla",
        ),
        ("experts", "sparse", "ffn none"),
        ("experts", "slots", ""),
        ("family", "bert", ""),
    ],
)
def test_what_it_does_not_go_with(axis: str, name: str, with_: str) -> None:
    assert refused_in_words(axis, name) == with_


def test_what_is_said_to_clash_is_refused_and_both_sides_say_so() -> None:
    for axis, name in ALL:
        for other, names in refused(axis, name).items():
            for there in names:
                words = [*AXES[axis].variants[name].words, *AXES[other].variants[there].words]
                with pytest.raises(UserError):
                    load_recipe(PretrainRecipe, None, {}, words)
                assert axis == "options" or name in refused(other, there)[axis]


def test_what_is_needed_is_missed() -> None:
    for axis, name in ALL:
        words = AXES[axis].variants[name].words
        for needed in needs(axis, name):
            with pytest.raises(UserError):
                load_recipe(PretrainRecipe, None, {}, [word for word in words if word != needed])


def test_options_say_what_the_fields_say() -> None:
    assert {name: v.does for name, v in OPTIONS.items()} == {name: WORDS[f"model.{name}"] for name in OPTIONS}


def test_papers() -> None:
    every = {name: paper for name, paper in vars(papers).items() if isinstance(paper, Paper)}
    cited = [v.paper for axis in AXES.values() for v in axis.variants.values() if v.paper is not None]
    assert set(every.values()) == set(cited)
    ids = [paper.arxiv for paper in every.values() if paper.arxiv]
    assert len(ids) == len(set(ids))
    for paper in every.values():
        assert paper.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv)
        # first shown in the year of the id, and published then or soon after
        assert paper.arxiv is None or 0 <= paper.year - (2000 + int(paper.arxiv[:2])) <= 1
    assert str(papers.GQA) == "Ainslie et al. (2023), arXiv:2305.13245"
    assert str(papers.MIXTURE) == "Jacobs et al. (1991)"


def test_docstrings_of_the_model_name_the_same_papers() -> None:
    """An arXiv id in a class's docstring is one of ours, so that neither is mistyped."""
    known = {paper.arxiv for paper in vars(papers).values() if isinstance(paper, Paper)}
    folder = Path(model.__file__).parent.parent / "model"
    files = ("norms", "positions", "rope", "patterns", "ffn", "mla", "mamba", "content")
    found = {id_ for f in files for id_ in re.findall(r"arXiv:(\d+\.\d+)", (folder / f"{f}.py").read_text())}
    assert found and found - known == {STAR_TRANSFORMER}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mixr", "did you mean `mixer`?"),
        ("lsh", "did you mean `mixer`?"),
        ("xyz", "`llmctl recipe variants` prints all"),
    ],
)
def test_unknown_axis(name: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        find_axis(name)
    assert caught.value.message.startswith(f"{name}: not one of `stack`, `position`")
    assert caught.value.hint == hint
