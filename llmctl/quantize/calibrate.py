"""A whole model by GPTQ, block after block, each leaf on what the quantized part before it computes.

Shape legend: B rows, T tokens, E hidden width, N real tokens, I inputs of a leaf, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmctl.errors import UserError
from llmctl.kernels.quantized import Quantized
from llmctl.kernels.threads import Work, timed
from llmctl.model import Leaf, LlmctlForCausalLM, leaves
from llmctl.model.context import context_of
from llmctl.quantize.absmax import absmax
from llmctl.quantize.gptq import Gptq, Singular, gptq

Tell = Callable[[str, Mapping[str, float]], None]


@torch.no_grad()
def quantize_blocks(
    model: LlmctlForCausalLM,
    batches: Iterable[Mapping[str, Tensor]],
    settings: Gptq,
    tell: Tell | None = None,
) -> dict[str, Quantized]:
    """Quantize every leaf but the head in place: its weights become what the codes stand for.

    Leaves that read the same tensor are quantized together, in the order in which a block calls them, and
    each sees inputs computed with all that were quantized before. A leaf whose inputs are no whole groups
    is left as it is. The hidden states of all rows are kept on the CPU in float32.

    Args:
        batches: input_ids, position_ids and attention_mask, [B, T] each, as `data.batches.collate` makes them.
        tell: called after each leaf with its name and `error`, `nearest_error` (||XW^T - XQ^T||² / ||XW^T||²
            on the calibration text, of the codes found and of round to nearest) and `tokens`.

    Returns:
        Name of a leaf -> its codes, on the device of the model, in the order they were made.

    Raises:
        UserError: a weight, or what a layer is given or gives, is not finite; no damping makes a Hessian
            positive definite.
        ValueError: no batches.
    """
    model.eval()
    text = _Text(model, batches)
    found: dict[str, Quantized] = {}
    text.expect_finite("model.embed_tokens")
    blocks = set(model.model.layers)
    for name, block in [(name, module) for name, module in model.named_modules() if module in blocks]:
        for group in text.groups(block, _leaves_in(model, block)):
            whole = [leaf for leaf in group if leaf.shape[1] % (settings.group or 1) == 0]
            if not whole:
                continue
            hessian = text.hessian(block, group[0])
            # of an expert that no calibration token came to, nothing says which rounding is better
            hessian = hessian if bool(hessian.any()) else torch.eye(len(hessian), device=hessian.device)
            for leaf in whole:
                found[leaf.name], figures = _quantize(leaf, hessian, settings)
                if tell is not None:
                    tell(leaf.name, figures | {"tokens": text.tokens})
        text.advance(block)
        text.expect_finite(name)
    return found


@torch.no_grad()
def refuse_not_finite(model: LlmctlForCausalLM, batch: Mapping[str, Tensor]) -> None:
    """Raise UserError with the name of the first leaf that a batch gives a number that is none."""

    def seen(leaf: Leaf, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise _not_finite(leaf.name, "its inputs are not finite")

    with _inputs([leaf for leaf in leaves(model) if leaf.kind == "linear"], seen):
        model.model(batch["input_ids"].to(model.device), position_ids=batch["position_ids"].to(model.device))


@dataclass(frozen=True)
class _Rows:
    """One batch on its way through the model: `hidden` [B, T, E] float32, `real` [B, T]; all on the CPU."""

    hidden: Tensor
    position_ids: Tensor
    real: Tensor


class _Text:
    """The calibration text as it stands before the block that is next."""

    def __init__(self, model: LlmctlForCausalLM, batches: Iterable[Mapping[str, Tensor]]) -> None:
        self._stack = model.model
        weight = self._stack.embed_tokens.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._rows = [
            _Rows(
                self._embedded(batch).float().cpu(),
                batch["position_ids"].cpu(),
                batch["attention_mask"].bool().cpu(),
            )
            for batch in batches
        ]
        self.tokens = sum(int(rows.real.sum()) for rows in self._rows)
        if not self.tokens:
            raise ValueError("no calibration text")

    def _embedded(self, batch: Mapping[str, Tensor]) -> Tensor:
        ids, mask, positions = (
            batch[name].to(self._device) for name in ("input_ids", "attention_mask", "position_ids")
        )
        return self._stack.embed(ids, context_of(ids, mask, positions, 0, True))

    def groups(self, block: nn.Module, inside: list[Leaf]) -> list[list[Leaf]]:
        """The leaves of a block that read the same tensor together, in the order of their calls.

        What the first rows do not come to, experts and their like, is looked for in the others; what none comes
        to is a group of its own at the end.
        """
        found: list[tuple[Tensor, list[Leaf]]] = []
        left = list(inside)

        def seen(leaf: Leaf, x: Tensor) -> None:
            for shared, group in found:
                if shared is x:
                    group.append(leaf)
                    return
            found.append((x, [leaf]))

        for rows in self._rows:
            with _inputs(left, seen):
                self._run(block, rows)
            reached = {leaf.name for _, group in found for leaf in group}
            left = [leaf for leaf in inside if leaf.name not in reached]
            if not left:
                break
        return [*(group for _, group in found), *([leaf] for leaf in left)]

    def hessian(self, block: nn.Module, leaf: Leaf) -> Tensor:
        """2/N · X^T X over what a leaf reads at all real tokens, float32 [I, I].

        Raises UserError if some of it is not finite.
        """
        total = torch.zeros(leaf.shape[1], leaf.shape[1], device=self._device)

        for rows in self._rows:
            real = rows.real.to(self._device)

            def seen(leaf: Leaf, x: Tensor, real: Tensor = real) -> None:
                # an expert is given real tokens only, one after the other
                x_NI = (x[real] if x.dim() == 3 else x).float()
                total.addmm_(x_NI.T, x_NI)
                raise _Enough

            # as far as this leaf: only the same one of other blocks takes as long
            work = Work("calibration", "tokens", leaf.name.rpartition(".")[2])
            with _inputs([leaf], seen), timed(work, rows.real.numel()):
                self._run(block, rows)
        if not total.isfinite().all():
            raise _not_finite(
                leaf.name, "its inputs on the calibration text, or their squares, are not finite"
            )
        return total.mul_(2 / self.tokens)

    def advance(self, block: nn.Module) -> None:
        """Let the text through a block."""
        for index, rows in enumerate(self._rows):
            with timed(Work("calibration", "tokens"), rows.real.numel()):
                out = self._run(block, rows)
            assert out is not None
            self._rows[index] = replace(rows, hidden=out.float().cpu())

    def expect_finite(self, name: str) -> None:
        """Raise UserError, naming the module that gave them, if hidden states of a real token are not finite."""
        if not all(rows.hidden[rows.real].isfinite().all() for rows in self._rows):
            raise _not_finite(name, "its outputs on the calibration text are not finite")

    def _run(self, block: nn.Module, rows: _Rows) -> Tensor | None:
        """What a block gives; None if a hook had seen enough before."""
        x_BTE = rows.hidden.to(self._device, self._dtype)
        real, positions = rows.real.to(self._device), rows.position_ids.to(self._device)
        ctx = context_of(x_BTE, real, positions, 0, True)
        self._stack.prepare(ctx)
        try:
            hidden, _ = block(x_BTE, ctx)
            return hidden
        except _Enough:
            return None


class _Enough(Exception):
    """Raised in a hook to leave a forward pass whose rest nobody needs."""


@contextmanager
def _inputs(watched: list[Leaf], seen: Callable[[Leaf, Tensor], None]) -> Iterator[None]:
    """Call `seen` with every input of these leaves."""

    def watch(leaf: Leaf) -> Any:
        return leaf.module.register_forward_pre_hook(lambda _, inputs: seen(leaf, inputs[0]))

    hooks = [watch(leaf) for leaf in watched]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _leaves_in(model: nn.Module, block: nn.Module) -> list[Leaf]:
    inside = set(block.modules())
    return [leaf for leaf in leaves(model) if leaf.kind == "linear" and leaf.module in inside]


def _quantize(leaf: Leaf, hessian: Tensor, settings: Gptq) -> tuple[Quantized, dict[str, float]]:
    """The codes of a leaf, which takes them in, and the errors they make."""
    parameter: Any = leaf.module.weight
    weight = parameter.detach().float()
    if not weight.isfinite().all():
        raise _not_finite(leaf.name, "its weight is not finite")
    try:
        found = gptq(weight, hessian, settings)
    except Singular as error:
        raise UserError(
            f"{leaf.name}: the Hessian of its inputs is {error}", "give more calibration text"
        ) from None
    figures = {
        "error": output_error(weight, found.dequantize(), hessian),
        "nearest_error": output_error(
            weight, absmax(weight, settings.bits, settings.group).dequantize(), hessian
        ),
    }
    parameter.copy_(found.dequantize())
    return found, figures


def output_error(weight: Tensor, other: Tensor, hessian: Tensor) -> float:
    """||XW^T - XV^T||² / ||XW^T||² for a Hessian of X; 0 where the layer gives nothing but zeros."""

    def energy(matrix: Tensor) -> float:
        return float(((matrix @ hessian) * matrix).sum())

    whole = energy(weight)
    return energy(weight - other) / whole if whole > 0 else 0.0


def _not_finite(name: str, what: str) -> UserError:
    return UserError(
        f"{name}: {what}",
        "the checkpoint is broken, or its numbers are too large even for float32",
    )
