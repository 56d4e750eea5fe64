"""The walk on a model that llmctl trained: its words, its JSON, its page, its lines on a terminal."""

from __future__ import annotations

import base64
import dataclasses
import errno
import json
import pydoc
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmctl.cli.explain import show_paged
from llmctl.cli.explain_page import check_page, packed, page_html
from llmctl.cli.explain_text import NARROWEST, percent, quoted, walk_lines
from llmctl.cli.output import cell_width
from llmctl.errors import UserError
from llmctl.files import write_json
from llmctl.recipe.generate import GenerateRecipe, GenerateSection
from llmctl.stages import explain, generate
from llmctl.stages.explain import Walk, as_json
from llmctl.talk import SILENT
from tests.program import Program

TEXT = "Ada of <script>alert(1)</script>\n"


@pytest.fixture(scope="module")
def walk(base: Path) -> Walk:
    return explain.run(str(base), TEXT, "cpu", SILENT)


def test_state_space_layers_have_no_heads_of_attention(walk: Walk) -> None:
    def second_line(pattern: str) -> str:
        layers = [dataclasses.replace(layer, pattern=pattern) for layer in walk.trace.layers]
        changed = dataclasses.replace(walk.trace, layers=layers)
        return walk_lines(dataclasses.replace(walk, trace=changed), 300)[1]

    assert second_line("full") == "2 layers, 2 heads, width 16"
    assert second_line("mamba2") == "2 layers, width 16"


def test_tokens_and_next(walk: Walk, base: Path) -> None:
    assert "".join(walk.text(place) for place in range(1, len(walk.trace.ids))) == TEXT
    assert walk.text(0) == "<|bos|>"
    likeliest = [each.probability for each in walk.next]
    assert likeliest == sorted(likeliest, reverse=True) and len(likeliest) == 10
    settings = GenerateSection(max_new_tokens=1, temperature=0.0, ignore_eos=True)
    recipe = GenerateRecipe(base=str(base), device="cpu", generate=settings)
    assert generate.run(recipe, TEXT, SILENT, None)["tokens"] == [walk.next[0].id]


def test_an_adapter_is_explained_at_work_on_its_base(adapter: Path) -> None:
    walk = explain.run(str(adapter), TEXT, "cpu", SILENT)
    names = [table.name for step in walk.trace.layers[0].steps for table in step.tables]
    assert "model.layers.0.self_attn.q_proj.lora_A.default.weight" in names
    settings = GenerateSection(max_new_tokens=1, temperature=0.0, ignore_eos=True)
    recipe = GenerateRecipe(base=str(adapter), device="cpu", generate=settings)
    assert generate.run(recipe, TEXT, SILENT, None)["tokens"] == [walk.next[0].id]


def test_json_holds_everything(walk: Walk) -> None:
    told: dict[str, Any] = json.loads(json.dumps(as_json(walk)))
    assert [token["id"] for token in told["tokens"]] == walk.trace.ids
    assert sum(part["parameters"] for part in told["parts"].values()) == told["model"]["parameters"]
    attention = told["layers"][1]["attention"][0]
    count = told["window"]["tokens"]
    assert np.array(attention["weights"]).shape == (2, count, count)
    assert np.allclose(np.array(attention["weights"]).sum(-1), 1, atol=1e-4)
    queries = next(step for step in told["layers"][0]["steps"] if step["what"] == "queries")
    (table,) = queries["tables"]
    assert table["shape"] == [16, 16] and table["bytes"] == 4 * 16 * 16
    assert table["share"] == table["parameters"] / told["model"]["parameters"]
    lens = told["layers"][-1]["lens"][-1]
    assert lens["ids"] == [each["id"] for each in told["next"]]


def test_page_is_self_contained_and_no_token_is_markup(walk: Walk) -> None:
    page = page_html(walk, 1)
    assert not re.search(r"https?://|\bsrc=|@import|url\(", page)
    assert "alert(1)" not in page.partition('id="walk">')[0]
    data = re.search(r'<script type="application/json" id="walk">(.*?)</script>', page, re.DOTALL)
    assert data is not None and "<" not in data[1]
    told = json.loads(data[1])
    assert told["open"] == 1
    assert "".join(token["text"] for token in told["tokens"][1:]) == TEXT
    map_ = told["layers"][0]["attention"][0]["weights"]
    steps = np.frombuffer(base64.b64decode(map_["data"]), "<u2").reshape(map_["shape"])
    expected = walk.trace.layers[0].attention[0].weights.numpy()
    assert np.abs(steps / 65535 - expected).max() < 1e-5


def test_packed_keeps_signs_and_ends(walk: Walk) -> None:
    scores = walk.trace.layers[0].attention[0].scores
    held = packed(scores)
    steps = np.frombuffer(base64.b64decode(held["data"]), "<u2").reshape(held["shape"])
    values = held["low"] + steps / 65535 * (held["high"] - held["low"])
    assert np.abs(values - scores.numpy()).max() < 1e-4 * max(1, held["high"] - held["low"])
    seen = packed(walk.trace.layers[0].attention[0].allowed)
    assert base64.b64decode(seen["data"])[: seen["shape"][1]] == b"\1" + b"\0" * (seen["shape"][1] - 1)


@pytest.mark.parametrize("columns", [NARROWEST, 80, 160])
@pytest.mark.parametrize("shown", [{}, {"layer": 1}, {"full": True}])
def test_lines_fit_the_terminal(walk: Walk, columns: int, shown: dict[str, Any]) -> None:
    lines = walk_lines(walk, columns, **shown)
    assert max(cell_width(line) for line in lines) <= columns
    text = "\n".join(lines)
    assert "q_proj" in text and "[16, 16]" in text and "6 Next token" in text
    assert text.count("step by step") == 0
    assert len([line for line in lines if line.startswith("Layer ")]) == (2 if "full" in shown else 1)
    assert ("head 1" in text) and ('"\\n"' in text)


@pytest.mark.parametrize(
    ("share", "words"),
    [(1.0, "100 %"), (0.123, "12 %"), (0.0345, "3.5 %"), (0.0002, "0.02 %"), (1e-6, "0 %")],
)
def test_percent(share: float, words: str) -> None:
    assert percent(share) == words


def test_quoted_shows_what_cannot_be_seen() -> None:
    assert quoted(" a\n\x1b[31m") == '" a\\n\\x1b[31m"'


def test_command(stocked: Path, llmctl: Program) -> None:
    plain = llmctl("explain", "base", TEXT)
    assert plain.code == 0 and plain.out.splitlines()[0].startswith("base: ") and "\x1b" not in plain.out
    told = json.loads(llmctl("explain", "base", TEXT, "--json").out)
    assert told["next"][0]["probability"] <= 1
    page = llmctl("explain", "base", TEXT, "--html", "pages/a.html", "--layer", "1")
    assert (page.code, page.out) == (0, "") and "pages/a.html: open it in a browser" in page.err
    first = (stocked / "pages" / "a.html").read_text()
    # a page of this command may be replaced, anything else may not
    assert llmctl("explain", "base", "Bo", "--html", "pages/a.html").code == 0
    assert (stocked / "pages" / "a.html").read_text() != first
    (stocked / "notes.html").write_text("<p>mine</p>")
    refused = llmctl("explain", "base", "Bo", "--html", "notes.html")
    assert refused.err.splitlines() == [
        "error: notes.html: exists, and is no page of `llmctl explain`",
        "hint: name another file with --html",
    ]


@pytest.mark.parametrize(("pager", "through"), [("no-such-pager -R", False), ("cat", True), ("", True)])
def test_a_pager_that_is_not_there_loses_nothing(
    pager: str, through: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paged: list[str] = []
    monkeypatch.setenv("PAGER", pager)
    monkeypatch.delenv("MANPAGER", raising=False)
    monkeypatch.setattr(pydoc, "pager", paged.append)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show_paged(["line"] * 500)
    assert paged == (["line\n" * 500] if through else [])
    assert capsys.readouterr().out == ("" if through else "line\n" * 500)


def test_a_page_where_nothing_may_be_written(stocked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "tmpabc")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError) as caught:
        check_page(Path("x.html"))
    assert caught.value.message == "x.html: no permission to write"


def test_an_encoder_has_no_next_token(stocked: Path) -> None:
    path = stocked / "base" / "config.json"
    config = json.loads(path.read_text())
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    write_json(path, {name: config[name] for name in sizes} | {"model_type": "llmctl", "stack": "encoder"})
    with pytest.raises(UserError) as refused:
        explain.run("base", TEXT, "cpu", SILENT)
    assert refused.value.message == (
        "base: the walk ends in a next token, which a model with stack `encoder` does not predict"
    )
    assert refused.value.hint == "`llmctl explain MODEL --size` takes any model"
