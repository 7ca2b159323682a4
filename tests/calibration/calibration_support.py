"""Tiny checkpoints with a tokenizer and a text, for tests of calibration."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from globe.calibration.collect import LayerSums, watched
from globe.calibration.experts_module import ExpertsView, experts_modules
from globe.calibration.statistics import LayerStatistics
from globe.checkpoint import open_checkpoint
from globe.config.calibrate_options import CalibrateConfig
from tiny_models import write_tiny

LETTERS = "abcdefghijklmnopqrstuvwxyz ,.;"


def write_letters(folder: Path) -> None:
    """A tokenizer of single letters, with numbers that every tiny model knows."""
    numbers = {letter: number + 3 for number, letter in enumerate(LETTERS)} | {"?": 0}
    made = Tokenizer(models.WordLevel(numbers, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?").save_pretrained(folder)


def text_file(folder: Path, length: int = 700) -> Path:
    generator = torch.Generator().manual_seed(2)
    letters = torch.randint(0, len(LETTERS), (length,), generator=generator).tolist()
    path = folder / "text.txt"
    path.write_text("".join(LETTERS[one] for one in letters))
    return path


def make(tmp_path: Path, model_type: str = "qwen3_moe", **overrides: Any) -> tuple[Any, CalibrateConfig]:
    """A checkpoint with a tokenizer, and options for it."""
    folder = write_tiny(model_type, tmp_path / "model", **overrides)
    write_letters(folder)
    text = text_file(tmp_path)
    options = CalibrateConfig(text=str(text), tokens=13 * 11, window=13, batch=4, out=str(tmp_path / "out"))
    return open_checkpoint(str(folder)), options


def output_information(model: Any, windows: Int[Tensor, "w t"]) -> dict[int, Tensor]:
    """Layer -> F of its experts' output, from gradients through a whole model, one token's at a time.

    Tokens are drawn as the streamed pass draws them.
    """
    model.requires_grad_(False)
    outputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            outputs[layer] = torch.zeros_like(output, requires_grad=True)
            return output + outputs[layer]

        return hook

    modules = {layer: model.get_submodule(name) for layer, name in sorted(experts_modules(model).items())}
    handles = [module.register_forward_hook(keep(layer)) for layer, module in modules.items()]
    found: dict[int, list[Tensor]] = {layer: [] for layer in modules}
    for number, ids in enumerate(windows):
        logits = model(ids[None], use_cache=False).logits[0].float()
        generator = torch.Generator().manual_seed(number)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        sum(logits[at].log_softmax(-1)[token] for at, token in enumerate(drawn.tolist())).backward()
        for layer, one in outputs.items():
            assert one.grad is not None
            rows = one.grad.reshape(-1, one.shape[-1]).double()
            found[layer] += [torch.outer(row, row) for row in rows]
    for handle in handles:
        handle.remove()
    return {layer: torch.stack(one).mean(0) for layer, one in found.items()}


@torch.no_grad()
def collect(
    model: Any, windows: Int[Tensor, "w t"], *, batch: int = 8, rank: int | None = None
) -> dict[int, LayerStatistics]:
    """Layer -> statistics, from one pass of a whole model in memory over windows of token ids."""
    found: dict[int, LayerStatistics] = {}
    with ExitStack() as stack:
        sums = []
        for layer, name in sorted(experts_modules(model).items()):
            module = model.get_submodule(name)
            one = LayerSums(layer, ExpertsView(module, name), rank=rank)
            stack.enter_context(watched(module, one))
            sums.append(one)
        device = next(model.parameters()).device
        for ids in windows.split(batch):
            model(ids.to(device), use_cache=False)
        for one in sums:
            found[one.layer] = one.finish()
    return found
