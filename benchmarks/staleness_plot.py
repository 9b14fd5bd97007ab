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
REFERENCE_COLOUR, LABEL_HEIGHT = "#777777", 15


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
    bottom = min(low for points in table.values() for _, low, _ in points.values())
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
        parts += _lines({name: table[name] for name in known}, lags, floor)
        parts.append("</g>")
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _x(lag: int, lags: Sequence[int]) -> float:
    return 14 + lags.index(lag) * (WIDTH - 28) / max(len(lags) - 1, 1)


def _y(accuracy: float, floor: float) -> float:
    return HEIGHT * (1 - (accuracy - floor) / (1 - floor))


def _text(x: float, y: float, text: str, *, size: int = 12, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="#222222">{text}</text>'
    )


def _way(spots: Sequence[tuple[float, float]], style: str) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    return f'<polyline points="{points}" fill="none" {style}/>'


def _frame(title: str, lags: Sequence[int], floor: float, start: float) -> list[str]:
    parts = [_text(0, -12, title, size=14)]
    for tenth in range(round(floor * 10), 11):
        y = _y(tenth / 10, floor)
        parts.append(_way([(0, y), (WIDTH, y)], 'stroke="#e3e3e3"'))
        parts.append(_text(-6, y + 4, f"{10 * tenth} %", anchor="end"))
    y = _y(start, floor)
    parts.append(_way([(0, y), (WIDTH, y)], 'stroke="#999999" stroke-dasharray="1 4"'))
    parts.append(_text(4, y - 4, "before training", size=11))
    parts += [_text(_x(lag, lags), HEIGHT + 18, str(lag), anchor="middle") for lag in lags]
    label = "lag: learner steps between sampling and training"
    return [*parts, _text(WIDTH / 2, HEIGHT + 38, label, anchor="middle")]


def _lines(table: Mapping[str, Points], lags: Sequence[int], floor: float) -> list[str]:
    """A line per method, the first dashed, the range over seeds at each lag, labels at the ends."""
    parts, ends = [], []
    for rank, (name, points) in enumerate(table.items()):
        colour = COLOURS[rank - 1] if rank else REFERENCE_COLOUR
        dash = "" if rank else ' stroke-dasharray="6 4"'
        shift = 2.5 * (rank - (len(table) - 1) / 2)  # seeds' ranges beside each other
        spots = []
        for lag, (mean, *span) in sorted(points.items()):
            x = _x(lag, lags) + shift
            spots.append((x, _y(mean, floor)))
            style = f'stroke="{colour}" opacity=".45"'
            parts.append(_way([(x, _y(end, floor)) for end in span], style))
        parts.append(_way(spots, f'stroke="{colour}" stroke-width="2"{dash}'))
        ends.append((spots[-1][1], spots[-1], name, colour))
    height = 0.0  # of the last label
    for wanted, end, name, colour in sorted(ends):
        height = max(wanted, height + LABEL_HEIGHT)
        parts.append(_way([end, (WIDTH + 11, height)], f'stroke="{colour}" opacity=".7"'))
        parts.append(_text(WIDTH + 14, height + 4, name))
    return parts
