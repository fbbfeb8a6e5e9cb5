"""Growth laws: straight lines through what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import linear_regression, mean


@dataclass(frozen=True)
class Line:
    """Least squares of y on x.

    Attributes:
        slope, intercept: y = intercept + slope x.
        r_squared: share of y's variance that the line explains; None where y does not vary, or two points fix the line.
    """

    slope: float
    intercept: float
    r_squared: float | None


def fit(x: Sequence[float], y: Sequence[float]) -> Line | None:
    """The line through the points (x, y); None for fewer than two different x."""
    if len(set(x)) < 2:
        return None
    slope, intercept = linear_regression(x, y)
    middle = mean(y)
    total = sum((value - middle) ** 2 for value in y)
    left = sum((value - intercept - slope * at) ** 2 for at, value in zip(x, y, strict=True))
    return Line(slope, intercept, None if total == 0 or len(x) == 2 else 1 - left / total)


def spread(values: Sequence[float]) -> float:
    """How far the largest is above the smallest: max / min - 1."""
    return max(values) / min(values) - 1
