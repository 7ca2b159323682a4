"""Does `dry_run=true` say what a fit then takes? Predicted and measured, side by side, for several shapes.

    python experiments/bench/dry_run.py                                  # three shapes, about two minutes
    python experiments/bench/dry_run.py --shapes 60x704x1024 --m n/4 --atom-rank r/8
    python experiments/bench/dry_run.py --cpu-time                       # on a shared machine, one thread

Each shape gets a synthetic Qwen2-MoE checkpoint and a process of its own for the prediction and for the fit, so that
each peak is its own. Seconds per step are the mean over the 60 steps of a default fit, without its start: early steps
take fewer conjugate-gradient iterations, and coding and validation have their share. Exit code 1 when a ratio is off by
more than --tolerance. Needs
Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

STEPS = 60


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["16x44x64", "60x176x256", "24x352x512"])
    parser.add_argument("--m", default="n/4")
    parser.add_argument("--r", default="p/2")
    parser.add_argument("--atom-rank", default="null")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tolerance", type=float, default=0.25)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds for both; one thread")
    parser.add_argument("--option", action="append", default=[], help="a further option of globe.train")
    parser.add_argument("--child", choices=("write", "predict", "fit"), help=argparse.SUPPRESS)
    return parser.parse_args()


def write_checkpoint(folder: Path, n: int, p: int, d: int) -> None:
    """One layer of random experts with decaying spectra, as Qwen2-MoE names them."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    decay = torch.linspace(1.0, 0.1, p)[:, None]
    tensors = {}
    for expert in range(n):
        for family in ("up", "gate"):
            weight = torch.randn(p, p, generator=generator) @ (decay * torch.randn(p, d, generator=generator))
            tensors[f"model.layers.0.mlp.experts.{expert}.{family}_proj.weight"] = weight * (0.02 / p**0.5)
        tensors[f"model.layers.0.mlp.experts.{expert}.down_proj.weight"] = torch.zeros(d, p)
    config = {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_hidden_layers": 1,
        "num_experts": n,
        "hidden_size": d,
        "moe_intermediate_size": p,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def child(options: argparse.Namespace) -> None:
    """In a process of its own: predict, or fit; a line of JSON with the bytes and the seconds per step."""
    import globe.am.loop
    import globe.sizes.dry_run
    import globe.sizes.timing
    from globe.checkpoint import open_checkpoint
    from globe.config.keywords import configure
    from globe.numerics.device import peak_host_bytes
    from globe.runs.folder import RunFolder
    from globe.sizes.interface import learn_banks

    clock = time.process_time if options.cpu_time else time.perf_counter
    config = configure({}, options.option)
    if options.child == "predict":
        globe.sizes.timing.time.perf_counter = clock  # type: ignore[attr-defined]
        (found,) = globe.sizes.dry_run.dry_run(config)
        print(json.dumps([found.bytes, found.seconds]))
        return
    times: list[float] = []
    inner = globe.am.loop.am_step

    def timed(*args: object, **kwargs: object) -> object:
        times.append(clock())
        return inner(*args, **kwargs)  # type: ignore[arg-type]

    globe.am.loop.am_step = timed  # type: ignore[assignment]
    folder = RunFolder(Path(tempfile.mkdtemp(prefix="globe-dry-run-")) / "run")
    learn_banks(config, open_checkpoint(config.model.path), folder)
    print(json.dumps([peak_host_bytes(), (times[-1] - times[0]) / (len(times) - 1)]))


def ask(what: str, options: argparse.Namespace, overrides: list[str]) -> tuple[float, float]:
    command = [sys.executable, __file__, "--child", what, *(["--cpu-time"] if options.cpu_time else [])]
    command += [part for override in overrides for part in ("--option", override)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    peak, seconds = json.loads(done.stdout.splitlines()[-1])
    return peak, seconds


def main() -> int:
    options = arguments()
    if options.child == "write":
        write_checkpoint(Path(options.option[0]), *map(int, options.shapes[0].split("x")))
        return 0
    if options.child:
        child(options)
        return 0
    kind = "CPU" if options.cpu_time else "wall-clock"
    print(
        f"{options.threads} thread(s) of {platform.machine()}, PyTorch {torch.__version__}, {kind} seconds, load "
        f"{os.getloadavg()[0]:.1f} at the start\n\n"
        "| n x p x d | MiB predicted | measured | ratio | s/step predicted | measured | ratio |\n"
        + "|---" * 7
        + "|"
    )
    worst = 1.0
    with tempfile.TemporaryDirectory(prefix="globe-dry-run-") as root:
        for shape in options.shapes:
            n, p, d = shape.split("x")
            folder = Path(root) / shape
            # by another process: a child's peak would count what its parent held when it was started
            command = [
                sys.executable,
                __file__,
                "--child",
                "write",
                "--shapes",
                shape,
                "--option",
                str(folder),
            ]
            subprocess.run(command, check=True)
            overrides = [
                f"model.path={folder}",
                "layer=0",
                f"threads={options.threads}",
                f"train.steps={STEPS + 1}",
            ]
            overrides += [f"bank.m={options.m}", f"bank.r={options.r}", f"bank.atom_rank={options.atom_rank}"]
            overrides += ["train.patience=0", *options.option]
            said, took = ask("predict", options, overrides), ask("fit", options, overrides)
            ratios = [one / other for one, other in zip(said, took, strict=True)]
            worst = max([worst, *(max(ratio, 1 / ratio) for ratio in ratios)])
            print(
                f"| {n} x {p} x {d} | {said[0] / 2**20:.0f} | {took[0] / 2**20:.0f} | {ratios[0]:.2f} "
                f"| {said[1]:.4f} | {took[1]:.4f} | {ratios[1]:.2f} |",
                flush=True,
            )
    print(
        f"\nlargest factor between predicted and measured: {worst:.2f}, allowed {1 + options.tolerance:.2f}"
    )
    return int(worst > 1 + options.tolerance)


if __name__ == "__main__":
    sys.exit(main())
