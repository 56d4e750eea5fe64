"""What the stages that adapt a model share: its base, its template, and what of it is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerFast

from llmctl.errors import UserError
from llmctl.kernels.device import Compute, pick_compute
from llmctl.model import LlmctlForCausalLM, LlmctlForSequenceClassification, recompute_activations
from llmctl.model.adapters import (
    add_lora,
    is_adapter,
    load_adapter_weights,
    narrow_frozen,
    refused_elsewhere,
    save_adapter,
)
from llmctl.model.checkpoint import load_weights, save_model
from llmctl.model.classify import open_or_begin
from llmctl.model.config import LlmctlConfig
from llmctl.model.generation import ids_in
from llmctl.model.hf import LlmctlPreTrainedModel
from llmctl.model.nf4 import quantize_nf4
from llmctl.model.open import open_config, open_folded, open_generation_config
from llmctl.model.vocabulary import grow_vocabulary
from llmctl.plan.size import total_parameters
from llmctl.recipe.rates import shown
from llmctl.recipe.tune import LoraSection, Method
from llmctl.runs import run_of
from llmctl.stages.text import (
    highest_id,
    open_tokenizer,
    pad_id_of,
    parent,
    refuse_mismatch,
    refuse_swapped_tokenizer,
    row_length,
)
from llmctl.talk import Talk
from llmctl.tokenizer.choose import choose_template, template_tokens
from llmctl.tokenizer.load import fingerprint
from llmctl.tokenizer.template import stop_ids, template_hash

NO_MODEL = ("no MODEL to start from", "name a run folder, a Hugging Face folder or a hub id")


@dataclass(frozen=True)
class Base:
    """The model a run starts from, checked to fit its tokenizer and template.

    Args:
        rows: entries of the vocabulary when trained; more than the base has if the template needs them.
        ends: tokens that end a generation of the base.
        unseen: special tokens the template writes and the base was never trained on.
        never_seen: those that no stage up to this one will have trained.
    """

    where: str
    config: LlmctlConfig
    tokenizer: PreTrainedTokenizerFast
    compute: Compute
    max_length: int
    rows: int
    ends: tuple[int, ...]
    unseen: tuple[int, ...]
    never_seen: list[int]

    @property
    def stop_ids(self) -> list[int]:
        """What ends a generation: of the template, and of the base."""
        return list(dict.fromkeys([*stop_ids(self.tokenizer), *self.ends]))

    def manifest(self) -> dict[str, Any]:
        """What a manifest records of the base and of how text becomes ids."""
        return {
            "device": str(self.compute),
            "parents": [parent("model", self.where)],
            "tokenizer": fingerprint(self.tokenizer),
            "template": template_hash(self.tokenizer),
            "stop_ids": self.stop_ids,
            "vocab_size": self.rows,
            "trained_tokens": list(self.unseen),
            "never_seen": self.never_seen,
        }


def resolved(recipe: Any) -> tuple[Any, str]:
    """A recipe with its learning rate, and a sentence that says where that comes from.

    Raises UserError: no base, or as `open_config`.
    """
    if recipe.base is None:
        raise UserError(*NO_MODEL)
    if recipe.train.learning_rate != "auto":
        return recipe, f"learning rate {shown(recipe.train.learning_rate)}, as train.learning_rate says"
    size = total_parameters(open_config(recipe.base).spec)
    found = recipe.resolved(size)
    rate = found.train.learning_rate
    return found, (
        f"learning rate {shown(rate)}: the default of {recipe.stage_name} by {recipe.method} for {size:,} parameters; "
        "train.learning_rate sets another"
    )


def prepare_base(
    where: str | None,
    *,
    device: str,
    dtype: str,
    template: str,
    max_length: int | None,
    talk: Talk,
) -> Base:
    """Open config and tokenizer, choose the template, and check that all fit.

    Says which template is used if the model has none, and which tokens it never saw.

    Raises UserError: no base, or what `open_tokenizer`, `open_config` and `choose_template` raise.
    """
    if where is None:
        raise UserError(*NO_MODEL)
    if dtype == "float16":
        raise UserError(
            "train.dtype: float16 needs loss scaling, which this loop does not do",
            "use bfloat16, float32 or auto",
        )
    compute = pick_compute(device, dtype)
    config = open_config(where)  # first, because a broken config.json would look like a broken tokenizer
    tokenizer = open_tokenizer(where)
    refuse_swapped_tokenizer(tokenizer, where)
    refuse_mismatch(tokenizer, config.vocab_size, where)
    choice = choose_template(tokenizer, template)
    if choice.said:
        talk.say(choice.said)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        talk.say(
            "padding and end token are the same; labels are masked by place, so ends are trained all the same"
        )
    if is_adapter(Path(where).expanduser()):
        talk.say(f"{where} is an adapter: it is folded into its base")
    written, never = set(template_tokens(tokenizer)), _never_seen(where, tokenizer)
    unseen = tuple(sorted(written & (never | set(choice.added))))
    if unseen:
        names = ", ".join(tokenizer.convert_ids_to_tokens(list(unseen)))
        talk.say(f"the base has never seen {names}: their embeddings are trained too")
    rows = max(config.vocab_size, highest_id(tokenizer) + 1)
    length = row_length(max_length, config.max_position_embeddings, "data.max_length")
    ends, never_seen = ids_in(open_generation_config(where).eos_token_id), sorted(never - written)
    return Base(where, config, tokenizer, compute, length, rows, tuple(ends), unseen, never_seen)


def _never_seen(where: str, tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Special tokens the base was not trained on, as far as it is a model of ours: of others nothing is known.

    Pretraining sees BOS and the end, since text holds no other; every later stage writes down what is left.
    """
    made = run_of(Path(where)) or {}
    if "never_seen" in made:
        return set(made["never_seen"])
    if made.get("stage") != "pretrain" or any(one["role"] == "model" for one in made.get("parents", [])):
        return set()
    special = {token for token, about in tokenizer.added_tokens_decoder.items() if about.special}
    return special - {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}


@dataclass(frozen=True)
class Tuned:
    """A model ready to be trained.

    Args:
        model: what is called and trained: PEFT's wrapper, or the model itself.
        inner: the model, a language model or one that scores; it computes with the adapter.
        save: writes what was trained, with tokenizer and generation config, into a folder.
        load: reads the trained weights back, in place.
        needs_merging: why other programs open the result only once it is merged; None where they do.
    """

    model: torch.nn.Module
    inner: Any
    save: Callable[[Path], None]
    load: Callable[[Path], None]
    needs_merging: str | None = None

    def tell(self, talk: Talk) -> None:
        """Say if other programs will not open what is trained."""
        if self.needs_merging:
            talk.say(f"other programs open the result only once merged: {self.needs_merging}")


def tuned(
    base: Base,
    method: Method,
    lora: LoraSection,
    seed: int,
    checkpointing: bool,
    task: Literal["causal", "reward"] = "causal",
) -> Tuned:
    """The base with what is to be trained of it.

    Adapters start from `seed`; the frozen rest is kept in the precision it is multiplied in. For `reward`
    the base gets a score head in place of its output head, unless it has one, and the head is trained too.

    Raises UserError: as `open_folded`, `open_or_begin` and `target_names`.
    """
    torch.manual_seed(seed)
    inner = _opened(base, task, seed)
    if checkpointing:
        recompute_activations(inner)
    if method == "full":
        inner.requires_grad_(True)
        inner.config.eos_token_id = base.stop_ids
        inner.to(base.compute.device)
        return Tuned(inner, inner, partial(_save_whole, inner, base.tokenizer), partial(load_weights, inner))
    if method == "qlora":
        quantize_nf4(inner, base.compute.dtype)
    model = add_lora(
        inner,
        r=lora.r,
        alpha=lora.alpha,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        tokens=base.unseen,
        base=_written_down(base.where),
        task=task,
    )
    if method == "lora":
        narrow_frozen(inner, base.compute.dtype)
    # PEFT had to know of the four bits; TRL would cast what is trained to bfloat16 for it
    inner.is_loaded_in_4bit = False
    model.to(base.compute.device)
    save, load = partial(_save_adapter, model, base.tokenizer), partial(load_adapter_weights, model)
    return Tuned(model, inner, save, load, _needs_merging(base, model))


def _needs_merging(base: Base, model: Any) -> str | None:
    if is_adapter(Path(base.where).expanduser()):
        return "its base is an adapter, and PEFT would put it on the base of that"
    if base.rows > base.config.vocab_size:
        return "the base has no rows for the tokens that the template added"
    return refused_elsewhere(model)


def _opened(base: Base, task: str, seed: int) -> LlmctlForCausalLM | LlmctlForSequenceClassification:
    """The base in float32, with its new rows, and with the ids of this run's tokenizer and template."""
    if task == "reward":
        scorer = open_or_begin(base.where, seed, torch.float32)
        grow_vocabulary(scorer, base.rows)
        scorer.config.pad_token_id = base.tokenizer.pad_token_id  # by which transformers finds a row's end
        return scorer
    inner = open_folded(base.where, torch.float32)
    grow_vocabulary(inner, base.rows)
    inner.generation_config.update(
        bos_token_id=base.tokenizer.bos_token_id,
        eos_token_id=base.stop_ids,
        pad_token_id=pad_id_of(base.tokenizer),
    )
    return inner


def _written_down(where: str) -> str:
    """The base as PEFT's config names it: a folder by its whole path, so that it is found from anywhere."""
    path = Path(where).expanduser()
    return str(path.resolve()) if path.is_dir() else where


def _save_whole(model: LlmctlPreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    save_model(model, folder)
    tokenizer.save_pretrained(folder)


def _save_adapter(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    save_adapter(model, folder)
    if model.get_base_model().can_generate():
        model.get_base_model().generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
