"""Error of few bits over the ridge of their refit, by bank: does the share that was chosen on one matrix suit others?

    python experiments/bench/ridge.py MODEL CALIBRATION_TEXT [--bits 2] [--shares 0.02 0.08] [--coded] [--layers ..]

Every bank of the layers is fitted in the metric of its inputs (one square linear atom, three steps) and rounded with
each share of the noise as its ridge; printed is the error in the metric once it is rounded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = "import sys; import globe.bank.precision as p; p._FEEDBACK_OF_ROWS = float(sys.argv.pop(1)); "
RUN += "sys.argv[0] = 'globe.train'; from globe.train import main; main()"


def errors(given: argparse.Namespace, share: float, folder: Path) -> dict[str, float]:
    """Return the error of every bank in the metric, by its key."""
    options = [
        f"model.path={given.model}",
        "family=all",
        f"layer={given.layers}",
        "threads=1",
        "bank.m=1",
        "bank.r=d",
    ]
    options += [
        "bank.activation=identity",
        "train.steps=3",
        f"bank.bits={given.bits}",
        f"bank.coded={given.coded}",
    ]
    options += [f"calibrate.text={given.text.resolve()}", f"calibrate.out={folder / 'calibration'}"]
    run = folder / f"{share}"
    command = [sys.executable, "-c", RUN, str(share), *options, f"hydra.run.dir={run}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    banks = json.loads((run / "summary.json").read_text())["banks"]
    return {bank["key"]: bank["metrics"]["relfrob_metric"] for bank in banks}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.005, 0.02, 0.08])
    parser.add_argument("--coded", action="store_true")
    parser.add_argument("--layers", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="globe-ridge-") as folder:
        found = [errors(given, share, Path(folder)) for share in given.shares]
    print("| bank |", " | ".join(f"{share:g}" for share in given.shares), "|")
    print("|---" * (len(found) + 1) + "|")
    for key in found[0]:
        print(f"| {key} |", " | ".join(f"{one[key]:.4f}" for one in found), "|")


if __name__ == "__main__":
    main()
