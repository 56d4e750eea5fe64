"""`llmctl chat` on tiny models: what the model reads each turn, what it says, and what goes wrong."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmctl.data.document import Account
from llmctl.data.records import records
from llmctl.errors import UserError
from llmctl.recipe.chat import ChatRecipe
from llmctl.recipe.load import load_recipe
from llmctl.stages import chat as stage
from llmctl.stages.chat import Chat
from llmctl.tokenizer.load import load_tokenizer
from tests.program import Outcome, Program
from tests.said import Said
from tests.stages.bad_input import snapshot
from tests.stages.conftest import FEW

GREEDY = ["chat.temperature=0", "chat.ignore_eos=true", "chat.max_new_tokens=6"]
PLAIN_NOTE = "base has no chat template: each text is continued, below what came before"


def begin(*words: str, base: str = "base", said: Said | None = None) -> Chat:
    recipe = load_recipe(ChatRecipe, None, {"base": base}, [*GREEDY, *words])
    return stage.begin(recipe, Said() if said is None else said)


def error(action: Callable[[], object]) -> tuple[str, str | None]:
    with pytest.raises(UserError) as caught:
        action()
    return caught.value.message, caught.value.hint


def set_template(folder: Path, template: str | None) -> None:
    """Give a tokenizer another template, or none; the manifest, which would refuse it, goes."""
    (folder / "run.json").unlink(missing_ok=True)
    file = folder / "chat_template.jinja"
    file.write_text(template) if template else file.unlink()


# --- what the model reads and says ---------------------------------------------------------------------


def test_every_turn_is_what_generate_says_after_the_rendered_conversation(talking: Path) -> None:
    """The prompt is the template's, and greedy answers are those of a model that reads all of it anew."""
    chat, tokenizer = begin("chat.system=Be.", "chat.max_new_tokens=2"), load_tokenizer("base")
    read = "<|bos|><|im_start|>system\nBe.<|im_end|>\n"
    for text in ("Hi", "是"):
        found = chat.ask(text)
        read += f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(read, add_special_tokens=False)["input_ids"]
        assert found.prompt_tokens == len(ids)
        assert (found.prompt, found.new_tokens, found.context) == (text, 2, 64)
        fresh = stage.Session(chat._model).generate(ids, 2, stage.sampler(0, None, 1, 0))
        assert tokenizer.decode(list(fresh), skip_special_tokens=True) == found.text
        read += f"{found.text.strip()}<|im_end|>\n"
    assert [turn["role"] for turn in chat.messages] == ["system", *["user", "assistant"] * 2]


def test_only_new_tokens_are_run(talking: Path) -> None:
    chat, lengths = begin(), []
    chat._model.model.layers[0].register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    first = chat.ask("Hi")
    lengths.clear()
    second = chat.ask("No")
    # of the first turn, at most the answer's last token is read, which was never run
    assert lengths[0] <= second.prompt_tokens - first.prompt_tokens
    assert lengths[1:] == [1] * (second.new_tokens - 1)


def test_the_first_answer_is_that_of_generate(talking: Path, llmctl: Program) -> None:
    words = ["--max-new-tokens", "9", "--temperature", "1", "--seed", "5", "--ignore-eos", "--json"]
    one = json.loads(llmctl("generate", "adapter", "Where is Leo?", "--chat", *words).out)
    chat = begin("chat.temperature=1.0", "chat.seed=5", "chat.max_new_tokens=9", base="adapter")
    assert chat.ask("Where is Leo?").text == one["text"]


def test_the_seed_decides_and_every_turn_draws_anew(talking: Path) -> None:
    def answers(seed: int) -> list[str]:
        chat, found = begin("chat.temperature=2.0", f"chat.seed={seed}", "chat.max_new_tokens=20"), []
        for _ in range(2):
            found.append(chat.ask("Hi").text)
            chat.forget()
        return found

    assert answers(1) == answers(1)
    assert len({*answers(1), *answers(7)}) == 4


def test_without_history_every_turn_stands_alone(talking: Path) -> None:
    chat = begin("chat.history=false", "chat.system=Be.")
    first, other, again = (chat.ask(text) for text in ("Hi", "No", "Hi"))
    assert (again.text, again.prompt_tokens) == (first.text, first.prompt_tokens)
    assert len(chat.messages) == 7
    chat.forget()
    assert chat.ask("No").text == other.text
    assert error(lambda: chat.ask("!?" * 60))[1] == "say it in fewer words"


def test_text_comes_bit_by_bit(talking: Path) -> None:
    bits: list[str] = []
    found = begin().ask("Hi", bits.append)
    assert len(bits) > 1 and "".join(bits) == found.text


def test_settings_and_forgetting(talking: Path) -> None:
    chat = begin()
    first = chat.ask("Hi")
    chat.settings = chat.settings.model_copy(update={"max_new_tokens": 3})
    chat.forget()
    again = chat.ask("Hi")
    assert again.prompt_tokens == first.prompt_tokens
    assert again.new_tokens == 3 and first.text.startswith(again.text)
    assert first.ended == again.ended == "length"


# --- how an answer ends --------------------------------------------------------------------------------


def test_an_end_token_ends_it(talking: Path) -> None:
    config = talking / "base" / "generation_config.json"
    chat = begin()
    first = chat.ask("Hi")
    token = chat._session.ids[first.prompt_tokens + 2]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": token}))
    found = begin("chat.ignore_eos=false").ask("Hi")
    assert found.ended == "stop" and found.new_tokens <= 3


def test_it_can_be_stopped_and_the_part_is_kept(talking: Path) -> None:
    chat, bits = begin(), []
    found = chat.ask("Hi", bits.append, stopped=lambda: len(bits) == 2)
    assert found.ended == "interrupted" and found.kept and found.new_tokens < 6
    assert chat.turns == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "".join(bits)}]
    assert chat.ask("No").prompt_tokens > found.prompt_tokens


def test_what_is_broken_off_before_a_word_is_taken_back(
    talking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = begin()
    first = chat.ask("Hi")
    turns = list(chat.turns)
    monkeypatch.setattr(stage.TextStream, "text", " ")
    assert not chat.ask("No", stopped=lambda: True).kept
    assert chat.turns == turns

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask("No", interrupt)
    assert chat.turns == turns
    monkeypatch.undo()
    chat.forget()
    assert chat.ask("Hi").text == first.text


def test_the_context_ends_an_answer_and_then_the_conversation(talking: Path) -> None:
    chat = begin("chat.max_new_tokens=500")
    found = chat.ask("Hi")
    assert found.ended == "context" and found.prompt_tokens + found.new_tokens == found.context == 64
    turns = list(chat.turns)
    message, hint = error(lambda: chat.ask("No"))
    length = int(message.split("has ")[1].split(" ")[0])
    assert length > 64 and message == (
        f"with this turn the conversation has {length} tokens, but the model's context is 64; the turn is taken back"
    )
    assert hint == "/reset begins a new conversation"
    assert chat.turns == turns
    chat.forget()
    assert chat.ask("Hi").text == found.text


def test_a_prompt_longer_than_the_context(talking: Path) -> None:
    message, hint = error(lambda: begin().ask("!?" * 60))
    assert message.startswith("the prompt has 1") and message.endswith(
        " tokens, but the model's context is 64; the turn is taken back"
    )
    assert hint == "say it in fewer words"


# --- templates -----------------------------------------------------------------------------------------


def test_a_model_without_a_template_continues_text(talking: Path) -> None:
    set_template(talking / "base", None)
    said = Said()
    chat, tokenizer = begin(said=said), load_tokenizer("base")
    assert said.lines == [PLAIN_NOTE]
    first = chat.ask("Leo is")
    second = chat.ask("and Anna")
    for text, found in (("Leo is", first), (f"Leo is{first.text}\nand Anna", second)):
        assert found.prompt_tokens == 1 + len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert error(lambda: chat.tell("Be.")) == (
        "base: a system prompt cannot be given: the tokenizer has no chat template",
        "write it as the first text",
    )
    assert said.lines == [PLAIN_NOTE]


NO_SYSTEM = """{%- for m in messages -%}
{%- if m.role == 'system' -%}
{{ raise_exception('System role not supported.') }}
{%- endif -%}
{{ m.role }}: {{ m.content }}
{% endfor -%}
"""
DROPS_SYSTEM = "{%- for m in messages if m.role != 'system' -%}\n{{ m.role }}: {{ m.content }}\n{% endfor -%}"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (NO_SYSTEM, "the chat template refuses it: system role not supported (line 3 of the template)"),
        (DROPS_SYSTEM, "the chat template does not write it"),
    ],
)
def test_a_template_without_a_system_prompt(template: str, why: str, talking: Path) -> None:
    set_template(talking / "base", template)
    told = (f"base: a system prompt cannot be given: {why}", "say it in the first turn")
    assert error(lambda: begin("chat.system=Be.")) == told
    chat = begin()
    assert error(lambda: chat.tell("Be.")) == told
    assert chat.settings.system is None and chat.ask("Hi").new_tokens == 6


def test_a_template_that_cannot_write_an_answer(talking: Path) -> None:
    set_template(talking / "base", "{% for m in messages %}\n{{ m.missing.more }}\n{% endfor %}")
    assert error(begin) == (
        "base: the chat template cannot write a question and its answer: "
        "'dict object' has no attribute 'missing' (line 2 of the template)",
        "mend the chat template that lies beside the tokenizer",
    )


def test_a_template_that_refuses_a_later_turn(talking: Path) -> None:
    fault = "{% if messages | length > 2 %}\n{{ raise_exception('Only one turn.') }}\n{% endif %}\n"
    set_template(talking / "base", fault + DROPS_SYSTEM)
    chat = begin()
    chat.ask("Hi")
    turns = list(chat.turns)
    assert error(lambda: chat.ask("No")) == (
        "base: the chat template refuses it: only one turn (line 2 of the template)",
        "mend the chat template that lies beside the tokenizer",
    )
    assert chat.turns == turns


def test_special_tokens_that_are_said_stay_text(talking: Path) -> None:
    found = begin().ask("<|im_end|>")
    assert found.prompt_tokens > begin().ask("x").prompt_tokens + 4


def test_what_does_not_fit_is_refused(talking: Path) -> None:
    assert error(lambda: begin("chat.dtype=float16", "device=cpu")) == (
        "chat.dtype: float16 is far slower than float32 on a CPU",
        "use bfloat16, float32 or auto",
    )
    (talking / "base" / "chat_template.jinja").write_text(DROPS_SYSTEM)
    assert error(begin)[0] == "base: the chat template is not the one this run was made with"


# --- saving --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["talk.json", "deep/talk.jsonl"])
def test_a_saved_conversation_is_data(name: str, talking: Path, llmctl: Program) -> None:
    chat = begin("chat.system=Be.", "chat.max_new_tokens=4")
    chat.ask("Hi 你好")
    chat.save(Path(name))
    shown = json.loads(llmctl("data", "inspect", name, "--model", "base", "--json").out)
    assert shown["rows"][0]["text"].startswith(
        "<|bos|><|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi 你好<|im_end|>\n<|im_start|>assistant\n"
    )
    trained = llmctl("sft", "base", "--data", name, "--out", "tuned", *FEW, "data.eval_fraction=0")
    assert trained.code == 0, trained.err


@pytest.mark.parametrize("name", ["talk.json", "talk.jsonl"])
def test_without_history_every_exchange_is_saved_as_one(name: str, talking: Path) -> None:
    chat = begin("chat.history=false", "chat.system=Be.")
    answers = [chat.ask(text).text for text in ("Hi", "No")]
    chat.save(Path(name))
    account = Account(noun="record")
    found = [record.value["messages"] for record in records([name], account)]
    system = {"role": "system", "content": "Be."}
    assert found == [
        [system, {"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        for text, answer in zip(("Hi", "No"), answers, strict=True)
    ]


def test_a_conversation_that_cannot_be_saved(talking: Path) -> None:
    chat = begin()
    assert error(lambda: chat.save(Path("a.json"))) == (
        "nothing was said yet, so there is nothing to save",
        None,
    )
    chat.ask("Hi")
    (talking / "there.json").write_text("mine")
    before = snapshot(talking)
    assert error(lambda: chat.save(Path("there.json"))) == (
        "there.json: exists already",
        "/save! there.json overwrites it",
    )
    assert error(lambda: chat.save(Path("talk.txt"))) == (
        "talk.txt: a conversation is saved as .json or .jsonl",
        "name it talk.json",
    )
    for name, why in (
        ("there.json/a.json", "there.json is not a folder"),
        (f"{'x' * 300}.json", "cannot be written (file name too long)"),
    ):
        told = error(lambda name=name: chat.save(Path(name)))
        assert told == (f"{name}: {why}", "choose another name")
    assert snapshot(talking) == before
    chat.save(Path("there.json"), overwrite=True)
    assert json.loads((talking / "there.json").read_text()) == [{"messages": chat.messages}]


# --- the whole command ---------------------------------------------------------------------------------


@pytest.fixture
def piped(talking: Path, llmctl: Program, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """`echo TEXT | llmctl chat WORDS…`"""

    def run(text: str, *words: str) -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return llmctl("chat", *words)

    return run


@pytest.mark.parametrize("model", ["base", "adapter"])
def test_a_question_through_a_pipe(model: str, piped: Callable[..., Outcome]) -> None:
    outcome = piped("Leo?\nNo\n", model, *GREEDY)
    chat = begin(base=model)
    answers = [chat.ask(text) for text in ("Leo?", "No")]
    assert outcome.code == 0
    assert outcome.out == "".join(f"{one.text}\n" for one in answers)
    assert outcome.err.count(" of 64 tokens · ") == 2


def test_a_quantized_model_says_how_it_computes(piped: Callable[..., Outcome], llmctl: Program) -> None:
    words = ["--calibration", "data.jsonl", "--out", "small", "compare.min_top1=0", "compare.max_kl=99"]
    small = llmctl("quantize", "base", *words, "compare.answers=1", "compare.speed_tokens=8")
    assert small.code == 0, small.err
    outcome = piped("Leo?\nNo\n", "small", *GREEDY)
    assert outcome.code == 0 and len(outcome.out.splitlines()) >= 2
    assert (
        outcome.err.startswith("quantized: 8 products: fbgemm int8") and outcome.err.count("quantized") == 1
    )


def test_the_command_tells_what_is_wrong(piped: Callable[..., Outcome]) -> None:
    outcome = piped("Hi\n", "nowhere")
    assert outcome.code == 1 and outcome.out == "" and outcome.err.startswith("error: nowhere: ")
    outcome = piped("Hi\n" + "!?" * 60 + "\nNo\n", "base", *GREEDY, "--json")
    assert outcome.code == 1 and len(outcome.out.splitlines()) == 1
    assert "the model's context is 64; the turn is taken back\nhint: /reset begins" in outcome.err
