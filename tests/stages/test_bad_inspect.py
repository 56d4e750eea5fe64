"""Wrong command lines and bad data of `llmctl data inspect` and `stats`, through the real command line."""

from __future__ import annotations

import json
from pathlib import Path

from tests.program import Program
from tests.stages.bad_input import Bad, Make, cases, check, file, told

FEW = "--model base --template chatml"
KNOWN = "what can be set is `data.columns`, `data.template`, `data.max_length`, `data.text_field`, `data.mask_prompt`, `data.rewritten`"


def records(name: str, *values: object) -> Make:
    """A maker of a jsonl file."""
    return file(name, "".join(json.dumps(value) + "\n" for value in values))


def files(*makes: Make) -> Make:
    """A maker of several files."""

    def make(here: Path) -> None:
        for one in makes:
            one(here)

    return make


TALK = records("x.jsonl", {"instruction": "a", "output": "b"})
PAIR = records("x.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
LABEL = records("y.jsonl", {"prompt": "a", "completion": "b", "label": True})
LONG = records("x.jsonl", {"instruction": "a", "output": "long " * 90}, {"instruction": "a", "output": "b"})
LOUD = file("x.jinja", "{% for m in messages %}{{ m['content'] }}{% endfor %}")

BAD = {
    "no file": Bad(
        "data inspect --model base",
        "missing argument FILE",
        "name files, folders, globs or builtin:NAME",
        code=2,
    ),
    "no file for stats": Bad(
        "data stats", "missing argument FILE", "name files, folders, globs or builtin:NAME", code=2
    ),
    "no model": Bad(
        "data inspect x.jsonl",
        "missing option --model",
        "its tokenizer and template make the rows; `llmctl data stats` needs none",
        TALK,
        code=2,
    ),
    "no such model": Bad(
        "data inspect x.jsonl --model ./nope",
        "./nope: no such folder",
        "name a folder with a model, or a hub id",
        TALK,
    ),
    "a tokenizer alone": Bad(
        "data inspect x.jsonl --model tok",
        "tok: is a tokenizer, not a model",
        "`llmctl pretrain --tokenizer tok` makes a model for it",
        TALK,
    ),
    "no rows": Bad(
        "data inspect x.jsonl --model base --rows 0", "--rows is 0", "rows are counted from 1", code=2
    ),
    "fewer than no rows": Bad(
        "data inspect x.jsonl --model base --rows -3", "--rows is -3", "rows are counted from 1", code=2
    ),
    "row none": Bad(
        "data inspect x.jsonl --model base --from 0", "--from is 0", "rows are counted from 1", code=2
    ),
    "rows in words": Bad(
        "data inspect x.jsonl --model base --rows many",
        "--rows: `many` is not a whole number",
        "see `llmctl data inspect --help`",
        code=2,
    ),
    "beyond the last row": Bad(
        f"data inspect x.jsonl {FEW} --from 2",
        "--from 2: the last row is 1",
        "begin with that one, or earlier",
        TALK,
    ),
    "misspelt policy": Bad(
        "data inspect x.jsonl --model base --overlong truncat",
        "command line: data.overlong: `truncat` is not one of `error`, `drop`, `truncate`, `split`",
        "did you mean `truncate`?",
        TALK,
    ),
    "another setting": Bad(
        "data inspect x.jsonl --model base data.packing=true",
        "data.packing changes nothing here",
        f"{KNOWN}, `data.overlong`",
        code=2,
    ),
    "a setting of stats that is none": Bad(
        "data stats x.jsonl data.overlong=drop",
        "data.overlong changes nothing here",
        KNOWN,
        code=2,
    ),
    "a template without a model": Bad(
        "data stats x.jsonl --template chatml",
        "data.template is about tokens, which are not counted",
        "name a model with --model",
        code=2,
    ),
    "a mask of preferences": Bad(
        f"data inspect x.jsonl {FEW} data.mask_prompt=false",
        "data.mask_prompt: preferences have no such setting",
        "leave out data.mask_prompt",
        PAIR,
    ),
    "preferences in parts": Bad(
        f"data inspect x.jsonl {FEW} --overlong split",
        "data.overlong: `split` makes no sense for a pair of answers",
        "use drop or truncate",
        PAIR,
    ),
    "preferences among conversations": Bad(
        f"data inspect x.jsonl data.jsonl {FEW}",
        "x.jsonl holds preferences (`preference`), but data.jsonl conversations or text (`text`)",
        "no stage trains on both: look at them one after the other",
        PAIR,
    ),
    "labels among preferences": Bad(
        f"data inspect x.jsonl y.jsonl {FEW}",
        "x.jsonl holds preferences (`preference`), but y.jsonl labelled answers (`kto-completion`)",
        "no stage trains on both: look at them one after the other",
        files(PAIR, LABEL),
    ),
    "a longer row than the model takes": Bad(
        f"data inspect x.jsonl {FEW} --max-length 65",
        "data.max_length is 65, but the model's max_position_embeddings is 64",
        "lower data.max_length, or give the model a longer context",
        TALK,
    ),
    "many long records": Bad(
        f"data inspect x.jsonl {FEW}",
        "1 of 2 records are longer than 64 tokens (x.jsonl:1): too many to drop unasked",
        "raise data.max_length (up to the context of the model), or set data.overlong to drop or truncate",
        LONG,
    ),
    "no such file": Bad(
        f"data inspect data.json {FEW}", "data.json: no such file or folder", "did you mean `data.jsonl`?"
    ),
    "no such file for stats": Bad(
        "data stats data.json", "data.json: no such file or folder", "did you mean `data.jsonl`?"
    ),
    "no such builtin": Bad(
        f"data inspect builtin:tinyworld-instruction {FEW}",
        "builtin:tinyworld-instruction: no such builtin data; there is `builtin:pydoc`, `builtin:tinyworld`, "
        "`builtin:tinyworld-instructions`, `builtin:tinyworld-instructions-heldout`, "
        "`builtin:tinyworld-preferences`, `builtin:tinyworld-preferences-heldout`",
        "did you mean `builtin:tinyworld-instructions`?",
    ),
    "an empty file": Bad(
        f"data inspect x.jsonl {FEW}",
        "x.jsonl: the file is empty",
        "check how it was made, or leave it out",
        file("x.jsonl", ""),
    ),
    "an empty list": Bad(
        "data stats x.json",
        "x.json: no usable record (it holds none)",
        "mend the file, or leave it out",
        file("x.json", "[]"),
    ),
    "no answer in any record": Bad(
        f"data inspect x.jsonl {FEW}",
        "x.jsonl: no usable record (dropped 1: the answer is empty)",
        "mend the file, or leave it out",
        records("x.jsonl", {"instruction": "a", "output": ""}),
    ),
    "mixed in one file": Bad(
        "data stats x.jsonl",
        "x.jsonl:2: mixed formats: this record is `text`, line 1 is `alpaca`",
        "a file holds one format: put them in files of their own",
        records("x.jsonl", {"instruction": "a", "output": "b"}, {"text": "c"}),
    ),
    "an answer that never ends": Bad(
        "data inspect x.jsonl --model base --template x.jinja",
        "x.jsonl:1: an answer ends with `b`, which does not stop generation",
        "the template must end an answer with a special token; choose another with --template",
        files(TALK, LOUD),
    ),
    "a template that always raises": Bad(
        "data inspect x.jsonl --model base --template x.jinja",
        "x.jsonl:1: the chat template refuses it: no user here (line 2 of the template)",
        "mend the record, or choose another template with --template",
        files(
            TALK,
            file(
                "x.jinja",
                "{% for m in messages %}\n{{ raise_exception('No ' + m.role + ' here.') }}\n{% endfor %}",
            ),
        ),
    ),
    "a template that calls what is not there": Bad(
        "data stats x.jsonl --model base --template x.jinja",
        "x.jsonl:1: the chat template refuses it: 'dict object' has no attribute 'parts' (line 3 of the template)",
        "mend the record, or choose another template with --template",
        files(TALK, file("x.jinja", "{% for m in messages %}\n\n{{ m.parts.text() }}\n{% endfor %}")),
    ),
    "no such template": Bad(
        "data inspect x.jsonl --model base --template chatm",
        "template: `chatm` is neither a file nor one of `auto`, `chatml`, `alpaca`",
        "did you mean `chatml`?",
        TALK,
    ),
    "text in no field": Bad(
        "data stats x.jsonl data.text_field=body",
        "x.jsonl:1: fits no format: keys `bodi`; nearest is text",
        "did you mean `body`?",
        records("x.jsonl", {"bodi": "a"}),
    ),
}


@cases(BAD)
def test_bad_input(bad: Bad, stocked: Path, llmctl: Program) -> None:
    check(bad, stocked, llmctl)


def test_another_tokenizer_than_the_run_was_made_with(stocked: Path, llmctl: Program) -> None:
    TALK(stocked)
    config = stocked / "base" / "tokenizer.json"
    config.write_text(config.read_text().replace('"<|pad|>"', '"<|fill|>"'))
    for words in ("data inspect x.jsonl --model base", "data stats x.jsonl --model base"):
        told(
            llmctl(*words.split()),
            Bad(
                words,
                "base: the tokenizer is not the one this run was made with",
                "copy it back from the run's parent, or from the folder's last checkpoint",
            ),
        )
