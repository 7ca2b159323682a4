"""What a calibration takes, beside what it says beforehand: peak memory, disk and processor seconds.

    python experiments/bench/calibration.py CHECKPOINT --text TEXT --tokens 30000
    python experiments/bench/calibration.py --sizes 32x352x1024 --tokens 8192 --memory 0.8    # random weights

Memory is the peak above what the process held after its imports. Linux only.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import globe.embedded
from globe.calibration.run import calibrate, prepare
from globe.checkpoint import open_checkpoint
from globe.config.calibrate_options import CalibrateConfig
from globe.numerics.device import return_large_blocks


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", help="folder; left out, the embedded model")
    parser.add_argument(
        "--sizes", help="n x p x d: no checkpoint but two layers of a Qwen2-MoE of this shape"
    )
    parser.add_argument("--text", default="embedded")
    parser.add_argument("--tokens", type=int, default=61440)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--memory", type=float)
    return parser.parse_args()


def write_random(sizes: str, folder: Path) -> Path:
    """A checkpoint of random weights in bfloat16, with the tokenizer of the embedded model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    n, p, d = map(int, sizes.split("x"))
    config = AutoConfig.for_model(
        "qwen2_moe",
        vocab_size=4096,
        hidden_size=d,
        intermediate_size=4 * p,
        moe_intermediate_size=p,
        shared_expert_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=n,
        num_experts_per_tok=4,
        decoder_sparse_step=1,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in globe.embedded.path().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def measure(path: Path, options: argparse.Namespace, out: Path) -> None:
    chosen = CalibrateConfig(
        text=options.text, tokens=options.tokens, batch=options.batch, memory=options.memory, out=str(out)
    )
    checkpoint = open_checkpoint(str(path))
    print(prepare(checkpoint, chosen).plan.sentence)
    idle = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.process_time()
    calibrate(checkpoint, chosen)
    disk = sum(one.stat().st_size for one in out.iterdir())
    print(
        f"it took {(status('VmHWM') - idle) / 1e9:.2f} GB of memory, {disk / 1e9:.2f} GB of disk that stay, and "
        f"{time.process_time() - start:.1f} s of the processor"
    )


def main() -> None:
    options = arguments()
    return_large_blocks()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "statistics"
        warm = CalibrateConfig(text="embedded", tokens=256, out=str(Path(scratch) / "warm"))
        calibrate(open_checkpoint(None), warm, layers=[0])  # which imports what a calibration imports
        if options.sizes:
            measure(write_random(options.sizes, Path(scratch) / "model"), options, out)
        else:
            measure(Path(options.checkpoint or globe.embedded.path()), options, out)


if __name__ == "__main__":
    sys.exit(main())
