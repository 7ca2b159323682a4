"""python -m globe.evaluate model=MODEL [against=ORIGINAL] [text=TEXT] [KEY=VALUE ...]

Measure what a model is worth beside the one it was made from: perplexity, divergence, activation errors, sizes.
Both models are in memory at once; of their logits, those of one batch.

model=MODEL        checkpoint folder or hub id (dense or globe), `embedded`, or the folder of a run
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
out=null           JSON file to write; null is evaluation.json in the folder of the model
"""

from __future__ import annotations

import logging
import sys

from globe.config.command_line import run_command
from globe.config.commands import start
from globe.evaluation.measure import evaluate
from globe.evaluation.options import EvaluateOptions, output_file
from globe.evaluation.report import print_evaluation
from globe.files import write_json


def _quiet() -> None:
    """No bars and remarks of transformers between our lines."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)


def main() -> None:
    run_command(__doc__ or "", EvaluateOptions, _evaluate_and_show, positional="model")


def _evaluate_and_show(options: EvaluateOptions) -> None:
    file = output_file(options)
    _quiet()
    result = evaluate(options)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, result.to_dict())
    print_evaluation(result, file)
    if shared := result.settings["calibration_overlap"]:
        print(
            f"{100 * shared:.1f} % of the text stands in the calibration text of the model as well, so the figures "
            "flatter: evaluate on another text",
            file=sys.stderr,
        )
    if not result.parity_holds:
        print(
            f"what the model computes is {result.parity:.1e} from what its files stand for, more than "
            f"{options.dtype} explains: evaluate with dtype=float32, and if that stays, patch again",
            file=sys.stderr,
        )


if __name__ == "__main__":
    start(main)
