# SPDX-License-Identifier: Apache-2.0
"""Charts are well-formed, and their marks stand where the values are."""

import xml.etree.ElementTree as ET

import pytest

from nemo_mtbi.evaluation.charts import Point, bars, lines, strips


def of(svg, tag):
    return [element for element in ET.fromstring(svg).iter() if element.tag == tag]


def test_bars_are_as_high_as_their_shares():
    svg = bars(
        "<a & b>",
        ["seen", "new"],
        [("x<", 3, [Point(0, 1.0), Point(0, 0.25, 0.2, 0.3)]), ("y", 13, [None, Point(0, 0)])],
    )
    heights = [float(bar.get("height")) for bar in of(svg, "rect")]
    assert heights[1] == pytest.approx(heights[0] / 4, abs=0.1) and len(heights) == 3
    assert of(svg, "title")[1].text == "x<, new: 25.0% (20.0 to 30.0)" and len(of(svg, "path")) == 1
    assert [bar.get("fill") for bar in of(svg, "rect")] == ["var(--c3)", "var(--c3)", "var(--c1)"]
    assert ET.fromstring(svg).get("aria-label") == "<a & b>"


def test_dots_lie_between_the_ends_of_their_line():
    svg = strips("s", [("a", 0, [("p", 0.0), ("q", 1.0)]), ("none", 1, [])])
    left, right = sorted(float(dot.get("cx")) for dot in of(svg, "circle"))
    thick = [line for line in of(svg, "line") if line.get("stroke")]
    assert [float(thick[0].get(key)) for key in ("x1", "x2")] == [left, right]


def test_curves_rise_to_the_right():
    svg = lines("c", [("a", 0, [Point(1, 0.1), Point(10, 0.9, 0.8, 1.0)])], "h", shares=True, markers=True, log_x=True)
    (x0, y0), (x1, y1) = [tuple(map(float, p.split(","))) for p in of(svg, "polyline")[0].get("points").split()]
    assert x0 < x1 and y0 > y1 and len(of(svg, "circle")) == 2
    assert lines("c", [("a", 0, [])], "h") == ""
    for only in (0.0, -3.0, 7e-9, 1e12):
        ET.fromstring(lines("c", [("a", 0, [Point(5, only)])], "h"))
