"""The report as one HTML file that needs nothing else: pictures, style and the sorting of tables are inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from globe.reporting.markdown import common_yaml
from globe.reporting.sections import Report, Section
from globe.reporting.style import Picture
from globe.reporting.tables import Cell, Table

_HERE = Path(__file__).parent


def to_html(report: Report) -> str:
    """The document. Everything that comes from a run is escaped; it refers to nothing outside itself."""
    links = " ".join(
        f'<a href="#{_anchor(at)}">{escape(section.title)}</a>' for at, section in enumerate(report.sections)
    )
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        *_paragraphs(report.introduction),
        f"<nav>{links}</nav>",
        *(_section(section, _anchor(at)) for at, section in enumerate(report.sections)),
    ]
    if report.common:
        parts.append(
            f"<details><summary>Options that all runs share</summary><pre>{escape(common_yaml(report))}</pre></details>"
        )
    style, script = (_HERE / "page.css").read_text("utf-8"), (_HERE / "page.js").read_text("utf-8")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.title)}</title>\n"
        '<link rel="icon" href="data:,">\n'  # a browser would ask a server for one
        f"<style>\n{style}</style>\n</head>\n<body>\n{body}\n<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _anchor(at: int) -> str:
    return f"section-{at + 1}"


def _section(section: Section, anchor: str) -> str:
    parts = [f'<h2 id="{anchor}">{escape(section.title)}</h2>', *_paragraphs(section.paragraphs)]
    if section.table is not None:
        parts.append(_table(section.table))
    parts += [_picture(picture) for picture in section.pictures]
    return "\n".join(parts)


def _paragraphs(texts: Sequence[str]) -> list[str]:
    return [f"<p>{escape(text)}</p>" for text in texts]


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    return (
        f'<figure><img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    numeric = [
        all(not isinstance(row[at].value, str) for row in table.rows) for at in range(len(table.headings))
    ]
    kinds = [' class="number"' if one else "" for one in numeric]
    heads = "".join(
        f'<th scope="col"{kind}><button type="button">{escape(heading)}</button></th>'
        for heading, kind in zip(table.headings, kinds, strict=True)
    )
    rows = []
    for at, row in enumerate(table.rows):
        cells = "".join(_cell(cell, kind) for cell, kind in zip(row, kinds, strict=True))
        mark = ' class="marked"' if at in table.marked else ""
        rows.append(f"<tr{mark}>{cells}</tr>")
    body = "\n".join(rows)
    return (
        f'<div class="wide"><table id="{table.name}"><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(cell: Cell, kind: str) -> str:
    sort = "" if cell.value is None else f' data-sort="{escape(str(cell.value))}"'
    return f"<td{kind}{sort}>{escape(cell.text)}</td>"
