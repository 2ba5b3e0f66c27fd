"""Curves with their intervals, for pages and for plots."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

MAX_POINTS = 1000  # of a curve. Longer ones are thinned
# colors that stand out on white and on black
BLUE, ORANGE, GREEN, RED, VIOLET, GRAY = "#3d85c6", "#e08a3c", "#4c9f70", "#d9534f", "#8e7cc3", "#8a919c"
CYCLE = (BLUE, ORANGE, GREEN, VIOLET, RED, GRAY, "#c9a227", "#48a9a6")


@dataclass(frozen=True)
class Curve:
    """One curve, with a band between `low` and `high` if they are given. All lists have the same length."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    color: str = BLUE
    markers: bool = False


def thinned(curve: Curve) -> Curve:
    """The curve with at most MAX_POINTS points, evenly chosen. The last point stays."""
    step = -(-len(curve.x) // MAX_POINTS)
    if step <= 1:
        return curve
    places = range((len(curve.x) - 1) % step, len(curve.x), step)

    def chosen(values: Sequence | None) -> list | None:
        return None if values is None else [values[place] for place in places]

    lists = {name: chosen(getattr(curve, name)) for name in ("x", "y", "low", "high")}
    return replace(curve, **lists)


def steady_range(curves: Sequence[Curve], least: float = 0.1) -> tuple[float, float] | None:
    """Ends of a y axis that does not magnify noise. None without values.

    The axis spans at least half of the largest magnitude, and at least `least`. It has negative numbers only for
    negative values.

    >>> steady_range([Curve("return", [1, 2], [10.0, 10.5])])
    (7.625, 12.875)
    """
    values = [value for curve in curves for value in (*curve.y, *(curve.low or ()), *(curve.high or ()))]
    values = [value for value in values if value is not None]
    if not values:
        return None
    low, high = min(values), max(values)
    span = max(1.1 * (high - low), 0.5 * max(abs(low), abs(high)), least) or 1.0
    start = (low + high - span) / 2
    start = 0.0 if start < 0 <= low else start
    return round(start, 6), round(start + span, 6)


def normal_interval(mean: float, deviation: float | None, count: float) -> tuple[float | None, float | None]:
    """The 95 % interval of a mean over `count` values with this standard deviation, or two None without one."""
    if deviation is None or count < 2:
        return None, None
    half = 1.96 * deviation / math.sqrt(count)
    return mean - half, mean + half
