"""python -m globe.evaluate model=MODEL [against=ORIGINAL] [text=TEXT] [KEY=VALUE ...]
python -m globe.evaluate sweep=FOLDER [KEY=VALUE ...]

Measure what a model is worth beside the one it was made from: perplexity, divergence, activation errors, sizes.
Both models are in memory at once; of their logits, those of one batch, and with a sweep up to 2 GiB of the original's.

model=MODEL        checkpoint folder or hub id (dense or globe), `embedded`, or the folder of a run
sweep=FOLDER       instead: every run below a folder, each patched in memory; evaluation.json goes into each run's
                   folder, where the report finds it, and the same command goes on with the runs that lack one
against=auto       the original: a checkpoint, `embedded`, `none`; auto is what the model was made from, if it says so
text=embedded      UTF-8 text file, or the held-out text that comes with the package
window=256         tokens the model sees at once
stride=128         tokens between two windows; each token is counted once, with at least window - stride before it
max_tokens=null    use the first so many tokens of the text; null is all
batch=8            windows that go through the models together
dtype=float32      arithmetic: float32, bfloat16, float16, or auto (as stored)
device=auto        auto, cpu, cuda or mps
tokenizer=null     folder of a tokenizer; null is the original's, or else the model's
S_cache=null       bases that stay composed per layer and family in a factored model; null is as it was saved, or as
                   the run says
activation_windows=16   windows on which the error of each MoE block is measured; 0 is none
experts=8          experts drawn at random for spot checks; 0 is none
top_k=8            leading singular vectors that are compared in them
seed=0             of the bootstrap and of the draws
tasks=[]           lm-eval tasks to run besides, on both models; needs the extra globe-moe[eval]
include_path=null  folder with lm-eval task files of your own
limit=null         examples per task; null is all
out=null           JSON file to write; null is evaluation.json in the folder of the model. Not with sweep
"""

from __future__ import annotations

import sys

from globe.config.command_line import run_command
from globe.config.commands import start
from globe.config.console import say, show_table, wide_console
from globe.errors import ConfigError, SweepError
from globe.evaluation.measure import evaluate
from globe.evaluation.options import EvaluateOptions, output_file
from globe.evaluation.report import print_evaluation
from globe.evaluation.sweep import evaluate_sweep, shared_with_calibration, sweep_table
from globe.files import write_json
from globe.hf.loading import quiet


def main() -> None:
    run_command(
        __doc__ or "",
        EvaluateOptions,
        _evaluate_and_show,
        positional="model",
        resumes=lambda options: options.sweep is not None,
    )


def _evaluate_and_show(options: EvaluateOptions) -> None:
    if options.sweep is not None and options.model is None:
        _evaluate_sweep_and_show(options, options.sweep)
        return
    file = output_file(options)
    quiet()
    result = evaluate(options)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, result.to_dict())
    print_evaluation(result, file)
    _warn_of_overlap(result.settings["calibration_overlap"])
    if not result.parity_holds:
        print(
            f"what the model computes is {result.parity:.1e} from what its files stand for, more than "
            f"{options.dtype} explains: evaluate with dtype=float32, and if that stays, patch again",
            file=sys.stderr,
        )


def _warn_of_overlap(shared: float | None) -> None:
    if shared:
        print(
            f"{100 * shared:.1f} % of the text stands in the calibration text of the model as well, so the figures "
            "flatter: evaluate on another text",
            file=sys.stderr,
        )


def _evaluate_sweep_and_show(options: EvaluateOptions, folder: str) -> None:
    if options.out is not None:
        raise ConfigError(
            "out is not possible with sweep, whose runs get an evaluation.json each: leave it out"
        )
    quiet()
    console = wide_console()
    result = evaluate_sweep(options, lambda line: say(console, line))
    if result.records:
        show_table(console, sweep_table(result))
        say(console, f"next: python -m globe.report sweep={folder} shows them beside their errors")
    _warn_of_overlap(max((shared_with_calibration(one) for one in result.records.values()), default=None))
    if result.failed:
        name, reason = next(iter(result.failed.items()))
        count = len(result.failed)
        raise SweepError(
            f"{count} run{'s' * (count != 1)} of {folder} could not be measured, such as {name}: {reason}"
        )


if __name__ == "__main__":
    start(main)
