# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG, without any library: they take their colors from the page, so that they fit light and dark.

Colors are the CSS variables ``--c0`` to ``--c11`` of the page; so are the classes ``axis``, ``grid`` and ``tick``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLORS = 12
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 780, 56, 16, 14, 46


@dataclass(frozen=True)
class Point:
    """A value with its interval; ``low`` and ``high`` are None where there is none."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


def color(index: int) -> str:
    """The CSS color of a series; beyond the palette they repeat."""
    return f"var(--c{index % COLORS})"


def legend(names: Mapping[str, int]) -> str:
    """Names beside their colors, by index, as HTML."""
    marks = (
        f'<span class="key"><i style="background:{color(index)}"></i>{escape(name)}</span>'
        for name, index in names.items()
    )
    return f'<div class="legend">{"".join(marks)}</div>'


def bars(label: str, groups: Sequence[str], series: Sequence[tuple[str, int, Sequence[Point | None]]]) -> str:
    """Shares from 0 to 1 in groups of bars, with intervals.

    Args:
        label: What the chart shows, for readers who can't see it.
        groups: Titles below the groups.
        series: Name, index of the color and one value for each group; the x of a point is not read.
    """
    height, base = 320, 320 - _BOTTOM
    span, scale = (_WIDTH - _LEFT - _RIGHT) / max(1, len(groups)), base - _TOP
    width = min(46.0, 0.82 * span / max(1, len(series)))
    parts = [_horizontal(share, base - share * scale, f"{100 * share:.0f}%") for share in (0, 0.25, 0.5, 0.75, 1)]
    for number, title in enumerate(groups):
        center = _LEFT + span * (number + 0.5)
        parts.append(_text(center, base + 20, title, "middle"))
        for index, (name, shade, values) in enumerate(series):
            point = values[number]
            if point is None:
                continue
            left = center + width * (index - len(series) / 2)
            top = base - _clip(point.y) * scale
            shown = f"{name}, {title}: {_percent(point)}"
            parts.append(
                f'<rect x="{left + 1:.1f}" y="{top:.1f}" width="{width - 2:.1f}" height="{max(base - top, 1):.1f}"'
                f' rx="2" fill="{color(shade)}"><title>{escape(shown)}</title></rect>'
            )
            parts.append(_whisker(left + width / 2, point, lambda y: base - _clip(y) * scale))
    return _svg(label, height, parts)


def strips(label: str, rows: Sequence[tuple[str, int, Sequence[tuple[str, float]]]]) -> str:
    """Shares from 0 to 1 as dots, a row for each system, with a line from the lowest to the highest.

    Args:
        label: What the chart shows.
        rows: Name of the system, index of its color, and name and value of each dot.
    """
    left, step = 170, 30
    height = _TOP + step * len(rows) + _BOTTOM
    base, scale = height - _BOTTOM, _WIDTH - left - _RIGHT - 20
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = left + share * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{base}"/>')
        parts.append(_text(x, base + 18, f"{100 * share:.0f}%", "middle"))
    for index, (name, shade, dots) in enumerate(rows):
        y = _TOP + step * (index + 0.5)
        parts.append(_text(left - 12, y + 4, name if len(name) < 24 else name[:22] + "…", "end"))
        values = [value for _, value in dots]
        if not values:
            continue
        low, high, center = (left + _clip(v) * scale for v in (min(values), max(values), sum(values) / len(values)))
        parts.append(
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="{color(shade)}" stroke-width="3" '
            f'opacity="0.35"/>'
        )
        parts += [
            f'<circle cx="{left + _clip(value) * scale:.1f}" cy="{y}" r="4.5" fill="{color(shade)}" opacity="0.6">'
            f"<title>{escape(f'{name}, {what}: {100 * value:.1f}%')}</title></circle>"
            for what, value in dots
        ]
        parts.append(f'<line class="mean" x1="{center:.1f}" x2="{center:.1f}" y1="{y - 9}" y2="{y + 9}"/>')
    return _svg(label, height, parts)


def lines(
    label: str,
    series: Sequence[tuple[str, int, Sequence[Point]]],
    x_title: str,
    shares: bool = False,
    markers: bool = False,
    log_x: bool = False,
) -> str:
    """Curves.

    Args:
        label: What the chart shows.
        series: Name, index of the color and points, by x.
        x_title: Below the axis.
        shares: The y axis goes from 0 to 1, in percent, or as far as the values do.
        markers: Draw the points and their intervals.
        log_x: Logarithmic x; all x must be above 0.
    """
    points = [point for _, _, found in series for point in found]
    if not points:
        return ""
    height, base = 320, 320 - _BOTTOM
    xs = [point.x for point in points]
    edges = [v for point in points for v in (point.y, point.low, point.high) if v is not None]
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
    for name, index, found in series:
        path = " ".join(f"{across(p.x):.1f},{up(p.y):.1f}" for p in found)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color(index)}" stroke-width="2" stroke-linejoin="round">'
            f"<title>{escape(name)}</title></polyline>"
        )
        for p in found if markers else ():
            shown = f"{name}, {p.x:g}: {_percent(p) if shares else f'{p.y:.3f}'}"
            parts.append(
                f'<circle cx="{across(p.x):.1f}" cy="{up(p.y):.1f}" r="4.5" fill="{color(index)}">'
                f"<title>{escape(shown)}</title></circle>"
            )
            parts.append(_whisker(across(p.x), p, up))
    return _svg(label, height, parts)


def _svg(label: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(label, quote=True)}">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _horizontal(value: float, y: float, text: str) -> str:
    kind = "axis" if value == 0 else "grid"
    line = f'<line class="{kind}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + _text(_LEFT - 8, y + 4, text, "end")


def _whisker(x: float, point: Point, up) -> str:
    if point.low is None or point.high is None:
        return ""
    low, high = up(point.low), up(point.high)
    return (
        f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}H{x + 4:.1f}'
        f'M{x - 4:.1f} {high:.1f}H{x + 4:.1f}"/>'
    )


def _percent(point: Point) -> str:
    bounds = "" if point.low is None else f" ({100 * point.low:.1f} to {100 * point.high:.1f})"
    return f"{100 * point.y:.1f}%{bounds}"


def _clip(share: float) -> float:
    return min(1.0, max(0.0, share))


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from at most ``low`` on that cover the range."""
    if high <= low:
        return [low]
    raw = (high - low) / most
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]
