"""A report as documents: one HTML page that needs nothing else, Markdown beside its pictures, LaTeX and CSV tables.

Whatever comes from a run is escaped for the document it goes into.
"""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import yaml

from globe.reporting.sections import Report
from globe.reporting.tables import Table

_TEMPLATES = Path(__file__).parent / "templates"
_MOST_ROWS = 100
_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
} | {one: f"\\{one}" for one in "&%$#_{}"}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet takes for the beginning of a formula."""


def to_html(report: Report) -> str:
    """Return the page."""
    return _render("page.html.jinja", report, escape=True)


def to_markdown(report: Report) -> str:
    """Return the Markdown twin; a long table is cut, and says so."""
    return _render("report.md.jinja", report, escape=False)


def _render(template: str, report: Report, *, escape: bool) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "md": escape_markdown,
        "base64": lambda data: base64.b64encode(data).decode("ascii"),
        "breakable": _breakable,
        "row": lambda cells: f"| {' | '.join(cells)} |",
    }
    return environment.get_template(template).render(
        report=report,
        common=yaml.safe_dump(dict(report.common), sort_keys=False, allow_unicode=True)
        if report.common
        else "",
        most_rows=_MOST_ROWS,
    )


def _breakable(heading: str) -> markupsafe.Markup:
    """Return the heading with places where a browser may begin a new line, after dots and underscores."""
    return markupsafe.Markup(re.sub(r"([._])", r"\1<wbr>", str(markupsafe.escape(heading))))


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is, also in a table."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    # an underscore inside a word is no mark, and stays readable
    return re.sub(r"([\\`*|\[\]]|(?<!\w)_|_(?!\w)|(?<!\S)#(?=\s))", r"\\\1", text)


def to_latex(table: Table) -> str:
    """Return the table for LaTeX with the packages booktabs and longtable; the rows of a front are bold."""
    headings = [escape_latex(column.heading) for column in table.columns]
    form = "".join("r" if numeric else "l" for numeric in table.numeric)
    lines = [
        "% needs \\usepackage{booktabs} and \\usepackage{longtable}",
        f"\\begin{{longtable}}{{{form}}}",
        f"\\caption{{{escape_latex(table.caption)}}}\\label{{tab:{table.name}}}\\\\",
        "\\toprule",
        f"{' & '.join(headings)} \\\\",
        "\\midrule",
        "\\endhead",
    ]
    for at, row in enumerate(table.rows):
        cells = [escape_latex(cell.text) for cell in row]
        cells = [f"\\textbf{{{cell}}}" for cell in cells] if at in table.marked else cells
        lines.append(f"{' & '.join(cells)} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{longtable}", ""])


def escape_latex(text: str) -> str:
    """Return text that LaTeX sets as it is."""
    return "".join(_TEX.get(one, one) for one in text)


def table_csv(table: Table) -> str:
    """Return a table as CSV, with every digit of its numbers."""
    headings = [column.heading for column in table.columns]
    return to_csv([dict(zip(headings, (cell.value for cell in row), strict=True)) for row in table.rows])


def to_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Return records as CSV; a text in which a spreadsheet would see a formula gets an apostrophe before it."""
    names = list(dict.fromkeys(name for record in records for name in record))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=names, restval="", lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({name: _no_formula(value) for name, value in record.items()})
    return stream.getvalue()


def _no_formula(value: Any) -> Any:
    text = value if isinstance(value, str) else str(value) if isinstance(value, list) else ""
    return f"'{text}" if text.startswith(_FORMULA) else value
