"""What quantization is told."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from llmctl.recipe.base import Section, StageRecipe, about
from llmctl.recipe.ranges import MOST_NATS, MOST_STEPS, MOST_TOKENS
from llmctl.recipe.train import Device, Threads
from llmctl.recipe.tune import CompareRows

QuantizeMethod = Literal["int8", "gptq"]
Bits = Literal[8, 4, 3]

# what the recipe leaves open: bits by method, the group by bits
BITS: dict[str, int] = {"int8": 8, "gptq": 4}
GROUPS: dict[int, int | Literal["channel"]] = {8: "channel", 4: 128, 3: 128}
# least agreement at decided tokens and most divergence that pass, by bits, where the recipe sets none. They
# stop what is useless: SmolLM2-135M, as small as real models come, has KL 0.0025 at 8 bits, 0.12 to 0.17 at 4
# (groups of 64 and 128). Faults are found by holding the file against what was to be written, which is sharper.
BOUNDS: dict[int, tuple[float, float]] = {8: (0.97, 0.01), 4: (0.75, 0.3), 3: (0.5, 1.5)}


def _group(value: Any) -> Any:
    """One sentence for both choices, where pydantic would tell of each."""
    if value is None or value == "channel" or (type(value) is int and 0 < value <= MOST_TOKENS):
        return value
    raise ValueError(f"`{value}` is neither a number of weights nor channel")


class QuantizeSection(Section):
    """`quantize.*`: how weights become integers."""

    method: QuantizeMethod = about("quantize.method", "int8")
    bits: Bits | None = about("quantize.bits", None)
    group_size: Annotated[
        Annotated[int, Field(gt=0, le=MOST_TOKENS)] | Literal["channel"] | None, BeforeValidator(_group)
    ] = about("quantize.group_size", None)
    symmetric: bool = about("quantize.symmetric", True)
    calibration: list[str] = about("quantize.calibration", [])
    calibration_rows: int = about("quantize.calibration_rows", 128, ge=1, le=MOST_STEPS)
    act_order: bool = about("quantize.act_order", True)
    damping: float = about("quantize.damping", 0.01, gt=0, le=10)
    threads: Threads = about("quantize.threads", "auto")

    @model_validator(mode="after")
    def settings_belong_to_the_method(self) -> Self:
        if self.method == "gptq":
            return self
        if self.bits not in (None, 8):
            raise ValueError(f"method int8 has 8 bits, not {self.bits}; `method: gptq` has 8, 4 or 3")
        if self.group_size not in (None, "channel"):
            raise ValueError("method int8 has one scale a channel; `group_size` belongs to `method: gptq`")
        plain = QuantizeSection.model_fields
        for name in ("symmetric", "act_order", "damping"):
            if getattr(self, name) != plain[name].default:
                raise ValueError(f"`{name}` belongs to `method: gptq`")
        return self

    @property
    def group(self) -> int | None:
        """Weights that share a scale; None: those of an output channel."""
        size = self.resolved().group_size
        return None if size == "channel" else size

    def resolved(self) -> QuantizeSection:
        """A copy with bits and group size filled in."""
        bits = self.bits or BITS[self.method]
        size = self.group_size if self.group_size is not None else GROUPS[bits]
        return self.model_copy(update={"bits": bits, "group_size": size})


class ReceiptSection(CompareRows):
    """`compare.*` of a quantization: the model against what became of it, on the path that chat runs."""

    min_top1: float | None = about("compare.min_top1", None, ge=0, le=1)
    max_kl: float | None = about("compare.max_kl", None, ge=0, le=MOST_NATS)
    speed_tokens: int = about("compare.speed_tokens", 64, ge=8, le=MOST_TOKENS)


class QuantizeRecipe(StageRecipe):
    """`llmctl quantize MODEL`."""

    stage: Literal["quantize"] = about("stage", "quantize")
    out: str | None = about("out", None)
    device: Device = about("device", "auto")
    base: str | None = about("base", None)
    quantize: QuantizeSection = about("quantize", QuantizeSection())
    compare: ReceiptSection = about("compare", ReceiptSection())

    def resolved(self) -> QuantizeRecipe:
        """A copy with bits, group size and bounds filled in."""
        settings = self.quantize.resolved()
        assert settings.bits is not None
        top1, kl = BOUNDS[settings.bits]
        bounds = {
            "min_top1": top1 if self.compare.min_top1 is None else self.compare.min_top1,
            "max_kl": kl if self.compare.max_kl is None else self.compare.max_kl,
        }
        return self.model_copy(
            update={"quantize": settings, "compare": self.compare.model_copy(update=bounds)}
        )
