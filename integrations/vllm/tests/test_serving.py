"""vLLM serves compact checkpoints as transformers runs them, and stops with a sentence where it can't.

Runs in GloBE's environment and starts engines in another: `make test-vllm`, or
VLLM_PYTHON=python pytest integrations/vllm.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = pytest.mark.skipif(
    not PYTHON, reason="VLLM_PYTHON names no Python with vLLM: use make test-vllm"
)
CASES = ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "packed", "embedded")
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")},
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = os.environ.get("GLOBE_VLLM_MODELS")
    if made:
        return Path(made)
    folder = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, HERE / "models.py", folder], check=True, timeout=900)
    return folder


def engine(
    checkpoint: Path, form: str, *options: str, **environment: str
) -> tuple[dict[str, Any] | None, str]:
    """What one engine printed as its result, or None, and all of its output."""
    done = subprocess.run(
        [PYTHON, HERE / "engine.py", checkpoint, form, *options],
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return (json.loads(lines[0][7:]) if lines else None), done.stdout + done.stderr


def assert_same(
    found: dict[str, Any] | None, text: str, folder: Path, reference: str = "reference.json"
) -> dict[str, Any]:
    assert found is not None, text[-3000:]
    expected = json.loads((folder / reference).read_text())
    assert found["tokens"] == expected["tokens"]
    pairs = zip(found["logprobs"], expected["logprobs"], strict=True)
    assert max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True)) < 1e-3
    return expected


@pytest.mark.parametrize("form", ["bank", "composed"])
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_transformers_and_bytes_those_predicted(
    models: Path, case: str, form: str
) -> None:
    found, text = engine(models / case / "globe", form)
    expected = assert_same(found, text, models / case)
    assert found is not None
    assert found["bytes"] == pytest.approx(expected["bytes"][form], rel=0.03)
    if form == "bank":
        assert found["bytes"] < expected["bytes"]["dense"]


def test_the_dense_form_needs_no_plugin(models: Path) -> None:
    """The model of the package, compressed and written dense, is one that vLLM knows."""
    dense = models / "embedded" / "dense"
    found, text = engine(dense, "dense")
    assert_same(found, text, models / "embedded", "dense.json")
    for checkpoint in (dense, models / "embedded" / "original"):
        found, text = engine(checkpoint, "dense", "--dtype", "bfloat16")
        assert found is not None, text[-3000:]
        assert all(len(tokens) == 16 for tokens in found["tokens"])


def test_compiled(models: Path) -> None:
    found, text = engine(models / "qwen2_moe" / "globe", "bank", "--compile")
    assert_same(found, text, models / "qwen2_moe")


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two processes of vLLM want two cores")
@pytest.mark.parametrize("case", ["qwen2_moe", "qwen3_moe"])
def test_tensor_parallelism(models: Path, case: str) -> None:
    bound = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    found, text = engine(models / case / "globe", "bank", "--tp", "2", **bound)
    assert_same(found, text, models / case)


# --- no path to silent garbage ------------------------------------------------------------------------------------


@pytest.fixture
def copy(models: Path, tmp_path: Path) -> Path:
    shutil.copytree(models / "qwen3_moe" / "globe", tmp_path / "copy")
    return tmp_path / "copy"


def refused(folder: Path, *words: str, **environment: str) -> None:
    found, text = engine(folder, "bank", **environment)
    assert found is None
    for word in words:
        assert word in text, text[-3000:]


def test_without_the_plugin_vllm_stops(copy: Path) -> None:
    refused(copy, "globe_qwen3_moe", VLLM_PLUGINS="")


@pytest.mark.parametrize("version", [3, 99], ids=["coded adapters", "newer"])
def test_a_checkpoint_of_another_version_is_refused(copy: Path, version: int) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["globe_version"] = version
    (copy / "config.json").write_text(json.dumps(config))
    refused(copy, f"globe_version={version}", "update globe-vllm, or patch with packed=false")


def change(folder: Path, lose: str = "", rename: tuple[str, str] = ("", "")) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    kept = {name: value for name, value in tensors.items() if not lose or not name.endswith(lose)}
    assert len(kept) < len(tensors) or rename[0]
    renamed = {name.replace(*rename) if rename[0] else name: value for name, value in kept.items()}
    save_file(renamed, file, metadata={"format": "pt"})


def test_a_missing_factor_is_refused(copy: Path) -> None:
    change(copy, lose="layers.1.mlp.experts.globe_up.codes")
    refused(copy, "layer 1 up got no codes")


def test_a_missing_dense_tensor_is_refused(copy: Path) -> None:
    change(copy, lose="layers.1.self_attn.o_proj.weight")
    refused(copy, "not initialized from", "o_proj")


def test_an_unknown_factor_is_refused(copy: Path) -> None:
    change(copy, rename=("globe_gate.adapters", "globe_gate.adaptors"))
    refused(copy, "holds adaptors of", "patch the run again")


def test_an_impossible_form_is_refused(copy: Path) -> None:
    found, text = engine(copy, "half")
    assert found is None
    assert "choose bank or composed" in text


# --- over HTTP ----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(models: Path, tmp_path: Path) -> Iterator[tuple[str, Path, subprocess.Popen[bytes]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "serve.log"
    # what `vllm serve` runs; the command itself asks for a distribution called vllm, which that of vllm-cpu is not
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--dtype", "float32"]
    command += ["--model", str(models / "qwen2_moe" / "globe")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "128"]
    with log.open("w") as file:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{port}", log, process
    finally:
        process.terminate()
        process.wait(timeout=60)


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read() or "{}")


def test_vllm_serve_answers_an_openai_request(
    server: tuple[str, Path, subprocess.Popen[bytes]], models: Path
) -> None:
    url, log, process = server
    for _ in range(300):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            ask(f"{url}/health")
            break
        except OSError:
            time.sleep(2)
    else:
        pytest.fail(log.read_text()[-3000:])
    expected = json.loads((models / "qwen2_moe" / "reference.json").read_text())
    body = {"prompt": [5, 77, 301, 12], "max_tokens": 16, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    name = ask(f"{url}/v1/models")["data"][0]["id"]
    answer = ask(f"{url}/v1/completions", body | {"model": name})["choices"][0]
    assert answer["logprobs"]["token_logprobs"] == pytest.approx(expected["logprobs"][0], abs=1e-3)
