"""What the factored forward costs: one layer's experts, dense and in every form, timed in turn in one process.

    python experiments/bench/forward.py                               # 60 experts of 1408 x 2048, r = p/2, float32
    python experiments/bench/forward.py --r 352 --m 8 --dtype bfloat16 --threads 2
    python experiments/bench/forward.py --activation identity         # the linear case, with the latent form

Speed does not depend on how good a bank is, so factors are random, of the sizes given, in gate and up; down stays
dense, and is the same tensor in all. Dense is transformers' own module, by the faster of its implementations. Every
call draws other tokens and experts, as decoding does; the variants take turns at every call, and a ratio is the median
over the calls of the dense time by the variant's, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from globe.hf.experts import GlobeExperts
from globe.hf.layout import BankLayout, Mean, MemberLayout

DENSE = ("eager", "grouped_mm")
"""Implementations of transformers that run on every device"""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=60)
    parser.add_argument("--p", type=int, default=1408, help="rows of an expert")
    parser.add_argument("--d", type=int, default=2048, help="hidden size")
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--m", type=int, help="atoms; n/4 if left out")
    parser.add_argument("--r", type=int, help="rows of an atom; p/2 if left out")
    parser.add_argument("--activation", default="silu", help="of the bank; identity is the linear case")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64, 512], help="tokens of a call")
    parser.add_argument(
        "--calls", type=int, default=12, help="calls of batch 1; of larger ones fewer, at least 5"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the figures to this file")
    return parser.parse_args(argv)


def dense_experts(options: argparse.Namespace) -> Any:
    """The experts module of a Qwen2-MoE of these sizes, with random weights."""
    from transformers import AutoConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

    config = AutoConfig.for_model(
        "qwen2_moe",
        hidden_size=options.d,
        moe_intermediate_size=options.p,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
    )
    module = Qwen2MoeExperts(config).to(options.device, getattr(torch, options.dtype))
    return fill(module, options)


def factored_experts(dense: nn.Module, options: argparse.Namespace) -> GlobeExperts:
    """Gate and up of random banks; the parameter of down is that of `dense`."""
    twin = type(dense)(dense.config)  # type: ignore[operator]
    down = dense.down_proj
    with torch.device("meta"):
        twin.gate_up_proj = nn.Parameter(torch.empty(*dense.gate_up_proj.shape, dtype=down.dtype))  # type: ignore
    twin.down_proj = down
    members = {one: MemberLayout(0, one, tuple(range(options.experts))) for one in ("gate", "up")}
    sizes = {"m": options.m, "r": options.r, "p": options.p, "d": options.d, "atom_rank": None}
    rest = {"activation": options.activation, "lam": 1.0, "mean": Mean.none}
    served = {
        name: (BankLayout(**sizes, **rest, members=(member,)), member, None)  # type: ignore[arg-type]
        for name, member in members.items()
    }
    module = GlobeExperts(twin, served).to(options.device)
    return fill(module, options, but=down)


@torch.no_grad()
def fill(module: Any, options: argparse.Namespace, but: Tensor | None = None) -> Any:
    """Draw all parameters with a spread at which activations stay near one."""
    generator = torch.Generator().manual_seed(options.seed)
    for name, parameter in module.named_parameters():
        if parameter is not but:
            drawn = torch.randn(parameter.shape[1:], generator=generator) / parameter.shape[-1] ** 0.5
            for row in parameter:  # rolled, not drawn anew: numbers don't matter, and drawing takes long
                row.copy_(drawn)
            if name.endswith("codes"):
                parameter.copy_(torch.rand(parameter.shape, generator=generator) / options.m)
    return module.requires_grad_(False).eval()


def variants(
    dense: Any, factored: GlobeExperts, options: argparse.Namespace
) -> dict[str, Callable[..., Tensor]]:
    """Name -> a call of the experts."""

    def by(implementation: str) -> Callable[..., Tensor]:
        def run(*inputs: Tensor) -> Tensor:
            dense.config._experts_implementation = implementation
            return dense(*inputs)

        return run

    def keeping(share: int) -> Callable[..., Tensor]:
        def run(*inputs: Tensor) -> Tensor:
            for projection in factored.projections.values():
                projection.cache.capacity = share * len(projection.row)
            return factored(*inputs)

        return run

    found = {f"dense, {one}": by(one) for one in DENSE}
    return found | {"composed (S_cache=all)": keeping(1), "bank (S_cache=0)": keeping(0)}


@torch.inference_mode()
def measure(dense: Any, factored: GlobeExperts, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per variant and batch."""
    generator = torch.Generator().manual_seed(options.seed)
    dtype, device = getattr(torch, options.dtype), options.device
    runs = variants(dense, factored, options)
    held = resident(dense, factored)
    rows = []
    for batch in options.batch:
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        calls = max(5, options.calls // (1 + batch // 32))
        for call in range(calls + 1):
            x = torch.randn(batch, options.d, generator=generator).to(device, dtype)
            picks = torch.rand(batch, options.experts, generator=generator).topk(options.top_k).indices
            weights = torch.full(picks.shape, 1 / options.top_k, dtype=dtype, device=device)
            names = list(runs)
            for name in names[call % len(names) :] + names[: call % len(names)]:
                taken = timed(runs[name], (x, picks.to(device), weights), options)
                if call:  # the first one of each warms up
                    seconds[name].append(taken)
        best = min(
            (name for name in runs if name.startswith("dense")),
            key=lambda one: statistics.median(seconds[one]),
        )
        for name, times in seconds.items():
            ratios = [d / t for d, t in zip(seconds[best], times, strict=True)]
            rows.append(
                {
                    "variant": name,
                    "batch": batch,
                    "tokens_per_second": batch / statistics.median(times),
                    "ratio": statistics.median(ratios),
                    "bytes": held[name.split(",")[0].split(" ")[0]],
                    "read": read_numbers(name, batch, options) / read_numbers("dense", batch, options),
                }
            )
    return rows


def timed(run: Callable[..., Tensor], inputs: tuple[Tensor, ...], options: argparse.Namespace) -> float:
    """Return the seconds of a call: of the processor for one thread, where others count less, else elapsed."""
    cuda = options.device.startswith("cuda")
    clock = time.process_time if options.threads == 1 and not cuda else time.perf_counter
    if cuda:
        torch.cuda.synchronize()
    start = clock()
    run(*inputs)
    if cuda:
        torch.cuda.synchronize()
    return clock() - start


def resident(dense: Any, factored: GlobeExperts) -> dict[str, int]:
    """Bytes of each form; composed bases stand beside the bank they were made of."""
    bank = sum(one.nbytes for one in factored.parameters())
    for projection in factored.projections.values():
        projection.compose()
    composed = sum(projection.composed_bytes for projection in factored.projections.values())
    return {"dense": sum(one.nbytes for one in dense.parameters()), "composed": bank + composed, "bank": bank}


def read_numbers(name: str, batch: int, options: argparse.Namespace) -> float:
    """Numbers that one call reads on average; those of a linear bank are of the latent form."""
    n, p, d, m, r = options.experts, options.p, options.d, options.m, options.r
    hit = n * (1 - (1 - options.top_k / n) ** batch)
    if name.startswith("dense"):
        return 3 * hit * p * d
    form = hit * r * d if name.startswith("composed") else m * r * d
    return hit * p * d + 2 * (form + hit * p * r)


def show(rows: list[dict[str, Any]]) -> None:
    dense = next(row for row in rows if row["variant"].startswith("dense"))
    table = Table()
    for heading in (
        "variant",
        "MB",
        "of dense",
        "batch",
        "tokens/s",
        "speed, of dense",
        "numbers read, of dense",
    ):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in rows:
        table.add_row(
            row["variant"],
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['bytes'] / dense['bytes']:.2f}",
            str(row["batch"]),
            f"{row['tokens_per_second']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['read']:.2f}",
        )
    Console(width=110).print(table)


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    options.m, options.r = options.m or options.experts // 4, options.r or options.p // 2
    torch.set_num_threads(options.threads)
    dense = dense_experts(options)
    factored = factored_experts(dense, options)
    rows = measure(dense, factored, options)
    print(
        f"{platform.machine()}, {options.threads} thread(s), torch {torch.__version__}, {options.dtype}, "
        f"{options.experts} x {options.p} x {options.d}, m={options.m}, r={options.r}, {options.activation}"
    )
    show(rows)
    if options.json:
        Path(options.json).write_text(json.dumps({"options": vars(options), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
