"""The chat template: what is rendered, what is marked, where generation stops."""

import pytest

from llmctl.tokenizer.template import CHATML, TEMPLATES, stop_ids, template_hash
from llmctl.tokenizer.train import train_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where does Anna live?"},
    {"role": "assistant", "content": "Anna lives in Alderton."},
    {"role": "user", "content": "Thanks!"},
    {"role": "assistant", "content": "You are welcome."},
]
RENDERED = (
    "<|bos|><|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nWhere does Anna live?<|im_end|>\n"
    "<|im_start|>assistant\nAnna lives in Alderton.<|im_end|>\n"
    "<|im_start|>user\nThanks!<|im_end|>\n"
    "<|im_start|>assistant\nYou are welcome.<|im_end|>\n"
)


def test_rendered_text(trained):
    assert trained.apply_chat_template(TALK, tokenize=False) == RENDERED
    prompt = trained.apply_chat_template(TALK[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == RENDERED[: RENDERED.index("Anna lives")]


def test_one_bos_and_special_tokens_as_such(trained):
    ids = trained.apply_chat_template(TALK, return_dict=True)["input_ids"]
    assert ids.count(1) == 1
    assert ids[0] == 1
    assert (ids.count(3), ids.count(4)) == (5, 5)


def test_the_mask_covers_the_answers_and_their_end_and_nothing_else(trained):
    out = trained.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = out["input_ids"], out["assistant_masks"]
    answers, current = [], []
    for token, marked in zip(ids, mask, strict=True):
        if marked:
            current.append(token)
        elif current:
            answers.append(current)
            current = []
    assert [trained.decode(answer) for answer in answers] == [
        "Anna lives in Alderton.<|im_end|>",
        "You are welcome.<|im_end|>",
    ]
    assert current == []  # the line break after the last end of turn is not marked


@pytest.mark.parametrize(
    "answer", ["\n\nTwo lines down", "  spaces  ", "\tTab", "1984", "...", "é", "中文", "-\n-"]
)
def test_the_prompt_at_inference_begins_what_was_trained_on(trained, answer):
    whole = trained.apply_chat_template(
        [*TALK[:2], {"role": "assistant", "content": answer}],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    prompt = trained.apply_chat_template(TALK[:2], return_dict=True, add_generation_prompt=True)["input_ids"]
    assert whole["input_ids"][: len(prompt)] == prompt
    mask = whole["assistant_masks"]
    assert mask[: len(prompt)] == [0] * len(prompt)
    assert mask[len(prompt) :] == [1] * (len(mask) - len(prompt) - 1) + [0]
    assert whole["input_ids"][-2] == 4


@pytest.mark.parametrize("content", [None, ["text"], 3])
def test_content_that_is_not_text_is_refused_not_printed(trained, content):
    with pytest.raises(Exception, match="the content of a message must be text"):
        trained.apply_chat_template([{"role": "user", "content": content}], tokenize=False)


def test_generation_stops_at_the_end_of_text_and_of_a_turn(trained):
    assert stop_ids(trained) == [2, 4]


def test_stop_ids_follow_the_template_and_not_a_name(trained):
    other = train_tokenizer("byte-bpe", iter(["text"]), 261, 2)
    other.chat_template = CHATML.replace("'<|im_end|>'", "'<|pad|>'")
    assert stop_ids(other) == [2, 0]
    other.chat_template = CHATML.replace("'<|im_end|>'", "'<|eos|>'")
    assert stop_ids(other) == [2]
    other.chat_template = None
    assert stop_ids(other) == [2]


def test_no_template(trained):
    bare = train_tokenizer("byte-bpe", iter(["text"]), 261, 2, chat_template=TEMPLATES["none"])
    assert bare.chat_template is None
    assert template_hash(bare) is None
