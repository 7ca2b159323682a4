"""Small fits by several processes, or by one: the factors of all experts go into a file for each number of processes.

python tests/am/sharded_worker.py FOLDER 2 4
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))

from planted import configured, plant, sizes_of

from globe.am.loop import fit_bank
from globe.am.records import FitState, StepRecord
from globe.config.choices import Seeding
from globe.config.schema import InitConfig
from globe.fit.normalise import normalise
from globe.fit.options import fit_options
from globe.numerics.group import ProcessGroup

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
        {"activation": "tanh", "lam": 1.0, "lambda_A": 1e-4, "init": DENSE},
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
    "steps": 5,
    "checkpoint_every": 0.0,
    "evaluate_every": 2,
    "cg_iterations": 40,
    "cg_tolerance": 0.5,
    "init": DENSE,
}
"""Conjugate gradients made to the end on such small systems would blow up the rounding of sums in another order."""
IN_FLOAT32 = ("silu, target support", "tanh, low-rank atoms")
BY_MANY = ("silu, target support", "tanh, low-rank atoms")
"""What more than two processes are given, since exchanges among them are slow where cores are few."""


def fit(name: str, group: ProcessGroup, dtype: torch.dtype, resume: FitState | None = None) -> dict[str, Any]:
    """Factors of all experts, figures of every step and last of the result, and the state after the third step."""
    options, more = CASES[name]
    config = configured(**(_GENTLE | options))
    W = plant(N, m=M, r=R, noise=0.3, activation="tanh", lam=1.0, dtype=dtype).X
    sizes = sizes_of(W, M, R, **more)
    X = normalise(group.own(W), centre="scalar", scale="family", group=group).experts
    records: list[StepRecord] = []
    states: list[FitState] = []
    generator = torch.Generator().manual_seed(3)
    result = fit_bank(
        X,
        sizes,
        fit_options(config, export_dtype=dtype),  # bfloat16 would blow a last digit up to its own
        generator=generator,
        resume=resume,
        on_step=records.append,
        on_checkpoint=states.append,
        group=group,
    )
    return {
        "bank": result.factors.bank,
        "codes": group.gather(result.factors.codes),
        "adapters": group.collect(result.factors.adapters),
        "relfrob": [record.relfrob for record in records] + [result.relfrob],
        "captured": result.energy_captured,
        "supports": [[r.support_median, r.support_mean, r.support_min, r.support_max] for r in records],
        "decisions": [[r.accepted, r.temperature, r.validation_relfrob or 0.0] for r in records],
        "state": states[2] if len(states) > 2 else None,
    }


def all_fits(group: ProcessGroup, processes: int) -> dict[str, dict[str, Any]]:
    """Cases in float64, some in float32 too, and one that goes on from its own state; `processes` says how many."""
    many = processes > 2
    found = {name: fit(name, group, torch.float64) for name in (BY_MANY if many else CASES)}
    for name in IN_FLOAT32[-1:] if many else IN_FLOAT32:
        found[f"{name}, float32"] = fit(name, group, torch.float32)
    if not many:
        sparse = "silu, target support"
        found["resumed"] = fit(sparse, group, torch.float64, found[sparse]["state"])
    return found


def file_of(folder: Path, processes: int) -> Path:
    return folder / f"{processes}.safetensors"


def write(file: Path, found: dict[str, dict[str, Any]]) -> None:
    tensors = {
        f"{name}/{part}": one[part].contiguous()
        for name, one in found.items()
        for part in ("bank", "codes", "adapters")
    }
    save_file(tensors, file)
    numbers = {
        name: {part: one[part] for part in ("relfrob", "captured", "supports", "decisions", "apart")}
        for name, one in found.items()
    }
    file.with_suffix(".json").write_text(json.dumps(numbers))


def read(file: Path) -> dict[str, dict[str, Any]]:
    found = json.loads(file.with_suffix(".json").read_text())
    for name, tensor in load_file(file).items():
        case, part = name.split("/")
        found[case][part] = tensor
    return found


def work(folder: Path, rank: int, processes: int) -> None:
    """The part of one process."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/{processes}.store"
    limit = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes, timeout=limit)
    found = all_fits(ProcessGroup.of(N, torch.device("cpu")), processes)
    for one in found.values():
        first = one["bank"].clone()
        dist.broadcast(first, 0)
        apart = (one["bank"] - first).abs().max() / first.abs().max()
        dist.all_reduce(apart, dist.ReduceOp.MAX)
        one["apart"] = float(apart)
    if rank == 0:
        write(file_of(folder, processes), found)
    dist.destroy_process_group()


def forked(folder: Path, rank: int, processes: int) -> int:
    """A process that has imported all it needs; this one must not have calculated anything yet."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work(folder, rank, processes)
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> int:
    folder, failed = Path(sys.argv[1]), False
    for processes in map(int, sys.argv[2:]):
        children = [forked(folder, rank, processes) for rank in range(processes)]
        failed |= any(os.waitpid(child, 0)[1] for child in children)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
