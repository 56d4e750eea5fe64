"""What other programs write beside tokenizer.json: read as transformers reads it, kept, or refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmctl.errors import UserError
from llmctl.stages.text import refuse_mismatch
from llmctl.tokenizer.load import fingerprint, load_tokenizer
from llmctl.tokenizer.template import template_hash

Change = Callable[[Path], object]
GONE = object()
CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEMPLATE = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
NAMED = [
    {"name": "default", "template": TEMPLATE},
    {"name": "tool_use", "template": "{{ tools }}" + TEMPLATE},
]
AS_OBJECT = {
    "content": "<|eos|>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
}
TEXT = "Ada keeps <|im_end|> two\n maps , isn't it? <|eos|>"


@pytest.fixture
def folder(trained: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    trained.save_pretrained(tmp_path / "t")
    return tmp_path / "t"


def fields(file: str, **changed: Any) -> Change:
    def apply(folder: Path) -> None:
        found = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
        found = {name: value for name, value in (found | changed).items() if value is not GONE}
        (folder / file).write_text(json.dumps(found))

    return apply


def text(file: str, content: str | bytes) -> Change:
    def apply(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return apply


def templated(template: Any) -> Change:
    """A chat template in tokenizer_config.json instead of a file of its own."""

    def apply(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        fields(CONFIG, chat_template=template)(folder)

    return apply


def vocabulary_and_merges(folder: Path) -> None:
    """The files of GPT-2's tokenizer, before there was tokenizer.json."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    fields(CONFIG, tokenizer_class="GPT2Tokenizer")(folder)


def model_beside(**config: Any) -> Change:
    return lambda folder: (folder / "config.json").write_text(json.dumps(config))


OPENS: dict[str, Change] = {
    "no config": lambda folder: (folder / CONFIG).unlink(),
    "an empty config": text(CONFIG, "{}"),
    "no length": fields(CONFIG, model_max_length=int(1e30)),
    "length null": fields(CONFIG, model_max_length=None),
    "a slow class": fields(CONFIG, tokenizer_class="LlamaTokenizer"),
    "an unknown class": fields(CONFIG, tokenizer_class="OfOurOwnTokenizer"),
    "class null": fields(CONFIG, tokenizer_class=None),
    "tokens as objects": fields(CONFIG, eos_token={"__type": "AddedToken", **AS_OBJECT}),
    "unk as an object": fields(CONFIG, unk_token={"__type": "AddedToken", **AS_OBJECT}),
    "no pad": fields(CONFIG, pad_token=None),
    "pad is the end token": fields(CONFIG, pad_token="<|eos|>"),
    "add_bos_token": fields(CONFIG, add_bos_token=True, add_eos_token=True),
    "not add_bos_token": fields(CONFIG, add_bos_token=False),
    "extra_special_tokens as a list": fields(CONFIG, extra_special_tokens=["<|im_start|>"]),
    "extra_special_tokens by name": fields(CONFIG, extra_special_tokens={"image_token": "<|im_start|>"}),
    "additional_special_tokens": fields(CONFIG, additional_special_tokens=["<|im_start|>"]),
    "additional_special_tokens null": fields(CONFIG, additional_special_tokens=None),
    "added_tokens_decoder": fields(CONFIG, added_tokens_decoder={"2": AS_OBJECT | {"special": True}}),
    "clean_up_tokenization_spaces": fields(CONFIG, clean_up_tokenization_spaces=True),
    "of Llama": fields(CONFIG, legacy=True, sp_model_kwargs={}, padding_side="left", use_default_system_prompt=False),
    "a template in the config": templated(TEMPLATE),
    "named templates": templated(NAMED),
    "one named template": templated(NAMED[:1]),
    "no template": templated(None),
    "templates in both places": fields(CONFIG, chat_template=TEMPLATE),
    "templates in a folder": text("additional_chat_templates/tool_use.jinja", TEMPLATE),
    "special_tokens_map": fields(SPECIAL, eos_token=AS_OBJECT, pad_token="<|pad|>"),
    "special_tokens_map alone": lambda m: ((m / CONFIG).unlink(), fields(SPECIAL, eos_token="<|eos|>")(m)),
    "added_tokens": fields(ADDED, **{"<|eos|>": 2}),
    "vocabulary and merges": vocabulary_and_merges,
    # a config.json that transformers' tokenizers stumble over does not matter to a tokenizer
    "dtype auto": model_beside(model_type="llama", dtype="auto"),
    "a broken size": model_beside(model_type="llama", hidden_size="wide"),
    "an architecture nobody knows": model_beside(model_type="of_our_own"),
}  # fmt: skip
OF_THE_MODEL = ("dtype auto", "a broken size")  # with which transformers opens no tokenizer


@pytest.mark.parametrize("what", OPENS)
def test_opens_as_in_transformers_and_is_kept(
    what: str, folder: Path, tmp_path: Path, trained: PreTrainedTokenizerFast
) -> None:
    OPENS[what](folder)
    ours = load_tokenizer(str(folder))
    theirs = trained if what in OF_THE_MODEL else AutoTokenizer.from_pretrained(folder)
    ours.save_pretrained(tmp_path / "saved")
    for other in (
        theirs,
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
        load_tokenizer(str(tmp_path / "saved")),
    ):
        for special in (True, False):
            one, two = (each(TEXT, add_special_tokens=special)["input_ids"] for each in (ours, other))
            assert one == two
        assert fingerprint(other) == fingerprint(ours)
        assert template_hash(other) == template_hash(ours)


DAMAGED = "the file is damaged; copy or train the tokenizer again"
# change -> file, and what is said of it
REFUSED: dict[str, tuple[Change, str, str]] = {
    "an object that is no token": (
        fields(CONFIG, eos_token={"content": "x"}),
        CONFIG,
        'eos_token: {"content": "x"} is not a token: its text, or an object with __type AddedToken',
    ),
    "a number": (fields(CONFIG, pad_token=5), CONFIG, "pad_token: 5 is not a token: its text, or an object with __type AddedToken"),
    "tokens by words": (fields(CONFIG, added_tokens_decoder={"x": AS_OBJECT}), CONFIG, "added_tokens_decoder: "),
    "tokens that are none": (fields(CONFIG, additional_special_tokens=[5]), CONFIG, "additional_special_tokens: [5] is not a list of tokens"),
    "extra tokens that are none": (fields(CONFIG, extra_special_tokens=5), CONFIG, "extra_special_tokens: 5 is not "),
    "a template without text": (templated([{"name": "rag"}]), CONFIG, 'chat_template: [{"name": "rag"}] is not a template, or a list of named ones'),
    "a template that is none": (templated(5), CONFIG, "chat_template: 5 is not "),
    "classes": (fields(CONFIG, tokenizer_class=["a"]), CONFIG, 'tokenizer_class: ["a"] is not the name of a class'),
    "a side": (fields(CONFIG, padding_side="middle"), CONFIG, 'padding_side: "middle" is not left or right'),
    "a length": (fields(CONFIG, model_max_length="long"), CONFIG, 'model_max_length: "long" is not a number'),
    "a marked config": (lambda m: text(CONFIG, b"\xef\xbb\xbf" + (m / CONFIG).read_bytes())(m), CONFIG, "begins with a byte order mark"),
    "a config without end": (text(CONFIG, '{"a":' * 100_000), CONFIG, "nested too deeply"),
    "a broken map": (text(SPECIAL, "{"), SPECIAL, "line 1: not valid JSON"),
    "a map that is a list": (text(SPECIAL, "[]"), SPECIAL, "not a JSON object"),
    "an empty map": (text(SPECIAL, ""), SPECIAL, "line 1: not valid JSON"),
    "added tokens without ids": (fields(ADDED, **{"<x>": "3"}), ADDED, '<x>: "3" is not an id'),
    "a template in Latin-1": (text("chat_template.jinja", b"{{ '\xff' }}"), "chat_template.jinja", "not UTF-8 (byte 4)"),
    "code of its own": (
        fields(CONFIG, tokenizer_class="XTokenizer", auto_map={"AutoTokenizer": ["tokenization_x.XTokenizer", None]}),
        CONFIG,
        "auto_map names code of the tokenizer's own, which is not run",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_refused_with_the_file_and_the_field(
    what: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, file, said = REFUSED[what]
    change(folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(folder))
    assert caught.value.message.startswith(f"{folder}/{file}: {said}")
    assert caught.value.hint and "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["tokenizer.model", "vocab.txt", "qwen.tiktoken"])
def test_a_vocabulary_that_no_tokenizer_can_be_made_of(name: str, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / name).write_bytes(b"\x00junk")
    fields(CONFIG, tokenizer_class=GONE)(folder)
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(folder))
    assert caught.value.message.startswith(f"{folder}: no tokenizer.json, and none can be made of {name}: ")
    assert caught.value.hint == "open it with transformers where that works, and save it as tokenizer.json"


def test_tokens_without_a_row_are_named(folder: Path) -> None:
    size = len(load_tokenizer(str(folder)))
    fields(CONFIG, pad_token="[PAD]")(folder)
    with pytest.raises(UserError) as caught:
        refuse_mismatch(load_tokenizer(str(folder)), size, "m")
    said = f"m: the tokenizer needs {size + 1} rows, but the model has vocab_size {size}: none for `[PAD]`"
    assert caught.value.message == said
    assert (
        caught.value.hint == "take what was added out of the tokenizer's files, or give the model rows for it"
    )
