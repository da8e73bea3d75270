"""The pictures of a comparison: accuracy against round, bytes and seconds; final accuracies; merge errors."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bora_fl.simulations.compare.intervals import Estimate
from bora_fl.simulations.compare.results import Results
from bora_fl.simulations.compare.rows import Row

_AXES: dict[str, Callable[[Row], float]] = {
    "round": lambda row: row.round,
    "MB sent, up and down": lambda row: (row.bytes_up + row.bytes_down) / 1e6,
    "seconds": lambda row: row.seconds,
}
_DASHES = ("-", "--", ":", "-.")


def accuracy_curves(results: Results, scenario: str) -> Figure:
    """Mean accuracy over seeds against round, bytes and wall clock; dots mark evaluations.

    Personal strategies, starred, are drawn by their clients' mean accuracy, thin.
    """
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    panels = figure.subplots(1, len(_AXES), sharey=True)
    for panel, (label, position) in zip(panels, _AXES.items(), strict=True):
        for index, variant in enumerate(results.plan.variants):
            curves = results.curves(scenario, variant)
            points = _mean_curve(curves, position, lambda r: r.accuracy)
            width = 1.6
            if variant.personal:
                points, width = _mean_curve(curves, position, lambda r: r.client_accuracy), 0.8
            if points:
                panel.plot(
                    *zip(*points, strict=True),
                    label=results.plan.label(variant),
                    lw=width,
                    marker="o",
                    ms=3,
                    **_style(index),
                )
        panel.set_xlabel(label)
        panel.xaxis.set_major_locator(MaxNLocator(integer=label == "round", nbins=6))
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("accuracy")
    _legend(figure, panels[0])
    return figure


def final_accuracies(results: Results, scenario: str) -> Figure:
    """Final accuracy of each variant and its paired difference from the baseline, with 95 % intervals."""
    summaries = results.of(scenario)
    figure = Figure(figsize=(11, 1.2 + 0.32 * len(summaries)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, summary in enumerate(summaries):
        color = _style(results.plan.variants.index(summary.variant))["color"]
        for panel, value in ((left, summary.accuracy or summary.client_accuracy), (right, summary.difference)):
            if value is not None:
                panel.errorbar(value.mean, place, xerr=value.half_width, fmt="o", ms=4, capsize=3, color=color)
    right.axvline(0, color="black", lw=0.8)
    left.set_yticks(range(len(summaries)), [results.plan.label(s.variant) for s in summaries])
    left.invert_yaxis()
    left.set_xlabel("accuracy after the last round, 95 % interval")
    right.set_xlabel(f"difference from {results.plan.label(results.baseline)}, paired by seed")
    for panel in (left, right):
        panel.grid(alpha=0.25)
    return figure


def merge_errors(results: Results, scenario: str) -> Figure | None:
    """Relative merge error by round, mean over seeds, on a logarithmic axis; None if no variant has any."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panel = figure.subplots()
    for index, variant in enumerate(results.plan.variants):
        points = _mean_curve(results.curves(scenario, variant), _AXES["round"], lambda r: r.merge_error or None)
        if points and max(y for _, y in points) > 1e-9:  # exact merges have rounding errors only
            panel.plot(
                *zip(*points, strict=True), label=results.plan.label(variant), lw=1.6, marker="o", ms=3, **_style(index)
            )
    if not panel.lines:
        return None
    panel.set_yscale("log")
    panel.set_xlabel("round")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_ylabel("relative merge error")
    panel.grid(alpha=0.25)
    _legend(figure, panel)
    return figure


def draw(results: Results, folder: Path) -> dict[str, list[tuple[str, Figure]]]:
    """All figures, also written as PNG.

    Args:
        results: The comparison's results.
        folder: Where ``<scenario>-accuracy.png``, ``-final.png`` and ``-merge-error.png`` go.

    Returns:
        Scenario to (what it shows, figure).
    """
    drawn: dict[str, list[tuple[str, Figure]]] = {}
    for scenario in results.plan.scenarios:
        if not results.of(scenario.name):
            continue
        drawn[scenario.name] = []
        for name, make in (
            ("accuracy", accuracy_curves),
            ("final", final_accuracies),
            ("merge-error", merge_errors),
        ):
            figure = make(results, scenario.name)
            if figure is not None:
                figure.savefig(folder / f"{scenario.name}-{name}.png", dpi=150)
                drawn[scenario.name].append((name, figure))
    return drawn


def interval(value: Estimate | None, scale: float = 1.0, digits: int = 1, sign: bool = False) -> str:
    """``71.2 ± 1.3``; a dash where there is no value, no ± with a single seed or where all seeds agree."""
    if value is None:
        return "-"
    plus = "+" if sign else ""
    mean = f"{scale * value.mean:{plus}.{digits}f}"
    return mean if not value.half_width else f"{mean} ± {scale * value.half_width:.{digits}f}"


def _mean_curve(
    curves: Sequence[Sequence[Row]], position: Callable[[Row], float], value: Callable[[Row], float | None]
) -> list[tuple[float, float]]:
    """Means over seeds, round by round, where every seed has a value."""
    points = []
    for rows in zip(*curves, strict=False):
        values = [v for row in rows if (v := value(row)) is not None]
        if values and len(values) == len(curves):
            points.append((sum(map(position, rows)) / len(rows), sum(values) / len(values)))
    return points


def _style(index: int) -> dict[str, Any]:
    """A variant's colour and dashes, the same in every picture."""
    return {"color": colormaps["tab10"](index % 10), "linestyle": _DASHES[index // 10 % len(_DASHES)]}


def _legend(figure: Figure, panel: Axes) -> None:
    handles, labels = panel.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
