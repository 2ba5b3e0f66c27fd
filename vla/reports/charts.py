"""Charts of a page, drawn by plotly in the browser.

A chart is a plotly figure as JSON inside the page. The script of base.html draws it in the colors of the reader's light
or dark theme. Names in a chart are text: plotly would read <b> or a link in them, so they are escaped twice.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import plotly.graph_objects as go
from markupsafe import Markup

from vla.reports.curves import BLUE, CYCLE, GRAY, Curve, thinned
from vla.text import MAX_DRAWN, one_line

BAND_OPACITY = 0.18


@dataclass(frozen=True)
class Chart:
    """A chart with its words.

    Args:
        ident: the element's id in the page.
        caption: one sentence that says what good looks like.
        spec: the figure as JSON, safe inside a <script> element.
        height: in pixels.
    """

    ident: str
    title: str
    caption: str
    spec: Markup
    height: int = 230


@dataclass(frozen=True)
class Dots:
    """One success rate per category, with its interval. A category without an interval has None for both ends."""

    name: str
    categories: Sequence[str]
    rates: Sequence[float]
    low: Sequence[float | None] = field(default_factory=tuple)
    high: Sequence[float | None] = field(default_factory=tuple)
    color: str = BLUE
    symbol: str = "circle"


def plain(text: str) -> str:
    """A name for plotly, which reads some HTML. Long names are cut.

    >>> plain("<b>x</b>")
    '&lt;b&gt;x&lt;/b&gt;'
    """
    line = one_line(text)
    return html.escape(line if len(line) <= MAX_DRAWN else f"{line[:MAX_DRAWN]}...")


def spec_of(figure: go.Figure) -> Markup:
    """The figure as JSON that ends no <script> element."""
    drawn = json.loads(figure.to_json())
    drawn["layout"].pop("template", None)  # colors come from the page's style
    text = json.dumps(drawn, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def translucent(color: str) -> str:
    """A color "#rrggbb" for a band.

    >>> translucent("#ff8000")
    'rgba(255,128,0,0.18)'
    """
    red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{BAND_OPACITY})"


def band(curve: Curve) -> go.Scatter:
    """The area between `low` and `high` where both are known."""
    known = [(x, low, high) for x, low, high in zip(curve.x, curve.low, curve.high) if None not in (low, high)]
    x, low, high = zip(*known) if known else ((), (), ())
    look = dict(fill="toself", fillcolor=translucent(curve.color), line=dict(width=0), mode="lines")
    hidden = dict(hoverinfo="skip", showlegend=False, legendgroup=plain(curve.name))
    return go.Scatter(x=[*x, *reversed(x)], y=[*high, *reversed(low)], **look, **hidden)


def intervals_in_words(curve: Curve, percent: bool) -> list[str]:
    """What a point's hover says behind its value: " [40.1, 52.2]", or "" without an interval."""
    if curve.low is None:
        return [""] * len(curve.x)
    scale, places = (100, 1) if percent else (1, 3)
    ends = zip(curve.low, curve.high)
    return ["" if None in pair else f" [{scale * pair[0]:.{places}f}, {scale * pair[1]:.{places}f}]" for pair in ends]


def curves(
    ident: str,
    title: str,
    caption: str,
    lines: Sequence[Curve],
    *,
    x_title: str = "",
    y_range: tuple[float, float] | None = None,
    percent: bool = False,
    limit: float | None = None,
) -> Chart:
    """Curves over training.

    Args:
        y_range: ends of the y axis. None fits it to the curves.
        percent: whether values in [0, 1] are shown in percent.
        limit: a value to mark with a dashed line, such as a threshold.
    """
    figure = go.Figure()
    form = ".1%" if percent else ".4~g"
    for line in map(thinned, lines):
        if line.low is not None:
            figure.add_trace(band(line))
        mode = "lines+markers" if line.markers or len(line.x) == 1 else "lines"
        look = dict(line=dict(color=line.color, width=2), marker=dict(color=line.color, size=7), mode=mode)
        hover = f"%{{y:{form}}}%{{customdata}}<extra>{plain(line.name).replace('%', '&#37;')}</extra>"
        words = intervals_in_words(line, percent)
        group = dict(name=plain(line.name), legendgroup=plain(line.name))
        figure.add_trace(
            go.Scatter(x=list(line.x), y=list(line.y), customdata=words, hovertemplate=hover, **look, **group)
        )
    if limit is not None:
        figure.add_hline(y=limit, line=dict(dash="dot", width=1, color=GRAY))
    figure.update_layout(hovermode="x unified", showlegend=len(lines) > 1)
    figure.update_xaxes(title_text=plain(x_title), nticks=6)
    figure.update_yaxes(range=y_range, tickformat=".0%" if percent else None, nticks=5)
    return Chart(ident, title, caption, spec_of(figure))


def stacked_bars(
    ident: str,
    title: str,
    caption: str,
    x: Sequence[float],
    parts: dict[str, Sequence[float]],
    *,
    x_title: str = "",
    unit: str = "",
) -> Chart:
    """One bar per x, stacked from parts in their order. A part that is 0 everywhere is left out, with its color."""
    figure = go.Figure()
    for (name, values), color in zip(parts.items(), CYCLE):
        if not any(values):
            continue
        hover = f"%{{y:.3~g}} {unit}<extra>{plain(name)}</extra>"
        figure.add_trace(go.Bar(x=list(x), y=list(values), name=plain(name), marker_color=color, hovertemplate=hover))
    figure.update_layout(barmode="stack", bargap=0.15, hovermode="x unified", showlegend=True)
    figure.update_xaxes(title_text=plain(x_title), nticks=8)
    figure.update_yaxes(rangemode="tozero", nticks=5)
    return Chart(ident, title, caption, spec_of(figure))


def dots(ident: str, title: str, caption: str, series: Sequence[Dots]) -> Chart:
    """Success rates in [0, 1] of categories, one below the other, with intervals."""
    figure = go.Figure()
    for one in series:
        errors = None
        if one.low:
            above = [max(0.0, high - rate) for rate, high in zip(one.rates, one.high)]
            below = [max(0.0, rate - low) for rate, low in zip(one.rates, one.low)]
            errors = dict(type="data", symmetric=False, array=above, arrayminus=below, thickness=1.5, width=0)
        names = [plain(name) for name in one.categories]
        look = dict(color=one.color, size=9, symbol=one.symbol)
        hover = f"%{{y}}: %{{x:.1%}}<extra>{plain(one.name).replace('%', '&#37;')}</extra>"
        figure.add_trace(
            go.Scatter(
                x=list(one.rates),
                y=names,
                mode="markers",
                name=plain(one.name),
                error_x=errors,
                marker=look,
                hovertemplate=hover,
            )
        )
    figure.update_layout(hovermode="closest", showlegend=len(series) > 1)
    figure.update_xaxes(range=[-0.02, 1.02], tickformat=".0%")
    figure.update_yaxes(autorange="reversed", type="category", automargin=True)
    rows = len({name for one in series for name in one.categories})
    return Chart(ident, title, caption, spec_of(figure), height=110 + 26 * rows)
