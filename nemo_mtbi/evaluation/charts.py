# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG, without any library: they take their colors from the page, so that they fit light and dark.

Colors are the CSS variables ``--c0`` to ``--c11`` of the page; so are the classes ``axis``, ``grid`` and ``tick``.
Each element is a format of ``Markup``, which escapes the values that are put into it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

COLORS = 12
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 780, 320, 56, 16, 14, 46
_BAR = Markup(
    '<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" fill="{color}">'
    "<title>{title}</title></rect>"
)
_DOT = Markup('<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}"><title>{title}</title></circle>')
_FAINT_DOT = Markup(
    '<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}" opacity="0.6"><title>{title}</title></circle>'
)
_LINE = Markup('<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>')
_RANGE = Markup(
    '<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{color}" stroke-width="3" opacity="0.35"/>'
)
_CURVE = Markup(
    '<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2" stroke-linejoin="round">'
    "<title>{title}</title></polyline>"
)
_TEXT = Markup('<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>')
_WHISKER = Markup(
    '<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}M{left:.1f} {low:.1f}H{right:.1f}'
    'M{left:.1f} {high:.1f}H{right:.1f}"/>'
)
_SVG = Markup('<svg viewBox="0 0 {width} {height:g}" role="img" aria-label="{label}">{content}</svg>')


@dataclass(frozen=True)
class Point:
    """A value with its interval; ``low`` and ``high`` are None where there is none."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


def color(index: int) -> str:
    """Return the CSS color of a series; beyond the palette they repeat."""
    return f"var(--c{index % COLORS})"


def bars(label: str, groups: Sequence[str], series: Sequence[tuple[str, int, Sequence[Point | None]]]) -> Markup:
    """Return shares from 0 to 1 in groups of bars, with intervals.

    Args:
        label: Description of the chart, for readers who can't see it.
        groups: Titles below the groups.
        series: Name, index of the color and one value for each group; the x of a point is not read.
    """
    base = _HEIGHT - _BOTTOM
    span, scale = (_WIDTH - _LEFT - _RIGHT) / max(1, len(groups)), base - _TOP
    width = min(46.0, 0.82 * span / max(1, len(series)))

    def up(share: float) -> float:
        return base - _clip(share) * scale

    parts = [_horizontal(share, up(share), f"{100 * share:.0f}%") for share in (0, 0.25, 0.5, 0.75, 1)]
    for number, title in enumerate(groups):
        center = _LEFT + span * (number + 0.5)
        parts.append(_text(center, base + 20, title, "middle"))
        for index, (name, shade, values) in enumerate(series):
            point = values[number]
            if point is None:
                continue
            left, top = center + width * (index - len(series) / 2), up(point.y)
            shown = f"{name}, {title}: {_percent(point)}"
            box = {"x": left + 1, "y": top, "width": width - 2, "height": max(base - top, 1)}
            parts.append(_BAR.format(**box, color=color(shade), title=shown))
            parts.append(_whisker(left + width / 2, point, up))
    return _svg(label, _HEIGHT, parts)


def strips(label: str, rows: Sequence[tuple[str, int, Sequence[tuple[str, float]]]]) -> Markup:
    """Return shares from 0 to 1 as dots, a row for each system, with a line from the lowest to the highest.

    Args:
        label: Description of the chart.
        rows: Name of the system, index of its color, and name and value of each dot.
    """
    left, step = 170, 30
    height = _TOP + step * len(rows) + _BOTTOM
    base, scale = height - _BOTTOM, _WIDTH - left - _RIGHT - 20
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = left + share * scale
        parts.append(_LINE.format(kind="grid", x1=x, x2=x, y1=_TOP, y2=base))
        parts.append(_text(x, base + 18, f"{100 * share:.0f}%", "middle"))
    for index, (name, shade, dots) in enumerate(rows):
        y = _TOP + step * (index + 0.5)
        parts.append(_text(left - 12, y + 4, name if len(name) < 24 else name[:22] + "…", "end"))
        values = [value for _, value in dots]
        if not values:
            continue
        low, high, center = (left + _clip(v) * scale for v in (min(values), max(values), sum(values) / len(values)))
        parts.append(_RANGE.format(x1=low, x2=high, y=y, color=color(shade)))
        for wording, value in dots:
            title = f"{name}, {wording}: {100 * value:.1f}%"
            parts.append(_FAINT_DOT.format(x=left + _clip(value) * scale, y=y, color=color(shade), title=title))
        parts.append(_LINE.format(kind="mean", x1=center, x2=center, y1=y - 9, y2=y + 9))
    return _svg(label, height, parts)


def lines(
    label: str,
    series: Sequence[tuple[str, int, Sequence[Point]]],
    x_title: str,
    shares: bool = False,
    markers: bool = False,
    log_x: bool = False,
) -> Markup:
    """Return curves; empty where there is no point.

    Args:
        label: Description of the chart.
        series: Name, index of the color and points, by x.
        x_title: Below the axis.
        shares: The y axis goes from 0 to 1, in percent, or as far as the values do.
        markers: Draw the points and their intervals.
        log_x: Logarithmic x; all x must be above 0.
    """
    all_points = [point for _, _, points in series for point in points]
    if not all_points:
        return Markup("")
    base = _HEIGHT - _BOTTOM
    xs = [point.x for point in all_points]
    edges = [v for point in all_points for v in (point.y, point.low, point.high) if v is not None]
    top = max(edges) if not shares else max(1.0, *edges)
    y_ticks = _ticks(min(0.0, *edges), top)
    x_ticks = sorted(set(xs)) if markers and len(set(xs)) <= 8 else _ticks(min(xs), max(xs))
    warp = math.log if log_x else float
    x_low, x_high = warp(min(xs)), warp(max(xs))
    y_low, y_high = min(y_ticks[0], *edges), max(y_ticks[-1], *edges)
    room = _WIDTH - _LEFT - _RIGHT - 40

    def across(x: float) -> float:
        return _LEFT + 20 + room * ((warp(x) - x_low) / (x_high - x_low) if x_high > x_low else 0.5)

    def up(y: float) -> float:
        return base - (base - _TOP) * (y - y_low) / ((y_high - y_low) or 1.0)

    parts = [_horizontal(y, up(y), f"{100 * y:.0f}%" if shares else f"{y:g}") for y in y_ticks]
    parts += [_text(across(x), base + 18, f"{x:g}", "middle") for x in x_ticks if min(xs) <= x <= max(xs)]
    parts.append(_text(_LEFT + 20 + room / 2, base + 38, x_title, "middle"))
    for name, index, points in series:
        path = " ".join(f"{across(p.x):.1f},{up(p.y):.1f}" for p in points)
        parts.append(_CURVE.format(points=path, color=color(index), title=name))
        for p in points if markers else ():
            title = f"{name}, {p.x:g}: {_percent(p) if shares else f'{p.y:.3f}'}"
            parts.append(_DOT.format(x=across(p.x), y=up(p.y), color=color(index), title=title))
            parts.append(_whisker(across(p.x), p, up))
    return _svg(label, _HEIGHT, parts)


def _svg(label: str, height: float, parts: Iterable[Markup]) -> Markup:
    return _SVG.format(width=_WIDTH, height=height, label=label, content=Markup("").join(parts))


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return _TEXT.format(x=x, y=y, text=text, anchor=anchor)


def _horizontal(value: float, y: float, text: str) -> Markup:
    kind = "axis" if value == 0 else "grid"
    return _LINE.format(kind=kind, x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y, y2=y) + _text(_LEFT - 8, y + 4, text, "end")


def _whisker(x: float, point: Point, up: Callable[[float], float]) -> Markup:
    if point.low is None or point.high is None:
        return Markup("")
    return _WHISKER.format(x=x, left=x - 4, right=x + 4, low=up(point.low), high=up(point.high))


def _percent(point: Point) -> str:
    bounds = ""
    if point.low is not None and point.high is not None:
        bounds = f" ({100 * point.low:.1f} to {100 * point.high:.1f})"
    return f"{100 * point.y:.1f}%{bounds}"


def _clip(share: float) -> float:
    return min(1.0, max(0.0, share))


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers, the first at most ``low``, that cover the range."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]
