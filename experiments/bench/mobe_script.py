"""MoBE's own public training script as one more method of `fit.py`, from a file that the user has fetched.

    git clone https://github.com/inclusionAI/MoBE
    python experiments/bench/fit.py --mobe-script MoBE/train.py --methods "mobe_script tanh" "globe tanh" --times 20 40

The script runs in a process of its own, on a checkpoint that holds nothing but the matrices to fit, with the rate,
the start and the half precision that are its own. It prints its loss every 200 steps; each such line is stamped with
the processor seconds of that process, and once they pass the limit the process ends. Nothing that it writes is read.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from globe.errors import GlobeError

# Runs inside the new process: argv is the limit, the threads, the script and its options.
_STAMPED = """
import runpy, sys, time
import torch, safetensors.torch
limit, threads, script = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(threads)
sys.argv = sys.argv[3:]
out, started = sys.stdout, time.process_time()

class Stamped:
    line = ""
    def write(self, text):
        self.line += text
        while "\\n" in self.line:
            line, self.line = self.line.split("\\n", 1)
            seconds = time.process_time() - started
            out.write(f"{seconds:.6f} {line}\\n")
            out.flush()
            if seconds > limit:
                raise SystemExit(0)
    def flush(self):
        pass

sys.stdout = Stamped()
runpy.run_path(script, run_name="__main__")
"""
_LOSS = re.compile(r"^(\S+) Epoch (\d+), Scaled Loss: (\S+),")


def script_history(
    script: Path, W: Tensor, *, m: int, r: int, activation: str, seconds: float, threads: int
) -> list[tuple[float, float]]:
    """Return (processor seconds, RelFrob) at every loss that the script prints within that time.

    Parameters
    ----------
    script
        MoBE's `train.py`.
    W
        (n, p, d): the experts as the checkpoint has them. The script takes n/m of them for each atom of its start, so
        m has to divide n. Its error is relative to W as it rounds it, to half precision.
    activation
        `silu` or `tanh`.

    Raises
    ------
    GlobeError
        If m does not divide n, or the script ends early or prints no loss.
    """
    n, p, d = W.shape
    if n % m:
        raise GlobeError(f"--mobe-script needs m to divide the number of experts: m={m}, {n} experts.")
    rounded = W.half().contiguous()
    exact = rounded.double()
    # the script's loss is the mean square of (W - What) / std(W)
    to_relative = float(exact.var() / exact.square().mean())
    with tempfile.TemporaryDirectory() as folder:
        names = {f"model.layers.0.mlp.experts.{one}.up_proj.weight": rounded[one].clone() for one in range(n)}
        save_file(names, Path(folder) / "model.safetensors")
        index = Path(folder) / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
        sizes = {
            "num_matrices": n,
            "rows_per_matrix": p,
            "cols": d,
            "num_B": m,
            "truncation": r,
            "batch_size": n,
        }
        own = {
            "index_path": index,
            "base_dir": folder,
            "save_path": f"{folder}/out",
            "matrix_type": "up_proj",
        }
        whole = {
            **own,
            **sizes,
            "start_layer": 0,
            "end_layer": 1,
            "num_epochs": 10**7,
            "activation": activation,
        }
        options = [word for key, value in whole.items() for word in (f"--{key}", str(value))]
        done = subprocess.run(
            [sys.executable, "-c", _STAMPED, str(seconds), str(threads), str(script), *options],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)},
            capture_output=True,
            text=True,
            check=False,
        )
    found = [match for line in done.stdout.splitlines() if (match := _LOSS.match(line))]
    if done.returncode or not found:
        last = (done.stderr.strip().splitlines() or ["no loss was printed"])[-1]
        raise GlobeError(f"MoBE's script {script} ended with {done.returncode}: {last}")
    return [(float(at), math.sqrt(float(loss) * to_relative)) for at, _, loss in map(re.Match.groups, found)]
