"""PEFT's config for an adapter that was translated: the same updates under other names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, TypeVar

from torch import nn

from llmctl.model.adapter_file import CHANGED_BASES, Adapter
from llmctl.model.adapter_names import STACKED, WEIGHT, Names
from llmctl.model.hf import LlmctlPreTrainedModel
from llmctl.model.routers import Router

if TYPE_CHECKING:
    from peft import LoraConfig

V = TypeVar("V", int, float)
# linear layers of these names in a class with stacked experts: PEFT takes the names for those of the experts
_TAKEN = frozenset({"gate", *(part for parts in STACKED.values() for part in parts)})


def for_core(settings: LoraConfig, adapter: Adapter, model: LlmctlPreTrainedModel) -> LoraConfig:
    """The settings of an adapter that is in the core's names, to be used and not to be trained."""
    from peft import LoraConfig

    modules = dict(model.named_modules())
    routers = {name for name in adapter.matrices if isinstance(modules[name], Router)}
    ranks = {name: factors.r for name, factors in adapter.matrices.items()}
    ranks |= {name: factors.r for name, factors in adapter.tables.items()}
    alphas = {name: factors.alpha for name, factors in (adapter.matrices | adapter.tables).items()}
    every = [
        name for name, module in modules.items() if isinstance(module, nn.Linear | nn.Embedding | Router)
    ]
    chosen = {f"{name}{WEIGHT}" if name in routers else name for name in ranks}
    ranks, alphas = (
        {f"{n}{WEIGHT}" if n in routers else n: v for n, v in each.items()} for each in (ranks, alphas)
    )
    start = settings.init_lora_weights
    r, rank_pattern = _patterns(ranks)
    alpha, alpha_pattern = _patterns(alphas)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        target_modules=sorted(shortest(chosen & set(every), every)),
        target_parameters=sorted(chosen - set(every)) or None,
        trainable_token_indices={name: tokens for name, (tokens, _) in adapter.rows.items()} or None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        lora_bias=settings.lora_bias,
        ensure_weight_tying=settings.ensure_weight_tying,
        init_lora_weights=start
        if isinstance(start, str) and start.lower().startswith(CHANGED_BASES)
        else False,
        inference_mode=True,
    )


def for_family(settings: LoraConfig, adapter: Adapter, names: Names) -> LoraConfig:
    """The settings of an adapter that is in the names of its base's family, as PEFT reads them there."""
    found = deepcopy(settings)
    found.inference_mode = True
    parameters = {
        module if module in names.stacks else f"{module}{WEIGHT}"
        for module in adapter.matrices
        if names.stacks and (module in names.stacks or module.rpartition(".")[2] in _TAKEN)
    }
    modules = {module for module in adapter.matrices if not {module, f"{module}{WEIGHT}"} & parameters}
    every = [*names.steps, *names.stacks, *(f"{module}{WEIGHT}" for module in names.steps)]
    found.target_modules = shortest(modules, every)
    if parameters:
        found.target_parameters = sorted(shortest(parameters, every))
        found.lora_dropout = 0.0  # of training alone, and PEFT has none for parameters
    named = {
        name if name in parameters or name in modules else f"{name}{WEIGHT}": name
        for name in adapter.matrices
    }
    count = {module: len(experts) for module, experts in names.stacks.items()}
    ranks = {key: adapter.matrices[name].r // count.get(name, 1) for key, name in named.items()}
    found.r, found.rank_pattern = _patterns(ranks, settings.r)
    alphas = {key: adapter.matrices[name].alpha for key, name in named.items()}
    found.lora_alpha, found.alpha_pattern = _patterns(alphas, settings.lora_alpha)
    if isinstance(settings.trainable_token_indices, dict):
        found.trainable_token_indices = {name: tokens for name, (tokens, _) in adapter.rows.items()}
    return found


def _patterns(values: Mapping[str, V], usual: V | None = None) -> tuple[V, dict[str, V]]:
    """The value of most modules, and patterns for those that have another."""
    if usual is None or usual not in values.values():
        usual = Counter(values.values()).most_common(1)[0][0] if values else usual
    found: dict[str, V] = {}
    for value in sorted(set(values.values()) - {usual}):
        those = {name for name, each in values.items() if each == value}
        found |= {re.escape(end): value for end in sorted(shortest(those, values))}
    return usual, found


def shortest(chosen: set[str], every: Iterable[str]) -> set[str]:
    """The fewest last words of names that mean the chosen ones and no others of all."""
    others = set(every) - chosen
    taken = {end for name in others for end in _ends(name)}
    return {next(end for end in _ends(name) if end not in taken) for name in chosen}


def _ends(name: str) -> list[str]:
    """The last word of a dotted name, the last two, and so on."""
    words = name.split(".")
    return [".".join(words[at:]) for at in range(len(words) - 1, -1, -1)]
