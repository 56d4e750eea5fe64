"""`generation_config.json`: the token ids that llmctl uses, and everything else kept as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import logging

from llmctl.errors import UserError
from llmctl.files import read_json, write_json
from llmctl.model.notes import culprit

GENERATION_CONFIG = "generation_config.json"
# fields that hold a token id or null; those in the second row may hold a list of ids too
ONE_ID = ("pad_token_id", "decoder_start_token_id")
SOME_IDS = ("bos_token_id", "eos_token_id")
# what transformers raises for values it cannot use
FAULTS = (ValueError, TypeError, AttributeError, KeyError)


class StoredGenerationConfig(GenerationConfig):
    """A generation config that is saved as the file it was read from, with what was changed since.

    transformers refuses to save a changed config with sampling fields but without `do_sample`, as Vicuna and Llama 2
    ship it, drops fields it does not know of files that say `_from_model_config`, and leaves out what equals a default.
    """

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self._stored = dict(fields)
        self._read = self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """The fields, as transformers asks for them."""
        return {key: value for key, value in super().to_dict().items() if key not in ("_stored", "_read")}

    def contents(self) -> dict[str, Any]:
        """What is written: the file that was read, and the fields that have changed."""
        changed = {key: value for key, value in self.to_dict().items() if value != self._read.get(key)}
        return self._stored | changed

    def save_pretrained(
        self, save_directory: str | Path, config_file_name: str | Path | None = None, *_: Any, **__: Any
    ) -> None:
        """Write `generation_config.json`, whatever transformers thinks of its fields."""
        write_json(Path(save_directory) / (config_file_name or GENERATION_CONFIG), self.contents())


def read_generation_config(folder: Path, defaults: Mapping[str, Any]) -> StoredGenerationConfig:
    """The generation config of a folder; of its `config.json` if it has none.

    Args:
        defaults: ids that `config.json` names, for those that the file does not name.

    Raises UserError: a file that is no JSON object, or a field that is not a token id, or that transformers refuses.
    """
    path, model = folder / GENERATION_CONFIG, folder / "config.json"
    if path.is_file():
        raw = read_json(path)
    else:  # as transformers does, for models from before there was such a file
        path, known = model, vars(GenerationConfig()).keys() - {"transformers_version"}
        found = read_json(model) if model.is_file() else {}
        raw = {name: value for name, value in found.items() if name in known and not name.startswith("_")}
    for name in raw:
        if name in dir(StoredGenerationConfig):  # its methods: a field of that name would take their place
            raise UserError(f"{path}: {name}: no field has this name", "delete this field")
    for name in (*ONE_ID, *SOME_IDS):
        _check_ids(raw.get(name), name, path)
    named = {name: value for name, value in defaults.items() if raw.get(name) is None and value is not None}
    with _quiet():
        try:
            return StoredGenerationConfig(**raw | named)
        except FAULTS as error:
            field = culprit(raw, lambda rest: GenerationConfig(**rest), FAULTS)
            said = str(error.args[0] if error.args else error).strip().rstrip(".")
            raise UserError(
                f"{path}: {f'{field}: ' if field else ''}{said}",
                "mend or delete this field; transformers does not open the model with it either",
            ) from None


def ids_in(value: int | list[int] | None) -> list[int]:
    """The ids that a field names: none, one or several. Negative ones, which some files have for none, are left out."""
    listed = [] if value is None else [value] if isinstance(value, int) else list(value)
    return [token for token in listed if token >= 0]


def _check_ids(value: Any, name: str, path: Path) -> None:
    several = name in SOME_IDS
    for token in value if several and isinstance(value, list) else [] if value is None else [value]:
        if type(token) is not int:  # nor True
            what = "a token id, or a list of them" if several else "a token id"
            raise UserError(f"{path}: {name}: {token!r} is not {what}", f"write {what}, or null")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings about sampling fields: llmctl samples as its recipe says."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
