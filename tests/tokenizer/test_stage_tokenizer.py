"""The stage: a run folder when all went well, nothing when not."""

import gzip
import json
import os

import pytest
from transformers import AutoTokenizer

from llmctl.errors import UserError
from llmctl.recipe.schema import TokenizerRecipe
from llmctl.runs import read_manifest
from llmctl.stages import tokenizer as stage
from llmctl.talk import SILENT
from llmctl.tokenizer.load import encode_batch, fingerprint, load_tokenizer
from llmctl.tokenizer.template import template_hash


@pytest.fixture
def source(tmp_path, texts):
    file = tmp_path / "data.jsonl.gz"
    lines = [json.dumps({"body": text}) for text in texts] + [json.dumps({"body": " "})]
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    return file


def recipe(out, *sources, **values):
    fields = {
        "vocab_size": 400,
        "out": str(out),
        "data": {"train": list(map(str, sources)), "text_field": "body"},
    }
    return TokenizerRecipe.model_validate(fields | values)


class Bar:
    def __init__(self):
        self.amount = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def advance(self, amount=1, **facts):
        self.amount += amount


class Heard:
    def __init__(self):
        self.said, self.bars = [], []

    def say(self, text):
        self.said.append(text)

    def bar(self, label, total, unit):
        self.bars.append((label, total, unit, Bar()))
        return self.bars[-1][-1]


def test_a_run_folder_with_tokenizer_manifest_and_recipe(tmp_path, source, texts):
    out, heard = tmp_path / "tokenizer", Heard()
    result = stage.run(recipe(out, source), heard)
    assert result.path == out
    assert sorted(p.name for p in out.iterdir()) == [
        "chat_template.jinja",
        "recipe.yaml",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl.gz", "tokenizer"]

    ours, theirs = load_tokenizer(str(out)), AutoTokenizer.from_pretrained(out)
    assert len(ours) == 400
    assert theirs(texts[0])["input_ids"] == [1, *encode_batch(ours, texts[:1])[0]]

    manifest = read_manifest(out)
    assert manifest["status"] == "done"
    assert manifest["tokenizer"] == fingerprint(ours)
    assert manifest["template"] == template_hash(ours)
    assert manifest["stop_ids"] == [2, 4]
    assert manifest["data"]["sources"] == [str(source)]
    assert (manifest["data"]["read"], manifest["data"]["kept"]) == (2001, 2000)
    size = sum(len(text.encode()) for text in texts)
    assert manifest["metrics"] == result.metrics
    assert result.metrics["vocab_size"] == 400
    assert result.metrics["bytes"] == size
    assert 1.5 < result.metrics["bytes_per_token"] < 5
    assert (result.metrics["unknown_rate"], result.metrics["round_trip"]) == (0.0, 1.0)

    ((label, total, unit, bar),) = heard.bars
    assert (label, unit) == ("reading", "MB")
    assert total == pytest.approx(source.stat().st_size / 1e6)
    assert 0.9 * total <= bar.amount <= total * 1.001
    assert heard.said[0] == f"read {size / 1e6:.1f} MB of text; learning the vocabulary"
    assert heard.said[1] == "read 2,001 documents, kept 2,000"
    assert "no text in it" in heard.said[2]


def test_the_same_data_gives_the_same_text_hash_and_tokenizer(tmp_path, source):
    manifests = []
    for name in ("one", "two"):
        stage.run(recipe(tmp_path / name, source), SILENT)
        manifests.append(read_manifest(tmp_path / name))
    assert manifests[0]["hash"] == manifests[1]["hash"]
    assert manifests[0]["data"]["text_hash"] == manifests[1]["data"]["text_hash"]


def test_builtin_data_and_no_template(tmp_path):
    out = tmp_path / "tokenizer"
    stage.run(recipe(out, "builtin:tinyworld", chat_template="none"), SILENT)
    assert load_tokenizer(str(out)).chat_template is None
    assert read_manifest(out)["template"] is None
    assert read_manifest(out)["stop_ids"] == [2]


def test_a_kind_that_loses_something_says_how_much(tmp_path, source):
    metrics = stage.run(recipe(tmp_path / "words", source, kind="word", vocab_size=100), SILENT).metrics
    assert 0.01 < metrics["unknown_rate"] < 0.9
    assert metrics["round_trip"] < 0.1
    heard = Heard()
    metrics = stage.run(recipe(tmp_path / "chars", source, kind="char"), heard).metrics
    assert (metrics["unknown_rate"], metrics["round_trip"]) == (0.0, 1.0)
    assert metrics["vocab_size"] == len(load_tokenizer(str(tmp_path / "chars"))) < 100
    assert [line for line in heard.said if "the data fills only" in line]


def test_the_default_folder_is_the_next_free_one(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unnamed = recipe("unused", source).model_copy(update={"out": None})
    made = [stage.run(unnamed, SILENT).path for _ in range(2)]
    assert [str(path) for path in made] == ["runs/tokenizer-001", "runs/tokenizer-002"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 100}, "vocab_size: 100 is too small for `byte-bpe`, which needs at least 261"),
        (
            {"kind": "char", "min_frequency": 5},
            "min_frequency: 5 means nothing to `char`, which learns no merges",
        ),
        ({"kind": "unigram", "vocab_size": 20}, "vocab_size: 20 is too small for `unigram` on this text"),
        ({"data": {"train": []}}, "no data to learn from"),
        ({"data": {"train": ["/no/such/file.txt"]}}, "/no/such/file.txt: "),
    ],
)
def test_bad_recipes_leave_nothing(tmp_path, source, values, message):
    out = tmp_path / "tokenizer"
    with pytest.raises(UserError) as caught:
        stage.run(recipe(out, source, **values), SILENT)
    assert caught.value.message.startswith(message)
    assert caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == [source.name]


def test_bad_data_in_the_middle_leaves_nothing(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"body": "fine"}\n' * 5 + "{broken\n")
    with pytest.raises(UserError, match=r"data\.jsonl:6: "):
        stage.run(recipe(tmp_path / "tokenizer", file), SILENT)
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_a_full_disk_leaves_nothing(tmp_path, source, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    with pytest.raises(UserError) as caught:
        stage.run(recipe(tmp_path / "tokenizer", source), SILENT)
    assert caught.value.message == f"{tmp_path / 'tokenizer'}: the disk is full"
    assert [p.name for p in tmp_path.iterdir()] == [source.name]


def test_an_occupied_folder_is_refused_before_anything_is_read(tmp_path):
    out = tmp_path / "tokenizer"
    out.mkdir()
    (out / "note.txt").write_text("mine")
    with pytest.raises(UserError) as caught:
        stage.run(recipe(out, "/no/such/file.txt"), SILENT)
    assert caught.value.message == f"{out}: the folder is not empty"
    assert os.listdir(out) == ["note.txt"]


def test_evaluate_compares_on_the_same_documents(tmp_path, source, trained):
    small, large = tmp_path / "small", tmp_path / "large"
    stage.run(recipe(small, source, vocab_size=300), SILENT)
    trained.save_pretrained(large)
    rows = stage.evaluate([str(small), str(large)], [str(source)], "body")
    assert [(row["tokenizer"], row["vocab_size"]) for row in rows] == [(str(small), 300), (str(large), 600)]
    assert rows[0]["bytes"] == rows[1]["bytes"]
    assert rows[0]["bytes_per_token"] < rows[1]["bytes_per_token"]
    with pytest.raises(UserError) as caught:
        stage.evaluate([], [str(source)], "body")
    assert caught.value.message == "no tokenizer to measure"
    assert caught.value.hint == "name one or more: folders or hub ids"


def test_show(tmp_path, trained):
    trained.save_pretrained(tmp_path)
    assert b"".join(raw for _, _, raw in stage.show(str(tmp_path), "Anna é")) == "Anna é".encode()
