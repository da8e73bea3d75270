"""The report of a comparison: one HTML file that needs nothing beside it, and a Markdown table to paste."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from bora_fl.page import html
from bora_fl.paths import write_atomically
from bora_fl.simulations.compare.figures import draw, interval
from bora_fl.simulations.compare.intervals import Estimate
from bora_fl.simulations.compare.references import References
from bora_fl.simulations.compare.results import Results, Summary

_COLUMNS = (
    "strategy",
    "accuracy %",
    "difference, points",
    "over round 0, points",
    "retention %",
    "learning rate",
    "loss",
    "difference in loss",
    "clients' mean %",
    "worst client %",
    "spread over clients",
    "merge error %",
    "rank",
    "effective rank",
    "MB",
    "MB to target",
    "seconds",
    "server seconds",
    "epsilon",
    "of central's fall in loss %",
    "perplexity",
    "exact match %",
    "ROUGE-L",
)
_NOTES = (
    "Accuracy and loss are of the server's model on the central test set after the last round. A difference is paired "
    "by seed with the baseline {baseline} and bold where its interval excludes zero; nothing is corrected for the "
    "number of comparisons.",
    "Over round 0: accuracy less that of the model before round 1, paired by seed: what training added to the start. "
    "Retention: accuracy as a share of the variant's own with the examples dealt at random, seed by seed.",
    "Zero rounds, local only, IID federated and central are of the baseline {baseline}: the model before round 1; "
    "clients that train alone, their mean; the same federation with its examples dealt at random; one client with all "
    "the data and the steps of all. All are on the central test set.",
    "± is half a 95 % Student t interval over seeds. Runs with one seed share the partition, the clients sampled, the "
    "order of the data and the initial adapter.",
    "Strategies marked * keep part of the adapter on the clients: no server model is their result, and their "
    "difference and bytes to target are of the clients' mean.",
    "Clients' mean, worst client and spread (standard deviation, points) are on what each client holds out, after the "
    "last merge.",
    "Merge error is ‖adapter + folds - mean of the clients' products‖ / ‖that mean‖, mean over rounds. Bytes are the "
    "arrays of training rounds. Seconds are wall clock, of runs that shared the machine: compare them loosely.",
    "Effective rank: the exponential of the entropy of the update's singular values, mean over layers, after the last "
    "round: how many directions it uses.",
    "Epsilon is what each client's ledger holds it to, over all seeds, and whose presence it hides. "
    "Accuracies on held-out examples are computed without noise.",
    "Of central's fall in loss: how far the test loss fell since round 0, as a share of how far it fell in the central "
    "run. Perplexity is of a language model's test loss; exact match and ROUGE-L are of what it writes for held-out "
    "prompts after the last round.",
    "MB to target: bytes until the first evaluation at the target accuracy or above, over the seeds that got there.",
)


def markdown(results: Results) -> str:
    """Accuracy by variant and scenario, the differences from the baseline, and a table per scenario."""
    scenarios = [row.name for row in results.plan.scenarios if results.of(row.name)]
    lines = ["## Accuracy after the last round (%), mean ± 95 % interval", ""]
    lines += _table(["strategy", *scenarios], _overview(results, scenarios, difference=False))
    lines += ["", f"## Difference from {results.plan.label(results.baseline)} (points), paired by seed", ""]
    lines += _table(["strategy", *scenarios], _overview(results, scenarios, difference=True))
    for scenario in results.plan.scenarios:
        if summaries := results.of(scenario.name):
            lines += ["", f"## {scenario.name}: {scenario.summary}", ""]
            lines += _table(_COLUMNS, [_details(s, results) for s in summaries])
            lines += ["", against_what(results, scenario.name)]
    lines += [""] + [f"- {note.format(baseline=results.plan.label(results.baseline))}" for note in _NOTES]
    if results.failures:
        lines += ["", "## Without a result", ""] + [f"- {run}: {reason}" for run, reason in results.failures]
    return "\n".join(lines) + "\n"


def against_what(results: Results, scenario: str) -> str:
    """The accuracies that a scenario's are read against, in a line; those that were measured."""
    found = results.references.get(scenario, References())
    named = {
        "zero rounds": found.floor,
        "local only": found.local,
        "IID federated": found.iid,
        "central": found.central,
    }
    shown = [f"{name} {interval(value, 100)}" for name, value in named.items() if value is not None]
    return "read against (%): " + (", ".join(shown) or "nothing was measured on a central test set")


def write(results: Results, folder: Path) -> list[Path]:
    """Write ``report.html``, ``table.md`` and the PNGs.

    Returns:
        The paths of the report and the table.
    """
    figures = draw(results, folder)
    report, table = folder / "report.html", folder / "table.md"
    write_atomically(report, _page(results, figures))
    write_atomically(table, markdown(results))
    return [report, table]


def _overview(results: Results, scenarios: Sequence[str], *, difference: bool) -> list[list[str]]:
    found = {(s.scenario, s.variant): s for s in results.summaries}
    best = {name: max((s.accuracy.mean for s in results.of(name) if s.accuracy), default=0.0) for name in scenarios}
    rows = []
    for variant in results.plan.variants:
        cells = []
        for name in scenarios:
            summary = found.get((name, variant))
            if summary is None:
                cells.append("-")
            elif difference:
                cells.append(_difference(summary.difference, 100, 1))
            else:
                text = interval(summary.accuracy, 100)
                cells.append(f"**{text}**" if summary.accuracy and summary.accuracy.mean == best[name] else text)
        rows.append([results.plan.label(variant), *cells])
    return rows


def _details(summary: Summary, results: Results) -> list[str]:
    to_target = interval(summary.megabytes_to_target, digits=2)
    if summary.reached < len(summary.seeds):
        to_target = f"{to_target} ({summary.reached}/{len(summary.seeds)} seeds)"
    return [
        results.plan.label(summary.variant),
        interval(summary.accuracy, 100),
        _difference(summary.difference, 100, 1),
        _difference(summary.gain, 100, 1),
        interval(summary.retention, 100),
        "-" if summary.learning_rate is None else f"{summary.learning_rate:g}",
        interval(summary.loss, digits=3),
        _difference(summary.loss_difference, 1, 3),
        interval(summary.client_accuracy, 100),
        interval(summary.client_accuracy_min, 100),
        interval(summary.client_accuracy_sd, 100),
        interval(summary.merge_error, 100, 2),
        interval(summary.rank),
        interval(summary.effective_rank),
        interval(summary.megabytes, digits=2),
        to_target,
        interval(summary.seconds),
        interval(summary.server_seconds, digits=2),
        "-" if summary.epsilon is None else f"{summary.epsilon:.3f} per {summary.epsilon_unit}",
        interval(summary.of_central, 100),
        interval(summary.perplexity, digits=2),
        interval(summary.exact_match, 100),
        interval(summary.rouge_l, digits=3),
    ]


def _difference(value: Estimate | None, scale: float, digits: int) -> str:
    text = interval(value, scale, digits, sign=True)
    return f"**{text}**" if value is not None and value.excludes_zero else text


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _page(results: Results, figures: dict[str, list[tuple[str, Figure]]]) -> str:
    scenarios = [row for row in results.plan.scenarios if results.of(row.name)]
    names = [row.name for row in scenarios]
    seeds = len({run.seed for run in results.plan.runs})
    finished = len(results.outcomes) - len(results.failures)
    label = results.plan.label(results.baseline)
    parts = [
        html.heading("Federated fine-tuning, compared", 1),
        html.note(
            f"{len(results.plan.variants)} variants, {len(results.plan.scenarios)} scenarios, {seeds} seeds each; "
            f"{finished} of {len(results.outcomes)} runs finished; baseline {label}."
        ),
        html.heading("Accuracy after the last round (%)"),
        html.table(["strategy", *names], _overview(results, names, difference=False)),
        html.heading(f"Difference from {label} (points)"),
        html.table(["strategy", *names], _overview(results, names, difference=True)),
    ]
    for scenario in scenarios:
        target = next((s.target for s in results.of(scenario.name) if not s.variant.personal), None)
        parts.append(html.heading(f"{scenario.name}: {scenario.summary}"))
        parts.append(html.note(f"Target accuracy: {'-' if target is None else f'{100 * target:.1f} %'}"))
        parts.append(html.note(against_what(results, scenario.name)))
        parts += [_image(figure, f"{scenario.name}: {name}") for name, figure in figures[scenario.name]]
        parts.append(html.table(_COLUMNS, [_details(s, results) for s in results.of(scenario.name)]))
    if results.failures:
        parts += [html.heading("Without a result"), html.bullets(f"{run}: {why}" for run, why in results.failures)]
    if results.plan.skipped:
        parts += [html.heading("Skipped"), html.bullets(results.plan.reasons())]
    parts += [html.heading("How to read this"), html.bullets(text.format(baseline=label) for text in _NOTES)]
    return html.document("bora-fl compare", [*parts, _settings(results), _versions(results)])


def _versions(results: Results) -> str:
    """The versions that the runs were made with, each set once."""
    found = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in outcome.versions.items())
        for _, outcome in results.outcomes
        if outcome.versions
    )
    return html.note(f"Versions: {'; '.join(found) or 'unknown'}.")


def _settings(results: Results) -> str:
    """The run config that all runs share."""
    configs = [run.identity["config"] for run in results.plan.runs]
    first = configs[0] if isinstance(configs[0], dict) else {}
    shared = {
        key: value for key, value in first.items() if all(c[key] == value for c in configs if isinstance(c, dict))
    }
    rows = [[key, str(value)] for key, value in shared.items()]
    return html.folded("Settings that all runs share", html.table(["setting", "value"], rows, text=["value"]))


def _image(figure: Figure, description: str) -> str:
    """An SVG as a data URL: sharp at any size, and its ids cannot clash with another's."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bora-fl"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return html.picture(buffer.getvalue().encode(), "svg+xml", description)
