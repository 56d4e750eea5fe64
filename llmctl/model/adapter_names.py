"""An adapter in the names of its base's family, and in the core's: `parse`d parts, translated exactly both ways.

The family's rules (`keymap`) say which matrices of the core one matrix of the family is. A low-rank update b a of a
matrix that is cut by its outputs is one of each part, with the same a and that part's rows of b. The other way, updates
of parts with factors of their own are one update of the whole, of the summed rank: their a one below the other, and their
b as blocks. transformers holds all experts of a layer in two stacked parameters, which PEFT adapts as such; the core has
a module for each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmctl.model.adapter_file import Adapter, Factors
from llmctl.model.families import FAMILIES, write_config
from llmctl.model.hf import LlmctlPreTrainedModel
from llmctl.model.keymap import Rename, Rule, Step, from_core, to_core, to_disk
from llmctl.model.leaves import HEADS
from llmctl.model.routers import Router

WEIGHT = ".weight"
# transformers' stacked parameters, and what they hold of an expert
STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class Names:
    """Which modules of the core the modules of a family's class in transformers are.

    Attributes:
        steps: module of the family -> the step that makes the core's weights of its weight.
        stacks: stacked parameter of experts -> for each expert, the core's modules that its rows are.
        rules: of all tensors.
        shapes: weight in the core -> its shape.
        heads: the modules that stand above the blocks, which `all-linear` leaves out.
    """

    steps: dict[str, Step]
    stacks: dict[str, list[tuple[str, ...]]]
    rules: tuple[Rule, ...]
    shapes: dict[str, tuple[int, int]]
    heads: frozenset[str]

    @property
    def same(self) -> bool:
        """Whether the family's modules have the core's names, and their rows the core's order."""
        return not self.stacks and all(
            step.disk == step.core and isinstance(step.rule, Rename) for step in self.steps.values()
        )

    def shape(self, module: str) -> tuple[int, int]:
        """(outputs, inputs) of a module's matrix; of a stacked parameter, of one expert."""
        if module in self.stacks:
            inside = [f"{name}{WEIGHT}" for name in self.stacks[module][0]]
        else:
            inside = list(self.steps[module].core)
        return sum(self.shapes[name][0] for name in inside), self.shapes[inside[0]][1]


def names_of(model: LlmctlPreTrainedModel, core: bool = False) -> Names:
    """The names of a model's family; with `core`, the core's own."""
    name, _ = write_config(model.config)
    family = None if core else FAMILIES.get(name)
    rules = family.rules(model.config.spec) if family else ()
    named = {_WRAPPED.sub("", name): module for name, module in model.named_modules()}
    modules = {
        name: module
        for name, module in named.items()
        if isinstance(module, nn.Linear | nn.Embedding | Router) and not _OF_PEFT.search(name)
    }
    steps = {}
    for step in from_core([f"{name}{WEIGHT}" for name in modules], rules):
        (disk,) = step.disk
        steps[disk.removesuffix(WEIGHT)] = step
    stacks: dict[str, list[tuple[str, ...]]] = {}
    if family and family.stacked_experts:
        stacks = _stacks(modules)
        # files have a matrix for each expert, as transformers' classes had before version 5; routers were renamed too
        for step in list(steps.values()):
            if isinstance(modules[_core_module(step)], Router):
                steps.setdefault(_core_module(step), step)
    shapes = {f"{name}{WEIGHT}": _shape(module) for name, module in modules.items()}
    return Names(steps, stacks, rules, shapes, frozenset(HEADS & modules.keys()))


# modules that PEFT has put around one of the model, and its own
_WRAPPED = re.compile(r"\.(token_adapter\.)?base_layer|\.original_module")
_OF_PEFT = re.compile(r"\.lora_|\.token_adapter|\.modules_to_save")


def _shape(module: nn.Module) -> tuple[int, int]:
    # not the weight's: four bits are packed
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return tuple(module.weight.shape)


def _stacks(modules: Iterable[str]) -> dict[str, list[tuple[str, ...]]]:
    known = set(modules)
    found: dict[str, list[tuple[str, ...]]] = {}
    for place in dict.fromkeys(name.split(".experts.")[0] for name in modules if ".experts." in name):
        for stack, parts in STACKED.items():
            experts: list[tuple[str, ...]] = []
            while f"{place}.experts.{len(experts)}.{parts[0]}" in known:
                experts.append(tuple(f"{place}.experts.{len(experts)}.{part}" for part in parts))
            found[f"{place}.experts.{stack}"] = experts
    return found


def _core_module(step: Step) -> str:
    return step.core[0].removesuffix(WEIGHT)


# --- from the family to the core ----------------------------------------------------------------------

# of the core's modules, the ranks they have
Ranks = Mapping[str, int]


def in_core(adapter: Adapter, names: Names, rslora: bool = False, ranks: Ranks | None = None) -> Adapter:
    """An adapter of the family's modules as one of the core's; all its modules must be in `names`, and fit.

    Args:
        rslora: alpha is divided by the square root of the rank, and not by the rank.
        ranks: those of the parts whose updates were joined by `in_family`; None looks for ranks that a part does
            not use.
    """
    found = Adapter()
    for module, factors in adapter.matrices.items():
        if module in names.stacks:
            each = _of_experts(factors, names.stacks[module])
        else:
            each = [(factors, _split(factors, names.steps[module]))]
        for whole, parts in each:
            found.matrices |= _narrowed(whole, parts, rslora, ranks)
    for module, factors in adapter.tables.items():
        found.tables[_core_module(names.steps[module])] = factors
    for module, value in adapter.rows.items():
        found.rows[_core_module(names.steps[module])] = value
    for ours, theirs in ((found.own, adapter.own), (found.base, adapter.base)):
        for step in to_core(theirs, names.rules):
            ours |= step.load([theirs[name] for name in step.disk])
    return found


def _split(factors: Factors, step: Step) -> dict[str, Factors]:
    """The update of each of the core's matrices that one of the family's is."""
    parts = {name: replace(factors, b=b) for name, b in step.split_rows(factors.b).items()}
    for kind in ("magnitude", "bias"):
        if (whole := getattr(factors, kind)) is not None:
            for name, part in step.split_rows(whole).items():
                setattr(parts[name], kind, part)
    return {name.removesuffix(WEIGHT): part for name, part in parts.items()}


def _of_experts(
    factors: Factors, experts: list[tuple[str, ...]]
) -> Iterator[tuple[Factors, dict[str, Factors]]]:
    """The update of each expert, and of its matrices.

    PEFT has the ranks of an expert together in a [X r, in], and the experts of a rank in b [out, r X].
    """
    a_XRI = factors.a.unflatten(0, (len(experts), -1))
    b_XOR = factors.b.unflatten(1, (-1, len(experts))).permute(2, 0, 1)
    for parts, a, b in zip(experts, a_XRI, b_XOR, strict=True):
        whole = replace(factors, a=a, b=b)
        yield (
            whole,
            {name: replace(whole, b=rows) for name, rows in zip(parts, b.chunk(len(parts)), strict=True)},
        )


def _narrowed(
    whole: Factors, parts: dict[str, Factors], rslora: bool, ranks: Ranks | None
) -> dict[str, Factors]:
    """The updates of the parts of a matrix, each without the ranks that only other parts use."""
    if len(parts) == 1 or whole.magnitude is not None:
        return parts
    if ranks is not None:
        widths = [ranks.get(name, 0) for name in parts]
        if sum(widths) != whole.r:
            return parts
        starts = [sum(widths[:at]) for at in range(len(widths))]
        used = [torch.arange(start, start + width) for start, width in zip(starts, widths, strict=True)]
    else:
        used = [part.b.any(0).nonzero().squeeze(1) for part in parts.values()]
    found = {}
    for (name, part), kept in zip(parts.items(), used, strict=True):
        if kept.numel():
            alpha = _alpha(part.alpha, whole.r, kept.numel(), rslora)
            found[name] = replace(part, a=part.a[kept], b=part.b[:, kept], alpha=alpha)
        elif part.bias is not None or (ranks is None and not whole.b.any()):
            found[name] = part
    return found


def _alpha(alpha: float, before: int, after: int, rslora: bool) -> float:
    """The alpha that scales an update as much after its rank has changed."""
    return alpha * math.sqrt(after / before) if rslora else alpha * after / before


# --- from the core to the family ----------------------------------------------------------------------


def in_family(adapter: Adapter, names: Names) -> Adapter:
    """A plain LoRA adapter of the core's modules as one of the family's; the inverse of `in_core`."""
    left = dict(adapter.matrices)
    found = Adapter(own=to_disk(adapter.own, names.rules), base=to_disk(adapter.base, names.rules))
    for stack, experts in names.stacks.items():
        inside = [name for parts in experts for name in parts]
        if any(name in left for name in inside):
            whole = [_joined([left.pop(name, None) for name in parts], parts, names) for parts in experts]
            a = torch.cat([each[0].a for each in whole])
            b = torch.stack([torch.cat(blocks) for _, blocks in whole], -1).flatten(1)
            found.matrices[stack] = Factors(a, b, whole[0][0].alpha)
    for module, step in names.steps.items():
        inside = [name.removesuffix(WEIGHT) for name in step.core]
        if any(name in left for name in inside):
            factors, blocks = _joined([left.pop(name, None) for name in inside], inside, names)
            found.matrices[module] = replace(factors, b=step.rule.join_rows(blocks))
    modules = {_core_module(step): module for module, step in names.steps.items()}
    found.tables = {modules[name]: factors for name, factors in adapter.tables.items()}
    found.rows = {modules[name]: rows for name, rows in adapter.rows.items()}
    return found


def _joined(
    parts: Sequence[Factors | None], inside: Sequence[str], names: Names
) -> tuple[Factors, list[Tensor]]:
    """The a of one update that is those of several matrices, and the rows of b for each of these; None is not adapted."""
    present = [part for part in parts if part is not None]
    first, r = present[0], sum(part.r for part in present)
    blocks, start = [], 0
    for part, name in zip(parts, inside, strict=True):
        b = first.b.new_zeros(names.shapes[f"{name}{WEIGHT}"][0], r)
        if part is not None:
            b[:, start : start + part.r] = part.b
            start += part.r
        blocks.append(b)
    a = torch.cat([part.a for part in present])
    return replace(first, a=a, b=torch.cat(blocks), alpha=first.alpha * r / first.r), blocks
