"""How much memory a whole-model run takes, in multiples of one layer's one family, and does it grow with the layers?

    python experiments/bench/memory.py                                   # 2 and 6 layers of 60 x 704 x 1024
    python experiments/bench/memory.py --layers 1 --family up --phases   # where the peak is
    python experiments/bench/memory.py --experts 12 --p 88 --d 128 --target inf

Writes a synthetic Qwen2-MoE checkpoint (experts with decaying spectra, a part of them shared) and runs `globe.train`
on it in a process of its own, with few steps: memory does not depend on how many there are. The process notes its
resident memory once its imports are done; its peak from there to the end, less that, is divided by the bytes of one
family of one layer in the fit's dtype (173 MB in float32 at the default sizes). Exit code 1 when the largest such
ratio is above --target, or grows by more than 5 % from the fewest to the most layers. Needs Linux.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_GROWTH = 1.05
_PHASES = ("source_of", "read_experts", "fit_bank", "finalise", "bank_figures", "write_artefact")
"""What `globe.fit.one_bank` calls for a bank, in this order."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--family", default="both", choices=("up", "gate", "both"))
    parser.add_argument("--experts", type=int, default=60)
    parser.add_argument("--p", type=int, default=704)
    parser.add_argument("--d", type=int, default=1024)
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the checkpoint"
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--cg", type=int, default=2, help="conjugate-gradient iterations; memory needs no more"
    )
    parser.add_argument("--target", type=float, default=4.0, help="the largest ratio that passes")
    parser.add_argument("--phases", action="store_true", help="also the peak of each phase, over all banks")
    parser.add_argument("--option", action="append", default=[], help="a further option of globe.train")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    unit = options.experts * options.p * options.d * 4
    ratios = []
    with tempfile.TemporaryDirectory(prefix="globe-memory-") as root:
        for layers in options.layers:
            folder = Path(root) / f"model{layers}"
            write_checkpoint(folder, layers, options)
            figures = measure(folder, Path(root) / f"run{layers}", options)
            above = figures["peak"] - figures["idle"]
            ratios.append(above / unit)
            print(
                f"{layers} layers, {options.family}: idle {figures['idle'] / 1e6:.0f} MB, peak "
                f"{figures['peak'] / 1e6:.0f} MB, {above / 1e6:.0f} MB above = {ratios[-1]:.2f} x {unit / 1e6:.0f} MB "
                f"({figures['seconds']:.0f} s)"
            )
            for name, peak in figures["phases"].items() if options.phases else ():
                print(f"    {name:16} {(peak - figures['idle']) / unit:6.2f} x")
    grows = ratios[-1] > _GROWTH * ratios[0]
    passed = max(ratios) <= options.target and not grows
    print(
        f"{'PASS' if passed else 'FAIL'}: at most {max(ratios):.2f} x (target {options.target:g} x); grows: {grows}"
    )
    return 0 if passed else 1


def write_checkpoint(folder: Path, layers: int, options: argparse.Namespace) -> None:
    """Gate and up of every layer; experts of full rank with a decaying spectrum, half of whose energy is shared."""
    import torch

    from globe.checkpoint.shards import ShardWriter

    generator = torch.Generator().manual_seed(0)
    p, d, rank = options.p, options.d, min(options.p, options.d) // 8
    with ShardWriter(folder, max_shard_bytes=10**8) as writer:
        for layer in range(layers):
            for family in ("gate", "up"):
                decay = torch.arange(1, rank + 1) ** -0.5
                shared = torch.randn(p, rank, generator=generator) * decay
                rows = torch.randn(rank, d, generator=generator)
                for expert in range(options.experts):
                    own = shared + torch.randn(p, rank, generator=generator) * decay
                    weight = own @ rows + 0.5 * torch.randn(p, d, generator=generator)
                    name = f"model.layers.{layer}.mlp.experts.{expert}.{family}_proj.weight"
                    writer.write(name, (0.02 * weight).to(getattr(torch, options.dtype)))
                    if family == "up":  # not learned, but a layer without it is no layer of the architecture
                        down = torch.zeros(d, p, dtype=torch.bfloat16)
                        writer.write(f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight", down)
    config = {
        "model_type": "qwen2_moe",
        "num_hidden_layers": layers,
        "hidden_size": d,
        "moe_intermediate_size": p,
        "num_experts": options.experts,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def measure(model: Path, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [
        *(f"model.path={model}", f"family={options.family}", "layer=all", f"hydra.run.dir={output}"),
        *(f"train.steps={options.steps}", "train.patience=0", "train.checkpoint_every=0"),
        *(f"train.cg_iterations={options.cg}", "threads=1", *options.option),
    ]
    figures = output.with_suffix(".json")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    worker = [sys.executable, __file__, "--worker", str(figures), *command]
    log = output.with_suffix(".log")
    with log.open("wb") as stream:
        if subprocess.run(worker, stdout=stream, stderr=stream, env=environment, check=False).returncode:
            sys.exit(f"the run failed:\n{log.read_text()[-2000:]}")
    return json.loads(figures.read_text())


def worker(figures: Path, command: list[str]) -> None:
    import globe.fit.one_bank
    from globe.train import main as train

    peaks: dict[str, int] = {}
    for name in _PHASES:
        setattr(globe.fit.one_bank, name, watched(name, getattr(globe.fit.one_bank, name), peaks))
    begun, idle = time.monotonic(), resident("VmRSS")
    sys.argv = ["globe.train", *command]
    reset_peak()
    train()
    peak = max(resident("VmHWM"), *peaks.values())
    record = {"idle": idle, "peak": peak, "phases": peaks, "seconds": time.monotonic() - begun}
    figures.write_text(json.dumps(record), encoding="utf-8")


def watched(name: str, function: Callable[..., Any], peaks: dict[str, int]) -> Callable[..., Any]:
    """The same function, with the largest resident memory while it ran, and between it and the one before."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        peaks["between"] = max(peaks.get("between", 0), resident("VmHWM"))
        reset_peak()
        try:
            return function(*args, **kwargs)
        finally:
            peaks[name] = max(peaks.get(name, 0), resident("VmHWM"))
            reset_peak()

    return wrapper


def resident(which: str) -> int:
    """Bytes resident now (VmRSS) or at most since the last reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which + ":"))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(main())
