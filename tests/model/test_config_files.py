"""What other programs write into a model's JSON files: read as transformers reads it, kept, or refused by its name."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from llmctl.errors import UserError
from llmctl.model.checkpoint import load_model, save_model
from llmctl.model.families import config_in
from llmctl.model.generation import ids_in
from llmctl.model.notes import say_once
from llmctl.model.open import open_config, open_generation_config, open_model, stored_dtype

GONE = object()  # a field that is taken out
IDS = torch.tensor([[1, 5, 9, 30, 2, 7]])
Change = Callable[[Path], object]
CONFIG, GENERATION = "config.json", "generation_config.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a small Llama of transformers' own, with a head of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.4, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("made")
    LlamaForCausalLM(config).save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def folder(made: dict[str, bytes], tmp_path: Path) -> Path:
    where = tmp_path / "m"
    where.mkdir()
    for name, content in made.items():
        (where / name).write_bytes(content)
    return where


@pytest.fixture(autouse=True)
def _said_again() -> Iterator[None]:
    say_once.cache_clear()
    yield
    say_once.cache_clear()


def fields(file: str, **changed: Any) -> Change:
    """Set fields of a JSON file, or take them out."""

    def apply(folder: Path) -> None:
        found = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
        found = {name: value for name, value in (found | changed).items() if value is not GONE}
        (folder / file).write_text(json.dumps(found))

    return apply


def rope(**old: Any) -> Change:
    """`rope_theta` and `rope_scaling`, as configs had them before `rope_parameters`."""
    return fields(CONFIG, rope_parameters=GONE, **old)


def text(file: str, content: str | bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )


def marked(file: str) -> Change:
    """A byte order mark before the file."""
    return lambda folder: (folder / file).write_bytes(b"\xef\xbb\xbf" + (folder / file).read_bytes())


def linked(folder: Path) -> None:
    """Every file a symbolic link, as in the hub's cache."""
    for file in list(folder.iterdir()):
        file.symlink_to(file.rename(folder.parent / f"blob-{file.name}"))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def theirs(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


SCALED = {"factor": 2.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# opens here with transformers' logits, and what is saved opens in transformers with the same
OPENS: dict[str, Change] = {
    "as it is": lambda folder: None,
    "dtype auto": fields(CONFIG, dtype="auto"),
    "torch_dtype auto": fields(CONFIG, dtype=GONE, torch_dtype="auto"),
    "torch_dtype with its module": fields(CONFIG, dtype=GONE, torch_dtype="torch.bfloat16"),
    "torch_dtype float16": fields(CONFIG, dtype=GONE, torch_dtype="float16"),
    "no dtype": fields(CONFIG, dtype=None, torch_dtype=None),
    "no cache": fields(CONFIG, use_cache=False),
    "no ids": fields(CONFIG, bos_token_id=None, eos_token_id=None, pad_token_id=None),
    "several end ids": fields(CONFIG, eos_token_id=[2, 7]),
    "pad -1": fields(CONFIG, pad_token_id=-1),
    "tie_word_embeddings missing": fields(CONFIG, tie_word_embeddings=GONE),
    "rope_scaling null": rope(rope_theta=10000.0, rope_scaling=None),
    "rope_theta a whole number": rope(rope_theta=500000),
    "neither rope field": rope(),
    "rope_scaling by type": rope(rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 2}),
    "rope_scaling by rope_type": rope(rope_theta=10000.0, rope_scaling={"rope_type": "yarn", **SCALED}),
    "rope_scaling by both": rope(rope_scaling={"type": "linear", "rope_type": "linear", "factor": 2.0}),
    "rope_scaling default": rope(rope_scaling={"type": "default"}),
    "rope_scaling llama3": rope(rope_theta=500000.0, rope_scaling={"rope_type": "llama3", **LLAMA3}),
    "both forms of rope": fields(CONFIG, rope_theta=50000.0, rope_scaling=None),
    "rope_parameters by type": fields(CONFIG, rope_parameters={"type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "rope_parameters without a base": fields(CONFIG, rope_parameters={"rope_type": "default"}),
    "a window that Llama has not": fields(CONFIG, sliding_window=None, max_window_layers=1),
    "biases missing": fields(CONFIG, attention_bias=GONE, mlp_bias=GONE),
    "head_dim null": fields(CONFIG, head_dim=None),
    "architectures missing": fields(CONFIG, architectures=GONE),
    "architectures null": fields(CONFIG, architectures=None),
    "several architectures": fields(CONFIG, architectures=["LlamaModel", "LlamaForCausalLM"]),
    "architectures of another program": fields(CONFIG, architectures=["LlavaForConditionalGeneration"]),
    "a name and a newer version": fields(CONFIG, _name_or_path="a/b", transformers_version="9.9.9"),
    "code of its own": fields(CONFIG, auto_map={"AutoModelForCausalLM": "modeling_x.X"}),
    "quantization_config null": fields(CONFIG, quantization_config=None),
    "quantized by nothing": fields(
        CONFIG, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}
    ),
    "max_position_embeddings missing": fields(CONFIG, max_position_embeddings=GONE),
    "sampling in config.json": fields(CONFIG, temperature=0.7, top_p=0.9, max_length=20, do_sample=True),
    "fields nobody knows": fields(CONFIG, of_our_own={"a": [1]}, mup_width=3),
    "symbolic links": linked,
    "sampling fields alone": fields(GENERATION, temperature=0.9, top_p=0.6),
    "not sampling, with a temperature": fields(GENERATION, do_sample=False, temperature=0.5),
    "more of sampling": fields(GENERATION, typical_p=0.9, min_p=0.1, top_k=4, penalty_alpha=0.6),
    "of beams": fields(GENERATION, length_penalty=1.2, early_stopping=True, num_beam_groups=2, num_beams=4),
    "outputs": fields(GENERATION, output_attentions=True, cache_implementation="hybrid"),
    "new fields": fields(GENERATION, brand_new={"a": 1}, chat_format="chatml"),
    "new fields, said to be of the config": fields(GENERATION, _from_model_config=True, brand_new=3),
    "end ids null": fields(GENERATION, eos_token_id=None),
    "end ids beyond the vocabulary": fields(GENERATION, eos_token_id=[50256, -1]),
    "pad ids that are none": fields(GENERATION, pad_token_id=-1),
    "an empty generation config": text(GENERATION, "{}"),
    "no generation config": lambda folder: (folder / GENERATION).unlink(),
    "a marked generation config": marked(GENERATION),
}  # fmt: skip


@pytest.mark.parametrize("what", OPENS)
def test_opens_and_is_saved_as_transformers_reads_it(what: str, folder: Path, tmp_path: Path) -> None:
    OPENS[what](folder)
    wanted = theirs(folder)
    model = open_model(folder, torch.float32)
    torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)
    assert stored_dtype(folder) in (torch.float32, torch.bfloat16, torch.float16)
    kept = (
        json.loads((folder / GENERATION).read_bytes().lstrip(b"\xef\xbb\xbf"))
        if (folder / GENERATION).is_file()
        else {}
    )
    save_model(model, tmp_path / "saved")
    torch.testing.assert_close(theirs(tmp_path / "saved"), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(load_model(tmp_path / "saved")), wanted, atol=1e-5, rtol=1e-5)
    written = json.loads((tmp_path / "saved" / GENERATION).read_text())
    assert {name: written[name] for name in kept if kept[name] is not None} == {
        name: value for name, value in kept.items() if value is not None
    }
    GenerationConfig.from_pretrained(tmp_path / "saved")


def shows(file: str, *words: str) -> list[str]:
    return [f"{{m}}/{file}: ", *words]


# change -> what stands in the message
REFUSED: dict[str, tuple[Change, list[str]]] = {
    **{
        f"{field} {value!r}": (fields(CONFIG, **{field: value}), shows(CONFIG, field))
        for field, value in {
            "dtype": "floaty", "eos_token_id": "2", "pad_token_id": [0], "bos_token_id": 1.0,
            "tie_word_embeddings": None, "rope_scaling": "linear", "attention_bias": None, "hidden_size": 16.0,
            "vocab_size": "40", "num_attention_heads": 0, "num_hidden_layers": -1, "rms_norm_eps": None,
            "hidden_act": ["silu"], "max_position_embeddings": 64.5, "id2label": {"x": "a"}, "initializer_range": "1",
        }.items()
    },
    "torch_dtype 16": (fields(CONFIG, dtype=GONE, torch_dtype=16), shows(CONFIG, "torch_dtype: `16`")),
    "int8 weights": (fields(CONFIG, dtype="int8"), shows(CONFIG, "dtype: `int8` is not a precision of weights")),
    "a rope without its factor": (rope(rope_scaling={"type": "linear"}), shows(CONFIG, "rope_scaling", "factor")),
    "an unknown rope": (rope(rope_scaling={"type": "magic", "factor": 2.0}), shows(CONFIG, "rope_type: magic")),
    "a rope that is not built": (rope(rope_scaling={"type": "dynamic", "factor": 2.0}), shows(CONFIG, "dynamic")),
    "half a rope": (rope(partial_rotary_factor=0.5), shows(CONFIG, "partial_rotary_factor: 0.5")),
    "NaN": (lambda m: text(CONFIG, (m / CONFIG).read_text().replace("1e-06", "NaN"))(m), shows(CONFIG, "rms_norm_eps")),
    "model_type a list": (fields(CONFIG, model_type=["llama"]), shows(CONFIG, "unsupported architecture `['llama']`")),
    "gptq": (fields(CONFIG, quantization_config={"quant_method": "gptq"}), shows(CONFIG, "quantized (gptq)")),
    "awq": (fields(CONFIG, quantization_config={"quant_method": "awq"}), shows(CONFIG, "quantized (awq)")),
    "bitsandbytes": (
        fields(CONFIG, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        shows(CONFIG, "quantized (bitsandbytes)"),
    ),
    "bitsandbytes, as it was": (
        fields(CONFIG, quantization_config={"load_in_8bit": True}),
        shows(CONFIG, "quantization_config: the weights are quantized (bitsandbytes)"),
    ),
    "architectures that are none": (fields(CONFIG, architectures=[5]), shows(CONFIG, "architectures: [5] is not")),
    "more layers than there are": (fields(CONFIG, num_hidden_layers=10**30), shows(CONFIG, "num_hidden_layers: should be less than or equal to 10000")),
    "a vocabulary without end": (fields(CONFIG, vocab_size=10**30), shows(CONFIG, "vocab_size: should be")),
    "a field that is a method": (fields(GENERATION, to_dict=1), shows(GENERATION, "to_dict: no field has this name")),
    "an empty config": (text(CONFIG, ""), shows(CONFIG, "not valid JSON")),
    "a list for a config": (text(CONFIG, "[]"), shows(CONFIG, "not a JSON object")),
    "a config without end": (text(CONFIG, "[" * 100_000), shows(CONFIG, "nested too deeply")),
    "UTF-16": (lambda m: (m / CONFIG).write_text("{}", encoding="utf-16"), shows(CONFIG, "not valid JSON")),
    **{
        f"generation: {field} {value!r}": (fields(GENERATION, _from_model_config=GONE, **{field: value}), shows(GENERATION, f"{field}: "))
        for field, value in {
            "eos_token_id": "2", "pad_token_id": [0], "bos_token_id": 1.0, "num_return_sequences": 3,
            "early_stopping": "maybe", "cache_implementation": "superb", "logits_processor": "x", "max_new_tokens": 0,
            "suppress_tokens": 5, "watermarking_config": {"nope": 1}, "compile_config": {"fullgraph": True},
        }.items()
    },
    "end ids that are nested": (fields(GENERATION, eos_token_id=[[2], 3]), shows(GENERATION, "eos_token_id: [2] is not")),
    "an end id that is true": (fields(GENERATION, eos_token_id=True), shows(GENERATION, "eos_token_id: True is not")),
    "an end id that is null": (fields(GENERATION, eos_token_id=[2, None]), shows(GENERATION, "eos_token_id: None is not")),
    "an empty generation config": (text(GENERATION, ""), shows(GENERATION, "not valid JSON")),
    "a list for a generation config": (text(GENERATION, "[]"), shows(GENERATION, "not a JSON object")),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_the_file_and_the_field(what: str, folder: Path) -> None:
    change, words = REFUSED[what]
    change(folder)
    with pytest.raises(UserError) as caught:
        open_config(folder)
        open_model(folder)
    for word in words:
        assert word.format(m=folder) in caught.value.message
    assert caught.value.hint and "\n" not in caught.value.message


def test_fields_that_nothing_reads_are_saved_as_they_were(folder: Path, tmp_path: Path) -> None:
    """But not what the core says itself, code that is not copied, and what belongs to another family's config."""
    of_a_file = {"auto_map": {"AutoConfig": "x.X"}, "rope_scaling": None, "torch_dtype": "float32"}
    fields(CONFIG, use_cache=False, of_our_own={"a": [1]}, mup_width=3, **of_a_file)(folder)
    model = load_model(folder)
    save_model(model, tmp_path / "one")
    found = json.loads((tmp_path / "one" / CONFIG).read_text())
    assert (found["use_cache"], found["of_our_own"], found["mup_width"]) == (False, {"a": [1]}, 3)
    assert not of_a_file.keys() & found.keys()
    save_model(load_model(tmp_path / "one"), tmp_path / "two")
    assert json.loads((tmp_path / "two" / CONFIG).read_text()) == found
    for family in ("llmctl", "mistral"):
        model.config.family = family
        save_model(model, tmp_path / family)
        assert "of_our_own" not in json.loads((tmp_path / family / CONFIG).read_text())


def test_a_changed_id_is_written_and_the_rest_is_as_it_was(folder: Path, tmp_path: Path) -> None:
    fields(GENERATION, temperature=0.9, brand_new=[1], transformers_version="4.28.1")(folder)
    model = load_model(folder)
    model.generation_config.update(eos_token_id=[2, 7])
    model.generation_config.save_pretrained(tmp_path)
    before = json.loads((folder / GENERATION).read_text())
    assert json.loads((tmp_path / GENERATION).read_text()) == before | {"eos_token_id": [2, 7]}


def test_transformers_generates_by_the_file(folder: Path) -> None:
    """Sampling fields are not lost to those who call `generate` in Python."""
    fields(GENERATION, do_sample=True, temperature=0.01, max_new_tokens=5, eos_token_id=None)(folder)
    fields(CONFIG, eos_token_id=None)(folder)
    found = []
    for model in (load_model(folder), AutoModelForCausalLM.from_pretrained(folder)):
        torch.manual_seed(0)
        found.append(model.generate(IDS).tolist())
    assert found[0] == found[1] and len(found[0][0]) == IDS.shape[1] + 5


def test_sampling_fields_of_an_old_config_are_kept_as_transformers_reads_them(
    folder: Path, tmp_path: Path
) -> None:
    """There was a time before generation_config.json."""
    (folder / GENERATION).unlink()
    fields(CONFIG, do_sample=True, temperature=0.7, max_length=9, eos_token_id=[2, 7])(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).generation_config
    ours = load_model(folder)
    save_model(ours, tmp_path / "saved")
    again = GenerationConfig.from_pretrained(tmp_path / "saved")
    for found in (ours.generation_config, again):
        for name in (
            "do_sample",
            "temperature",
            "max_length",
            "eos_token_id",
            "bos_token_id",
            "pad_token_id",
        ):
            assert getattr(found, name) == getattr(theirs, name), name


ENDS = {
    # config.json, generation_config.json -> what ends a generation
    "the generation config's": (2, [2, 7], [2, 7]),
    "not the config's, where there are others": ([2, 9], 7, [7]),
    "the config's, where there are no others": ([2, 9], None, [2, 9]),
    "the config's, where the field is missing": (9, GONE, [9]),
    "none": (None, None, []),
    "negative ones are none": (9, [-1, 7], [7]),
}


@pytest.mark.parametrize("what", ENDS)
def test_which_ids_end_a_generation(what: str, folder: Path) -> None:
    config, generation, wanted = ENDS[what]
    fields(CONFIG, eos_token_id=config)(folder)
    fields(GENERATION, eos_token_id=generation)(folder)
    assert ids_in(load_model(folder).generation_config.eos_token_id) == wanted
    assert ids_in(open_generation_config(folder).eos_token_id) == wanted


def test_a_pad_token_without_a_row_is_left_out(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers does not open such a folder (an assertion of torch's Embedding); it opens what we save of it."""
    wanted = theirs(folder)
    fields(CONFIG, pad_token_id=40)(folder)
    with pytest.raises(AssertionError):
        theirs(folder)
    with caplog.at_level(logging.WARNING, "llmctl"):
        model = load_model(folder)
        open_config(folder)
    said = f"{folder}/config.json: pad_token_id 40 is beyond the vocabulary of 40: left out"
    assert [record.getMessage() for record in caplog.records if record.name == "llmctl"] == [said]
    save_model(model, tmp_path / "saved")
    torch.testing.assert_close(theirs(tmp_path / "saved"), wanted, atol=1e-5, rtol=1e-5)


def test_code_of_its_own_is_not_run_and_that_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields(CONFIG, auto_map={"AutoModelForCausalLM": "modeling_x.X"})(folder)
    with caplog.at_level(logging.WARNING, "llmctl"):
        config_in(folder)
    said = f"{folder}/config.json: auto_map names code of the model's own, which is not run"
    assert [record.getMessage() for record in caplog.records] == [said]


PRECISIONS = {
    # what config.json says -> as what it is taken, of float32 weights
    "auto": "float32", None: "float32", "torch.bfloat16": "bfloat16", "float16": "float16", "half": "float16",
}  # fmt: skip


@pytest.mark.parametrize("named", PRECISIONS)
@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_the_precision_that_a_model_is_stored_in(field: str, named: str | None, folder: Path) -> None:
    fields(CONFIG, **{"dtype": GONE, field: named})(folder)
    assert stored_dtype(folder) == getattr(torch, PRECISIONS[named])
