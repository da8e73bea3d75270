"""Line charts as SVG inside a page, in the page's own colours, light and dark."""

import html
import math
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 460.0, 240.0, 52.0, 10.0, 10.0, 34.0
_COLOURS = 6


def line_chart(title: str, series: Mapping[str, Points], x_label: str = "round") -> str:
    """A figure with a line for every series that has points; nothing if none has.

    Args:
        title: Plain text.
        series: By name: points with whole x, such as rounds, in order.
        x_label: Plain text.
    """
    shown = {name: points for name, points in series.items() if points}
    if not shown:
        return ""
    xs = [x for points in shown.values() for x, _ in points]
    ys = [y for points in shown.values() for _, y in points]
    x_ticks, y_ticks = ticks(min(xs), max(xs), whole=True), ticks(min(ys), max(ys))
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / (right - left or 1)
        up = (y - low) / (high - low or 1)
        return (
            round(_LEFT + across * (_WIDTH - _LEFT - _RIGHT), 1),
            round(_HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM), 1),
        )

    parts = []
    for value in y_ticks:
        _, y = place(left, value)
        parts.append(f'<line class=axis x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor=end>{value:g}</text>')
    for value in x_ticks:
        x, _ = place(value, low)
        parts.append(f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor=middle>{value:g}</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 2}" text-anchor=middle>{html.escape(x_label)}</text>')
    legend = []
    for index, (name, points) in enumerate(shown.items()):
        colour = f"var(--c{index % _COLOURS})"
        line = " ".join("{},{}".format(*place(x, y)) for x, y in points)
        parts.append(f'<polyline points="{line}" fill=none stroke="{colour}" stroke-width=2 />')
        for x, y in points:
            across, up = place(x, y)
            label = html.escape(f"{name}, {x_label} {x:g}: {y:.4g}")
            parts.append(f'<circle cx="{across}" cy="{up}" r=3 fill="{colour}"><title>{label}</title></circle>')
        legend.append(f'<span style="color:{colour}">\u25cf</span> {html.escape(name)}')
    label = html.escape(title)
    return (
        f'<figure><figcaption>{label}</figcaption><svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role=img '
        f'aria-label="{label}">{"".join(parts)}</svg><div class=legend>{" &nbsp; ".join(legend)}</div></figure>'
    )


def ticks(low: float, high: float, whole: bool = False, most: int = 6) -> list[float]:
    """Round numbers between two, both included where they are round.

    Args:
        low: The least value.
        high: The largest value.
        whole: Only whole numbers.
        most: The most intervals between them.
    """
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if (high - low) / (factor * power) <= most)
    if whole:
        step = max(1.0, float(round(step)))
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]
