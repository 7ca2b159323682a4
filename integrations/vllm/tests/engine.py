"""Start vLLM on one checkpoint, compact or dense, and print what it generates, as one line of JSON after "RESULT ".

python engine.py CHECKPOINT FORM [--compile] [--tp N] [--dtype TYPE]       # in the environment of vLLM
"""

from __future__ import annotations

import argparse
import json
import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from models_data import NEW_TOKENS, PROMPTS


def resident(model) -> int:
    """Bytes of the routed experts in memory."""
    from globe_vllm.loading import PLACES

    total, banks = 0, {}
    for families in PLACES.values():
        for factors in families.values():
            total += factors.nbytes()
            if factors.bank is not None:
                banks[id(factors.bank)] = sum(tensor.nbytes for tensor in factors.bank.held.values())
    dense = [p.nbytes for name, p in model.named_parameters() if name.endswith("w2_weight")]
    return total + sum(banks.values()) + sum(dense)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("form", help="bank, composed, or dense: no plugin")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    if options.form == "dense":
        os.environ["VLLM_PLUGINS"] = ""  # as where the plugin is not installed
    else:
        os.environ["GLOBE_VLLM_FORM"] = options.form
    if options.tp == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # of the function below, into this very process
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=options.checkpoint,
        dtype=options.dtype,
        enforce_eager=not options.compile,
        max_model_len=128,
        max_num_batched_tokens=256,
        tensor_parallel_size=options.tp,
    )
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=1, ignore_eos=True)
    found = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], sampling)
    outputs = [one.outputs[0] for one in found]
    result = {
        "tokens": [list(one.token_ids) for one in outputs],
        "logprobs": [
            [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)]
            for one in outputs
        ],
        "bytes": llm.apply_model(resident)[0] if options.tp == 1 and options.form != "dense" else None,
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
