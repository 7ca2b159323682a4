"""A dense output of GloBE in llama.cpp: convert it to GGUF with llama.cpp's own script, and compare what both write.

    python examples/llama_cpp.py outputs/dense --llama-cpp ~/llama.cpp --out model.gguf
    python examples/llama_cpp.py outputs/dense --llama-cpp ~/llama.cpp --out model.gguf --untie --pre gpt-2

Needs a clone of llama.cpp, whose `convert_hf_to_gguf.py` converts and whose `build/bin/llama-completion` (or
`--binary`) writes. Greedy text of llama.cpp and of transformers is compared in float32 on a few prompts; the exit
status is 1 if any differs.
llama.cpp takes some things for granted that the configuration of a `qwen2_moe` may say otherwise, converts such a model
without complaint and writes nonsense: these are refused here before anything is written.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROMPTS = (
    "The",
    "It was a",
    "In the morning",
    "He said that",
    "There is no",
    "She went to the",
    "When",
    "I have",
)
BINARIES = ("build/bin/llama-completion", "build/bin/llama-cli", "llama-completion", "llama-cli")
CONVERT = """\
import runpy, sys
script, pre = sys.argv[1:3]
sys.path[:0] = [script.rpartition("/")[0], script.rpartition("/")[0] + "/gguf-py"]
import conversion.base as base
for kind in vars(base).values():
    if isinstance(kind, type) and "get_vocab_base_pre" in vars(kind):
        kind.get_vocab_base_pre = lambda self, tokenizer: pre
sys.argv = [script, *sys.argv[3:]]
runpy.run_path(script, run_name="__main__")
"""
"""Runs the script with the pre-tokenizer given instead of looked up by a hash, which it has of known models alone."""


class Refused(Exception):
    """One sentence for the user."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", type=Path, help="folder of a dense output, or of any checkpoint that transformers loads"
    )
    parser.add_argument("--llama-cpp", type=Path, required=True, help="folder of llama.cpp")
    parser.add_argument("--binary", type=Path, help="program that completes a prompt, if it stands elsewhere")
    parser.add_argument("--out", type=Path, required=True, help="GGUF file to write")
    parser.add_argument(
        "--pre", help="pre-tokenizer, such as gpt-2, where llama.cpp does not know the tokenizer"
    )
    parser.add_argument("--untie", action="store_true", help="convert a copy with a head of its own")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--tokens", type=int, default=24, help="that are written for each prompt")
    return parser.parse_args(argv)


def check(options: argparse.Namespace) -> tuple[Path, Path]:
    """Return the converter and the program. Raises Refused for what would fail later, or come out wrong."""
    try:
        config = json.loads((options.model / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise Refused(
            f"{options.model} has no readable config.json ({error}): give a checkpoint folder"
        ) from error
    kind = str(config.get("model_type"))
    if kind.startswith("globe_"):
        raise Refused(
            f"{options.model} is a compact checkpoint, which llama.cpp can't run: patch the run with format=dense"
        )
    if kind == "qwen2_moe" and config.get("norm_topk_prob"):
        raise Refused(
            "llama.cpp never normalises the expert weights of a qwen2_moe, and this model does (norm_topk_prob=true): "
            "it would write something else, so this model can't run there"
        )
    if kind == "qwen2_moe" and config.get("tie_word_embeddings") and not options.untie:
        raise Refused(
            "llama.cpp wants a head of its own from a qwen2_moe, and this model's is its embedding "
            "(tie_word_embeddings=true): give --untie"
        )
    if options.tokens < 1:
        raise Refused(f"--tokens={options.tokens} is not possible: give a number of at least 1")
    if options.out.exists():
        raise Refused(f"{options.out} exists: remove it, or give another --out")
    script = options.llama_cpp / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise Refused(f"{script} does not exist: give the folder of a clone of llama.cpp")
    places = [options.binary] if options.binary else [options.llama_cpp / name for name in BINARIES]
    program = next((place for place in places if place.is_file()), None)
    if program is None:
        raise Refused(f"none of {', '.join(map(str, places))} exists: build llama.cpp, or give --binary")
    return script, program


def untied(model: Path, folder: Path) -> Path:
    """Write a copy of a checkpoint whose head is a matrix of its own."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    loaded.config.tie_word_embeddings = False
    loaded.lm_head.weight = torch.nn.Parameter(loaded.get_input_embeddings().weight.detach().clone())
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def convert(script: Path, model: Path, out: Path, pre: str | None) -> None:
    """Run llama.cpp's converter, in float32. Raises Refused with the last line of what it says."""
    rest = [str(model), "--outfile", str(out), "--outtype", "f32"]
    command = [str(script), *rest] if pre is None else ["-c", CONVERT, str(script.resolve()), pre, *rest]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode != 0 or not out.is_file():
        said = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        hint = (
            "; give --pre gpt-2, or whichever its tokenizer is like"
            if "get_vocab_base_pre" in done.stderr
            else ""
        )
        raise Refused(f"{script} failed ({said}){hint}")


def written(program: Path, gguf: Path, prompt: str, tokens: int) -> str:
    """Return the greedy continuation by llama.cpp."""
    command = [str(program), "-m", str(gguf), "-p", prompt, "-n", str(tokens), "--temp", "0", "-no-cnv"]
    done = subprocess.run(
        [*command, "--no-display-prompt", "--no-warmup"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Refused(f"{program} failed ({said})")
    return done.stdout


def reference(model: Path, prompts: Sequence[str], tokens: int) -> list[str]:
    """Return the greedy continuations by transformers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    texts = []
    for prompt in prompts:
        given = tokenizer(prompt, return_tensors="pt")
        found = loaded.generate(**given, max_new_tokens=tokens, do_sample=False)
        texts.append(tokenizer.decode(found[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def same(one: str, other: str) -> bool:
    """Return whether two continuations agree, but for white space at the ends and what programs print behind it."""
    return one.strip() == other.strip().removesuffix("[end of text]").strip()


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    try:
        script, program = check(options)
        with tempfile.TemporaryDirectory() as scratch:
            model = untied(options.model, Path(scratch)) if options.untie else options.model
            convert(script, model, options.out, options.pre)
        agreed = 0
        expected = reference(options.model, options.prompts, options.tokens)
        for prompt, text in zip(options.prompts, expected, strict=True):
            found = written(program, options.out, prompt, options.tokens)
            good = same(text, found)
            agreed += good
            print(
                f"{'same' if good else 'DIFFERENT'}: {prompt!r} -> {text!r}"
                + ("" if good else f", {found!r}")
            )
    except Refused as refusal:
        print(refusal, file=sys.stderr)
        return 2
    print(f"{options.out}: {agreed} of {len(options.prompts)} continuations are those of transformers")
    return 0 if agreed == len(options.prompts) else 1


if __name__ == "__main__":
    sys.exit(main())
