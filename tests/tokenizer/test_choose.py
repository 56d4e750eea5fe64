"""Which chat template a run uses, what is said of it, and what is wrong with a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from llmctl.errors import UserError
from llmctl.tokenizer.choose import NAMED, Choice, choose_template, template_tokens
from llmctl.tokenizer.render import Encoded, Renderer, RenderError
from llmctl.tokenizer.template import ALPACA, CHATML, stop_ids
from tests.tokenizer.talks import MARKED, byte_level, unmarked
from tests.turns import assistant, user

TALK = [user("What is it?"), assistant("A map.")]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture
def bare() -> PreTrainedTokenizerFast:
    """A tokenizer without the tokens of any template, as base models bring it."""
    made = byte_level()
    rules = made.backend_tokenizer.to_str().replace("<|im_start|>", "<|x|>").replace("<|im_end|>", "<|y|>")
    backend = type(made.backend_tokenizer).from_str(rules)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def rendered(tokenizer: PreTrainedTokenizerFast) -> Encoded | RenderError:
    renderer = Renderer(tokenizer)
    return renderer.encode([renderer.render(TALK)])[0]


def write(folder: Path, content: str | bytes) -> str:
    file = folder / "my.jinja"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


def refused(tokenizer: PreTrainedTokenizerFast, wanted: str) -> UserError:
    before = tokenizer.chat_template, len(tokenizer)
    with pytest.raises(UserError) as caught:
        choose_template(tokenizer, wanted)
    assert (tokenizer.chat_template, len(tokenizer)) == before
    return caught.value


# --- names --------------------------------------------------------------------------------------------


def test_auto_is_the_models_own(tokenizer):
    tokenizer.chat_template = MARKED["headers"]
    assert choose_template(tokenizer, "auto") == Choice(None)
    assert tokenizer.chat_template == MARKED["headers"]


def test_auto_falls_back_to_alpaca_and_says_so(bare):
    size = len(bare)
    assert choose_template(bare, "auto") == Choice(
        "the model has no chat template: using `alpaca`, plain text without new tokens"
    )
    assert bare.chat_template == ALPACA and len(bare) == size
    one = rendered(bare)
    assert bare.decode(one.ids) == "<s>### Instruction:\nWhat is it?\n\n### Response:\nA map.</s>"


def test_a_named_template_replaces_the_models_own(tokenizer):
    tokenizer.chat_template = MARKED["headers"]
    assert choose_template(tokenizer, "alpaca") == Choice(None)
    assert tokenizer.chat_template == ALPACA
    assert choose_template(tokenizer, "chatml") == Choice(None)  # its tokens are there
    assert tokenizer.chat_template == CHATML


def test_chatml_adds_the_tokens_it_needs(bare):
    size, named = len(bare), bare.special_tokens_map
    choice = choose_template(bare, "chatml")
    assert choice == Choice(None, (size, size + 1))
    assert bare.convert_ids_to_tokens(list(choice.added)) == ["<|im_start|>", "<|im_end|>"]
    assert {name: bare.special_tokens_map[name] for name in named} == named
    one = rendered(bare)
    assert one.ids == bare.apply_chat_template(TALK, tokenize=True, return_dict=False)
    start, end = one.spans[0]
    assert bare.decode(one.ids[start:end]) == "A map.<|im_end|>"
    assert stop_ids(bare) == [bare.eos_token_id, size + 1]
    # and again, once they are there
    assert choose_template(bare, "chatml") == Choice(None)
    assert len(bare) == size + 2


def test_only_what_is_missing_is_added():
    made = byte_level()
    rules = made.backend_tokenizer.to_str().replace("<|im_end|>", "<|y|>")
    fast = PreTrainedTokenizerFast(tokenizer_object=type(made.backend_tokenizer).from_str(rules))
    size = len(fast)
    assert choose_template(fast, "chatml").added == (size,)
    assert fast.convert_tokens_to_ids("<|im_end|>") == size


def test_alpaca_needs_an_end_token(bare):
    bare.eos_token = None
    for wanted in ("alpaca", "auto"):
        error = refused(bare, wanted)
        assert (error.message, error.hint) == (
            "template `alpaca` ends an answer with the end token, and the tokenizer has none",
            "choose another template with --template",
        )
    assert choose_template(bare, "chatml").added


def test_none_is_no_template_to_train_with(tokenizer):
    assert set(NAMED) == {"chatml", "alpaca"}
    assert refused(tokenizer, "none").message == (
        "template: `none` is neither a file nor one of `auto`, `chatml`, `alpaca`"
    )


# --- files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("marks", [True, False])
def test_a_file_is_taken_as_it_is(tokenizer, tmp_path, name, marks):
    text = MARKED[name] if marks else unmarked(MARKED[name])
    assert choose_template(tokenizer, write(tmp_path, text)) == Choice(None)
    assert tokenizer.chat_template == text
    one = rendered(tokenizer)
    assert tokenizer.decode(one.ids[slice(*one.spans[0])]).strip().startswith("A map.")


def test_a_file_may_lie_at_home(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, CHATML)
    choose_template(tokenizer, "~/my.jinja")
    assert tokenizer.chat_template == CHATML


@pytest.mark.parametrize(
    "tags", ["{% generation %}|{% endgeneration %}", "{%- generation %}|{%- endgeneration %}",
             "{%generation-%}|{%endgeneration-%}", "{%- generation -%}|{%- endgeneration -%}"]
)  # fmt: skip
def test_marks_may_be_written_with_and_without_dashes(tokenizer, tmp_path, tags):
    begin, end = tags.split("|")
    text = MARKED["headers"].replace("{% generation %}", begin).replace("{% endgeneration %}", end)
    choose_template(tokenizer, write(tmp_path, text))
    one = rendered(tokenizer)
    assert tokenizer.decode(one.ids[slice(*one.spans[0])]) == "A map.<|eot_id|>"


PARSE = "mend it, or choose a named template: `chatml`, `alpaca`"
BAD: dict[str, tuple[str | bytes, str, str]] = {
    "syntax": (
        "{{ bos_token }}\n{% for m in messages %}\n{{ m.content | }}\n{% endfor %}",
        "line 3: not a Jinja template: expected token 'name', got 'end of print statement'",
        PARSE,
    ),
    "no end": ("\n{% for m in messages %}", "line 2: not a Jinja template: Unexpected end of template", PARSE),
    "marks without end": (
        "{% for m in messages %}\n{% generation %}{{ m.content }}{% endfor %}",
        "line 2: not a Jinja template: Encountered unknown tag 'endfor'",
        PARSE,
    ),
    "filter": (
        "{% for m in messages %}\n\n{{ m.content | trimm }}{% endfor %}",
        "line 3: not a Jinja template: No filter named 'trimm'",
        PARSE,
    ),
    "no messages": ("{{ bos_token }} hello", "the template never reads `messages`", "is it a chat template?"),
    "empty": ("", "the template never reads `messages`", "is it a chat template?"),
    "only a comment": (
        "{# messages #}{{ bos_token }}", "the template never reads `messages`", "is it a chat template?"
    ),
    "bytes": (b"{{ messages }} \xff", "not UTF-8 text (byte 15)", "save the file as UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_files(tokenizer, tmp_path, case):
    content, message, hint = case
    file = write(tmp_path, content)
    error = refused(tokenizer, file)
    assert error.message.startswith(f"{file}: {message}")
    assert error.hint == hint
    assert "\n" not in error.message + error.hint and not error.message.endswith(".")


def test_missing_files_and_folders(tokenizer, tmp_path):
    error = refused(tokenizer, "chatlm")
    assert error.message == "template: `chatlm` is neither a file nor one of `auto`, `chatml`, `alpaca`"
    assert error.hint == "did you mean `chatml`?"
    assert refused(tokenizer, str(tmp_path / "no.jinja")).hint == "name a file with a Jinja chat template"
    error = refused(tokenizer, str(tmp_path))
    assert error.message == f"{tmp_path}: is a folder, not a template file"
    assert error.hint == "name the file inside it"
    error = refused(tokenizer, f"{write(tmp_path, CHATML)}/inside")
    assert error.message.startswith("template: `")
    error = refused(tokenizer, "{{ messages }}" * 999)
    assert error.message == "template: cannot be read: File name too long"
    assert error.hint == "name a file with a Jinja chat template"


def test_the_mark_of_an_encoding_is_no_part_of_the_template(tokenizer, tmp_path):
    choose_template(tokenizer, write(tmp_path, b"\xef\xbb\xbf" + CHATML.encode()))
    assert tokenizer.chat_template == CHATML


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(tokenizer, tmp_path):
    file = write(tmp_path, CHATML)
    os.chmod(file, 0)
    error = refused(tokenizer, file)
    assert (error.message, error.hint) == (f"{file}: no permission to read it", f"chmod u+r {file}")


def test_a_file_without_permission_is_told(tokenizer, tmp_path, monkeypatch):
    file = write(tmp_path, CHATML)

    def denied(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    assert refused(tokenizer, file).message == f"{file}: no permission to read it"


# --- what a template writes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("chatml", ["<s>", "<|im_start|>", "<|im_end|>"]),
        ("alpaca", ["<s>", "</s>"]),
        ("headers", ["<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
        ("default-system", ["<|im_start|>", "<|im_end|>"]),
        ("instruction", ["<s>", "</s>", "[INST]", "[/INST]"]),
        ("model-turn", ["<s>", "<start_of_turn>", "<end_of_turn>"]),
    ],
)
def test_template_tokens(tokenizer, name, tokens):
    tokenizer.chat_template = MARKED[name]
    assert tokenizer.convert_ids_to_tokens(template_tokens(tokenizer)) == tokens


def test_a_template_that_cannot_write_an_answer_is_told(tokenizer):
    tokenizer.chat_template = "{{ messages[0].nothing.more }}"
    with pytest.raises(UserError) as caught:
        Renderer(tokenizer)
    assert caught.value.message == (
        "the chat template cannot write a question and its answer: 'dict object' has no attribute 'nothing'"
        " (line 1 of the template)"
    )
    assert caught.value.hint == "choose another one with --template"


def test_a_template_that_leaves_the_answer_out_stops_at_the_end_of_text_only(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages if m.role == 'user' %}{{ m.content }}<|eot_id|>{% endfor %}"
    )
    assert stop_ids(tokenizer) == [2]
