"""Error bars against published examples."""

from __future__ import annotations

import pytest

from llmctl.evaluate.intervals import paired_interval, share_interval


# Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares(right: int, of: int, low: float, high: float) -> None:
    assert share_interval(right, of) == pytest.approx((low, high), abs=5e-5)
    # the share of what is left lies in the mirrored interval
    assert share_interval(of - right, of) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_the_ends_of_a_share() -> None:
    assert share_interval(0, 5)[0] == 0.0 and share_interval(5, 5)[1] == 1.0
    assert all(
        0 <= low < right / 7 < high <= 1 for right in range(1, 7) for low, high in [share_interval(right, 7)]
    )
    with pytest.raises(ValueError, match="a share of nothing"):
        share_interval(0, 0)


def pairs(neither: int, gained: int, lost: int, both: int) -> tuple[list[bool], list[bool]]:
    """Cases before and after, by how many are right in which."""
    before = [False] * (neither + gained) + [True] * (lost + both)
    after = [False] * neither + [True] * gained + [False] * lost + [True] * both
    return before, after


def test_changes_of_a_share() -> None:
    """Bonett's R package statpsych, example of `ci.prop.ps`: 0.44 with the interval 0.2548067 to 0.6251933."""
    change, low, high = paired_interval(*pairs(12, 26, 4, 6))
    assert (low, high) == pytest.approx((0.2548067, 0.6251933), abs=1e-7)
    assert change == pytest.approx(22 / 48)
    # the other way round everything changes its sign
    assert paired_interval(*reversed(pairs(12, 26, 4, 6))) == pytest.approx((-change, -high, -low))


def test_only_cases_that_differ_count() -> None:
    assert paired_interval(*pairs(0, 3, 3, 20))[0] == 0
    change, low, high = paired_interval(*pairs(5, 0, 0, 5))
    assert change == 0 and low == pytest.approx(-high) and 0 < high < 0.3
    assert paired_interval(*pairs(6, 4, 0, 10)) == pytest.approx(paired_interval(*pairs(16, 4, 0, 0)))


def test_what_cannot_be_paired() -> None:
    for before, after in (([True], [True, False]), ([], [])):
        with pytest.raises(ValueError, match="pairs of cases are compared"):
            paired_interval(before, after)
