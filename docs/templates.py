"""Write the table of chat templates in docs/data.md: what llmctl makes of each template that TRL ships.

Every template renders five small records through the functions behind `llmctl data inspect`, and every row is
compared with `tokenizer.apply_chat_template` of transformers: the ids must be the same, and a record may be refused
only where transformers refuses it.

python docs/templates.py            write the table
python docs/templates.py --check    exit 1 if the page differs from what would be written
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmctl.errors import UserError
from llmctl.recipe.tune import SftData, SftRecipe
from llmctl.stages.inspect import base_of
from llmctl.stages.remarks import JOINED
from llmctl.stages.rows import read_rows
from llmctl.stages.tune import Base
from llmctl.talk import SILENT
from llmctl.tokenizer.answers import EMPTY, FORCED, OTHER_PROMPT, REWRITTEN, UNENDED, UNPROMPTED, UNTHOUGHT
from llmctl.tokenizer.forms import parts_of
from llmctl.tokenizer.jinja import FAULTS
from llmctl.tokenizer.learners import SPLIT
from llmctl.tokenizer.twins import shipped

PAGE = Path(__file__).resolve().parent / "data.md"
TABLE = re.compile(r"(<!-- templates -->\n).*?(<!-- end -->)", re.DOTALL)
# what looks like a token of its own in the text of a template
TOKEN = re.compile(
    r"<\|[^<>|\s]+\|>|<\|[^<>|\s]+>|<[^<>|\s]+\|>|<｜[^<>\s]+｜>|<(?:start|end)_of_\w+>|</?s>|<sop>|\[gMASK\]"
    r"|\[/?INST\]|<image>|</?think>|</?tool_call>|</?tool_response>"
)
BOS, EOS = "<bos>", "<eos>"


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


ARGUMENTS = {"at": "map"}
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "look", "arguments": ARGUMENTS}}
SCHEMA = {
    "type": "object",
    "properties": {"at": {"type": "string", "description": "where"}},
    "required": ["at"],
}
LOOK = {"type": "function", "function": {"name": "look", "description": "It looks.", "parameters": SCHEMA}}
RECORDS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [_user("Hi"), _assistant("Hello.")]},
    "three turns": {
        "messages": [
            _user("Hi"), _assistant("Hello."), _user("And?"), _assistant("Fine."), _user("Bye"), _assistant("See you."),
        ]
    },
    "system": {"messages": [{"role": "system", "content": "Be brief."}, _user("Hi"), _assistant("Hello.")]},
    "tools": {
        "messages": [
            _user("Where?"),
            _assistant("", tool_calls=[CALL]),
            {"role": "tool", "name": "look", "tool_call_id": "abcdefghi", "content": "here"},
            _assistant("It is here."),
        ],
        "tools": [LOOK],
    },
    "reasoning": {"messages": [_user("Hi"), _assistant("Hello.", reasoning_content="They greet.")]},
}  # fmt: skip
REASONS = {
    REWRITTEN: "h", FORCED: "q", OTHER_PROMPT: "q", UNPROMPTED: "q", EMPTY: "d", UNTHOUGHT: "d", UNENDED: "e", JOINED: "j",
}  # fmt: skip
REFUSED = "refused"


def tokenizer_for(source: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the special tokens that a template writes, and one word: two line breaks."""
    vocab = {text: number for number, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab | {"ĊĊ": len(vocab)}, [("Ċ", "Ċ")]))
    cut = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)
    made.add_special_tokens({"extra_special_tokens": sorted(set(TOKEN.findall(source)))})
    made.chat_template = source
    return made


def model_for(source: str, folder: Path) -> Base:
    """What stages know of a model with a template, opened as `llmctl data inspect` opens it."""
    save_model(tokenizer_for(source), folder)
    return base_of(SftRecipe(base=str(folder)), SILENT)


def save_model(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """What is read of a model before its weights."""
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": 8192, **sizes}
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 1}))


def cell(base: Base, record: dict[str, Any], folder: Path) -> str:
    """A cell of the table.

    Raises AssertionError if the row is not what transformers renders, or is refused and transformers does not.
    """
    file = folder / "record.jsonl"
    file.write_text(json.dumps(record))
    data = SftData(train=[str(file)], packing=False, overlong="drop")
    try:
        rows = read_rows([str(file)], data, base.tokenizer, base.max_length, SILENT)
    except UserError as error:
        assert all(ids is None for _, ids in theirs(base.tokenizer, record)), error.message
        return REFUSED
    same = [form for form, ids in theirs(base.tokenizer, record) if ids == rows.laid.ids.tolist()]
    assert same, f"other ids than those of transformers: {base.tokenizer.decode(rows.laid.ids.tolist())!r}"
    trained = rows.laid.trained
    assert trained is not None and trained.any()
    answers = [turn for turn in record["messages"] if turn["role"] == "assistant"]
    left = rows.answers
    untrained = sum(left.get(why, 0) for why in (REWRITTEN, OTHER_PROMPT, UNPROMPTED, EMPTY))
    letters = {REASONS[why] for why in left} | ({"d"} if rows.unwritten else set()) | {same[0]}
    return " ".join(filter(None, [f"{len(answers) - untrained}/{len(answers)}", *sorted(letters - {""})]))


def theirs(
    tokenizer: PreTrainedTokenizerFast, record: dict[str, Any]
) -> Iterator[tuple[str, list[int] | None]]:
    """A letter for the form of the messages, and what transformers makes of them in that form; None if it refuses."""
    for letter, messages in (
        ("", record["messages"]),
        ("a", [_with_text_arguments(turn) for turn in record["messages"]]),
        ("p", [{**turn, "content": parts_of(turn["content"])} for turn in record["messages"]]),
    ):
        try:
            ids = tokenizer.apply_chat_template(messages, tools=record.get("tools"), return_dict=False)
        except FAULTS:
            ids = None
        yield letter, ids


def _with_text_arguments(turn: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(ARGUMENTS)}}
        for call in turn.get("tool_calls", [])
    ]
    return {**turn, "tool_calls": calls} if calls else turn


def table(names: Iterable[str]) -> Iterator[str]:
    """Lines of the table, for templates by their names. Raises AssertionError for a wrong cell, with its place."""
    known = shipped()
    assert known is not None, "TRL is not installed"
    yield "| template | " + " | ".join(RECORDS) + " |"
    yield "|---" * (len(RECORDS) + 1) + "|"
    for name in names:
        cells = []
        with tempfile.TemporaryDirectory() as folder:
            base = model_for(known[name], Path(folder))
            for kind, record in RECORDS.items():
                try:
                    cells.append(cell(base, record, Path(folder)))
                except AssertionError as error:
                    raise AssertionError(f"{name}, {kind}: {error}") from error
        yield f"| `{name}` | " + " | ".join(cells) + " |"


def main() -> int:
    """Write or check the table; 0 if it is right afterwards."""
    parser = argparse.ArgumentParser(description="write the table of chat templates in docs/data.md")
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    text = TABLE.sub(lambda found: found[1] + "\n".join(table(shipped() or {})) + "\n" + found[2], page)
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    elif page != text:
        sys.stderr.write("error: docs/data.md is out of date\nhint: run `make docs`\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
