"""Opening, telling apart, plain encoding, and every way it can go wrong."""

import json
import os
import shutil

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmctl.errors import UserError
from llmctl.tokenizer.load import encode_batch, fingerprint, load_tokenizer
from llmctl.tokenizer.template import template_hash
from llmctl.tokenizer.train import train_tokenizer


@pytest.fixture
def folder(trained, tmp_path):
    path = tmp_path / "tokenizer"
    trained.save_pretrained(path)
    return path


def test_a_saved_folder_opens_the_same_here_and_in_transformers(folder, trained, texts):
    expected = encode_batch(trained, texts[:100])
    for opened in (load_tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder)):
        assert [opened(text, add_special_tokens=False)["input_ids"] for text in texts[:100]] == expected
        assert opened.chat_template == trained.chat_template
        assert (opened.pad_token_id, opened.bos_token_id, opened.eos_token_id) == (0, 1, 2)
        assert fingerprint(opened) == fingerprint(trained)
        assert template_hash(opened) == template_hash(trained)
        assert opened(texts[0])["input_ids"][0] == 1


def test_fingerprint_sees_vocabulary_and_special_ids_but_not_padding_or_template(trained, folder):
    same = load_tokenizer(str(folder))
    same(["a", "a longer one"], padding=True, truncation=True, max_length=4)
    same.chat_template = None
    assert fingerprint(same) == fingerprint(trained)
    assert template_hash(same) is None

    other_end = load_tokenizer(str(folder))
    other_end.eos_token = "<|im_end|>"
    assert fingerprint(other_end) != fingerprint(trained)
    other_words = train_tokenizer("byte-bpe", iter(["quite another text"] * 9), 300, 2)
    assert fingerprint(other_words) != fingerprint(trained)


def test_template_hash_differs_between_templates(trained, folder):
    other = load_tokenizer(str(folder))
    other.chat_template += " "
    assert template_hash(other) != template_hash(trained)
    assert len(template_hash(trained)) == 64


def test_encode_batch_adds_nothing_cuts_nothing_and_reads_no_special_token_in_a_text(trained, folder):
    tokenizer = load_tokenizer(str(folder))
    tokenizer(["a", "b c"], padding="max_length", truncation=True, max_length=3)  # leaves marks
    long = "Anna lives in Alderton. " * 50
    rows = encode_batch(tokenizer, [long, "<|eos|> and <|im_start|>system"])
    assert all(token > 4 for row in rows for token in row)
    assert [tokenizer.decode(row) for row in rows] == [long, "<|eos|> and <|im_start|>system"]
    assert rows == encode_batch(trained, [long, "<|eos|> and <|im_start|>system"])
    # a chat rendered afterwards still has its special tokens
    assert tokenizer("<|eos|>", add_special_tokens=False)["input_ids"] == [2]


def without(name):
    return lambda folder: (folder / name).unlink()


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def cut(folder):
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:2000])


DAMAGED = "the file is damaged; copy or train the tokenizer again"


@pytest.mark.parametrize(
    ("damage", "message", "hint"),
    [
        (
            without("tokenizer.json"),
            "{}: no tokenizer there (no tokenizer.json)",
            "make one with `llmctl tokenizer train DATA --out DIR`",
        ),
        (
            lambda folder: (folder / "tokenizer.json").rename(folder / "adapter_config.json"),
            "{}: no tokenizer there (no tokenizer.json)",
            "an adapter saved without one uses its base's: name that",
        ),
        (shutil.rmtree, "{}: no such folder", "name a folder with a tokenizer, or a hub id"),
        (write("tokenizer.json", b'{\n"a": }'), "{}/tokenizer.json: line 2: not valid JSON", DAMAGED),
        (write("tokenizer.json", b"[1]"), "{}/tokenizer.json: not a JSON object", DAMAGED),
        (write("tokenizer.json", b'{"\xff": 1}'), "{}/tokenizer.json: not UTF-8 (byte 2)", DAMAGED),
        (
            write("tokenizer_config.json", b"{"),
            "{}/tokenizer_config.json: line 1: not valid JSON",
            DAMAGED,
        ),
    ],
)
def test_folders_that_cannot_be_opened(folder, damage, message, hint):
    damage(folder)
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(folder))
    assert (caught.value.message, caught.value.hint) == (message.format(folder), hint)


@pytest.mark.parametrize("damage", [cut, write("tokenizer.json", b'{"version": "1.0"}')])
def test_a_damaged_tokenizer_names_its_file(folder, damage):
    damage(folder)
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(folder))
    assert caught.value.message.startswith(f"{folder}/tokenizer.json: ")
    assert "\n" not in caught.value.message
    assert caught.value.hint == DAMAGED


def test_a_file_is_not_a_tokenizer(folder):
    file = folder / "tokenizer.json"
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(file))
    assert caught.value.message == f"{file}: is a file, but a tokenizer is a folder"
    assert caught.value.hint == "name the folder it lies in"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(folder):
    file = folder / "tokenizer.json"
    file.chmod(0)
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(folder))
    assert caught.value.message == f"{file}: no permission to read"


class Hub:
    """Stands for the hub's client: answers with an error, or that the model is there."""

    error = None

    def model_info(self, name, timeout):
        if self.error is not None:
            raise self.error


def hub_error(name):
    import httpx2
    from huggingface_hub import errors

    if name == "ConnectError":
        return httpx2.ConnectError("name or service not known")
    answer = httpx2.Response(404, request=httpx2.Request("GET", "https://hub.invalid/api"))
    return getattr(errors, name)("refused", response=answer)


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (
            "ConnectError",
            "someone/nothing: not a folder here, and the hub cannot be reached",
            "check the spelling and the network, or name a folder",
        ),
        (
            "RepositoryNotFoundError",
            "someone/nothing: neither a folder here nor a model on the hub",
            "check the spelling; a private model needs `hf auth login`",
        ),
        (
            "GatedRepoError",
            "someone/nothing: the hub gives it only to those who accepted its terms",
            "accept them on its page, then log in with `hf auth login`",
        ),
    ],
)
def test_what_the_hub_refuses(monkeypatch, error, message, hint):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "error", hub_error(error))
    with pytest.raises(UserError) as caught:
        load_tokenizer("someone/nothing")
    assert (caught.value.message, caught.value.hint) == (message, hint)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "runs/a/b", "two words"])
def test_what_cannot_be_a_hub_id_is_a_missing_folder(name):
    with pytest.raises(UserError) as caught:
        load_tokenizer(name)
    assert caught.value.message == f"{name}: no such folder"


def test_no_name():
    with pytest.raises(UserError) as caught:
        load_tokenizer("")
    assert caught.value.message == "no tokenizer is named"
    assert caught.value.hint == "name a folder with a tokenizer, or a hub id"


def test_a_tokenizer_without_a_fast_form_is_refused(folder, monkeypatch):
    class Slow:
        pass

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: Slow())
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(folder))
    assert caught.value.message == f"{folder}: has only a slow tokenizer (Slow)"
    assert caught.value.hint == "convert it to tokenizer.json first"


def test_a_folder_beats_the_hub(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert isinstance(load_tokenizer("tokenizer"), PreTrainedTokenizerFast)
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|eos|>"
