"""All that a GPU has to show, in one command of at most ten minutes: tests, fits of real shapes, the forward pass.

    python experiments/gpu/run.py                            # on a machine with a CUDA device
    python experiments/gpu/run.py --device cpu --tiny        # the same script on a CPU, with tiny sizes: a rehearsal

Weights are made on the spot, nothing is downloaded. Every stage is a process of its own with what is left of the time
as its limit; one that fails or runs out of time is told so, and the others go on. `results.json` and `results.md` in
--out are written anew after each stage. The fits make a fixed number of conjugate-gradient iterations, so that their
multiply-adds can be counted (`globe.sizes.costs.step_work`); rates stand beside the best large product of that dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"real": ("60x1408x2048", "128x768x2048"), "tiny": ("6x20x24", "8x12x32")}
DTYPES = ("same", "bfloat16")
ITERATIONS = 10
"""Of conjugate gradients in a step."""
LARGEST_TESTS = 150.0
"""Seconds that the tests may take of the whole."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a rehearsal")
    parser.add_argument("--steps", type=int, default=60, help="of every fit")
    parser.add_argument("--seconds", type=float, default=560.0, help="that all may take together")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "outputs/gpu")))
    parser.add_argument("--stages", nargs="+", default=["tests", "fits", "forward"])
    parser.add_argument("--fit", help=argparse.SUPPRESS)
    return parser.parse_args()


def experts(n: int, p: int, d: int, device: torch.device) -> torch.Tensor:
    """Experts with power-law spectra, normalised: a part that four groups share, and one of their own."""
    generator = torch.Generator(device=device).manual_seed(0)
    decay = torch.arange(1, p + 1, device=device).pow(-0.5)[:, None]

    def matrix() -> torch.Tensor:
        left, right = (torch.randn(p, size, generator=generator, device=device) for size in (p, d))
        return left @ (decay * right)

    shared = [matrix() for _ in range(4)]
    X = torch.stack([matrix() + shared[i % 4] for i in range(n)])
    return X.sub_(X.mean()).div_(X.std())


def synchronised(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def best_product(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of the fastest of a few products of size^3, two for a multiply-add."""
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    rates = []
    for _ in range(6):
        start = synchronised(device)
        left @ right
        rates.append(2 * size**3 / (synchronised(device) - start))
    return max(rates)


@torch.no_grad()
def fit(shape: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """One bank to the last step: seconds of a step, rate, peak memory, errors."""
    from globe.am.loop import fit_bank
    from globe.am.records import Sizes
    from globe.config.schema import Config
    from globe.fit.options import fit_options
    from globe.sizes.costs import step_work

    n, p, d = map(int, shape.split("x"))
    sizes = Sizes(n, p, d, max(1, n // 4), p // 2)
    device = torch.device(options.device)
    config = Config()
    config.train.steps, config.train.patience, config.train.curvature_dtype = options.steps, 0, dtype
    config.train.cg_iterations, config.train.cg_tolerance = ITERATIONS, 0.0
    X = experts(n, p, d, device)
    fit_bank(
        X, sizes, fit_options(config_of(config, 1)), generator=torch.Generator().manual_seed(1)
    )  # warms up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    stamps = [synchronised(device)]
    result = fit_bank(
        X,
        sizes,
        fit_options(config),
        generator=torch.Generator().manual_seed(0),
        on_step=lambda record: stamps.append(synchronised(device)),
    )
    each = sorted(after - before for before, after in pairwise(stamps[1:]))
    step = each[len(each) // 2]
    product = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    return {
        "shape": shape,
        "curvature_dtype": dtype,
        "steps": result.steps,
        "seconds": stamps[-1] - stamps[0],
        "seconds_of_a_step": step,
        "rate": 2 * step_work(sizes, cg_iterations=ITERATIONS) / step,
        "best_product": best_product(device, product, 64 if options.tiny else 8192),
        "family_bytes": X.nbytes,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "relfrob_start": result.relfrob_start,
        "relfrob": result.relfrob,
    }


def config_of(config: Any, steps: int) -> Any:
    """The same configuration with other steps."""
    import copy

    found = copy.deepcopy(config)
    found.train.steps = steps
    return found


def stages(options: argparse.Namespace) -> dict[str, list[str]]:
    """Name of each part -> its command, in the order of what matters most."""
    kind = "tiny" if options.tiny else "real"
    own = [sys.executable, str(Path(__file__).resolve()), "--device", options.device]
    own += ["--steps", str(options.steps), *(["--tiny"] if options.tiny else [])]
    found: dict[str, list[str]] = {}
    if "fits" in options.stages:
        for shape in SHAPES[kind]:
            for dtype in DTYPES:
                found[f"fit {shape} {dtype}"] = [*own, "--fit", f"{shape}:{dtype}"]
    if "tests" in options.stages:
        tests = ["tests/am", "tests/commands", "-m", "gpu", "-p", "no:cacheprovider", "-n", "0"]
        found["tests"] = [sys.executable, "-m", "pytest", "-q", *tests]
    if "forward" in options.stages:
        script = [sys.executable, str(ROOT / "experiments" / "bench" / "forward.py")]
        sizes = {"real": ("60", "1408", "2048"), "tiny": ("6", "20", "32")}[kind]
        for dtype in ("float32",) if options.tiny else ("bfloat16", "float32"):
            found[f"forward {dtype}"] = [
                *script, "--experts", sizes[0], "--p", sizes[1], "--d", sizes[2], "--layers", "1", "--dtype",
                dtype, "--device", options.device, "--rounds", "5", "--steps", "8",
                "--json", str(options.out.resolve() / f"forward-{dtype}.json"),
            ]  # fmt: skip
    return found


def run_stage(name: str, command: list[str], limit: float) -> dict[str, Any]:
    """Run one part; what it printed last, how long it took, and whether it was well."""
    start = time.perf_counter()
    limit = min(limit, LARGEST_TESTS) if name == "tests" else limit
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=max(limit, 1.0)
        )
        code, output, errors = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        code, output, errors = None, _text(late.stdout), _text(late.stderr)
    found: dict[str, Any] = {"name": name, "code": code, "seconds": time.perf_counter() - start}
    if code == 0 and name.startswith("fit "):
        return found | json.loads(output.splitlines()[-1])
    tail = (output if code in (0, 1) and output.strip() else errors).strip().splitlines()[-30:]
    return found | {"output": tail}


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def _text(value: str | bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""


def markdown(found: list[dict[str, Any]], about: str) -> str:
    """The fits as a table, and the last lines of all else."""
    lines = [
        f"# {about}", "",
        f"m = n/4, r = p/2, dense atoms, SiLU, {ITERATIONS} conjugate-gradient iterations a step", "",
        "| n x p x d | curvature | steps | s | s/step | TFLOP/s | of the best product | experts, GiB | peak, GiB "
        "| RelFrob, start -> end |",
        "|---" * 10 + "|",
    ]  # fmt: skip
    for one in found:
        if "rate" in one:
            peak = "-" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 2**30:.2f}"
            share = one["rate"] / one["best_product"]
            lines.append(
                f"| {one['shape']} | {one['curvature_dtype']} | {one['steps']} | {one['seconds']:.1f} "
                f"| {one['seconds_of_a_step']:.3f} | {one['rate'] / 1e12:.2f} | {share:.2f} "
                f"| {one['family_bytes'] / 2**30:.2f} | {peak} | {one['relfrob_start']:.4f} -> {one['relfrob']:.4f} |"
            )
    for one in found:
        if "rate" not in one:
            ended = {None: "ran out of time", 0: "well"}.get(one["code"], f"failed with code {one['code']}")
            lines += ["", f"## {one['name']}: {ended} after {one['seconds']:.0f} s", "", "```text"]
            lines += [*one["output"], "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    options = arguments()
    if options.fit:
        shape, _, dtype = options.fit.partition(":")
        print(json.dumps(fit(shape, dtype, options)))
        return 0
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here: give --device cpu --tiny for a rehearsal", file=sys.stderr)
        return 1
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    about = f"{named}, PyTorch {torch.__version__}"
    options.out.mkdir(parents=True, exist_ok=True)
    until = time.perf_counter() + options.seconds
    found = []
    for name, command in stages(options).items():
        found.append(run_stage(name, command, until - time.perf_counter()))
        print(f"{name}: {found[-1]['code']} after {found[-1]['seconds']:.1f} s", flush=True)
        (options.out / "results.json").write_text(
            json.dumps({"about": about, "stages": found}, indent=1) + "\n"
        )
        (options.out / "results.md").write_text(markdown(found, about))
    print((options.out / "results.md").read_text())
    return 0 if all(one["code"] == 0 for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
