"""Draws lines and bars as SVG, by hand: no library, no script, no network. Pure: numbers in, markup out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final, Literal

COLOURS: Final = ("#1668b5", "#d1495b", "#3b8c3b", "#b07a12", "#7d4fa8", "#0f8b8d", "#8a5a44", "#5f6b76", "#c2529b")
WIDTH, HEIGHT = 620, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 28, 42
TICKS: Final = 5

Scale = Literal["linear", "log"]
Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line, or one bar's heights. Its colour is that of its place among all series."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Chart:
    """What is drawn. `mark_x` is a vertical line at a limit."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    x_scale: Scale = "linear"
    y_scale: Scale = "linear"
    mark_x: float | None = None


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    scale: Scale
    begin: float
    end: float

    @classmethod
    def over(cls, values: Sequence[float], scale: Scale, begin: float, end: float) -> "_Axis":
        if scale == "log":
            above = [value for value in values if value > 0] or [1.0]
            low, high = 10 ** math.floor(math.log10(min(above))), 10 ** math.ceil(math.log10(max(above)))
            return cls(low, max(high, low * 10), scale, begin, end)
        low, high = min([0.0, *values]), max([*values, 0.0])
        return cls(low, high if high > low else low + 1, scale, begin, end)

    def place(self, value: float) -> float:
        if self.scale == "log":
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.begin + min(max(share, 0.0), 1.0) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        if self.scale == "log":
            return [10.0**power for power in range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)]
        step = 10 ** math.floor(math.log10((self.high - self.low) / TICKS))
        step *= next(times for times in (1, 2, 5, 10) if (self.high - self.low) / (step * times) <= TICKS)
        first = math.ceil(self.low / step)
        return [step * number for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def lines(chart: Chart) -> str:
    """One line per series."""
    x = _Axis.over([point[0] for each in chart.series for point in each.points], chart.x_scale, _LEFT, WIDTH - _RIGHT)
    y = _Axis.over([point[1] for each in chart.series for point in each.points], chart.y_scale, HEIGHT - _BOTTOM, _TOP)
    drawn = [_frame(chart, x, y)]
    if chart.mark_x is not None and x.low <= chart.mark_x <= x.high:
        at = x.place(chart.mark_x)
        drawn.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
    for number, each in enumerate(chart.series):
        path = " ".join(f"{x.place(a):.1f},{y.place(b):.1f}" for a, b in each.points)
        colour = COLOURS[number % len(COLOURS)]
        drawn.append(f'<polyline points="{path}" stroke="{colour}"><title>{escape(each.name)}</title></polyline>')
    return _svg(chart.title, drawn)


def bars(chart: Chart) -> str:
    """One bar per series: its name, and the height of its only point."""
    heights = [each.points[0][1] for each in chart.series]
    y = _Axis.over(heights, "linear", HEIGHT - _BOTTOM, _TOP)
    slot = (WIDTH - _LEFT - _RIGHT) / max(len(heights), 1)
    drawn = [_frame(chart, None, y)]
    for number, (each, height) in enumerate(zip(chart.series, heights, strict=True)):
        left, top = _LEFT + slot * (number + 0.15), y.place(height)
        box = f'x="{left:.1f}" y="{top:.1f}" width="{slot * 0.7:.1f}" height="{HEIGHT - _BOTTOM - top:.1f}"'
        middle = left + slot * 0.35
        drawn.append(f'<rect {box} fill="{COLOURS[number % len(COLOURS)]}"/>')
        drawn.append(f'<text class="middle" x="{middle:.1f}" y="{top - 4:.1f}">{_told(height)}</text>')
        drawn.append(f'<text class="middle" x="{middle:.1f}" y="{HEIGHT - _BOTTOM + 14}">{escape(each.name)}</text>')
    return _svg(chart.title, drawn)


def legend(names: Sequence[str]) -> str:
    """Which colour is whose, as HTML."""
    return " ".join(
        f'<span><i style="background:{COLOURS[number % len(COLOURS)]}"></i>{escape(name)}</span>'
        for number, name in enumerate(names)
    )


def _frame(chart: Chart, x: _Axis | None, y: _Axis) -> str:
    drawn = []
    for value in y.ticks():
        at = y.place(value)
        drawn.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        drawn.append(f'<text class="end" x="{_LEFT - 6}" y="{at + 4:.1f}">{_told(value)}</text>')
    for value in [] if x is None else x.ticks():
        assert x is not None
        at = x.place(value)
        drawn.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        drawn.append(f'<text class="middle" x="{at:.1f}" y="{HEIGHT - _BOTTOM + 14}">{_told(value)}</text>')
    drawn.append(f'<text class="middle" x="{(_LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 8}">{escape(chart.x)}</text>')
    drawn.append(f'<text x="{_LEFT}" y="{_TOP - 10}">{escape(chart.y)}</text>')
    return "".join(drawn)


def _svg(title: str, drawn: Sequence[str]) -> str:
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg></figure>'
    )


def _told(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"
