"""`examples/llama_cpp.py` with stand-ins for llama.cpp's converter and program: what it refuses, runs and compares."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import globe.embedded
from globe.hf import load
from scripts import load_script

FILE = Path(__file__).parents[2] / "examples" / "llama_cpp.py"
CONVERTER = """\
import sys
from pathlib import Path
import conversion.base
model, _, out = sys.argv[1:4]
assert sys.argv[4:] == ["--outtype", "f32"]
Path(out).write_text(conversion.base.Text().get_vocab_base_pre(None))
"""
BASE = """\
class Text:
    def get_vocab_base_pre(self, tokenizer):
        raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")
"""
PROGRAM = """\
#!{python}
import json, sys
prompt, said = sys.argv[sys.argv.index("-p") + 1], json.load(open({texts!r}))
assert sys.argv[sys.argv.index("--temp") + 1] == "0"
print(said[prompt] + " [end of text]")
"""


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_script(FILE, "llama_cpp_example")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder like llama.cpp's, whose program says what `texts.json` has."""
    folder = tmp_path / "llama.cpp"
    (folder / "conversion").mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    (folder / "conversion" / "__init__.py").write_text("")
    (folder / "conversion" / "base.py").write_text(BASE)
    program = folder / "llama-completion"
    program.write_text(PROGRAM.format(python=sys.executable, texts=str(tmp_path / "texts.json")))
    program.chmod(0o755)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The embedded model with its embedding as its head, which llama.cpp could run with a copy of it."""
    folder = tmp_path / "dense"
    shutil.copytree(globe.embedded.path(), folder)
    change(folder, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_agreement_is_counted_and_told(
    example: ModuleType, clone: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["It was", "He"]
    texts = dict(zip(prompts, example.reference(model, prompts, 3), strict=True))
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    common = [str(model), "--llama-cpp", str(clone), "--tokens", "3", "--untie", "--prompts", *prompts]
    out = tmp_path / "a.gguf"
    assert example.main([*common, "--out", str(out), "--pre", "gpt-2"]) == 0
    assert out.read_text() == "gpt-2"
    assert "2 of 2 continuations" in capsys.readouterr().out
    (tmp_path / "texts.json").write_text(json.dumps(texts | {"He": "nonsense"}))
    assert example.main([*common, "--out", str(tmp_path / "b.gguf"), "--pre", "gpt-2"]) == 1
    said = capsys.readouterr().out
    assert "DIFFERENT: 'He'" in said
    assert "1 of 2 continuations" in said
    assert example.main([*common, "--out", str(tmp_path / "c.gguf")]) == 2
    assert "give --pre gpt-2" in capsys.readouterr().err


def test_an_untied_copy_is_the_same_model_with_a_head_of_its_own(
    example: ModuleType, model: Path, tmp_path: Path
) -> None:
    copy = load(example.untied(model, tmp_path / "copy"))
    assert not copy.config.tie_word_embeddings
    head, embedding = copy.lm_head.weight, copy.get_input_embeddings().weight
    assert head.data_ptr() != embedding.data_ptr()
    assert (head == load(model).lm_head.weight).all()


@pytest.mark.parametrize(
    ("changes", "extra", "message"),
    [
        ({"model_type": "globe_qwen2_moe"}, [], "patch the run with format=dense"),
        ({"norm_topk_prob": True}, [], "norm_topk_prob=true"),
        ({"tie_word_embeddings": True}, [], "give --untie"),
        ({"tie_word_embeddings": False}, ["--tokens", "0"], "--tokens=0"),
        ({"tie_word_embeddings": False}, ["--binary", "nowhere"], "none of nowhere exists"),
        ({"tie_word_embeddings": False}, ["--llama-cpp", "nowhere"], "convert_hf_to_gguf.py does not exist"),
        ({"tie_word_embeddings": False}, ["--out", str(FILE)], "exists: remove it"),
    ],
)
def test_what_would_come_out_wrong_is_refused(
    changes: dict[str, Any],
    extra: list[str],
    message: str,
    example: ModuleType,
    clone: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2_moe"}')
    change(folder, **changes)
    given = [str(folder), "--llama-cpp", str(clone), "--out", str(tmp_path / "a.gguf"), *extra]
    assert example.main(given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.gguf").exists()


def test_a_folder_without_a_configuration_is_refused(
    example: ModuleType, clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(tmp_path), "--llama-cpp", str(clone), "--out", str(tmp_path / "a.gguf")]
    assert example.main(given) == 2
    assert "give a checkpoint folder" in capsys.readouterr().err
