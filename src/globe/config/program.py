"""The console script `globe`: `globe train family=up`, `globe patch RUN out=OUT`, `globe --version`.

A console script does not look for modules in the current folder, as `python -m` does: a `yaml.py` that lies there is
not run.
"""

from __future__ import annotations

import difflib
import importlib
import sys

from globe.config.commands import say, start

COMMANDS = {
    "train": "learn the banks of a checkpoint, or of every run of a sweep",
    "patch": "put the banks of a run into its model and write that as a checkpoint",
    "evaluate": "measure perplexity, divergence and sizes of a model beside its original",
    "report": "make tables and pictures of runs",
    "inspect": "show what a checkpoint, a run or a bank holds",
    "calibrate": "collect what the experts of a model do on a text",
}


def main() -> None:
    """Run the command that the first word names. Leaves with SystemExit as `globe.config.commands.start` does."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_usage())
    elif name in ("-V", "--version", "version"):
        print(f"globe {importlib.import_module('globe').__version__}")
    elif name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        say(f"{name!r} is no command of globe: give one of {', '.join(COMMANDS)}{meant}")
        sys.exit(1)
    else:
        command = importlib.import_module(f"globe.{name}")
        sys.argv = [f"globe {name}", *rest]
        if name == "train":  # which starts itself, since Hydra has to
            command.main()
        else:
            start(command.main)


def _usage() -> str:
    lines = [f"  {name:10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "globe COMMAND [KEY=VALUE ...]",
            "",
            *lines,
            "",
            "globe COMMAND --help tells the options; globe --version",
        ]
    )
