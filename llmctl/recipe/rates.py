"""Peak learning rates where a recipe says `auto`: by stage and method, and higher for small models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

# Rates for models of a billion parameters and more. An adapter takes about ten times the rate of full training
# (Schulman et al. 2025, "LoRA Without Regret").
RATES: dict[str, dict[str, float]] = {
    "sft": {"lora": 2e-4, "qlora": 2e-4, "full": 2e-5},
    "reward": {"lora": 1e-4, "qlora": 1e-4, "full": 1e-5},
    "dpo": {"lora": 5e-6, "qlora": 5e-6, "full": 1e-6},
}
# Parameters of the model at least -> factor; measured, see docs/sft.md.
FACTORS: tuple[tuple[int, float], ...] = ((10**9, 1.0), (10**8, 2.5), (10**7, 5.0), (0, 10.0))


def chosen_rate(stage: str, method: str, parameters: int) -> float:
    """The rate that `auto` stands for.

    Args:
        parameters: of the whole model, trained or not.
    """
    factor = next(factor for least, factor in FACTORS if parameters >= least)
    return float(f"{RATES[stage][method] * factor:.3g}")


def shown(rate: float) -> str:
    """A rate as people write it: 2e-4."""
    digits, _, power = f"{rate:.4e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def _rate(value: Any) -> Any:
    """One sentence for both choices, where pydantic would tell of each; `null` of older recipes is auto."""
    if value is None or value == "auto":
        return "auto"
    if type(value) in (int, float):
        return float(value)
    raise ValueError(f"`{value}` is neither a number nor auto")


Rate = Annotated[Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"], BeforeValidator(_rate)]
