"""Models of other programs in whole commands: end ids, sampling fields, padding that is another token too."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from llmctl.errors import UserError
from llmctl.evaluate.scores import scores
from llmctl.kernels.device import Compute
from llmctl.model.classify import open_scorer
from llmctl.recipe.chat import ChatRecipe
from llmctl.recipe.convert import ConvertRecipe
from llmctl.recipe.generate import GenerateRecipe
from llmctl.recipe.load import load_recipe
from llmctl.recipe.quantize import QuantizeRecipe
from llmctl.recipe.schema import EvalRecipe, SftRecipe
from llmctl.recipe.tune import CompareRecipe
from llmctl.stages import chat, compare, convert, evaluate, generate, quantize, sft
from llmctl.stages.tune import prepare_base
from llmctl.talk import SILENT

WORDS = ("<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, 32)))  # the word of id 3 is w3
UNKNOWN, BOS, EOS = 0, 1, 2
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'w3 ' + message['content'] + ' w4 ' }}"
    "{% else %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
SAMPLING = {"temperature": 0.9, "top_p": 0.6, "brand_new": [1]}


def made(
    where: Path,
    *,
    counts: bool = False,
    pad: str | None = "<unk>",
    template: str | None = None,
    **generation: Any,
) -> Path:
    """A small Llama and its words. If it `counts`, w5 follows on w4."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, initializer_range=0.5, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if counts:
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight.zero_()
            model.model.layers[0].mlp.down_proj.weight.zero_()
            model.model.embed_tokens.weight.copy_(torch.eye(32))
            model.lm_head.weight.copy_(5 * torch.eye(32).roll(1, 0))
    model.save_pretrained(where)
    backend = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=pad
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(where)
    if generation:
        path = where / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | generation))
    return where


def recipe(kind: type, base: Path, *words: str, **flags: Any) -> Any:
    return load_recipe(
        kind,
        None,
        {"base": str(base), **{name.replace("__", "."): value for name, value in flags.items()}},
        [*words],
    )


# --- what ends a generation -------------------------------------------------------------------------

# generation_config.json -> what w4 is followed by
ENDS = {"[9, 7]": ([9, 7], [5, 6, 7]), "8": (8, [5, 6, 7, 8]), "the tokenizer's": (None, [*range(5, 13)])}


@pytest.mark.parametrize("what", ENDS)
def test_every_end_id_ends_what_is_generated(what: str, tmp_path: Path) -> None:
    ends, wanted = ENDS[what]
    base = made(tmp_path / "m", counts=True, eos_token_id=ends)
    settings = {"max_new_tokens": 8, "temperature": 0.0}
    flags = {f"generate__{name}": value for name, value in settings.items()}
    assert generate.run(recipe(GenerateRecipe, base, **flags), "w4", SILENT)["tokens"] == wanted
    theirs = AutoModelForCausalLM.from_pretrained(base)
    assert (
        theirs.generate(torch.tensor([[BOS, 4]]), max_new_tokens=8, do_sample=False)[0, 2:].tolist() == wanted
    )
    flags = {f"chat__{name}": value for name, value in settings.items()}
    said = chat.begin(recipe(ChatRecipe, base, **flags), SILENT).ask("w4")
    assert (said.ended, said.new_tokens) == ("stop" if ends else "length", len(wanted))


def test_each_model_of_a_comparison_has_its_own_ends(tmp_path: Path) -> None:
    a = made(tmp_path / "a", counts=True, template=TEMPLATE, eos_token_id=[9, 7])
    b = made(tmp_path / "b", counts=True, template=TEMPLATE)
    data = tmp_path / "talks.jsonl"
    data.write_text(json.dumps({"instruction": "w6", "output": "w5 w6"}) + "\n")
    found = compare.run(
        recipe(CompareRecipe, a, "compare.max_new_tokens=6", other=str(b), compare__data=[str(data)]), SILENT
    )
    (answer,) = found["answers"]
    assert (answer["a"], answer["b"]) == ("w5 w6 w7", "w5 w6 w7 w8 w9 w10")
    assert (found["stop_rate_a"], found["stop_rate_b"]) == (1.0, 0.0)


def test_a_model_is_tuned_with_all_its_ends(tmp_path: Path) -> None:
    base = made(tmp_path / "m", template=TEMPLATE, eos_token_id=[9, 7])
    settings = {"device": "cpu", "dtype": "float32", "template": "auto", "max_length": None, "talk": SILENT}
    assert prepare_base(str(base), **settings).stop_ids == [EOS, 9, 7]


# --- sampling fields --------------------------------------------------------------------------------


def test_sampling_fields_end_no_run_at_its_first_save(tmp_path: Path) -> None:
    base = made(tmp_path / "m", template=TEMPLATE, **SAMPLING)
    data = tmp_path / "talks.jsonl"
    data.write_text(
        "".join(json.dumps({"instruction": f"w{n}", "output": f"w{n + 1}"}) + "\n" for n in range(5, 25))
    )
    short = ["train.max_steps=1", "train.threads=1", "data.eval_fraction=0", "train.sample_steps=null"]
    runs = {
        "adapter": sft.run(recipe(SftRecipe, base, *short, out=str(tmp_path / "adapter"), data__train=[str(data)]), SILENT),
        "whole": sft.run(recipe(SftRecipe, base, *short, "method=full", out=str(tmp_path / "whole"), data__train=[str(data)]), SILENT),
        "converted": convert.run(recipe(ConvertRecipe, base, dtype="bfloat16", out=str(tmp_path / "converted")), SILENT),
        "quantized": quantize.run(
            recipe(
                QuantizeRecipe, base, "quantize.method=int8", "quantize.group_size=channel", "compare.answers=0",
                "compare.speed_tokens=8", "compare.min_top1=0", "compare.max_kl=9", out=str(tmp_path / "quantized"),
                compare__data=[str(data)],
            ),
            SILENT,
        ),
    }  # fmt: skip
    for name, done in runs.items():
        written = json.loads((done.path / "generation_config.json").read_text())
        assert written | SAMPLING == written, name
        if name in ("whole", "converted"):
            AutoModelForCausalLM.from_pretrained(done.path)
    AutoTokenizer.from_pretrained(tmp_path / "whole")


def test_a_chat_template_that_writes_nothing(tmp_path: Path) -> None:
    base = made(tmp_path / "m", template="{# nothing #}")
    said = f"{base}: the chat template writes nothing"
    with pytest.raises(UserError) as caught:
        chat.begin(recipe(ChatRecipe, base), SILENT).ask("w4")
    assert caught.value.message == said
    with pytest.raises(UserError) as caught:
        generate.run(recipe(GenerateRecipe, base, generate__chat=True), "w4", SILENT)
    assert (caught.value.message, caught.value.hint) == (said, "leave out --chat")


# --- special by place, not by id --------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["<unk>", "</s>", "<s>", "w9", None])
def test_words_that_are_padding_too_count_as_text(pad: str | None, tmp_path: Path) -> None:
    """Bits of every token but the end token that stands after a text, over the bytes of the text, by transformers."""
    base = made(tmp_path / "m", pad=pad)
    texts = ["w5 and w9 or w7 so", "what w9 w9", "</s> <s> w30"]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = evaluate.run(
        recipe(EvalRecipe, base, eval__data=[str(data)], eval__cache_dir=str(tmp_path / "cache")), SILENT
    )
    model, nats, ends = AutoModelForCausalLM.from_pretrained(base), [], []
    for text in texts:
        ids = [BOS, *(WORDS.index(word) if word in WORDS[3:] else UNKNOWN for word in text.split()), EOS]
        if "</s>" in text:  # an entry of the vocabulary like any other: not a special token in a text
            ids[1:3] = EOS, BOS
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        each = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").tolist()
        nats += each[:-1]
        ends += each[-1:]
    size = sum(len(text.encode()) for text in texts)
    assert found["bytes"] == size and found["tokens"] == len(nats) + len(ends)
    assert found["loss"] == pytest.approx((sum(nats) + sum(ends)) / len([*nats, *ends]), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / size, rel=1e-4)


@pytest.mark.parametrize("pad", [None, -1, 0, EOS])
def test_answers_are_scored_alike_alone_and_beside_longer_ones(pad: int | None, tmp_path: Path) -> None:
    """Where a row ends is known by its mask; transformers, one row at a time, knows the padding token alone."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.5, num_labels=1, pad_token_id=pad, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    theirs = LlamaForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    rows = [[BOS, 5, 9, 7], [BOS, 4], [BOS, 11, 12, 13, 14, 15, 6], [BOS, 8, 9, EOS]]
    found = scores(open_scorer(tmp_path), rows, Compute(torch.device("cpu"), torch.float32), batch_size=3)
    with torch.no_grad():
        wanted = [float(theirs(torch.tensor([row])).logits[0, 0]) for row in rows]
    assert found == pytest.approx(wanted, abs=1e-5)
