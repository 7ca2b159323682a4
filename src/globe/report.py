"""python -m globe.report FOLDER [KEY=VALUE ...]

Tables and pictures of the runs below a folder: report.html (one file, opens without a network), report.md, pictures as
PNG and SVG, tables as CSV and LaTeX, and runs.csv with every digit of every bank. Reads what the runs wrote beside
their banks, no bank and no checkpoint. report.json lists what was written: nothing else is ever replaced or removed.

sweep=FOLDER       folder of a multirun, or any folder with runs of globe.train below it; `sweep=` may be left out
run=FOLDER         folder of a single run, instead of sweep
out=null           folder to write; null is `report` in the folder of the runs
details=4          banks whose codes and singular values are drawn, chosen along the Pareto front; 0 is none
title=null         heading; null is the name of the folder
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from globe.config.command_line import path_option, run_command
from globe.config.commands import start
from globe.errors import ConfigError, printable
from globe.reporting.digits import digits
from globe.reporting.documents import table_csv, to_csv, to_html, to_latex, to_markdown
from globe.reporting.labels import varied_options
from globe.reporting.plot import require_matplotlib
from globe.reporting.publish import publish
from globe.reporting.runs import ReportRun, read_runs
from globe.reporting.sections import Report, build


@dataclass
class ReportOptions:
    """The options of the command, as the text above says."""

    sweep: str | None = path_option(None)
    run: str | None = path_option(None)
    out: str | None = path_option(None)
    details: int = 4
    title: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.details <= 64:
            raise ConfigError(f"details={self.details} is not possible: give a number of banks from 0 to 64")


def report(options: ReportOptions) -> tuple[tuple[ReportRun, ...], Report, Path]:
    """Read the runs, build the report and write it; return all three.

    Raises
    ------
    ConfigError if there is no run, no matplotlib, or a file of somebody else where one would be written.
    """
    if (options.sweep is None) == (options.run is None):
        raise ConfigError("give either sweep=FOLDER or run=FOLDER, --help lists the options")
    key = "sweep" if options.sweep is not None else "run"
    root = Path(options.sweep or options.run or "")
    require_matplotlib()
    runs = read_runs(root, key=key)
    built = build(
        runs, options.title or f"{root.resolve().name}: GloBE report", details=options.details, folder=root
    )
    out = root / "report" if options.out is None else Path(options.out)
    publish(out, _files(built, runs))
    return runs, built, out


def _files(built: Report, runs: Sequence[ReportRun]) -> dict[str, bytes]:
    """Return the contents of all files by their names, the documents last."""
    files: dict[str, bytes] = {}
    for picture in built.pictures:
        files |= {f"{picture.name}.png": picture.png, f"{picture.name}.svg": picture.svg}
    texts = {f"table-{table.name}.tex": to_latex(table) for table in built.tables}
    texts |= {f"table-{table.name}.csv": table_csv(table) for table in built.tables}
    texts["runs.csv"] = to_csv(digits(runs, varied_options(runs)))
    texts |= {"report.md": to_markdown(built), "report.html": to_html(built)}
    return files | {name: text.encode("utf-8") for name, text in texts.items()}


def main() -> None:
    run_command(__doc__ or "", ReportOptions, _report_and_say, positional="sweep")


def _report_and_say(options: ReportOptions) -> None:
    runs, built, out = report(options)
    lacking = sum(run.state != "finished" for run in runs)
    said = f", {lacking} of them not finished" if lacking else ""
    print(
        printable(
            f"{out}: {len(runs)} run{'s' * (len(runs) != 1)}{said}; report.html, report.md, tables as csv and tex, and "
            f"{len(built.pictures)} pictures as png and svg"
        )
    )


if __name__ == "__main__":
    start(main)
