"""python -m globe.report sweep=FOLDER [KEY=VALUE ...]

Tables and pictures of the runs below a folder: report.html (one file, opens without a network), report.md with its
pictures, and runs.csv with every digit. Reads what the runs wrote beside their banks, no bank and no checkpoint.

sweep=FOLDER       folder of a multirun, or any folder with runs of globe.train below it
run=FOLDER         folder of a single run, instead of sweep
out=null           folder to write; null is `report` in the folder of the runs
details=4          banks whose codes and singular values are drawn, chosen along the Pareto front; 0 is none
title=null         heading; null is the name of the folder
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from globe.config.command_line import path_option, run_command
from globe.config.commands import start
from globe.errors import ConfigError
from globe.files import write_bytes, write_text
from globe.reporting.labels import varied_options
from globe.reporting.markdown import to_markdown
from globe.reporting.page import to_html
from globe.reporting.runs import ReportRun, read_runs
from globe.reporting.sections import Report, build
from globe.reporting.style import require_matplotlib
from globe.reporting.tables import runs_csv

_OURS = re.compile(r"fig-[a-z]+(-\d+)?\.png")
"""Names of our pictures; those of an earlier report in the same folder are removed."""


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
    """Read the runs, build the report, write it; returns all three. Raises ConfigError with one sentence."""
    if (options.sweep is None) == (options.run is None):
        raise ConfigError("give either sweep=FOLDER or run=FOLDER, --help lists the options")
    key = "sweep" if options.sweep is not None else "run"
    root = Path(options.sweep or options.run or "").expanduser()
    require_matplotlib()
    runs = read_runs(root, key=key)
    built = build(runs, options.title or f"{root.resolve().name}: GloBE report", details=options.details)
    out = root / "report" if options.out is None else Path(options.out).expanduser()
    write(built, runs_csv(runs, varied_options(runs)), out)
    return runs, built, out


def write(built: Report, csv: str, out: Path) -> None:
    """Write all files, each atomically, the documents last; pictures of an earlier report go."""
    out.mkdir(parents=True, exist_ok=True)
    names = {f"{picture.name}.png" for picture in built.pictures}
    for stale in out.glob("fig-*.png"):
        if _OURS.fullmatch(stale.name) and stale.name not in names:
            stale.unlink()
    for picture in built.pictures:
        write_bytes(out / f"{picture.name}.png", picture.png)
    write_text(out / "runs.csv", csv)
    write_text(out / "report.md", to_markdown(built))
    write_text(out / "report.html", to_html(built))


def main() -> None:
    run_command(__doc__ or "", ReportOptions, _report_and_say)


def _report_and_say(options: ReportOptions) -> None:
    runs, built, out = report(options)
    lacking = sum(run.state != "finished" for run in runs)
    said = f", {lacking} of them not finished" if lacking else ""
    print(
        f"{out}: {len(runs)} run{'s' * (len(runs) != 1)}{said}; report.html, report.md, runs.csv and "
        f"{len(built.pictures)} pictures"
    )


if __name__ == "__main__":
    start(main)
