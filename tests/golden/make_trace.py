"""The golden trace: RelFrob after every step of small float64 fits. `make golden` writes it anew.

A change that should not alter numbers leaves `trace.json` as it is; one that should commits its diff.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from globe.am.loop import fit_bank
from globe.am.records import Sizes, StepRecord
from globe.config.choices import Activation, Curve, Dictionary
from globe.config.fit_options import CurveConfig
from globe.config.schema import BankConfig, CodesConfig, Config, ScheduleConfig, TrainConfig
from globe.fit.options import fit_options

FILE = Path(__file__).with_name("trace.json")
N, P, D, M, R = 9, 8, 13, 4, 5
STEPS = 12
HOMOTOPY = CurveConfig(Curve.cosine, 0.0, 1.0, warmup=0.1, hold=0.3)


def cases() -> dict[str, tuple[Config, Sizes]]:
    """Name -> configuration and sizes of one fit."""
    linear, silu = CurveConfig(start=0.0, end=0.0), BankConfig(activation=Activation.silu)

    def config(lam: CurveConfig = linear, codes: CodesConfig | None = None, **train: object) -> Config:
        return Config(
            bank=silu,
            codes=codes or CodesConfig(),
            schedule=ScheduleConfig(lam=lam),
            train=TrainConfig(
                steps=STEPS,
                patience=0,
                cg_iterations=6,
                cg_tolerance=0.1,
                **({"lambda_A": 0.0} | train),  # type: ignore[arg-type]
            ),
        )

    dense = Sizes(N, P, D, M, R)
    sparse = CodesConfig(every=2, control_every=1)
    separate = CodesConfig(joint=False, every=3)
    return {
        "gauss_newton linear": (config(), dense),
        "gauss_newton silu homotopy": (config(HOMOTOPY), dense),
        "gauss_newton target support": (config(codes=sparse), Sizes(N, P, D, M, R, target_support=2)),
        # the ridge keeps the bases of few low-rank atoms from rounding away the tolerance
        "gauss_newton low-rank atoms": (config(lambda_A=1e-4), Sizes(N, P, D, 6, R, atom_rank=3)),
        "gauss_newton ridge, separate codes": (config(codes=separate, lambda_A=1e-4), dense),
        "mod": (config(dictionary=Dictionary.mod), dense),
    }


def trace(config: Config, sizes: Sizes) -> list[float]:
    """RelFrob after each step of one fit of experts with structure and noise, from fixed seeds."""
    draw = torch.Generator().manual_seed(20)
    basis = torch.randn(3, R, D, generator=draw, dtype=torch.float64)
    mixed = torch.einsum("ij,jrd->ird", torch.rand(N, 3, generator=draw, dtype=torch.float64), basis)
    X = torch.randn(N, P, R, generator=draw, dtype=torch.float64) @ mixed
    X = X / X.std() + 0.3 * torch.randn(N, P, D, generator=draw, dtype=torch.float64)
    records: list[StepRecord] = []
    fit_bank(
        X, sizes, fit_options(config), generator=torch.Generator().manual_seed(21), on_step=records.append
    )
    return [record.relfrob for record in records]


def traces() -> dict[str, list[float]]:
    return {name: trace(config, sizes) for name, (config, sizes) in cases().items()}


def main() -> None:
    before = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    now = traces()
    for name, values in now.items():
        old = before.get(name, [])
        if len(old) != len(values):
            print(f"{name}: new, {len(values)} steps, ends at {values[-1]:.6f}")
            continue
        change = max(abs(a / b - 1) for a, b in zip(values, old, strict=True))
        print(f"{name}: largest relative change {change:.1e}, ends at {values[-1]:.6f}")
    FILE.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
