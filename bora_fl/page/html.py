"""The parts of a page: the document with its style and script, sortable tables, facts, pictures."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

# Nothing but what stands in the file itself may be loaded, whatever a name or a reason in it contains.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --text: #1a1a1a; --soft: #59606a; --line: #d9dde2; --head: #f3f5f7;
  --c0: #1f6fb4; --c1: #c4501b; --c2: #2a8a43; --c3: #8a4fb0; --c4: #9a6b00; --c5: #b0356f; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --text: #e4e7ea; --soft: #9aa3ad; --line: #343a40;
  --head: #1f2429; --c0: #6cb2f0; --c1: #f0905c; --c2: #6fce88; --c3: #c79be8; --c4: #e0b34a; --c5: #f08ab8; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 1200px; padding: 0 1rem;
  background: var(--ground); color: var(--text); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } .note { color: var(--soft); font-size: 13px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; white-space: normal; min-width: 16rem; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid var(--c0); }
th { background: var(--head); position: sticky; top: 0; } th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; } .wide { overflow-x: auto; }
.facts { display: flex; flex-wrap: wrap; gap: .6rem; } .facts div { background: var(--head); border-radius: .5rem;
  padding: .4rem .8rem; } .facts b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; } figcaption { font-weight: 600; font-size: 13px; } svg { width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 11px; } .axis { stroke: var(--line); } .legend { font-size: 12px; }
img { max-width: 100%; background: #fff; } pre { overflow-x: auto; } summary { cursor: pointer; }
"""
_SORT = """
document.querySelectorAll('th button').forEach(button => button.addEventListener('click', () => {
  const th = button.closest('th'), body = th.closest('table').tBodies[0], up = th.ariaSort !== 'ascending';
  const text = row => row.cells[th.cellIndex].textContent.trim(), value = row => parseFloat(text(row));
  const rows = [...body.rows], numbers = rows.some(row => !isNaN(value(row)));
  const key = row => isNaN(value(row)) ? -Infinity : value(row);
  const order = numbers ? (a, b) => key(a) - key(b) : (a, b) => text(a).localeCompare(text(b));
  th.parentNode.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
  th.ariaSort = up ? 'ascending' : 'descending';
  rows.sort((a, b) => (up ? 1 : -1) * order(a, b)).forEach(row => body.append(row));
}));
"""


def document(title: str, parts: Iterable[str]) -> str:
    """The whole file.

    Args:
        title: Plain text.
        parts: HTML, in order.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(parts)
        + f"<script>{_SORT}</script></body></html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    """A heading of plain text."""
    return f"<h{level}>{html.escape(text)}</h{level}>"


def note(text: str) -> str:
    """A line of plain text in the background."""
    return f"<p class=note>{html.escape(text)}</p>"


def bullets(lines: Iterable[str]) -> str:
    """A list of plain texts."""
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[str] = ()) -> str:
    """A table that a click on a column's head sorts.

    Args:
        header: Names of the columns, plain text.
        rows: Cells, plain text; ``**bold**`` is bold.
        text: The columns whose cells are sentences.
    """

    def cell(name: str, value: str) -> str:
        bold = value.startswith("**") and value.endswith("**") and len(value) > 4
        shown = f"<b>{html.escape(value[2:-2])}</b>" if bold else html.escape(value)
        return f"<td class=text>{shown}</td>" if name in text else f"<td>{shown}</td>"

    head = "".join(f"<th><button>{html.escape(name)}</button></th>" for name in header)
    body = "".join(f"<tr>{''.join(map(cell, header, row))}</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def facts(values: Mapping[str, str]) -> str:
    """Small boxes, a value over its name."""
    boxes = "".join(f"<div><b>{html.escape(value)}</b>{html.escape(name)}</div>" for name, value in values.items())
    return f"<div class=facts>{boxes}</div>"


def folded(summary: str, content: str) -> str:
    """HTML that opens with a click."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def picture(data: bytes, kind: str, description: str) -> str:
    """An image inside the file.

    Args:
        data: Its bytes.
        kind: ``png`` or ``svg+xml``.
        description: What it shows, in plain text.
    """
    text = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/{kind};base64,{text}">'


def png(path: Path, description: str) -> str:
    """A picture of a folder inside the file; nothing if it is not there."""
    return picture(path.read_bytes(), "png", description) if path.is_file() else ""
