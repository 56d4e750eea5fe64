"""`llmctl convert`: a model written anew, as another family, in another precision, or out of a pickle."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from llmctl.errors import UserError
from llmctl.kernels.device import DTYPES, pick_device
from llmctl.kernels.threads import use_threads
from llmctl.locate import locate
from llmctl.model.adapters import is_adapter
from llmctl.model.checkpoint import FILES, PICKLES, STACKS, head_in, load_config, load_model, save_model
from llmctl.model.classify import LlmctlForSequenceClassification
from llmctl.model.hf import LlmctlPreTrainedModel
from llmctl.recipe.convert import ConvertRecipe
from llmctl.recipe.load import dump_recipe
from llmctl.runs import Run, RunResult, check_out, default_out
from llmctl.stages.finish import install
from llmctl.stages.text import parent
from llmctl.talk import Talk

STAGE = "convert"
# what belongs to the tokenizer of a model folder, under its names in every library
TOKENIZER = (
    "tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "*.model", "*.tiktoken", "additional_chat_templates/*.jinja",
)  # fmt: skip


def run(recipe: ConvertRecipe, talk: Talk) -> RunResult:
    """Read, and write as the family that is asked for; the tokenizer's files are copied as they are.

    Raises UserError: as `load_model`; for an adapter; for a family that cannot express the model.
    """
    assert recipe.base is not None
    folder = locate(recipe.base, [*FILES, *TOKENIZER, *(PICKLES if recipe.allow_pickle else [])])
    if is_adapter(folder):
        raise UserError(f"{folder}: an adapter, not a model", "`llmctl merge` folds it into its base")
    out = Path(recipe.out) if recipe.out else default_out(STAGE)
    check_out(out, resumable=False, afresh=STAGE)
    use_threads(recipe.threads, "threads", pick_device("cpu"), talk)
    dtype = DTYPES.get(recipe.dtype)
    with talk.bar("loading", None, ""):
        model = load_model(folder, dtype, kind=_class_in(folder), allow_pickle=recipe.allow_pickle)
    model.config.family = recipe.family or model.config.family
    fields, _ = model.disk_form()
    parents = [parent("model", recipe.base)]
    text = dump_recipe(recipe.model_copy(update={"out": None}))
    with Run.start(STAGE, out, text, afresh=True, parents=parents) as opened:
        with talk.bar("writing", None, ""):
            install(partial(_write, model, folder), out)
        found: dict[str, Any] = {
            "family": fields["model_type"],
            "dtype": fields["dtype"],
            "parameters": sum(weight.numel() for weight in model.parameters()),
        }
        opened.finish(found)
    return RunResult(out, found)


def _class_in(folder: Path) -> type[LlmctlPreTrainedModel]:
    config = load_config(folder)
    scores = (head_in(config) or ("", ""))[0] == "ForSequenceClassification"
    return LlmctlForSequenceClassification if scores else STACKS[config.spec.stack][0]


def _write(model: LlmctlPreTrainedModel, folder: Path, target: Path) -> None:
    save_model(model, target)
    for pattern in TOKENIZER:
        for file in folder.glob(pattern):
            if file.is_file():
                copy = target / file.relative_to(folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
