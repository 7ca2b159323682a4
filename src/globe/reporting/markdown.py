"""The report as Markdown, for a pull request: pictures lie beside it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from omegaconf import OmegaConf

from globe.reporting.sections import Report
from globe.reporting.tables import Table

_MOST_ROWS = 100


def to_markdown(report: Report) -> str:
    """The document; a long table is cut, and says so."""
    lines = [f"# {escape(report.title)}", "", *_paragraphs(report.introduction)]
    for section in report.sections:
        lines += [f"## {escape(section.title)}", "", *_paragraphs(section.paragraphs)]
        if section.table is not None:
            lines += _table(section.table)
        for picture in section.pictures:
            lines += [f"![{escape(picture.title)}]({picture.name}.png)", "", *_paragraphs((picture.caption,))]
    if report.common:
        lines += ["<details><summary>Options that all runs share</summary>", "", "```yaml"]
        lines += [common_yaml(report).rstrip(), "```", "", "</details>", ""]
    return "\n".join(lines).rstrip() + "\n"


def common_yaml(report: Report) -> str:
    """The options that are alike, one `bank.m: n/4` a line."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(report.common)))


def escape(text: str) -> str:
    """Text that Markdown shows as it is, also in a table."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    # an underscore inside a word is no mark, and stays readable
    return re.sub(r"([\\`*|\[\]]|(?<!\w)_|_(?!\w)|(?<!\S)#(?=\s))", r"\\\1", text)


def _paragraphs(texts: Sequence[str]) -> list[str]:
    return [line for text in texts for line in (escape(text), "")]


def _table(table: Table) -> list[str]:
    lines = [_row(table.headings), _row(["---"] * len(table.headings))]
    for at, row in enumerate(table.rows[:_MOST_ROWS]):
        cells = [escape(cell.text) for cell in row]
        lines.append(_row([f"**{cells[0]}**", *cells[1:]] if at in table.marked else cells))
    if len(table.rows) > _MOST_ROWS:
        lines += ["", f"{len(table.rows) - _MOST_ROWS} further rows are in runs.csv."]
    return [*lines, ""]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
