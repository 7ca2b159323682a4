"""Small fits by as many processes as torchrun starts, or by one: the factors of all experts go into a file.

torchrun --nproc-per-node=4 tests/am/sharded_worker.py FOLDER
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))

from planted import configured, plant, sizes_of

from globe.am.loop import fit_bank
from globe.am.ranks import Ranks, Sharded
from globe.am.records import FitState, StepRecord
from globe.config import InitConfig, Seeding
from globe.normalise import normalise

N, M, R = 11, 5, 4
DENSE = InitConfig()
SPARSE = {"every": 2, "control_every": 1}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"lambda_A": 1e-4}, {}),
    "silu, target support": (
        {"activation": "silu", "lam": 1.0, "codes": SPARSE, "lambda_A": 1e-4, "init": DENSE},
        {"target_support": 2},
    ),
    "tanh, low-rank atoms": (
        {"activation": "tanh", "lam": 1.0, "lambda_A": 1e-4, "init": DENSE, "cg_tolerance": 0.1},
        {"atom_rank": 3},
    ),
    "gelu, separate codes, ridges": (
        {
            "activation": "gelu",
            "lam": 0.5,
            "codes": {"joint": False, "every": 2},
            "lambda_A": 1e-3,
            "lambda_B": 1e-3,
            "init": InitConfig(seeding=Seeding.random),
        },
        {},
    ),
    "simplex, priced codes": ({"codes": {"simplex": True, "l1": 0.05, "every": 2}, "lambda_A": 1e-4}, {}),
}
"""Options of the fit, and of its sizes."""
_GENTLE = {
    "steps": 7,
    "checkpoint_every": 0.0,
    "evaluate_every": 2,
    "cg_iterations": 6,
    "cg_tolerance": 0.1,
    "init": DENSE,
}
"""Many iterations of conjugate gradients would blow up the rounding of sums in another order."""


def fit(name: str, ranks: Ranks, dtype: torch.dtype, resume: FitState | None = None) -> dict[str, Any]:
    """Bank, codes, RelFrob and the state after the third step, of all experts."""
    options, more = CASES[name]
    config = configured(**(_GENTLE | options))
    W = plant(N, m=M, r=R, noise=0.3, activation="tanh", lam=1.0, dtype=dtype).X
    sizes = sizes_of(W, M, R, **more)
    X = normalise(ranks.own(W), centre="scalar", scale="family", ranks=ranks).experts
    records: list[StepRecord] = []
    states: list[FitState] = []
    generator = torch.Generator().manual_seed(3)
    result = fit_bank(
        X,
        sizes,
        config,
        generator=generator,
        export_dtype=dtype,  # bfloat16 would blow a last digit up to its own
        resume=resume,
        on_step=records.append,
        on_checkpoint=states.append,
        ranks=ranks,
    )
    return {
        "bank": result.factors.bank,
        "codes": ranks.gather(result.factors.codes),
        "adapters": ranks.collect(result.factors.adapters),
        "relfrob": [record.relfrob for record in records] + [result.relfrob, result.energy_captured],
        "supports": [[r.support_median, r.support_mean, r.support_min, r.support_max] for r in records],
        "decisions": [[r.accepted, r.temperature, r.validation_relfrob or 0.0] for r in records],
        "state": states[2] if len(states) > 2 else None,
    }


def all_fits(ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Every case in float64, the second in float32 too, and one that goes on from its own state."""
    found = {name: fit(name, ranks, torch.float64) for name in CASES}
    sparse = "silu, target support"
    found["float32"] = fit(sparse, ranks, torch.float32)
    found["resumed"] = fit(sparse, ranks, torch.float64, found[sparse]["state"])
    return found


def write(folder: Path, found: dict[str, dict[str, Any]]) -> None:
    tensors = {
        f"{name}/{part}": one[part].contiguous()
        for name, one in found.items()
        for part in ("bank", "codes", "adapters")
    }
    save_file(tensors, folder / "factors.safetensors")
    numbers = {
        name: {part: one[part] for part in ("relfrob", "supports", "decisions", "apart")}
        for name, one in found.items()
    }
    (folder / "numbers.json").write_text(json.dumps(numbers))


def read(folder: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((folder / "numbers.json").read_text())
    for name, tensor in load_file(folder / "factors.safetensors").items():
        case, part = name.split("/")
        found[case][part] = tensor
    return found


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    found = all_fits(Sharded.of(N, torch.device("cpu")))
    for one in found.values():
        first = one["bank"].clone()
        dist.broadcast(first, 0)
        apart = (one["bank"] - first).abs().max() / first.abs().max()
        dist.all_reduce(apart, dist.ReduceOp.MAX)
        one["apart"] = float(apart)
    if dist.get_rank() == 0:
        write(Path(sys.argv[1]), found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
