"""Whether an adapter is whole and belongs to its base: modules, ranks and shapes, as its config says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.errors import UserError
from llmctl.model.adapter_file import ADAPTER_CONFIG, EMBEDDINGS, HEAD, PREFIX, Adapter, misfit
from llmctl.model.adapter_names import STACKED, WEIGHT, Names

if TYPE_CHECKING:
    from peft import LoraConfig

_EXPERT = re.compile(r".*\.experts\.\d+\.[^.]+")


def named_parameters_of(adapter: Adapter, settings: LoraConfig, names: Names) -> Adapter:
    """The adapter with stacks of experts under the names of their parameters.

    PEFT names them by their depth: the module of the experts is wrapped once for each parameter, and the first is innermost.
    """
    found = replace(adapter, matrices=dict(adapter.matrices))
    for place in dict.fromkeys(stack.rpartition(".")[0] for stack in names.stacks):
        inside = [f"{place}.{stack}" for stack in STACKED]
        targeted = [stack for stack in inside if _is_parameter(stack, settings)]
        for depth, stack in enumerate(reversed(targeted)):
            factors = found.matrices.pop(place + ".base_layer" * depth, None)
            if factors is not None:
                found.matrices[stack] = factors
    return found


def with_depths(adapter: Adapter, names: Names) -> Adapter:
    """The inverse of `named_parameters_of`."""
    found = replace(adapter, matrices=dict(adapter.matrices))
    for place in dict.fromkeys(stack.rpartition(".")[0] for stack in names.stacks):
        stacks = [f"{place}.{stack}" for stack in STACKED if f"{place}.{stack}" in adapter.matrices]
        for depth, stack in enumerate(reversed(stacks)):
            found.matrices[place + ".base_layer" * depth] = found.matrices.pop(stack)
    return found


def check_fit(adapter: Adapter, settings: LoraConfig, names: Names, folder: Path) -> None:
    """Set the alpha of every update, and raise UserError where an adapter is not what its config says, for this base."""
    present = {**adapter.matrices, **adapter.tables}
    wanted = set(_targets(adapter, settings, names))
    known = names.steps.keys() | names.stacks.keys()
    for module in sorted(present.keys() | adapter.rows.keys()):
        if module not in known:
            raise misfit(folder, f"unexpected: {_tensor(module, adapter)}; the base has no {module}")
    for module in sorted(wanted - present.keys()):
        raise misfit(folder, f"missing: {PREFIX}{module}.{_first(module)}")
    for module in sorted(present.keys() - wanted):
        raise misfit(folder, f"unexpected: {_tensor(module, adapter)}, which target_modules does not name")
    for module, factors in present.items():
        key = f"{module}{WEIGHT}" if _is_parameter(f"{module}{WEIGHT}", settings) else module
        r = _pattern(settings.rank_pattern, key, settings.r)
        factors.alpha = _pattern(settings.alpha_pattern, key, settings.lora_alpha)
        _check_shapes(module, adapter, r, names, folder)
    _check_rows(adapter, settings, names, folder)


def _targets(adapter: Adapter, settings: LoraConfig, names: Names) -> Iterator[str]:
    """The modules that the config's fields choose, by PEFT's own rules."""
    from peft.tuners.tuners_utils import check_target_module_exists

    before_5 = any(_EXPERT.fullmatch(module) for module in adapter.matrices)
    every_linear = (
        isinstance(settings.target_modules, str) and settings.target_modules.lower() == "all-linear"
    )
    for module, step in names.steps.items():
        ours = step.core[0].removesuffix(WEIGHT)
        is_router = bool(names.stacks) and ours.endswith(".gate")
        as_parameter = _is_parameter(f"{module}{WEIGHT}", settings)
        if is_router and (module == ours) is before_5 and step.disk != step.core:
            continue  # its name in the other version
        if not before_5 and (is_router or (names.stacks and _EXPERT.fullmatch(module))):
            as_module = False  # today's classes have neither as modules
        else:
            as_module = True
        if as_parameter and (as_module or is_router):
            yield module
        if as_parameter or not as_module:
            continue
        if every_linear:
            if module not in names.heads and module.rpartition(".")[2] not in EMBEDDINGS:
                yield module
        elif settings.target_modules and check_target_module_exists(settings, module):
            yield module
    if settings.ensure_weight_tying:
        # the update of the table, written once more
        yield from (head for head in names.heads if head in adapter.matrices and adapter.tables)
    if not before_5:
        yield from (stack for stack in names.stacks if _is_parameter(stack, settings))


def _is_parameter(name: str, settings: LoraConfig) -> bool:
    """Whether `target_parameters` names a parameter."""
    return any(name == end or name.endswith(f".{end}") for end in settings.target_parameters or ())


def _pattern(patterns: dict[str, Any] | None, module: str, otherwise: Any) -> Any:
    from peft.utils.other import get_pattern_key

    return (patterns or {}).get(get_pattern_key((patterns or {}).keys(), module), otherwise)


def _check_shapes(module: str, adapter: Adapter, r: int, names: Names, folder: Path) -> None:
    outputs, inputs = names.shape(module)
    if module in adapter.tables:
        factors, ends = adapter.tables[module], ("lora_embedding_A", "lora_embedding_B")
        wanted = {"a": (r, outputs), "b": (inputs, r)}  # a table has a row for each input
    else:
        factors, ends = adapter.matrices[module], ("lora_A.weight", "lora_B.weight")
        count = len(names.stacks.get(module, [()]))
        wanted = {"a": (r * count, inputs), "b": (outputs, r * count)}
    for (half, shape), end in zip(wanted.items(), ends, strict=True):
        found = getattr(factors, half).shape
        if tuple(found) != shape:
            raise misfit(
                folder,
                f"{PREFIX}{module}.{end} has shape {list(found)}, but this base and r ask for {list(shape)}",
            )
    for name in ("magnitude", "bias"):
        vector = getattr(factors, name)
        if vector is not None and module not in adapter.tables and vector.numel() != outputs:
            raise misfit(
                folder,
                f"the {name} of {module} has {vector.numel()} entries, but the layer has {outputs} outputs",
            )


def _check_rows(adapter: Adapter, settings: LoraConfig, names: Names, folder: Path) -> None:
    named = settings.trainable_token_indices
    if named is not None:
        embedding = next(name for name in names.steps if name.rpartition(".")[2] in EMBEDDINGS)
        ends = [embedding] if not isinstance(named, dict) else list(named)
        if not any(module == end or module.endswith(f".{end}") for module in adapter.rows for end in ends):
            raise misfit(folder, f"missing: {PREFIX}{embedding}.{_ROWS}")
    for module, (tokens, rows) in adapter.rows.items():
        vocabulary, width = names.shape(module)
        if tuple(rows.shape) != (len(tokens), width):
            raise misfit(
                folder,
                f"{PREFIX}{module}.{_ROWS} has shape {list(rows.shape)}, "
                f"but trainable_token_indices and this base ask for {[len(tokens), width]}",
            )
        if tokens and max(tokens) >= vocabulary:
            raise misfit(folder, f"token {max(tokens)} is trained, but {module} has {vocabulary} rows")


_ROWS = "token_adapter.trainable_tokens_delta"


def _first(module: str) -> str:
    return "lora_embedding_A" if module.rpartition(".")[2] in EMBEDDINGS else "lora_A.weight"


def _tensor(module: str, adapter: Adapter) -> str:
    return f"{PREFIX}{module}.{_ROWS if module in adapter.rows else _first(module)}"


# --- the vocabulary -------------------------------------------------------------------------------------


def vocabulary_rows(said: dict[str, int | list[int]], rows: int) -> int:
    """Rows of the base's tables as an adapter needs them, `table_rows` being `said`, where the base has `rows`."""
    sizes = [value for value in said.values() if isinstance(value, int)]
    if sizes:
        return max(sizes)
    return max(
        rows, *(max(tokens, default=-1) + 1 for tokens in said.values() if isinstance(tokens, list)), 0
    )


def refuse_missing_rows(
    said: dict[str, int | list[int]],
    settings: dict[str, Any],
    before: int,
    rows: int,
    tied: bool,
    folder: Path,
) -> None:
    """Raise UserError if a table is to have rows that neither the base nor the adapter has."""
    whole = settings.get("modules_to_save") or ()
    together = tied and (settings.get("ensure_weight_tying") or not _names_one(whole, said))
    for table, other in ((EMBEDDINGS[0], HEAD), (HEAD, EMBEDDINGS[0])):
        held = said.get(table, said.get(other, []) if together else [])
        missing = set() if isinstance(held, int) else set(range(before, rows)) - set(held)
        if missing:
            raise UserError(
                f"{folder}: the adapter needs {rows:,} entries of the vocabulary, its base has {before:,}, "
                f"and {table} has no row for token {min(missing)} in either",
                "save the adapter again with PEFT's save_pretrained(..., save_embedding_layers=True)",
            )
        if isinstance(held, int) and held != rows:
            raise UserError(
                f"{folder}: {table} has {held:,} rows in the adapter, and the other table {rows:,}",
                f"the two belong to one vocabulary; train again with both in modules_to_save of {ADAPTER_CONFIG}",
            )


def _names_one(whole: Iterable[str], said: dict[str, int | list[int]]) -> bool:
    """Whether one of two tied tables is trained apart from the other."""
    return any(name.rpartition(".")[2] in (*EMBEDDINGS, HEAD) for name in whole) and len(said) == 1
