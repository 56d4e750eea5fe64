"""Error bars of shares."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959963984540054  # standard normal quantile of a two-sided 95 % interval


def share_interval(right: float, of: int) -> tuple[float, float]:
    """95 % interval of a share `right / of` (Wilson 1927), which holds for shares near 0 and 1 too.

    Raises ValueError if there is nothing to count.
    """
    if of < 1:
        raise ValueError("a share of nothing")
    share, spread = right / of, Z95 * Z95 / of
    middle = share + spread / 2
    reach = Z95 * math.sqrt(share * (1 - share) / of + spread / (4 * of))
    low, high = (middle - reach) / (1 + spread), (middle + reach) / (1 + spread)
    # none and all are bounds of their own, which rounding would miss by a hair
    return 0.0 if right == 0 else low, 1.0 if right == of else high


def paired_interval(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float, float]:
    """How much the share of True changed over the same cases, and the change's 95 % interval.

    Adjusted Wald interval for paired shares: one more case in each discordant cell (Bonett and Price
    2012), so it holds when few cases differ.

    Raises ValueError if the two have different lengths or are empty.
    """
    if len(before) != len(after) or not before:
        raise ValueError("pairs of cases are compared")
    count = len(before)
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    reach = Z95 * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    change = (gained - lost) / count
    return change, up - down - reach, up - down + reach
