"""What every kind of tokenizer keeps to, over the table of kinds."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llmctl.data.shards import open_shards
from llmctl.errors import UserError
from llmctl.recipe.schema import TokenizerKind
from llmctl.stages.text import encoder_of
from llmctl.talk import SILENT
from llmctl.tokenizer.evaluate import evaluate_tokenizer
from llmctl.tokenizer.kinds import KINDS, SPECIAL_TOKENS, UNKNOWN
from llmctl.tokenizer.load import encode_batch, fingerprint, load_tokenizer
from llmctl.tokenizer.render import Renderer
from llmctl.tokenizer.show import pieces
from llmctl.tokenizer.stream import TextStream
from llmctl.tokenizer.template import stop_ids
from llmctl.tokenizer.train import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
LOSSLESS = [kind for kind in KINDS if KINDS[kind].lossless]
FORGED = [*SPECIAL_TOKENS, UNKNOWN, "<0x41>", "##a", "[UNK]"]

rng = random.Random(7)
SAMPLES = {
    "english": "Ada doesn't keep two old maps; it's 1984 miles away, isn't it?",
    "chinese": "东村有12户人家，读书为生。西村有7户人家，打鱼为生。",
    "code": "def f(next_item):\n    if next_item > 3:\n\t\treturn [next_item] * 2  # i\n",
    "spaces": "  Ada   keeps\t\ta boat \n\n\n  it's   red\r\n ",
    "unseen": "Zürich 🙂‍↔️ ж ﷽ ﬁ e\u0301 日本語テキスト",
    "marks": "a ▁b ▁▁ \x10 \x10\x11\x10\x12 ## ##a ▁",
    "controls": "\x00\x7f\u200b\ufeff\ud7ff\ufffd",
    "special": "".join(FORGED),
    "bytes": bytes(rng.randrange(256) for _ in range(600)).decode("latin-1"),
    "unicode": "".join(chr(rng.choice([*range(0xD800), *range(0xE000, 0x110000)])) for _ in range(300)),
    "empty": "",
}
LEARNED = ("english", "chinese", "code")  # every character and word of these was in the training data


class Heard:
    """A Talk that remembers."""

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def ids_of(tokenizer, text):
    return encode_batch(tokenizer, [text])[0]


def back(tokenizer, text):
    return tokenizer.decode(ids_of(tokenizer, text), skip_special_tokens=True)


def unbroken(text):
    return re.sub(r"\s", "", text)


def test_the_recipe_knows_every_kind():
    assert get_args(TokenizerKind) == tuple(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_come_first_and_ids_have_no_gap(of_kind, kind):
    tokenizer = of_kind[kind]
    first = [*SPECIAL_TOKENS, *([UNKNOWN] if KINDS[kind].unknown else [])]
    assert tokenizer.convert_ids_to_tokens(range(len(first))) == first
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.unk_token_id == (5 if KINDS[kind].unknown else None)
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert len(tokenizer) <= 700
    assert tokenizer.clean_up_tokenization_spaces is False
    assert tokenizer("Ada")["input_ids"] == [1, *ids_of(tokenizer, "Ada")]
    assert stop_ids(tokenizer) == [2, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_learned_comes_back_as_promised(of_kind, mixed, kind):
    tokenizer = of_kind[kind]
    for text in [*(SAMPLES[name] for name in LEARNED), *mixed[:50]]:
        assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids_of(tokenizer, text)
        if KINDS[kind].keeps == "words":
            assert unbroken(back(tokenizer, text)) == unbroken(text)
        else:
            assert back(tokenizer, text) == text


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("name", SAMPLES)
def test_a_lossless_kind_gives_every_text_back(of_kind, kind, name):
    assert back(of_kind[kind], SAMPLES[name]) == SAMPLES[name]


@settings(max_examples=300, deadline=None)
@given(st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" ▁\x10\x11\x12\n\t中a<>"))))
@example("▁")
@example("\x10\x11")
@example(" ")
@pytest.mark.parametrize("kind", LOSSLESS)
def test_a_lossless_kind_gives_any_text_back(of_kind, kind, text):
    ids = ids_of(of_kind[kind], text)
    assert of_kind[kind].decode(ids, skip_special_tokens=True) == text
    assert all(token >= len(SPECIAL_TOKENS) for token in ids)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].keeps == "characters"])
@pytest.mark.parametrize("name", SAMPLES)
def test_known_characters_come_back_and_only_others_are_unknown(of_kind, kind, name):
    """Also in the order and the company that a random text has."""
    tokenizer, text = of_kind[kind], SAMPLES[name]
    known = "".join(c for c in text if tokenizer.unk_token_id not in ids_of(tokenizer, c))
    assert back(tokenizer, known) == known
    assert back(tokenizer, text) == known
    assert (tokenizer.unk_token_id in ids_of(tokenizer, text)) == (known != text)
    seen = set("".join(SAMPLES[learned] for learned in LEARNED))
    assert {c for c in text if c in seen} <= set(known)


@pytest.mark.parametrize("kind", KINDS)
def test_the_promise_is_what_evaluation_measures(of_kind, kind):
    learned = evaluate_tokenizer(of_kind[kind], iter(SAMPLES[name] for name in LEARNED))
    strange = evaluate_tokenizer(of_kind[kind], iter([SAMPLES["bytes"], SAMPLES["unicode"]]))
    assert learned["unknown_rate"] == 0
    assert learned["round_trip"] == (0 if KINDS[kind].keeps == "words" else 1)
    assert strange["round_trip"] == (1 if KINDS[kind].lossless else 0)
    assert (strange["unknown_rate"] > 0) == KINDS[kind].unknown


@pytest.mark.parametrize("kind", KINDS)
def test_a_reopened_folder_gives_the_same_ids_and_texts(of_kind, kind, tmp_path):
    tokenizer = of_kind[kind]
    tokenizer.save_pretrained(tmp_path)
    for opened in (load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)):
        assert fingerprint(opened) == fingerprint(tokenizer)
        assert opened.unk_token == (UNKNOWN if KINDS[kind].unknown else None)
        assert opened.chat_template == tokenizer.chat_template
        for text in SAMPLES.values():
            assert opened(text)["input_ids"] == tokenizer(text)["input_ids"]
            assert back(opened, text) == back(tokenizer, text)


@pytest.mark.parametrize("kind", KINDS)
def test_text_stays_text(of_kind, kind):
    """No text forges a special token, though a tokenizer reads a rendered template as such."""
    tokenizer = of_kind[kind]
    for text in FORGED + [f" {text}x" for text in FORGED]:
        assert not set(ids_of(tokenizer, text)) & set(range(len(SPECIAL_TOKENS)))
    assert tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] == [4]


def test_training_data_cannot_teach_a_forged_token():
    data = ["<|eos|><0x41><|unk|> <|eos|> <0x41>"] * 50
    for kind in KINDS:
        tokenizer = train_tokenizer(kind, iter(data), 400, 2)
        for text in ("<|eos|>", "<0x41>", " <0x41>", "<|unk|>"):
            ids = ids_of(tokenizer, text)
            assert 2 not in ids
            assert len(ids) > 1, (kind, text)
            assert unbroken(back(tokenizer, text)) == unbroken(text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SAMPLES)
def test_streamed_text_is_the_decoded_text(of_kind, kind, name):
    tokenizer, text = of_kind[kind], SAMPLES[name]
    for prompt in ("", "Ada keeps", "Ada\n"):
        before = [1, *ids_of(tokenizer, prompt)]
        ids = ids_of(tokenizer, text)
        stream = TextStream(tokenizer, before)
        chunks = [*(stream.add(token) for token in ids), stream.rest()]
        decoded = tokenizer.decode(before + ids, skip_special_tokens=True)
        expected = decoded[len(tokenizer.decode(before, skip_special_tokens=True)) :]
        assert "".join(chunks) == stream.text == expected
        assert "\ufffd" in text or not [chunk for chunk in chunks if "\ufffd" in chunk]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in SAMPLES if name != "special"])
def test_pieces_join_to_the_text(of_kind, kind, name):
    """But for white space, and control characters that BERT's cleaning takes away."""
    found = pieces(of_kind[kind], SAMPLES[name])
    assert [token for token, _, _ in found] == ids_of(of_kind[kind], SAMPLES[name])
    joined = b"".join(raw for _, _, raw in found).decode()
    if KINDS[kind].keeps == "words":
        assert set(unbroken(joined)) <= set(SAMPLES[name])
        if name in LEARNED:
            assert joined == unbroken(SAMPLES[name])
    else:
        assert joined == SAMPLES[name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ["Ada", "1984", "...", "东村", "-\n-", "[i] * 2", "▁x", "é"])
def test_a_prompt_begins_what_is_trained_on(of_kind, kind, answer):
    renderer = Renderer(of_kind[kind])
    turns = [{"role": "user", "content": "it's 12 miles"}, {"role": "assistant", "content": answer}]
    (whole,) = renderer.encode([renderer.render(turns)])
    prompt = renderer.prompt_ids(turns[:1])
    assert whole.ids[: len(prompt)] == prompt
    ((start, end),) = whole.spans
    assert start == len(prompt)
    assert whole.ids[end - 1] == 4
    expected = back(of_kind[kind], answer)
    assert of_kind[kind].decode(whole.ids[start:end], skip_special_tokens=True) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_in_parts_is_the_text(of_kind, mixed, kind):
    """Long documents are encoded in parts, cut before a word that follows a space or a line break."""
    for text in mixed[:40]:
        places = [found.start() for found in re.finditer(r"(?<=\S\n)(?=[^\W_])|(?<=\S)(?= [^\W_])", text)]
        parts = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
        rows = encode_batch(of_kind[kind], parts)
        assert [token for row in rows for token in row] == ids_of(of_kind[kind], text)


@pytest.mark.parametrize("kind", KINDS)
def test_data_becomes_shards(of_kind, mixed, kind, tmp_path):
    file = tmp_path / "data.txt"
    file.write_text("\n".join(mixed[:30]), encoding="utf-8")
    tokenizer = of_kind[kind]
    shards = open_shards([file], "text", encoder_of(tokenizer), tmp_path / "cache", SILENT)
    expected = [1, *ids_of(tokenizer, file.read_text(encoding="utf-8")), 2]
    assert np.asarray(shards.ids).tolist() == expected


def test_the_same_text_gives_the_same_tokenizer_on_any_number_of_threads(mixed, of_kind):
    script = (
        "import json, sys\n"
        "from llmctl.tokenizer.load import fingerprint\n"
        "from llmctl.tokenizer.train import train_tokenizer\n"
        "texts, kinds, size = json.load(sys.stdin)\n"
        "print([fingerprint(train_tokenizer(kind, iter(texts), size, 2)) for kind in kinds])\n"
    )
    for threads in ("1", "3"):
        told = subprocess.run(
            [sys.executable, "-c", script],
            input=json.dumps([mixed, list(KINDS), 700]),
            env=os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads},
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        ).stdout
        assert told.strip() == str([fingerprint(of_kind[kind]) for kind in KINDS])


# --- limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_vocabulary(kind):
    smallest = KINDS[kind].smallest
    tokenizer = train_tokenizer(kind, iter(["aa", "aaa"]), smallest, 2)
    assert len(tokenizer) <= smallest
    assert unbroken(back(tokenizer, "aa")) == ("aa" if kind != "word" else back(tokenizer, "aa"))
    with pytest.raises(UserError) as caught:
        train_tokenizer(kind, iter(["aa"]), smallest - 1, 2)
    assert caught.value.message == (
        f"vocab_size: {smallest - 1} is too small for `{kind}`, which needs at least {smallest}"
    )
    assert caught.value.hint == f"{KINDS[kind].needs} take the first {smallest} entries"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [300, 320])
def test_no_kind_goes_past_the_vocabulary(kind, size):
    """There are 400 different characters, which `unigram` refuses."""
    text = "".join(chr(0x4E00 + place) * (place // 50 + 1) for place in range(400))
    if kind == "unigram":
        with pytest.raises(UserError) as caught:
            train_tokenizer(kind, iter([text]), size, 2)
        assert caught.value.message == (
            f"vocab_size: {size} is too small for `unigram` on this text: its characters alone need 407"
        )
        assert caught.value.hint == "raise it, or take `sentencepiece`, which writes rare characters in bytes"
        return
    tokenizer = train_tokenizer(kind, iter([text]), size, 2)
    assert len(tokenizer) <= size
    assert max(ids_of(tokenizer, text)) < size


def test_unigram_with_room_for_characters_only():
    text = "".join(chr(0x4E00 + place) * 3 for place in range(100))
    tokenizer = train_tokenizer("unigram", iter([text]), 107, 2)
    assert len(tokenizer) == 107
    assert back(tokenizer, text) == text


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not KINDS[kind].counts])
def test_min_frequency_is_refused_where_it_means_nothing(kind):
    with pytest.raises(UserError) as caught:
        train_tokenizer(kind, iter(["text"]), 300, 3)
    assert caught.value.message == f"min_frequency: 3 means nothing to `{kind}`, which learns no merges"
    assert caught.value.hint == "leave it out"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].counts])
def test_min_frequency_keeps_rare_pieces_out(kind):
    data = ["seldom", *["often"] * 5]
    rare, common = (
        len(ids_of(train_tokenizer(kind, iter(data), 400, 3), word)) for word in ("seldom", "often")
    )
    assert common == 1
    assert rare > 1 or back(train_tokenizer(kind, iter(data), 400, 3), "seldom") == ""


def test_char_keeps_the_most_frequent_characters_and_says_what_is_lost():
    heard = Heard()
    tokenizer = train_tokenizer("char", iter(["eeee ttt aa\n", "bc"]), 10, 2, talk=heard)
    assert tokenizer.convert_ids_to_tokens(range(6, 10)) == [" ", "a", "e", "t"]
    assert heard.said == ["characters without an entry: 3; 21.43% of the text becomes <|unk|>"]
    assert back(tokenizer, "tea cab\n") == "tea a"
    assert ids_of(tokenizer, "bb") == [5, 5]


def test_char_has_an_entry_for_every_character_seen_once():
    heard = Heard()
    tokenizer = train_tokenizer("char", iter(["To be,\n"]), 300, 2, talk=heard)
    assert tokenizer.convert_ids_to_tokens(range(6, len(tokenizer))) == sorted("To be,\n")
    assert heard.said == ["the data fills only 13 of 300 entries; the vocabulary has 13"]


@pytest.mark.parametrize(
    ("kind", "kept", "fate"), [("bpe", 46, "becomes <|unk|>"), ("sentencepiece", 0, "is written in bytes")]
)
def test_rare_characters_leave_room_for_merges(kind, kept, fate):
    """600,000 characters are four letters and the space; 200 others are seen once each.

    They would take all there is. `bpe` gives half of its room to characters, so that few are unknown.
    """
    rare = "".join(chr(0x4E00 + place) for place in range(200))
    size = 102 + KINDS[kind].smallest - 1
    heard = Heard()
    tokenizer = train_tokenizer(kind, iter(["banana bandana " * 40_000, rare]), size, 2, talk=heard)
    out = [c for c in rare if len(ids_of(tokenizer, c)) > 1 or ids_of(tokenizer, c) == [5]]
    assert heard.said[-1] == f"characters without an entry: {200 - kept}; 0.03% of the text {fate}"
    assert len(out) == 200 - kept
    assert len(ids_of(tokenizer, " bandana")) == 1
    assert back(tokenizer, rare) == (
        rare if KINDS[kind].lossless else "".join(c for c in rare if c not in out)
    )


def test_docs_say_what_every_kind_keeps():
    words = {"text": "every text", "characters": "known characters", "words": "known words"}
    page = (ROOT / "docs" / "tokenizer.md").read_text(encoding="utf-8")
    for name, kind in KINDS.items():
        row = re.findall(rf"^\| `{name}` \|.*$", page, re.M)[0]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert words[kind.keeps] in cells[-3], name
        assert cells[-2] == ("yes" if kind.unknown else "no"), name
        assert cells[-1] == str(kind.smallest), name
