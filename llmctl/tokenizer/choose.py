"""Which chat template a run uses: the model's own, a named one, or a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerFast

from llmctl.errors import UserError, nearest, one_of
from llmctl.tokenizer.jinja import MARK, ChatTemplate, variables_of
from llmctl.tokenizer.kinds import TURN_END, TURN_START
from llmctl.tokenizer.render import Message, Renderer, RenderError
from llmctl.tokenizer.template import TEMPLATES

OWN = "auto"
PLAIN = "alpaca"  # for a model that brings no template: it needs no token the model has not seen
NAMED = {name: text for name, text in TEMPLATES.items() if text is not None}
# what a template may need besides the ordinary tokens
NEEDED = {"chatml": (TURN_START, TURN_END)}


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Args:
        said: a sentence for the user; None where there is nothing to say.
        added: ids of tokens that had to be added to the vocabulary.
    """

    said: str | None
    added: tuple[int, ...] = ()


def choose_template(tokenizer: PreTrainedTokenizerFast, wanted: str) -> Choice:
    """Set `tokenizer.chat_template` to what `data.template` names: auto, a name of `NAMED`, or a file.

    Raises UserError: neither a name nor a file, a file that is not a Jinja template, or a template that
    needs an end token the tokenizer lacks.
    """
    if wanted == OWN:
        if tokenizer.chat_template is not None:
            return Choice(None)
        _set(tokenizer, PLAIN)
        return Choice(f"the model has no chat template: using `{PLAIN}`, plain text without new tokens")
    if wanted in NAMED:
        return Choice(None, _set(tokenizer, wanted))
    tokenizer.chat_template = _read(Path(wanted).expanduser(), wanted)
    return Choice(None)


def template_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of the special tokens that the template writes around an ordinary conversation, sorted.

    Empty if it refuses that conversation: of what it makes of a record, the record's place will be told.
    """
    turns: list[Message] = [{"role": role, "content": MARK} for role in ("user", "assistant")]
    renderer = Renderer(tokenizer, strict=False)
    try:
        ids = set(renderer.prompt_ids(turns))
    except RenderError:
        return []
    return sorted(ids & {token for token, about in tokenizer.added_tokens_decoder.items() if about.special})


def _set(tokenizer: PreTrainedTokenizerFast, name: str) -> tuple[int, ...]:
    if tokenizer.eos_token is None and "eos_token" in NAMED[name]:
        raise UserError(
            f"template `{name}` ends an answer with the end token, and the tokenizer has none",
            "choose another template with --template",
        )
    known = tokenizer.get_vocab()
    missing = [token for token in NEEDED.get(name, ()) if token not in known]
    if missing:
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    tokenizer.chat_template = NAMED[name]
    return tuple(tokenizer.convert_tokens_to_ids(missing))


def _read(path: Path, wanted: str) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")  # a mark of the encoding would be in every prompt
    except (FileNotFoundError, NotADirectoryError):
        close = nearest(wanted, [OWN, *NAMED])
        raise UserError(
            f"template: `{wanted}` is neither a file nor one of {one_of([OWN, *NAMED])}",
            f"did you mean `{close}`?" if close else "name a file with a Jinja chat template",
        ) from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a template file", "name the file inside it") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it", f"chmod u+r {path}") from None
    except OSError as error:
        raise UserError(
            f"template: cannot be read: {error.strerror}", "name a file with a Jinja chat template"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})", "save the file as UTF-8") from None
    _check(path, text)
    return text


def _check(path: Path, text: str) -> None:
    try:
        ChatTemplate(text, {})  # finds unknown filters, which parsing alone does not
        variables = variables_of(text)
    except TemplateSyntaxError as error:
        raise UserError(
            f"{path}: line {error.lineno}: not a Jinja template: {(error.message or '').rstrip('.')}",
            "mend it, or choose a named template: " + one_of(list(NAMED)),
        ) from None
    if "messages" not in variables:
        raise UserError(f"{path}: the template never reads `messages`", "is it a chat template?")
