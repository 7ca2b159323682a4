"""What the factored forward costs: bytes resident and tokens per second beside the dense model, in one run.

    python experiments/bench/forward.py                                  # embedded model, random banks
    python experiments/bench/forward.py CHECKPOINT --run RUN             # the banks of a run
    python experiments/bench/forward.py --experts 60 --p 352 --d 512 --layers 4 --m 15 --r 176 --dtype bfloat16

Speed does not depend on how good a bank is, so without --run its factors are random, of the sizes given, in gate
and up of every layer; with --experts there is no checkpoint either, but a Qwen2-MoE of these sizes. Every variant
decodes: each sequence of the batch adds one token per step to a short context. Dense and factored steps alternate
and a figure is the median over the rounds, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from globe.bank.file import BankArtefact, Member, write_artefact
from globe.hf import patch_model
from globe.hf.experts import GlobeExperts
from globe.hf.footprint import Footprint, footprint
from globe.hf.quantizer import set_cache


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", help="folder or hub id; left out, the embedded model")
    parser.add_argument("--run", help="run folder; left out, random banks of --m and --r in every layer")
    parser.add_argument("--experts", type=int, help="no checkpoint: a Qwen2-MoE of this many experts")
    parser.add_argument("--p", type=int, default=352, help="with --experts: rows of an expert")
    parser.add_argument("--d", type=int, default=512, help="with --experts: hidden size")
    parser.add_argument("--layers", type=int, default=4, help="with --experts")
    parser.add_argument("--top-k", type=int, default=4, help="with --experts")
    parser.add_argument("--m", type=int, help="atoms of random banks; n/4 if left out")
    parser.add_argument("--r", type=int, help="rows of an atom of random banks; p/2 if left out")
    parser.add_argument("--activation", default="silu", help="of random banks; identity is the linear case")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="sequences decoded together")
    parser.add_argument("--context", type=int, default=8, help="tokens in the cache before decoding")
    parser.add_argument("--steps", type=int, default=8, help="decoding steps in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the figures to this file")
    return parser.parse_args()


def dense_model(options: argparse.Namespace) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    import globe.embedded

    dtype = getattr(torch, options.dtype)
    if options.experts is None:
        path = options.checkpoint or str(globe.embedded.path())
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(options.device)
    config = AutoConfig.for_model(
        "qwen2_moe",
        vocab_size=512,
        hidden_size=options.d,
        intermediate_size=4 * options.p,
        moe_intermediate_size=options.p,
        shared_expert_intermediate_size=64,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        decoder_sparse_step=1,
    )
    torch.manual_seed(options.seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to(options.device)


def random_run(model: nn.Module, options: argparse.Namespace, folder: Path) -> Path:
    """A run of random banks for gate and up of every layer of the model."""
    from globe.hf.structure import experts_modules

    generator = torch.Generator().manual_seed(options.seed)
    for layer, name in experts_modules(model).items():
        experts, double, d = model.get_submodule(name).gate_up_proj.shape
        p = double // 2
        m, r = options.m or experts // 4, options.r or p // 2
        for family in ("gate", "up"):
            artefact = BankArtefact(
                members=(Member(layer, family, 0, experts, tuple(range(experts))),),
                codes=torch.rand(experts, m, generator=generator) / m,
                adapters=torch.randn(experts, p, r, generator=generator) / r**0.5,
                bank=torch.randn(m, r, d, generator=generator) / d**0.5,
                activation=options.activation,
                lam=1.0,
                source={"model_type": model.config.model_type},
                config={},
                metrics={},
            )
            write_artefact(artefact, folder / "banks" / f"layer{layer:03d}.{family}")
    return folder


class Decoder:
    """Decodes the same random tokens with one model; a call is one round, its result seconds per step."""

    def __init__(self, model: Any, batch: int, options: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(options.seed)
        shape = (batch, options.context + options.steps)
        tokens = torch.randint(0, model.config.vocab_size, shape, generator=generator)
        self.tokens, self.model, self.options = tokens.to(options.device), model, options

    @torch.no_grad()
    def __call__(self) -> float:
        context = self.options.context
        past = self.model(self.tokens[:, :context], use_cache=True).past_key_values
        self._wait()
        clock = time.perf_counter()
        for step in range(context, self.tokens.shape[1]):
            past = self.model(self.tokens[:, step : step + 1], past_key_values=past, use_cache=True)
            past = past.past_key_values
        self._wait()
        return (time.perf_counter() - clock) / self.options.steps

    def _wait(self) -> None:
        if self.options.device.startswith("cuda"):
            torch.cuda.synchronize()


def variants(model: nn.Module, factored: nn.Module) -> dict[str, Callable[[], nn.Module]]:
    """Name -> the model, its cache set and empty. The factored variants share one model."""
    experts = max(one.num_experts for one in factored.modules() if isinstance(one, GlobeExperts))

    def cached(S_cache: int | str) -> Callable[[], nn.Module]:
        def prepare() -> nn.Module:
            set_cache(factored, S_cache)
            return factored

        return prepare

    return {
        "dense": lambda: model,
        "S_cache=0": cached(0),
        f"S_cache={experts // 2}": cached(experts // 2),
        "S_cache=all": cached("all"),
    }


def measure(model: nn.Module, factored: nn.Module, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per variant and batch."""
    rows = []
    for batch in options.batch:
        seconds: dict[str, list[float]] = {}
        held: dict[str, Footprint] = {}
        for _ in range(options.rounds):
            for name, prepare in variants(model, factored).items():
                chosen = prepare()
                decode = Decoder(chosen, batch, options)
                decode()  # fills the cache
                seconds.setdefault(name, []).append(decode())
                held[name] = footprint(chosen)
        dense = statistics.median(seconds["dense"])
        for name, times in seconds.items():
            step = statistics.median(times)
            rows.append(
                {
                    "variant": name,
                    "batch": batch,
                    "tokens_per_second": batch / step,
                    "ratio": dense / step,
                    "model_bytes": held[name].total,
                    "expert_bytes": held[name].experts,
                    "cache_bytes": held[name].cache,
                }
            )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    dense = next(row for row in rows if row["variant"] == "dense")
    table = Table()
    for heading in ("variant", "experts MB", "of dense", "cached MB", "batch", "tokens/s", "of dense"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in rows:
        table.add_row(
            row["variant"],
            f"{row['expert_bytes'] / 1e6:.2f}",
            f"{row['expert_bytes'] / dense['expert_bytes']:.3f}",
            f"{row['cache_bytes'] / 1e6:.2f}",
            str(row["batch"]),
            f"{row['tokens_per_second']:.1f}",
            f"{row['ratio']:.2f}",
        )
    Console(width=100).print(table)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    model = dense_model(options)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(options.run) if options.run else random_run(model, options, Path(folder))
        factored = patch_model(copy.deepcopy(model), run)
    rows = measure(model, factored, options)
    print(f"{platform.machine()}, {options.threads} thread(s), torch {torch.__version__}, {options.dtype}")
    show(rows)
    if options.json:
        Path(options.json).write_text(json.dumps({"options": vars(options), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
