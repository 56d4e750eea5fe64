"""`llmctl quantize`: weights in a few bits, with a receipt measured on what was written to disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from llmctl.data.batches import TooLittle, eval_batches
from llmctl.errors import UserError
from llmctl.files import read_json, write_atomic
from llmctl.kernels.device import pick_device
from llmctl.kernels.quantized import Quantized
from llmctl.kernels.threads import use_threads
from llmctl.locate import locate
from llmctl.model import LlmctlForCausalLM, leaves
from llmctl.model.adapters import is_adapter
from llmctl.model.checkpoint import FILES, refuse_reshaped, save_quantized
from llmctl.model.compressed import Scheme, scheme_in
from llmctl.model.open import open_config, open_folded, stored_dtype
from llmctl.quantize.absmax import absmax
from llmctl.quantize.calibrate import quantize_blocks, refuse_not_finite
from llmctl.quantize.gptq import Gptq
from llmctl.recipe.load import dump_recipe
from llmctl.recipe.quantize import QuantizeRecipe, QuantizeSection
from llmctl.recipe.tune import SftData
from llmctl.runs import Run, RunResult, accept_refused, check_out, default_out, refuse_refused, run_of
from llmctl.stages.compare import compared_length
from llmctl.stages.finish import install
from llmctl.stages.gate import kept_hint, out_of_bounds, refuse_drift, say_accepted
from llmctl.stages.receipt import Receipt, card
from llmctl.stages.rows import TalkRows, read_rows, talk_rows
from llmctl.stages.text import fitting_tokenizer, pad_id_of, parent
from llmctl.talk import Talk
from llmctl.tokenizer.choose import OWN, choose_template
from llmctl.tokenizer.load import fingerprint
from llmctl.tokenizer.template import stop_ids, template_hash

STAGE = "quantize"
HELD_OUT = 0.25  # of the calibration documents, to measure on where nothing else is named
CALIBRATION_BATCH = 8  # rows in a forward pass
INT8_TOKENS = 4096  # of calibration text: KL of SmolLM2 is 0.0019 with these, 0.0016 with four times as many
CARD_FILE = "README.md"


def run(recipe: QuantizeRecipe, talk: Talk, accept: bool = False) -> RunResult:
    """Quantize, write, read back and measure. A model that is out of the bounds is kept, but refused.

    Args:
        accept: keep what is refused as if it were not; a folder that holds such a result is not made again.

    Raises:
        UserError: MODEL cannot be opened, is quantized already, is of a family that is not written so, or has
            no layer that can be; no data, or too little of it; activations that are not finite.
        CheckFailed: the quantized model is further from the original than `compare.*` allows, or what was
            read back is not what was to be written.
    """
    assert recipe.base is not None
    recipe = recipe.resolved()
    folder = locate(recipe.base, FILES)
    _refuse_quantized(folder)
    config = open_config(folder)
    if config.spec.stack == "decoder":  # what is no language model is refused as such when it is opened
        refuse_reshaped(config)
    out = Path(recipe.out) if recipe.out else default_out(STAGE)
    text = dump_recipe(recipe.model_copy(update={"out": None}))
    parents = [parent("model", recipe.base)]
    if accept and (known := accept_refused(STAGE, out, text, parents=parents)) is not None:
        return RunResult(out, known | {"answers": []})
    check_out(out, resumable=False)
    _refuse_no_data(recipe)
    device, tokenizer = pick_device(recipe.device), fitting_tokenizer(recipe.base)
    use_threads(recipe.quantize.threads, "quantize.threads", device, talk)
    model = open_folded(folder, torch.float32, device)
    choice = choose_template(tokenizer, OWN)
    if choice.said:
        talk.say(choice.said)
    chosen = _chosen(model, recipe.quantize)
    by, held = _rows(recipe, tokenizer, model.config.max_position_embeddings, talk)
    if recipe.quantize.method == "gptq":
        _refuse_short(model, by, recipe.quantize, chosen)
    pad = pad_id_of(tokenizer)
    refuse_not_finite(model, next(eval_batches(held.laid, batch_size=recipe.compare.batch_size, pad_id=pad)))
    with Run.start(STAGE, out, text, **_manifest(recipe.base, folder, tokenizer, by, held, recipe)) as opened:
        matrices = METHODS[recipe.quantize.method](model, by, recipe.quantize, pad, talk)
        found: dict[str, Any] = {}
        job = Receipt(folder, recipe, held, tokenizer, talk)
        install(partial(_write_and_measure, job, model, matrices, found), out)
        answers, failed = found.pop("answers"), found.pop("failed")
        opened.finish(found, failed, accept)
    say_accepted(failed, accept, talk)
    refuse_drift([] if accept else failed, folder, "the quantized model", kept_hint(out))
    return RunResult(out, found | {"answers": answers})


def _refuse_quantized(folder: Path) -> None:
    refuse_refused(folder)
    if not is_adapter(folder) and scheme_in(read_json(folder / "config.json"), str(folder / "config.json")):
        raise UserError(
            f"{folder}: is quantized already; rounding it again would only lose more",
            "quantize the model it was made from",
        )


def _chosen(model: LlmctlForCausalLM, settings: QuantizeSection) -> list[str]:
    """The leaves that are quantized. Raises UserError if there is none, or a weight is not finite."""
    inside = [leaf for leaf in leaves(model) if leaf.kind == "linear"]
    for leaf in inside:
        if not bool(leaf.module.weight.isfinite().all()):
            raise UserError(
                f"{leaf.name}: the weights are not finite", "`llmctl eval` the model; it cannot be any good"
            )
    chosen = [leaf.name for leaf in inside if leaf.shape[1] % (settings.group or 1) == 0]
    if not chosen:
        widths = sorted({leaf.shape[1] for leaf in inside})
        shown = ", ".join(f"{width:,}" for width in widths)
        how = "is larger than every layer" if (settings.group or 0) > widths[-1] else "divides no layer"
        raise UserError(
            f"quantize.group_size: {settings.group} {how} (inputs: {shown})",
            "choose a smaller one, such as 32, or group_size=channel",
        )
    return chosen


def _refuse_no_data(recipe: QuantizeRecipe) -> None:
    if recipe.quantize.method == "gptq" and not recipe.quantize.calibration:
        raise UserError("gptq needs text to quantize by", "name some with --calibration FILE")
    if not recipe.quantize.calibration and not recipe.compare.data:
        raise UserError(
            "no data to measure the receipt on", "name some with --eval-data FILE or --calibration FILE"
        )


def _rows(
    recipe: QuantizeRecipe, tokenizer: PreTrainedTokenizerFast, longest: int, talk: Talk
) -> tuple[TalkRows | None, TalkRows]:
    """Rows to quantize by, if any are named, and rows to measure on, disjoint from them."""
    settings, receipt = recipe.quantize, recipe.compare
    length = compared_length(receipt, longest)
    data = SftData(
        train=settings.calibration,
        eval=receipt.data,
        eval_fraction=HELD_OUT,
        text_field=receipt.text_field,
        overlong="truncate",
    )
    if not settings.calibration:
        return None, read_rows(receipt.data, data, tokenizer, length, talk, measured=True)
    try:
        by, held = talk_rows(data, tokenizer, length, 0, talk, measured=True)
    except TooLittle as error:
        raise UserError(
            error.message, "give more text, or name some to measure on with --eval-data"
        ) from None
    assert held is not None  # the fraction is not 0
    return by, held


def _refuse_short(
    model: LlmctlForCausalLM, by: TalkRows | None, settings: QuantizeSection, chosen: list[str]
) -> None:
    """With fewer tokens than a layer has inputs there are directions in which GPTQ would know of no error."""
    assert by is not None
    widest = max(leaf.shape[1] for leaf in leaves(model) if leaf.name in chosen)
    tokens = _tokens(by, settings)[-1]
    if tokens < widest:
        raise UserError(
            f"the calibration text has {tokens:,} tokens, but the widest layer has {widest:,} inputs",
            "give more text; a hundred times as many tokens is usual",
        )


def _tokens(by: TalkRows, settings: QuantizeSection) -> np.ndarray:
    """Tokens in the first row, in the first two, and so on to the last that is calibrated on; int64 [rows]."""
    used = by.laid.rows.first(settings.calibration_rows)
    return by.laid.pieces.length[used.pieces].cumsum()[used.offsets[1:] - 1]


def _manifest(
    where: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    by: TalkRows | None,
    held: TalkRows,
    recipe: QuantizeRecipe,
) -> dict[str, Any]:
    settings = recipe.quantize
    data = {"eval": held.manifest(recipe.compare.data or settings.calibration)}
    if by is not None:
        data["train"] = by.manifest(settings.calibration)
    return {
        "device": recipe.device,
        "parents": [parent("model", where)],
        "data": data,
        "tokenizer": fingerprint(tokenizer),
        "template": template_hash(tokenizer),
        "stop_ids": stop_ids(tokenizer),
        "never_seen": (run_of(folder) or {}).get("never_seen", []),
    }


def _calibration(by: TalkRows, settings: QuantizeSection, pad: int) -> list[dict[str, torch.Tensor]]:
    return list(
        eval_batches(by.laid, batch_size=CALIBRATION_BATCH, pad_id=pad, max_rows=settings.calibration_rows)
    )


def _int8(
    model: LlmctlForCausalLM, by: TalkRows | None, settings: QuantizeSection, pad: int, talk: Talk
) -> dict[str, Quantized]:
    """By GPTQ on as much of the calibration text as 8 bits need; without text, every weight to the nearest code."""
    assert settings.bits is not None
    inside = [leaf for leaf in leaves(model) if leaf.kind == "linear"]
    if by is not None:
        tokens, widest = _tokens(by, settings), max(leaf.shape[1] for leaf in inside)
        if tokens[-1] >= widest:
            short = int((tokens < max(INT8_TOKENS, 2 * widest)).sum())  # the row after these makes it enough
            rows = min(short + 1, len(tokens))
            return _gptq(model, by, settings.model_copy(update={"calibration_rows": rows}), pad, talk)
        talk.say(
            f"the calibration text has {tokens[-1]:,} tokens, fewer than the {widest:,} inputs of the widest layer; "
            "each weight is rounded to the nearest code"
        )
    found = {}
    with talk.bar("quantizing", len(inside), "layers") as bar:
        for leaf in inside:
            weight = leaf.module.weight
            found[leaf.name] = absmax(weight.detach(), settings.bits, settings.group)
            weight.data.copy_(found[leaf.name].dequantize())
            bar.advance(1)
    return found


def _gptq(
    model: LlmctlForCausalLM, by: TalkRows | None, settings: QuantizeSection, pad: int, talk: Talk
) -> dict[str, Quantized]:
    assert by is not None and settings.bits is not None
    how = Gptq(settings.bits, settings.group, settings.symmetric, settings.act_order, settings.damping)
    count = sum(leaf.kind == "linear" for leaf in leaves(model))
    with talk.bar("quantizing", count, "layers") as bar:

        def tell(name: str, figures: Mapping[str, float]) -> None:
            bar.advance(1, error=f"{figures['error']:.2e}")

        return quantize_blocks(model, _calibration(by, settings, pad), how, tell)


def _write_and_measure(
    job: Receipt,
    model: LlmctlForCausalLM,
    matrices: Mapping[str, Quantized],
    found: dict[str, Any],
    target: Path,
) -> None:
    """`model` is what is to be written: its weights are what the codes stand for."""
    settings, bounds = job.recipe.quantize, job.recipe.compare
    assert settings.bits is not None and bounds.min_top1 is not None and bounds.max_kl is not None
    scheme = Scheme(settings.bits, settings.group, settings.symmetric)
    model.config.eos_token_id = model.generation_config.eos_token_id
    intended = [parameter.data for parameter in model.parameters()]
    save_quantized(model.to("cpu", stored_dtype(job.folder)), matrices, scheme, target)
    for parameter, value in zip(model.parameters(), intended, strict=True):
        parameter.data = value  # as before it was rounded for the file
    job.tokenizer.save_pretrained(target)
    found |= {"method": settings.method, "bits": settings.bits, "group_size": settings.group_size}
    found |= job.sizes(model, matrices, target) | job.measured(model, target)
    found["failed"] += out_of_bounds(found, bounds.min_top1, bounds.max_kl)
    write_atomic(target / CARD_FILE, card(job.recipe, found))


Quantizer = Callable[[LlmctlForCausalLM, TalkRows | None, QuantizeSection, int, Talk], dict[str, Quantized]]
METHODS: dict[str, Quantizer] = {"int8": _int8, "gptq": _gptq}
