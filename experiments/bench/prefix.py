"""Is a layer fitted better on inputs that the compressed layers before it give (AA-SVD) than on the model's own?

    python experiments/bench/prefix.py MODEL --text heldout.txt --calibrate calibration.txt --sizes 7,30

Twice the same fits, layer by layer: with statistics of the original, and with those of the model whose layers before
are replaced by their banks already. Both results are written dense and measured against the original on the held-out
text. Everything goes through the commands as a user types them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from globe.checkpoint import open_checkpoint


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--text", required=True, help="held-out text")
    parser.add_argument("--calibrate", required=True, help="calibration text")
    parser.add_argument("--sizes", default="7,30", help="m,r of all banks")
    parser.add_argument("--family", default="both", choices=("both", "up", "gate", "down", "all"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--max-tokens", type=int, default=20000)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench-prefix"))
    return parser.parse_args()


def command(name: str, *words: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"globe.{name}", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr or done.stdout)


def compressed(options: argparse.Namespace, layers: str, model: Path, folder: Path) -> Path:
    """Fit layers of `model` with its own statistics, and return the model with them replaced."""
    m, r = options.sizes.split(",")
    run, after = folder / f"run-{layers}", folder / f"model-{layers}"
    command(
        "train",
        f"layer={layers}",
        f"family={options.family}",
        f"bank.m={m}",
        f"bank.r={r}",
        "bank.activation=tanh",
        f"train.steps={options.steps}",
        "train.patience=0",
        "threads=1",
        f"model.path={model}",
        f"calibrate.text={options.calibrate}",
        f"calibrate.out={folder / f'statistics-{layers}'}",
        f"hydra.run.dir={run}",
    )
    if not after.exists():
        command("patch", f"run={run}", f"out={after}", "check=false")
    return after


def figures(options: argparse.Namespace, model: Path) -> str:
    out = model / "evaluation.json"
    words = [f"text={options.text}", f"max_tokens={options.max_tokens}", "experts=0", "activation_windows=0"]
    command("evaluate", f"model={model}", f"against={options.model}", *words, f"out={out}")
    found = json.loads(out.read_text())
    return f"{found['divergence']['kl']:.6f} | {found['perplexity']['perplexity']:.3f}"


def main() -> None:
    options = arguments()
    original, whole, step_by_step = Path(options.model), options.out / "original", options.out / "prefix"
    print("| statistics of | KL, nats | perplexity |\n|---|---|---|")
    print(f"| the original | {figures(options, compressed(options, 'all', original, whole))} |", flush=True)
    model = original
    for layer in open_checkpoint(options.model).moe_layers:
        model = compressed(options, str(layer), model, step_by_step)
    print(f"| the compressed layers before | {figures(options, model)} |")


if __name__ == "__main__":
    main()
