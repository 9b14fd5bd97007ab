"""Draws accuracy over lag as an SVG of panels, one line per method, without any dependency."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

Points = Mapping[int, tuple[float, float, float]]  # lag -> mean, lowest, highest over seeds

WIDTH, HEIGHT = 330, 300  # of one panel
LEFT, ABOVE, RIGHT, BELOW = 52, 34, 158, 62  # around it: scale, title, labels, scale
HEADING, COLUMNS = 40, 2
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0468a", "#8a6d00", "#3aa0e0", "#5b3a99")
REFERENCE_COLOUR, LABEL_HEIGHT, SPREAD = "#777777", 15, 2.5


def draw(
    path: Path,
    panels: Mapping[str, Sequence[str]],
    table: Mapping[str, Points],
    lags: Sequence[int],
    start: float,
) -> None:
    """Writes the plot. The first method of the first panel is drawn in all of them, dashed.

    table: method -> points; start: accuracy before training, a dotted line.
    """
    reference = next(iter(panels.values()))[0]
    bottom = min(min(low for _, low, _ in points.values()) for points in table.values())
    floor = int(min(bottom, start) * 10) / 10
    width = COLUMNS * (LEFT + WIDTH + RIGHT)
    height = HEADING + math.ceil(len(panels) / COLUMNS) * (ABOVE + HEIGHT + BELOW)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(LEFT, 24, "Held-out accuracy after training on data of a fixed age", size=16),
    ]
    for index, (title, names) in enumerate(panels.items()):
        row, column = divmod(index, COLUMNS)
        x = column * (LEFT + WIDTH + RIGHT) + LEFT
        y = HEADING + row * (ABOVE + HEIGHT + BELOW) + ABOVE
        known = [name for name in dict.fromkeys((reference, *names)) if name in table]
        parts.append(f'<g transform="translate({x} {y})">')
        parts += _frame(title, lags, floor, start)
        parts += _lines(known, reference, table, lags, floor)
        parts.append("</g>")
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _x(place: float, lags: Sequence[int]) -> float:
    return 14 + place * (WIDTH - 28) / max(len(lags) - 1, 1)


def _y(accuracy: float, floor: float) -> float:
    return HEIGHT * (1 - (accuracy - floor) / (1 - floor))


def _text(x: float, y: float, text: str, *, size: int = 12, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="#222222">{text}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def _frame(title: str, lags: Sequence[int], floor: float, start: float) -> list[str]:
    parts = [_text(0, -12, title, size=14)]
    for tenth in range(round(floor * 10), 11):
        y = _y(tenth / 10, floor)
        parts.append(_line(0, y, WIDTH, y, 'stroke="#e3e3e3"'))
        parts.append(_text(-6, y + 4, f"{10 * tenth} %", anchor="end"))
    y = _y(start, floor)
    parts.append(_line(0, y, WIDTH, y, 'stroke="#999999" stroke-dasharray="1 4"'))
    parts.append(_text(4, y - 4, "before training", size=11))
    for place, lag in enumerate(lags):
        parts.append(_text(_x(place, lags), HEIGHT + 18, str(lag), anchor="middle"))
    label = "lag: learner steps between sampling and training"
    return [*parts, _text(WIDTH / 2, HEIGHT + 38, label, anchor="middle")]


def _lines(
    names: Sequence[str],
    reference: str,
    table: Mapping[str, Points],
    lags: Sequence[int],
    floor: float,
) -> list[str]:
    """A line per method, its label at the end, and the range over seeds at each lag."""
    colours = dict(zip(names[1:], COLOURS, strict=False)) | {reference: REFERENCE_COLOUR}
    ends = {name: _y(table[name][max(table[name])][0], floor) for name in names}
    heights = _apart(ends)
    parts: list[str] = []
    for rank, name in enumerate(names):
        colour = colours[name]
        shift = SPREAD * (rank - (len(names) - 1) / 2)  # seeds' ranges beside each other
        spots = []
        for lag, (mean, low, high) in sorted(table[name].items()):
            x, y = _x(lags.index(lag), lags) + shift, _y(mean, floor)
            spots.append((x, y))
            style = f'stroke="{colour}" opacity=".45"'
            parts.append(_line(x, _y(low, floor), x, _y(high, floor), style))
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        dash = ' stroke-dasharray="6 4"' if name == reference else ""
        parts.append(
            f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        )
        label = WIDTH + 14
        parts.append(_line(*spots[-1], label - 3, heights[name], f'stroke="{colour}" opacity=".7"'))
        parts.append(_text(label, heights[name] + 4, name))
    return parts


def _apart(wanted: Mapping[str, float]) -> dict[str, float]:
    """Label heights close to the wanted ones, but at least a line apart, and not below the axis."""
    order = sorted(wanted, key=lambda name: wanted[name])
    placed: dict[str, float] = {}
    last = float("-inf")
    for name in order:
        placed[name] = last = max(wanted[name], last + LABEL_HEIGHT)
    limit = float(HEIGHT)
    for name in reversed(order):
        placed[name] = limit = min(placed[name], limit)
        limit -= LABEL_HEIGHT
    return placed
