"""Run the numerical tests again under the arithmetic of other processors: `make test-portable`.

First a few small fits are made under each setting and their bits compared, since a setting that changes no bit needs no
tests of its own. Then the tests run once per distinct arithmetic, with examples of Hypothesis that are drawn anew. The
table gives each setting, the first setting with the same bits, and how many tests passed and failed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TESTS = (
    "tests/golden",
    "tests/numerics/test_error_figures.py",
    *(
        f"tests/am/test_{name}.py"
        for name in (
            "codes",
            "curvature",
            "descent",
            "gauss_newton",
            "kernels",
            "low_precision",
            "metric",
            "metric_fits",
            "recovery",
            "ridge",
            "warm_start",
            "whole_steps",
        )
    ),
    "tests/baselines/test_baselines.py",
    "tests/fit/test_finalise.py",
)
"""What is decided by sums, factorisations and their conditioning. Options, files, schedules and whole runs compute with
these same functions, and `make test` has them once."""


class Setting(NamedTuple):
    """Environment and pytest options of one run."""

    environment: dict[str, str] = {}  # noqa: RUF012  (immutable by use)
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        parts = [f"{key}={value}" for key, value in self.environment.items()] + list(self.options)
        return " ".join(parts) or "as it is"


PLAINEST = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
"""Arithmetic that every x86-64 processor has."""
SETTINGS = [
    Setting(),
    Setting(PLAINEST),
    *(Setting({"ATEN_CPU_CAPABILITY": value}) for value in ("default", "avx2", "avx512")),
    *(
        Setting({"ONEDNN_MAX_CPU_ISA": value})
        for value in ("AVX2", "AVX512_CORE", "AVX512_CORE_BF16", "AVX512_CORE_AMX")
    ),
    *(Setting({"MKL_CBWR": value}) for value in ("COMPATIBLE", "AVX2", "AVX512")),
    *(Setting({"MKL_ENABLE_INSTRUCTIONS": value}) for value in ("AVX2", "AVX512")),
    Setting({"OMP_NUM_THREADS": "2"}),
    Setting({}, ("--curvature=bfloat16",)),
    Setting({}, ("--curvature=same",)),
]


def environment_of(setting: Setting) -> dict[str, str]:
    names = {name for one in SETTINGS for name in one.environment}
    plain = {name: value for name, value in os.environ.items() if name not in names}
    return (
        plain | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"} | setting.environment
    )


def fingerprint(curvature: str) -> str:
    """Digest of the factors of a few small fits: both dtypes, dense and low-rank, linear and not."""
    import torch

    from globe.am.loop import fit_bank
    from globe.am.records import Sizes
    from globe.config.choices import Activation, CurvatureDtype
    from globe.config.fit_options import CurveConfig
    from globe.config.schema import BankConfig, Config, ScheduleConfig, TrainConfig
    from globe.fit.options import fit_options

    digest = hashlib.sha256()
    for activation, lam, (n, p, d), atom_rank, dtype in (
        ("identity", 0.0, (9, 21, 34), None, torch.float32),
        ("silu", 1.0, (9, 21, 34), 3, torch.float64),
        ("tanh", 1.0, (8, 136, 248), None, torch.float32),
    ):
        X = torch.randn(n, p, d, generator=torch.Generator().manual_seed(0)).to(dtype)
        config = Config(
            bank=BankConfig(activation=Activation(activation)),
            schedule=ScheduleConfig(lam=CurveConfig(start=lam, end=lam)),
            train=TrainConfig(steps=4, patience=0, curvature_dtype=CurvatureDtype(curvature)),
        )
        sizes = Sizes(n, p, d, 5, 13, atom_rank=atom_rank)
        factors = fit_bank(X, sizes, fit_options(config), generator=torch.Generator().manual_seed(1)).factors
        for part in factors:
            if part is not None:
                digest.update(part.double().numpy().tobytes())
    return digest.hexdigest()[:12]


def fingerprint_of(setting: Setting) -> str:
    curvature = next((option.removeprefix("--curvature=") for option in setting.options), "auto")
    command = [sys.executable, __file__, "--fingerprint", curvature]
    done = subprocess.run(command, env=environment_of(setting), capture_output=True, text=True, check=True)
    return done.stdout.strip()


def run_tests(setting: Setting, options: argparse.Namespace) -> tuple[int, int]:
    """Numbers of tests that passed and failed; names of the latter are printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(options.workers)]
    command += [
        "--new-examples",
        "-m",
        "not slow and not gpu",
        *setting.options,
        *options.pytest,
        *(options.tests or TESTS),
    ]
    done = subprocess.run(
        command, env=environment_of(setting), cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines() or [done.stderr]
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            print(f"  {line}", flush=True)
    found = re.findall(r"(\d+) (passed|failed|error)", lines[-1])
    counts = {kind: int(count) for count, kind in found}
    if not counts:
        print("\n".join(lines[-20:]) + done.stderr, flush=True)
    return counts.get("passed", 0), counts.get("failed", 0) + counts.get("error", 0) + (not counts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", nargs="*", help=f"folders and files of tests (default: {' '.join(TESTS)})")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--every", action="store_true", help="run the tests under settings of equal bits too")
    parser.add_argument("--bits-only", action="store_true", help="compare bits, run no tests")
    parser.add_argument("--pytest", nargs="*", default=[], help="further options of pytest")
    parser.add_argument("--fingerprint", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fingerprint:
        print(fingerprint(options.fingerprint))
        return 0
    firsts: dict[str, Setting] = {}
    rows, failures = ["| setting | bits as | passed | failed |", "|---|---|---|---|"], 0
    for setting in SETTINGS:
        first = firsts.setdefault(fingerprint_of(setting), setting)
        counts = ("", "")
        if (first is setting or options.every) and not options.bits_only:
            print(f"{setting.name} ...", flush=True)
            passed, failed = run_tests(setting, options)
            counts, failures = (str(passed), str(failed)), failures + failed
        rows.append(
            f"| {setting.name} | {'itself' if first is setting else first.name} | {counts[0]} | {counts[1]} |"
        )
    print("\n".join(rows))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
